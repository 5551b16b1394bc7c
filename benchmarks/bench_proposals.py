"""generate_proposals against the reference and torchvision's ``filter_proposals`` on the outputs of the same head.

    pytest benchmarks/bench_proposals.py

The step's shapes: two 800x1344 images, 268,569 anchors on five levels. torchvision is given what its RPN has at this
point: per level [N, A, H, W] and [N, 4A, H, W], which it permutes, decodes and sorts; its scores of an image are
compared with ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import cell_anchors, generate_proposals
from fastrcnn_kernels.proposals import generate_proposals_reference


class Case(NamedTuple):
    """``per_batch``: maskrcnn-benchmark's training; torchvision only chooses an image."""

    images: int
    height: int
    width: int
    top_n: int
    dtype: torch.dtype
    channels_last: bool
    per_batch: bool

    def __str__(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        scope = "batch" if self.per_batch else "image"
        return f"{self.images}x{self.height}x{self.width}-{self.top_n}-{str(self.dtype)[6:]}-{layout}-{scope}"


CASES = (
    [Case(2, 64, 96, 50, torch.float32, False, False)]
    if SMALL
    else [
        Case(2, 800, 1344, 2000, torch.float32, False, False),
        Case(2, 800, 1344, 2000, torch.float32, True, False),
        Case(2, 800, 1344, 2000, torch.float32, False, True),
        Case(2, 800, 1344, 2000, torch.bfloat16, True, True),
        Case(1, 800, 1344, 1000, torch.float32, False, False),
        Case(1, 160, 224, 1000, torch.float32, False, False),
        Case(2, 1600, 2688, 2000, torch.float32, False, False),
    ]
)
STRIDES = [4, 8, 16, 32, 64]


def make_inputs(case: Case, device: torch.device) -> dict[str, Any]:
    """A head's outputs in which neighbours agree, as a trained one's do: objects of some cells on a low background."""
    random = torch.Generator().manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    objectness, deltas = [], []
    for stride in STRIDES:
        h, w = -(-case.height // stride), -(-case.width // stride)
        noise = torch.randn(case.images, 3, h, w, generator=random)
        blobs = torch.nn.functional.avg_pool2d(torch.randn(case.images, 1, h, w, generator=random), 5, 1, 2) * 10
        objectness.append((noise + blobs - 5).to(device, case.dtype).contiguous(memory_format=layout))
        delta = torch.randn(case.images, 12, h, w, generator=random) * 0.3
        deltas.append(delta.to(device, case.dtype).contiguous(memory_format=layout))
    return {
        "objectness": objectness,
        "deltas": deltas,
        "cells": [cell_anchors(stride, [8 * stride], [0.5, 1.0, 2.0], "torchvision").to(device) for stride in STRIDES],
        "strides": STRIDES,
        "image_sizes": torch.tensor([[case.height, case.width - 11]] * case.images, device=device),
    }


def torchvision_proposals(case: Case, inputs: dict[str, Any], device: torch.device) -> Any:
    """``RegionProposalNetwork``'s own steps from the head's outputs on; boxes and scores of each image."""
    rpn = torchvision("torchvision.models.detection.rpn")
    anchor_utils = torchvision("torchvision.models.detection.anchor_utils")
    image_list = torchvision("torchvision.models.detection.image_list")
    limit = {"training": case.top_n, "testing": case.top_n}
    generator = anchor_utils.AnchorGenerator(tuple((8 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * 5)
    network = rpn.RegionProposalNetwork(generator, torch.nn.Identity(), 0.7, 0.3, 256, 0.5, limit, limit, 0.7).eval()
    network.min_size = 0.0
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    images = image_list.ImageList(torch.empty(case.images, 3, 32 * 2, 32 * 2, device=device), sizes)
    images.tensors = torch.empty((case.images, 3, case.height, case.width), device=device)
    anchors = generator(images, inputs["objectness"])
    counts = [o[0].numel() for o in inputs["objectness"]]

    def call() -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = rpn.concat_box_prediction_layers(
            [o.float() for o in inputs["objectness"]], [d.float() for d in inputs["deltas"]]
        )
        boxes = network.box_coder.decode(offsets, anchors).view(case.images, -1, 4)
        return network.filter_proposals(boxes, logits, sizes, counts)

    return call


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_proposals(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    inputs = make_inputs(case, device)
    options: dict[str, Any] = {"pre_nms_top_n": case.top_n, "post_nms_top_n": case.top_n, "top_n": case.top_n}

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return generate_proposals(**inputs, **options, per_batch=case.per_batch)

    others: dict[str, Any] = {}
    if provider == "compiled":
        reference = torch.compile(generate_proposals_reference)
        arguments = (*inputs.values(), *options.values(), case.per_batch, 0.7, 0.0, [1.0] * 4, 0, 4.135166556742356)
        if not SMALL:
            pytest.skip("the reference walks every candidate in Python: a graph of thousands of steps")
        others["compiled"] = lambda: reference(*arguments)
    if provider == "torchvision":
        if case.per_batch:
            pytest.skip("torchvision chooses an image, not a batch")
        others["torchvision"] = torchvision_proposals(case, inputs, device)

    def equal(found: Any, expected: tuple[Tensor, Tensor, Tensor]) -> None:
        if provider != "torchvision":
            assert_close(1e-4, 1e-2)(found[:2], expected[:2])
            return
        # An exponential that rounds otherwise moves a box by less than a thousandth of a pixel, and now and then an IoU
        # across the threshold: the scores of the proposals, and their number, agree but for a few.
        for image, count in enumerate(expected[2].tolist()):
            assert abs(len(found[0][image]) - count) <= 0.01 * count
            ours_, theirs = expected[1][image, :count].sort().values, found[1][image].sort().values
            n = min(len(ours_), len(theirs))
            assert (ours_[-n:] - theirs[-n:]).abs().median() < 1e-3

    call = provider_call(provider, "generate_proposals", device, ours=ours, **others)
    anchors = sum(o.numel() for o in inputs["objectness"])
    size = torch.finfo(case.dtype).bits // 8
    measure(
        benchmark, call, truth=ours, equal=equal, group=f"proposals-{case}", provider=provider, device=device,
        # Logits once, the deltas of what is chosen, and the proposals.
        bytes=anchors * size + case.images * (4 * size * 5 * case.top_n + 20 * case.top_n),
        target=("torchvision", 5) if not case.per_batch else None, shape=str(case),
    )  # fmt: skip
