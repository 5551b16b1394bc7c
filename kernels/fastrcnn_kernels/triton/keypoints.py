"""Keypoints to heat-map cells, and heat maps to keypoints without the resized map.

``_targets_kernel``: a keypoint a lane; the row's own keypoints are looked through for ``visible_within``.
``_peaks_kernel``: a program finds the highest point of one map. It walks the pixels of the box in tiles and evaluates
the bicubic surface from the sixteen cells around each (which stay in the cache) instead of storing it. No product is
fused into a sum, so that it finds the pixel that the other implementations find.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_LARGEST_SIDE = 1 << 14


@triton.jit
def _divide(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _bin(point, low, high, size):
    place = tl.floor((point - low) * _divide(size.to(low.dtype), high - low))
    return tl.where(point == high, (size - 1).to(low.dtype), place)


@triton.jit(do_not_specialize=["count", "points", "size"])
def _targets_kernel(
    keypoints_ptr,
    boxes_ptr,
    within_ptr,
    index_ptr,
    valid_ptr,
    count,
    points,
    size,
    WITHIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of keypoints."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // points
    x = tl.load(keypoints_ptr + at * 3, mask=inside, other=0.0)
    y = tl.load(keypoints_ptr + at * 3 + 1, mask=inside, other=0.0)
    visibility = tl.load(keypoints_ptr + at * 3 + 2, mask=inside, other=0.0)
    x1 = tl.load(boxes_ptr + row * 4, mask=inside, other=0.0)
    y1 = tl.load(boxes_ptr + row * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(boxes_ptr + row * 4 + 2, mask=inside, other=1.0)
    y2 = tl.load(boxes_ptr + row * 4 + 3, mask=inside, other=1.0)
    column = _bin(x, x1, x2, size)
    line = _bin(y, y1, y2, size)
    valid = (column >= 0.0) & (column < size) & (line >= 0.0) & (line < size) & (visibility > 0.0)
    if WITHIN:
        left = tl.load(within_ptr + row * 4, mask=inside, other=0.0)
        top = tl.load(within_ptr + row * 4 + 1, mask=inside, other=0.0)
        right = tl.load(within_ptr + row * 4 + 2, mask=inside, other=0.0)
        bottom = tl.load(within_ptr + row * 4 + 3, mask=inside, other=0.0)
        seen = at < 0
        for point in range(points):
            other = keypoints_ptr + (row * points + point) * 3
            ox = tl.load(other, mask=inside, other=0.0)
            oy = tl.load(other + 1, mask=inside, other=0.0)
            ov = tl.load(other + 2, mask=inside, other=0.0)
            seen = seen | ((ox >= left) & (ox <= right) & (oy >= top) & (oy <= bottom) & (ov > 0.0))
        valid = valid & seen
    index = tl.where(valid, line, 0.0).to(tl.int64) * size + tl.where(valid, column, 0.0).to(tl.int64)
    tl.store(index_ptr + at, index, mask=inside)
    tl.store(valid_ptr + at, valid.to(tl.uint8), mask=inside)


@triton.jit
def _near(x):
    return (1.25 * x - 2.25) * x * x + 1.0


@triton.jit
def _far(x):
    return ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0


@triton.jit
def _taps(out, size, scale):
    """First of the four source pixels (before clamping) and their weights."""
    real = (out.to(scale.dtype) + 0.5) * scale - 0.5
    first = tl.floor(real)
    t = real - first
    return first.to(tl.int32) - 1, _far(t + 1.0), _near(t), _near(1.0 - t), _far((1.0 - t) + 1.0)


@triton.jit
def _cells(row, first, width, mask, w0, w1, w2, w3, COMPUTE: tl.constexpr):
    """One source row resized along x."""
    p0 = tl.load(row + tl.minimum(tl.maximum(first, 0), width - 1), mask=mask, other=0.0).to(COMPUTE)
    p1 = tl.load(row + tl.minimum(tl.maximum(first + 1, 0), width - 1), mask=mask, other=0.0).to(COMPUTE)
    p2 = tl.load(row + tl.minimum(tl.maximum(first + 2, 0), width - 1), mask=mask, other=0.0).to(COMPUTE)
    p3 = tl.load(row + tl.minimum(tl.maximum(first + 3, 0), width - 1), mask=mask, other=0.0).to(COMPUTE)
    return p0 * w0 + p1 * w1 + p2 * w2 + p3 * w3


@triton.jit(do_not_specialize=["points", "height", "width"])
def _peaks_kernel(
    maps_ptr,
    boxes_ptr,
    out_ptr,
    points,
    height,
    width,
    COMPUTE: tl.constexpr,
    LARGEST: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
):
    """The keypoint of one map. Grid: maps."""
    number = tl.program_id(0).to(tl.int64)
    box = boxes_ptr + number // points * 4
    heat = maps_ptr + number * height * width
    x1 = tl.load(box).to(COMPUTE)
    y1 = tl.load(box + 1).to(COMPUTE)
    box_width = tl.load(box + 2).to(COMPUTE) - x1
    box_height = tl.load(box + 3).to(COMPUTE) - y1
    # inf - inf and NaN are not below infinity either.
    finite = (tl.abs(box_width) < float("inf")) & (tl.abs(box_height) < float("inf"))
    finite = finite & (tl.abs(x1) < float("inf")) & (tl.abs(y1) < float("inf"))
    box_width = tl.where(finite, tl.maximum(box_width, 1.0), 1.0)
    box_height = tl.where(finite, tl.maximum(box_height, 1.0), 1.0)
    columns = tl.minimum(tl.ceil(box_width), LARGEST).to(tl.int32)
    rows = tl.minimum(tl.ceil(box_height), LARGEST).to(tl.int32)
    x_scale = _divide(width.to(COMPUTE), columns.to(COMPUTE))
    y_scale = _divide(height.to(COMPUTE), rows.to(COMPUTE))

    best = tl.full([BY, BX], float("-inf"), COMPUTE)
    place = tl.full([BY, BX], 2147483647, tl.int32)
    for top in range(0, tl.where(finite, rows, 0), BY):
        y = top + tl.arange(0, BY)[:, None]
        y_first, v0, v1, v2, v3 = _taps(y, height, y_scale)
        for left in range(0, columns, BX):
            x = left + tl.arange(0, BX)[None, :]
            mask = (y < rows) & (x < columns)
            first, w0, w1, w2, w3 = _taps(x, width, x_scale)
            row = heat + tl.minimum(tl.maximum(y_first, 0), height - 1) * width
            value = _cells(row, first, width, mask, w0, w1, w2, w3, COMPUTE) * v0
            row = heat + tl.minimum(tl.maximum(y_first + 1, 0), height - 1) * width
            value = value + _cells(row, first, width, mask, w0, w1, w2, w3, COMPUTE) * v1
            row = heat + tl.minimum(tl.maximum(y_first + 2, 0), height - 1) * width
            value = value + _cells(row, first, width, mask, w0, w1, w2, w3, COMPUTE) * v2
            row = heat + tl.minimum(tl.maximum(y_first + 3, 0), height - 1) * width
            value = value + _cells(row, first, width, mask, w0, w1, w2, w3, COMPUTE) * v3
            # NaN is the highest, and the first of equals stays.
            higher = (value > best) | ((value != value) & (best == best)) | (place == 2147483647)
            higher = higher & mask
            best = tl.where(higher, value, best)
            place = tl.where(higher, y * columns + x, place)

    unknown = best != best
    any_unknown = tl.sum(unknown.to(tl.int32)) > 0
    peak = tl.max(tl.where(unknown, float("-inf"), best))
    wanted = tl.where(any_unknown, unknown, best == peak)
    index = tl.min(tl.where(wanted, place, 2147483647))
    nothing = tl.where(finite, 0.0, float("nan")).to(COMPUTE)
    peak = tl.where(any_unknown, float("nan"), peak)
    out_x = ((index % columns).to(COMPUTE) + 0.5) * _divide(box_width, columns.to(COMPUTE)) + x1
    out_y = ((index // columns).to(COMPUTE) + 0.5) * _divide(box_height, rows.to(COMPUTE)) + y1
    tl.store(out_ptr + number * 3, out_x + nothing)
    tl.store(out_ptr + number * 3 + 1, out_y + nothing)
    tl.store(out_ptr + number * 3 + 2, peak + nothing)


_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _target_constants(within: bool) -> dict[str, Any]:
    return {"WITHIN": within, "BLOCK": 128}


def _peak_constants(dtype: torch.dtype) -> dict[str, Any]:
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return {"COMPUTE": compute, "LARGEST": _LARGEST_SIDE, "BY": 8, "BX": 64}


def keypoint_targets(
    keypoints: Tensor, boxes: Tensor, heatmap_size: int, visible_within: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::keypoint_targets``."""
    dtype = torch.float64 if keypoints.dtype == torch.float64 else torch.float32
    keypoints, boxes = keypoints.to(dtype).contiguous(), boxes.to(dtype).contiguous()
    within = boxes if visible_within is None else visible_within.to(dtype).contiguous()
    shape = keypoints.shape[:2]
    index = torch.empty(shape, dtype=torch.int64, device=keypoints.device)
    valid = torch.empty(shape, dtype=torch.bool, device=keypoints.device)
    if index.numel() == 0:
        return index, valid
    constants = _target_constants(visible_within is not None)
    with device_guard(keypoints):
        _targets_kernel[(triton.cdiv(index.numel(), constants["BLOCK"]),)](
            keypoints_ptr=keypoints,
            boxes_ptr=boxes,
            within_ptr=within,
            index_ptr=index,
            valid_ptr=valid.view(torch.uint8),
            count=index.numel(),
            points=shape[1],
            size=heatmap_size,
            **constants,
            **_OPTIONS,
        )
    return index, valid


def keypoints_from_heatmaps(maps: Tensor, boxes: Tensor) -> Tensor:
    """Launcher of ``fastrcnn_kernels::keypoints_from_heatmaps``."""
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    rows, points, height, width = maps.shape
    out = torch.empty((rows, points, 3), dtype=dtype, device=maps.device)
    if out.numel() == 0:
        return out
    with device_guard(maps):
        _peaks_kernel[(rows * points,)](
            maps_ptr=maps.contiguous(),
            boxes_ptr=boxes.to(dtype).contiguous(),
            out_ptr=out,
            points=points,
            height=height,
            width=width,
            **_peak_constants(maps.dtype),
            **_OPTIONS,
        )
    return out


def _target_case(within: bool) -> CompileCase:
    signature = {
        "keypoints_ptr": "*fp32",
        "boxes_ptr": "*fp32",
        "within_ptr": "*fp32",
        "index_ptr": "*i64",
        "valid_ptr": "*u8",
        "count": "i32",
        "points": "i32",
        "size": "i32",
    }
    label = f"targets{'-within' if within else ''}"
    return CompileCase(label, _targets_kernel, signature, _target_constants(within), _OPTIONS)


def _peak_case(dtype: torch.dtype) -> CompileCase:
    signature = {
        "maps_ptr": f"*{_TYPES[dtype]}",
        "boxes_ptr": "*fp64" if dtype == torch.float64 else "*fp32",
        "out_ptr": "*fp64" if dtype == torch.float64 else "*fp32",
        "points": "i32",
        "height": "i32",
        "width": "i32",
    }
    return CompileCase(f"peaks-{_TYPES[dtype]}", _peaks_kernel, signature, _peak_constants(dtype), _OPTIONS)


COMPILE_CASES = [
    _target_case(False),
    _target_case(True),
    *[_peak_case(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)],
]
