"""multiclass_nms against torchvision's ``postprocess_detections`` from probabilities and boxes on, and soft_nms.

    pytest benchmarks/bench_multiclass_nms.py

torchvision's steps after decoding and softmax: clip, flatten, threshold, small boxes, ``batched_nms``, top-k. Both
sides get the same boxes and probabilities. soft_nms has no torchvision peer: its rows are its own back-ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.cases import HEIGHT, WIDTH, random_boxes
from benchmarks.harness import PROVIDERS, SMALL, assert_close, assert_equal, measure, provider_call, torchvision
from fastrcnn_kernels import multiclass_nms, soft_nms


class Case(NamedTuple):
    """``sharpness`` scales the logits: the larger, the fewer classes of a proposal pass the threshold."""

    rows: int
    classes: int
    sharpness: float

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}-s{self.sharpness}"


CASES = (
    [Case(50, 5, 2.0)]
    if SMALL
    else [Case(1000, 81, 1.0), Case(1000, 81, 3.0), Case(300, 21, 2.0), Case(2000, 366, 2.0)]
)


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    boxes = random_boxes(case.rows, "clustered", 0, torch.device("cpu"))[0]
    boxes = boxes[:, None] + torch.randn(case.rows, case.classes, 4, generator=random) * 4
    logits = torch.randn(case.rows, case.classes, generator=random) * case.sharpness
    return boxes.to(device), logits.softmax(-1).to(device)


def torchvision_detections(boxes: Tensor, scores: Tensor) -> list[Tensor]:
    """The body of ``RoIHeads.postprocess_detections`` for one image."""
    ops = torchvision("torchvision.ops.boxes")
    labels = torch.arange(scores.shape[1], device=scores.device).view(1, -1).expand_as(scores)
    boxes = ops.clip_boxes_to_image(boxes, (HEIGHT, WIDTH))
    boxes, scores, labels = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)
    inds = torch.where(scores > 0.05)[0]
    boxes, scores, labels = boxes[inds], scores[inds], labels[inds]
    keep = ops.remove_small_boxes(boxes, min_size=1e-2)
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    keep = ops.batched_nms(boxes, scores, labels, 0.5)[:100]
    return [boxes[keep], scores[keep], labels[keep]]


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p != "compiled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_multiclass_nms(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    boxes, scores = make_inputs(case, device)
    size = torch.tensor([HEIGHT, WIDTH], device=device)

    def ours() -> Any:
        return multiclass_nms(boxes, scores, 0.05, 0.5, 100, image_size=size, min_size=1e-2, background=0)[:3]

    call = provider_call(
        provider, "multiclass_nms", device, ours=ours, torchvision=lambda: torchvision_detections(boxes, scores)
    )
    measure(
        benchmark, call, truth=ours, equal=assert_equal, group=f"multiclass_nms-{case}", provider=provider,
        device=device, bytes=4 * scores.numel() + 100 * 36, target=("torchvision", 5),
    )  # fmt: skip


@pytest.mark.parametrize("provider", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("rows", [60] if SMALL else [100, 1000, 4000])
def bench_soft_nms(benchmark: Any, device: torch.device, rows: int, method: str, provider: str) -> None:
    boxes, scores = random_boxes(rows, "clustered", 0, device)

    def ours() -> Any:
        return soft_nms(boxes, scores, method=method)

    measure(
        benchmark, provider_call(provider, "soft_nms", device, ours=ours), truth=ours, equal=assert_close(0, 0),
        group=f"soft_nms-{rows}-{method}", provider=provider, device=device, bytes=rows * 32, flops=rows * rows * 8,
    )  # fmt: skip
