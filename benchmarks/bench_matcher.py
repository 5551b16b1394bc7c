"""match_boxes and match_anchors against the reference, its compiled form, and torchvision's box_iou and Matcher.

pytest benchmarks/bench_matcher.py                          time everything
pytest benchmarks/bench_matcher.py --benchmark-disable      run each once: the correctness gate alone
FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_matcher.py   small inputs

Ground truths are COCO's where their statistics are found, else made up. torchvision writes the matrix of all IoUs and
several of that size on the way; where the memory does not hold them, that case is skipped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import random_boxes
from benchmarks.harness import PROVIDERS, SMALL, Call, assert_equal, measure, provider_call, torchvision
from benchmarks.mask_cases import coco_instances
from fastrcnn_kernels import cell_anchors, grid_anchors, match_anchors, match_boxes
from fastrcnn_kernels.matcher_reference import CPU_CHUNK_ELEMENTS, match_anchors_reference, match_boxes_reference

STRIDES = [4, 8, 16, 32, 64]
HEIGHT, WIDTH = (160, 224) if SMALL else (800, 1344)
GRID_SIZES = [(-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in STRIDES]
NUM_ANCHORS = sum(3 * height * width for height, width in GRID_SIZES)  # 268,569
RULE = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality_matches": True}


@dataclass(frozen=True)
class Case:
    """One call: the anchors of an 800 x 1344 pyramid and ``gts`` boxes in each of ``images``.

    Attributes:
        window: whether anchors that stick out of the image are left out, as maskrcnn-benchmark does and torchvision
            does not; ``match_anchors`` alone.
    """

    images: int
    gts: int
    window: bool = False

    def __str__(self) -> str:
        return f"{self.images}x{NUM_ANCHORS}-{self.gts}" + ("-window" if self.window else "")


BOXES = [Case(1, 5)] if SMALL else [Case(1, 20), Case(1, 7), Case(1, 100), Case(1, 1000)]
ANCHORS = (
    [Case(2, 5), Case(2, 5, True)] if SMALL else [Case(2, 20), Case(2, 20, True), Case(2, 7), Case(2, 100)]
    + [Case(2, 1000)]
)  # fmt: skip


def cells(device: torch.device) -> list[Tensor]:
    return [cell_anchors(s, [8 * s], [0.5, 1.0, 2.0], style="torchvision").to(device) for s in STRIDES]


def ground_truths(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes [images, gts, 4] and their number in each image."""
    count = case.images * case.gts
    try:
        boxes = coco_instances(count, 3)[0]
    except pytest.skip.Exception:
        boxes = random_boxes(count, "uniform", 3, torch.device("cpu"))[0]
    boxes = boxes * (HEIGHT / 800)
    return boxes.view(case.images, case.gts, 4).to(device), torch.full((case.images,), case.gts, device=device)


def skip_unless_compilable(case: Case) -> None:
    steps = NUM_ANCHORS * case.images * case.gts / CPU_CHUNK_ELEMENTS
    if steps > 100:
        pytest.skip("the reference walks the anchors in chunks: a graph of thousands of steps")


def skip_unless_it_fits(case: Case, device: torch.device) -> None:
    """box_iou holds about ten float32 matrices of ground truths and anchors at its peak."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 10 * 4 * case.gts * NUM_ANCHORS > free:
        pytest.skip("the matrices of torchvision's box_iou do not fit into the free memory")


def torchvision_match(gts: Tensor, anchors: Tensor) -> Tensor:
    matcher = torchvision("torchvision.models.detection._utils").Matcher(0.7, 0.3, True)
    return torch.stack([matcher(torchvision("torchvision.ops").box_iou(boxes, anchors)) for boxes in gts])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", BOXES, ids=str)
def bench_match_boxes(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    gts, count = ground_truths(case, device)
    anchors = torch.cat(list(grid_anchors(cells(device), GRID_SIZES, STRIDES)))

    def ours() -> Tensor:
        return match_boxes(gts, count, anchors, **RULE)

    others: dict[str, Call] = {}
    if provider == "compiled":
        skip_unless_compilable(case)
        reference = torch.compile(match_boxes_reference)
        others["compiled"] = lambda: reference(gts, count, anchors, *RULE.values(), 0)
    if provider == "torchvision":
        skip_unless_it_fits(case, device)
        others["torchvision"] = lambda: torchvision_match(gts, anchors)
    measure(
        benchmark,
        provider_call(provider, "match_boxes", device, ours=ours, **others),
        truth=ours,
        equal=assert_equal,
        group=f"match-boxes-{case}",
        provider=provider,
        device=device,
        # Anchors and ground truths in, a number an anchor and image out.
        bytes=16 * NUM_ANCHORS + case.images * (16 * case.gts + 8 * NUM_ANCHORS),
        target=("torchvision", 15) if case.gts == 20 else None,
        shape=str(case),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", ANCHORS, ids=str)
def bench_match_anchors(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    """The anchors are not there before: the peer writes them first, as its RPN does in each step."""
    gts, count = ground_truths(case, device)
    level_cells = cells(device)
    straddle = 0.0 if case.window else -1.0
    image_sizes = torch.tensor([[HEIGHT, WIDTH - 11]] * case.images, device=device)

    def ours() -> Tensor:
        return match_anchors(
            gts, count, level_cells, GRID_SIZES, STRIDES, image_sizes, straddle_thresh=straddle, **RULE
        )

    others: dict[str, Call] = {}
    if provider == "compiled":
        skip_unless_compilable(case)
        reference = torch.compile(match_anchors_reference)
        flat = [side for size in GRID_SIZES for side in size]
        others["compiled"] = lambda: reference(
            gts, count, level_cells, flat, STRIDES, image_sizes, *RULE.values(), straddle, 0
        )
    if provider == "torchvision":
        skip_unless_it_fits(case, device)
        generator = torchvision("torchvision.models.detection.anchor_utils").AnchorGenerator()
        generator.cell_anchors = level_cells
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in STRIDES]

        def peer() -> Tensor:
            anchors = torch.cat(generator.grid_anchors(GRID_SIZES, steps))
            matched = torchvision_match(gts, anchors)
            if case.window:
                x1, y1, x2, y2 = anchors.unbind(1)
                inside = (x1 >= 0) & (y1 >= 0) & (x2 < WIDTH - 11) & (y2 < HEIGHT)
                matched[:, ~inside] = -2
            return matched

        others["torchvision"] = peer
    measure(
        benchmark,
        provider_call(provider, "match_anchors", device, ours=ours, **others),
        truth=ours,
        equal=assert_equal,
        group=f"match-anchors-{case}",
        provider=provider,
        device=device,
        # Nothing of the anchors is read.
        bytes=case.images * (16 * case.gts + 8 * NUM_ANCHORS),
        target=("torchvision", 15) if case.gts == 20 and not case.window else None,
        shape=str(case),
    )
