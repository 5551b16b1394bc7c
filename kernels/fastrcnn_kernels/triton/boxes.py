"""IoU, GIoU, DIoU and CIoU of every pair of two lists of boxes, a tile of pairs for each program.

Bound by the output that is written. The arithmetic is pinned in ``fastrcnn_kernels/boxes_reference.py``: products are
not fused into sums (``enable_fp_fusion=False``) and divisions are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.box_coder import divide, load_corners

IOU, GENERALIZED, DISTANCE, COMPLETE = range(4)

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _positive_area(x1, y1, x2, y2, BOX_OFFSET: tl.constexpr, SMALLEST: tl.constexpr):
    area = (x2 - x1 + BOX_OFFSET) * (y2 - y1 + BOX_OFFSET)
    return tl.where(area < SMALLEST, SMALLEST, area)  # NaN stays


@triton.jit
def _at_least_zero(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit(do_not_specialize=["n", "m", "first_stride", "second_stride"])
def _pairs_kernel(
    boxes1_ptr, boxes2_ptr, angles1_ptr, angles2_ptr, out_ptr, n, m, first_stride, second_stride, eps,
    KIND: tl.constexpr, BOX_OFFSET: tl.constexpr, SMALLEST: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS pairs of one batch. Grid: batches x tiles, flat; strides in boxes, 0 for a list of all batches."""
    across = tl.cdiv(m, COLUMNS)
    tiles = tl.cdiv(n, ROWS) * across
    batch = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    first = batch * first_stride + row
    second = batch * second_stride + column
    x1, y1, x2, y2 = load_corners(boxes1_ptr, first, row < n, COMPUTE, ROWS)
    cx1, cy1, cx2, cy2 = load_corners(boxes2_ptr, second, column < m, COMPUTE, COLUMNS)
    area = _positive_area(x1, y1, x2, y2, BOX_OFFSET, SMALLEST)
    column_area = _positive_area(cx1, cy1, cx2, cy2, BOX_OFFSET, SMALLEST)
    width = tl.minimum(x2[:, None], cx2[None, :]) - tl.maximum(x1[:, None], cx1[None, :]) + BOX_OFFSET
    height = tl.minimum(y2[:, None], cy2[None, :]) - tl.maximum(y1[:, None], cy1[None, :]) + BOX_OFFSET
    inter = _at_least_zero(width) * _at_least_zero(height)
    union = area[:, None] + column_area[None, :] - inter
    iou = divide(inter, union, COMPUTE)
    result = iou
    if KIND != 0:
        width = tl.maximum(x2[:, None], cx2[None, :]) - tl.minimum(x1[:, None], cx1[None, :]) + BOX_OFFSET
        height = tl.maximum(y2[:, None], cy2[None, :]) - tl.minimum(y1[:, None], cy1[None, :]) + BOX_OFFSET
        width = _at_least_zero(width)
        height = _at_least_zero(height)
        if KIND == 1:
            hull = width * height
            hull = tl.where(hull < 2 * SMALLEST, 2 * SMALLEST, hull)
            result = iou - divide(hull - union, hull, COMPUTE)
        else:
            if COMPUTE == tl.float64:
                small = tl.load(eps)
            else:
                small = eps
            dx = ((x1 + x2) * 0.5)[:, None] - ((cx1 + cx2) * 0.5)[None, :]
            dy = ((y1 + y2) * 0.5)[:, None] - ((cy1 + cy2) * 0.5)[None, :]
            result = iou - divide(dx * dx + dy * dy, width * width + height * height + small, COMPUTE)
            if KIND == 3:
                angle = tl.load(angles1_ptr + first, mask=row < n, other=0.0)
                column_angle = tl.load(angles2_ptr + second, mask=column < m, other=0.0)
                turn = angle[:, None] - column_angle[None, :]
                v = 0.40528473456935108578 * (turn * turn)
                result = result - divide(v, 1.0 - iou + v + small, COMPUTE) * v
    offset = (batch.to(tl.int64) * n + row)[:, None] * m + column[None, :]
    tl.store(out_ptr + offset, result, mask=(row < n)[:, None] & (column < m)[None, :])


def _constants(dtype: torch.dtype, kind: int, box_offset: int, columns: int) -> dict[str, Any]:
    rows, width = (64, 32) if columns <= 32 else (16, 128)
    return {
        "KIND": kind,
        "BOX_OFFSET": box_offset,
        "SMALLEST": torch.finfo(dtype).tiny,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        # Half as many pairs for the registers: in float64, and where a pair has more to remember.
        "ROWS": rows // 2 if dtype == torch.float64 or kind >= DISTANCE else rows,
        "COLUMNS": width,
    }


def pairs(
    kind: int, boxes1: Tensor, boxes2: Tensor, angles1: Tensor, angles2: Tensor, out: Tensor, strides: tuple[int, int],
    box_offset: int, eps: float,
) -> None:  # fmt: skip
    """Fill ``out`` [B, N, M] from contiguous boxes [.., N, 4] and [.., M, 4]; strides 0 or N and 0 or M."""
    batches, n, m = out.shape
    constants = _constants(out.dtype, kind, box_offset, m)
    grid = batches * triton.cdiv(n, constants["ROWS"]) * triton.cdiv(m, constants["COLUMNS"])
    if max(batches * n, batches * m, grid) >= 2**31 - 128:
        raise ValueError(f"the Triton kernels of box_iou take fewer than 2**31 boxes and tiles, got {list(out.shape)}")
    # Triton passes a float argument as float32: a double goes through memory.
    small = out.new_full((1,), eps) if out.dtype == torch.float64 else eps
    with device_guard(out):
        _pairs_kernel[(grid,)](boxes1, boxes2, angles1, angles2, out, n, m, *strides, small, **constants, **_OPTIONS)


def _case(label: str, dtype: torch.dtype, kind: int, columns: int) -> CompileCase:
    name = "fp64" if dtype == torch.float64 else "fp32"
    pointers = ["boxes1_ptr", "boxes2_ptr", "angles1_ptr", "angles2_ptr", "out_ptr"]
    counts = ["n", "m", "first_stride", "second_stride"]
    signature = {**dict.fromkeys(pointers, f"*{name}"), **dict.fromkeys(counts, "i32")}
    signature["eps"] = "*fp64" if dtype == torch.float64 else "fp32"
    return CompileCase(label, _pairs_kernel, signature, _constants(dtype, kind, 1, columns), _OPTIONS)


COMPILE_CASES = [
    _case("iou-fp32-narrow", torch.float32, IOU, 20),
    _case("iou-fp32", torch.float32, IOU, 2000),
    _case("generalized-fp32", torch.float32, GENERALIZED, 2000),
    _case("complete-fp32", torch.float32, COMPLETE, 2000),
    _case("complete-fp64", torch.float64, COMPLETE, 2000),
]
