"""Soft-NMS of one list in one program: as many passes over the list as there are boxes selected.

A pass lowers the scores for the box selected last and finds the best that is left; scores lie in memory and stay in
cache. Selections depend on each other, so nothing here is parallel but the pass itself. The arithmetic is pinned in
``fastrcnn_kernels/soft_nms.py``: no fused products (``enable_fp_fusion=False``), rounded divisions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.box_coder import divide, exponential

_BLOCK = 1024
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["size"])
def _kernel(
    boxes_ptr, scores_ptr, parameters_ptr, keep_ptr, rescored_ptr, count_ptr, size,
    GAUSSIAN: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``scores_ptr`` is changed: -inf where a box is selected or out. Parameters: threshold, sigma, min_score."""
    threshold = tl.load(parameters_ptr)
    sigma = tl.load(parameters_ptr + 1)
    min_score = tl.load(parameters_ptr + 2)
    lanes = tl.arange(0, BLOCK)
    gone = float("-inf")
    total = size * 0
    # The first pass selects; it has no box to lower scores for.
    selected = size * 0 - 1
    best = threshold * 0.0
    while best > gone:
        at = tl.maximum(selected, 0) * 4
        x1, y1 = tl.load(boxes_ptr + at), tl.load(boxes_ptr + at + 1)
        x2, y2 = tl.load(boxes_ptr + at + 2), tl.load(boxes_ptr + at + 3)
        area = (x2 - x1 + BOX_OFFSET) * (y2 - y1 + BOX_OFFSET)
        best = threshold * 0.0 + gone
        following = size * 0 - 1
        for start in range(0, size, BLOCK):
            index = start + lanes
            inside = index < size
            base = boxes_ptr + index * 4
            bx1 = tl.load(base, mask=inside, other=0.0)
            by1 = tl.load(base + 1, mask=inside, other=0.0)
            bx2 = tl.load(base + 2, mask=inside, other=0.0)
            by2 = tl.load(base + 3, mask=inside, other=0.0)
            score = tl.load(scores_ptr + index, mask=inside, other=float("-inf"))
            width = tl.maximum(tl.minimum(x2, bx2) - tl.maximum(x1, bx1) + BOX_OFFSET, 0.0)
            height = tl.maximum(tl.minimum(y2, by2) - tl.maximum(y1, by1) + BOX_OFFSET, 0.0)
            inter = width * height
            iou = divide(inter, area + (bx2 - bx1 + BOX_OFFSET) * (by2 - by1 + BOX_OFFSET) - inter, COMPUTE)
            if GAUSSIAN:
                decay = exponential(divide(-(iou * iou), sigma + iou * 0.0, COMPUTE), COMPUTE)
                weight = tl.where(iou > 0.0, decay, 1.0)
            else:
                weight = tl.where(iou > threshold, 1.0 - iou, 1.0)
            score = tl.where(index == selected, gone, score) * tl.where(selected < 0, 1.0, weight)
            score = tl.where(score >= min_score, score, gone)
            tl.store(scores_ptr + index, score, mask=inside)
            top = tl.max(score, axis=0)
            first = tl.min(tl.where(score == top, index, 2147483647), axis=0)
            following = tl.where(top > best, first, following)
            best = tl.maximum(best, top)
        if best > gone:
            tl.store(keep_ptr + total, following.to(tl.int64))
            tl.store(rescored_ptr + total, best)
            total += 1
        selected = following
    tl.store(count_ptr, total.to(tl.int64))


def _constants(gaussian: bool, box_offset: int, dtype: torch.dtype) -> dict[str, Any]:
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return {"GAUSSIAN": gaussian, "BOX_OFFSET": box_offset, "COMPUTE": compute, "BLOCK": _BLOCK}


def soft_nms(
    boxes: Tensor, scores: Tensor, threshold: float, sigma: float, min_score: float, gaussian: bool, box_offset: int
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::soft_nms``, all of one type. Waits for the GPU once, for the count."""
    size = scores.shape[0]
    keep = torch.empty((size,), dtype=torch.int64, device=scores.device)
    rescored = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if size == 0:
        return keep, rescored
    count = torch.empty((1,), dtype=torch.int64, device=scores.device)
    parameters = torch.tensor([threshold, sigma, min_score], dtype=scores.dtype, device=scores.device)
    with device_guard(scores):
        _kernel[(1,)](
            boxes.contiguous(), scores.clone(memory_format=torch.contiguous_format), parameters, keep, rescored, count,
            size, **_constants(gaussian, box_offset, scores.dtype), **_OPTIONS,
        )  # fmt: skip
    number = int(count)
    return keep[:number].clone(), rescored[:number].clone()


def _case(gaussian: bool, box_offset: int, dtype: torch.dtype) -> CompileCase:
    real = "*fp64" if dtype == torch.float64 else "*fp32"
    signature = {
        "boxes_ptr": real, "scores_ptr": real, "parameters_ptr": real, "keep_ptr": "*i64", "rescored_ptr": real,
        "count_ptr": "*i64", "size": "i32",
    }  # fmt: skip
    label = f"{'gaussian' if gaussian else 'linear'}-{real[1:]}-o{box_offset}"
    return CompileCase(label, _kernel, signature, _constants(gaussian, box_offset, dtype), _OPTIONS)


COMPILE_CASES = [
    *[_case(gaussian, 0, dtype) for gaussian in (False, True) for dtype in (torch.float32, torch.float64)],
    _case(False, 1, torch.float32),
]
