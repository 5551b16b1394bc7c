"""Pasting masks, and their run lengths, against torchvision's pasting and pycocotools' encoding.

pytest benchmarks/bench_paste.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from benchmarks.harness import SMALL, assert_equal, measure, provider_call, torchvision
from benchmarks.mask_cases import HEIGHT, WIDTH, coco_instances, smooth_masks
from fastrcnn_kernels import paste_masks, paste_masks_rle

# masks, convention
CASES = [(5, "maskrcnn_benchmark")] if SMALL else [
    (1, "maskrcnn_benchmark"), (100, "maskrcnn_benchmark"), (100, "detectron2"), (300, "maskrcnn_benchmark")
]  # fmt: skip
SIZE = (HEIGHT, WIDTH)


def _inputs(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    boxes = coco_instances(count, 2)[0]
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, WIDTH)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, HEIGHT)
    return smooth_masks(count, 28, 2, device), boxes.to(device)


def _theirs(masks: Tensor, boxes: Tensor) -> Tensor:
    """uint8 [K, H, W]"""
    paste = torchvision("torchvision.models.detection.roi_heads").paste_masks_in_image
    return (paste(masks[:, None], boxes, SIZE) > 0.5)[:, 0].byte()


def _equal(provider: str, device: torch.device) -> Callable[[Any, Any], None]:
    if provider != "torchvision" or device.type == "cpu":
        return assert_equal

    # The CUDA kernel of interpolate rounds otherwise: pixels at the threshold may fall to either side.
    def nearly(actual: Tensor, expected: Tensor) -> None:
        assert (actual != expected).float().mean() <= 1e-5

    return nearly


@pytest.mark.parametrize("provider", ["reference", "cpp", "triton", "torchvision"])
@pytest.mark.parametrize(("count", "convention"), CASES)
def bench_paste_masks(benchmark: Any, device: torch.device, count: int, convention: str, provider: str) -> None:
    if provider == "torchvision" and convention == "detectron2":
        pytest.skip("torchvision has the other rule")
    masks, boxes = _inputs(count, device)

    def ours() -> Tensor:
        return paste_masks(masks, boxes, SIZE, convention=convention)

    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).sum().item()
    measure(
        benchmark,
        provider_call(provider, "paste_masks", device, ours=ours, torchvision=lambda: _theirs(masks, boxes)),
        truth=ours,
        equal=_equal(provider, device),
        group=f"paste_masks-K{count}-{convention}",
        provider=provider,
        device=device,
        # On a CPU fresh pages are zero already; on a GPU all of the result is written.
        bytes=masks.nbytes + (int(area) if device.type == "cpu" else count * HEIGHT * WIDTH),
        target=("torchvision", 5),
    )


@pytest.mark.parametrize("provider", ["reference", "cpp", "triton", "torchvision"])
@pytest.mark.parametrize(("count", "convention"), CASES)
def bench_paste_masks_rle(benchmark: Any, device: torch.device, count: int, convention: str, provider: str) -> None:
    if provider == "torchvision" and (convention == "detectron2" or device.type != "cpu"):
        pytest.skip("torchvision has the other rule, and other roundings on a GPU")
    masks, boxes = _inputs(count, device)

    def ours() -> list[dict[str, Any]]:
        return paste_masks_rle(masks, boxes, SIZE, convention=convention)

    def peer() -> list[dict[str, Any]]:
        return [coco_mask.encode(np.asfortranarray(mask)) for mask in _theirs(masks, boxes).numpy()]

    measure(
        benchmark,
        provider_call(provider, "paste_masks_rle", device, ours=ours, torchvision=peer),
        truth=ours,
        equal=assert_equal,
        group=f"paste_masks_rle-K{count}-{convention}",
        provider=provider,
        device=device,
        bytes=masks.nbytes + boxes.nbytes,
        target=("torchvision", 5),
    )
