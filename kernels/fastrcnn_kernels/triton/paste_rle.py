"""Pasted masks as the places where their columns change, without the images; the host makes strings of them.

A program walks down a block of columns of one mask's box, a lane a column, and writes the rows at which its column
changes: few, so that ``capacity`` of them are kept for each column, and how many there were. A mask of noise may have
more; the launcher then launches again with room for all. Pixels are those of ``triton/paste.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.paste import axis_cells, axis_region, blended, geometry_constants

_COLUMNS = 64
_CAPACITY = 8  # changes of a column; even
_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["height", "width", "blocks", "capacity"])
def _changes_kernel(
    masks_ptr,
    boxes_ptr,
    rows_ptr,
    counts_ptr,
    height,
    width,
    blocks,
    capacity,
    scale,
    threshold,
    SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    CONTINUOUS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of columns. Grid: masks x blocks, flat. ``rows_ptr`` int32 [K, capacity, W], ``counts_ptr`` [K, W]."""
    pid = tl.program_id(0).to(tl.int64)
    k = pid // blocks
    columns = pid % blocks * COLUMNS + tl.arange(0, COLUMNS)
    x_low = tl.load(boxes_ptr + k * 4)
    y_low = tl.load(boxes_ptr + k * 4 + 1)
    x_high = tl.load(boxes_ptr + k * 4 + 2)
    y_high = tl.load(boxes_ptr + k * 4 + 3)
    x_first, w, left, right = axis_region(x_low, x_high, width.to(tl.int64), scale, CONTINUOUS)
    y_first, h, top, bottom = axis_region(y_low, y_high, height.to(tl.int64), scale, CONTINUOUS)
    drawn = (columns >= left) & (columns < right)
    x0, x1, b0, b1 = axis_cells(columns, x_first, w, x_low, x_high, SIZE, PADDING, CONTINUOUS)
    mask = masks_ptr + k * SIZE * SIZE
    out = rows_ptr + k * capacity * width + columns
    separable = h + w > 128
    on = tl.zeros([COLUMNS], dtype=tl.int32)
    count = tl.zeros([COLUMNS], dtype=tl.int32)
    row = top
    last = tl.where(tl.max(drawn.to(tl.int32), 0) != 0, bottom, top)
    while row < last:
        y0, y1, a0, a1 = axis_cells(row, y_first, h, y_low, y_high, SIZE, PADDING, CONTINUOUS)
        value = blended(mask, y0, y1, a0, a1, x0, x1, b0, b1, drawn, separable, SIZE, PADDING, CONTINUOUS)
        if CONTINUOUS:
            now = (drawn & (value >= threshold)).to(tl.int32)
        else:
            now = (drawn & (value > threshold)).to(tl.int32)
        changes = now != on
        tl.store(out + count.to(tl.int64) * width, row.to(tl.int32), mask=changes & (count < capacity))
        count += changes.to(tl.int32)
        on = now
        row += 1
    tl.store(out + count.to(tl.int64) * width, bottom.to(tl.int32), mask=(on != 0) & (count < capacity))
    tl.store(counts_ptr + k * width + columns, count + on, mask=columns < width)


def _changes(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float,
    padding: int,
    continuous: bool,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    count, size = masks.shape[:2]
    rows = torch.empty((count, capacity, width), dtype=torch.int32, device=masks.device)
    counts = torch.empty((count, width), dtype=torch.int32, device=masks.device)
    blocks = triton.cdiv(width, _COLUMNS)
    with device_guard(masks):
        _changes_kernel[(count * blocks,)](
            masks_ptr=masks,
            boxes_ptr=boxes,
            rows_ptr=rows,
            counts_ptr=counts,
            height=height,
            width=width,
            blocks=blocks,
            capacity=capacity,
            scale=(size + 2 * padding) / size,
            threshold=threshold,
            COLUMNS=_COLUMNS,
            **geometry_constants(size, padding, continuous),
            **_OPTIONS,
        )
    return rows, counts


def mask_changes(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, continuous: bool
) -> tuple[Tensor, Tensor]:
    """Where each pasted mask changes, down its columns: places int64 [n], mask after mask, and ends int64 [K].

    Waits for the GPU: their number depends on the data.
    """
    count = masks.shape[0]
    if 0 in (count, height, width):
        nothing = torch.zeros(count, dtype=torch.int64, device=masks.device)
        return nothing[:0], nothing
    masks, boxes = masks.contiguous(), boxes.float().contiguous()
    if masks.dtype == torch.float64:
        masks = masks.float()
    capacity = _CAPACITY
    rows, counts = _changes(masks, boxes, height, width, threshold, padding, continuous, capacity)
    most = int(counts.max())
    if most > capacity:
        capacity = most
        rows, counts = _changes(masks, boxes, height, width, threshold, padding, continuous, capacity)
    column = torch.arange(width, device=masks.device)
    places = (rows + (column * height)[None, None, :]).transpose(1, 2)  # [K, W, capacity]
    written = torch.arange(capacity, device=masks.device) < counts[..., None]
    ends = counts.sum(dim=1, dtype=torch.int64).cumsum(0)
    return places[written], ends


def _case(continuous: bool) -> CompileCase:
    signature = {
        "masks_ptr": "*fp32",
        "boxes_ptr": "*fp32",
        "rows_ptr": "*i32",
        "counts_ptr": "*i32",
        **dict.fromkeys(("height", "width", "blocks", "capacity"), "i32"),
        "scale": "fp32",
        "threshold": "fp32",
    }
    constants: dict[str, Any] = geometry_constants(28, 1, continuous) | {"COLUMNS": _COLUMNS}
    label = f"rle-28{'-detectron2' if continuous else ''}"
    return CompileCase(label, _changes_kernel, signature, constants, dict(_OPTIONS))


COMPILE_CASES = [_case(False), _case(True)]
