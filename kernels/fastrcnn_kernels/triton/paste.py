"""Masks pasted into images in one launch: every pixel of the result is written once, zeros outside the boxes.

A program makes a tile of one mask's image. The place of a row and of a column in the mask is found once for each, then
four cells are gathered for each pixel (a mask of 28 x 28 stays in the first-level cache) and blended in the order
that ``fastrcnn_kernels/paste.py`` pins: fused multiply-adds where they are written (``tl.fma``), none elsewhere
(``enable_fp_fusion=False``). The work is the writing of K x height x width bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_ROWS, _COLUMNS = 16, 256
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _truncated(value):
    """Toward zero, saturated at 2^30, NaN as 0. int64"""
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, -1073741824.0), 1073741824.0)
    return tl.where(value < 0.0, tl.ceil(value), tl.floor(value)).to(tl.int64)


@triton.jit
def axis_region(low, high, extent, scale, CONTINUOUS: tl.constexpr):
    """One axis of a box in an image of ``extent`` pixels: its first pixel and its length as a whole-pixel box (of no
    meaning for CONTINUOUS), the pixels that are drawn, from ``start`` up to ``stop``. int64. Empty where not finite."""
    finite = (low - low == 0.0) & (high - high == 0.0)
    if CONTINUOUS:
        limit = extent.to(tl.float32)
        start = tl.minimum(tl.maximum(tl.floor(low) - 1.0, 0.0), limit)
        stop = tl.minimum(tl.maximum(tl.ceil(high) + 1.0, 0.0), limit)
        first = _truncated(start)
        drawn = finite & (high > low)
        return first, first, tl.where(drawn, first, 0), tl.where(drawn, _truncated(stop), 0)
    else:
        half = (high - low) * 0.5 * scale
        centre = (high + low) * 0.5
        first = _truncated(centre - half)
        last = _truncated(centre + half)
        start = tl.maximum(first, 0)
        stop = tl.minimum(last + 1, extent)
        return first, last - first + 1, start, tl.where(finite, stop, start)


@triton.jit
def axis_cells(
    pixel, first_pixel, length, low, high, SIZE: tl.constexpr, PADDING: tl.constexpr, CONTINUOUS: tl.constexpr
):
    """For pixels of one axis: the cells before and behind, counted in the mask with its margin, and their weights."""
    if CONTINUOUS:
        centre = pixel.to(tl.float32) + 0.5
        at = tl.div_rn(centre - low, high - low + centre * 0.0) * 2.0 - 1.0
        source = tl.fma(at + 1.0, at * 0.0 + SIZE / 2, at * 0.0 - 0.5)
        cell = tl.floor(source)
        inside = (cell >= -1.0) & (cell <= SIZE - 1.0)
        far = tl.where(inside, source - cell, 0.0)
        cell = tl.where(inside, cell + 1.0, 0.0).to(tl.int32)
        return cell, cell + inside.to(tl.int32), 1.0 - far, far
    else:
        CELLS: tl.constexpr = SIZE + 2 * PADDING
        offset = pixel - first_pixel
        centre = offset.to(tl.float32) + 0.5
        scale = tl.div_rn(tl.full([], CELLS, tl.float32), length.to(tl.float32))
        source = tl.maximum(tl.fma(centre * 0.0 + scale, centre, centre * 0.0 - 0.5), 0.0)
        cell = tl.minimum(source.to(tl.int32), CELLS - 1)
        far = tl.minimum(tl.maximum(source - cell.to(tl.float32), 0.0), 1.0)
        same = length == CELLS
        cell = tl.where(same, offset.to(tl.int32), cell)
        far = tl.where(same, 0.0, far)
        behind = tl.where(same, cell, tl.minimum(cell + 1, CELLS - 1))
        return cell, behind, 1.0 - far, far


@triton.jit
def _cell(mask_ptr, row, column, drawn, SIZE: tl.constexpr, MARGIN: tl.constexpr):
    row = row - MARGIN
    column = column - MARGIN
    inside = drawn & (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
    return tl.load(mask_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def blended(
    mask_ptr, y0, y1, a0, a1, x0, x1, b0, b1, drawn, separable, SIZE: tl.constexpr, MARGIN: tl.constexpr,
    CONTINUOUS: tl.constexpr
):  # fmt: skip
    """Bilinear values: cells and weights in y and in x of shapes that broadcast to that of ``drawn``."""
    p00 = _cell(mask_ptr, y0, x0, drawn, SIZE, MARGIN)
    p01 = _cell(mask_ptr, y0, x1, drawn, SIZE, MARGIN)
    p10 = _cell(mask_ptr, y1, x0, drawn, SIZE, MARGIN)
    p11 = _cell(mask_ptr, y1, x1, drawn, SIZE, MARGIN)
    zero = tl.zeros_like(p00)
    a0 = a0 + zero
    a1 = a1 + zero
    b0 = b0 + zero
    b1 = b1 + zero
    if CONTINUOUS:
        upper = tl.fma(p01, a0 * b1, p00 * (a0 * b0))
        value = tl.fma(p11, a1 * b1, tl.fma(p10, a1 * b0, upper))
    else:
        if separable:
            value = tl.fma(tl.fma(p00, b0, p01 * b1), a0, tl.fma(p10, b0, p11 * b1) * a1)
        else:
            upper = tl.fma(p00, a0 * b0, p01 * (a0 * b1))
            value = tl.fma(p11, a1 * b1, tl.fma(p10, a1 * b0, upper))
    return value


@triton.jit(do_not_specialize=["height", "width", "row_tiles", "column_tiles"])
def _paste_kernel(
    masks_ptr,
    boxes_ptr,
    canvas_ptr,
    height,
    width,
    row_tiles,
    column_tiles,
    scale,
    threshold,
    SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    CONTINUOUS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile. Grid: masks x row tiles x column tiles, flat. PADDING: the margin, 1 for CONTINUOUS."""
    pid = tl.program_id(0).to(tl.int64)
    k = pid // (row_tiles * column_tiles)
    tile = pid % (row_tiles * column_tiles)
    rows = tile // column_tiles * ROWS + tl.arange(0, ROWS)
    columns = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    x_low = tl.load(boxes_ptr + k * 4)
    y_low = tl.load(boxes_ptr + k * 4 + 1)
    x_high = tl.load(boxes_ptr + k * 4 + 2)
    y_high = tl.load(boxes_ptr + k * 4 + 3)
    x_first, w, left, right = axis_region(x_low, x_high, width.to(tl.int64), scale, CONTINUOUS)
    y_first, h, top, bottom = axis_region(y_low, y_high, height.to(tl.int64), scale, CONTINUOUS)
    # A box that one axis leaves out is not drawn at all.
    drawn = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]
    touched = (tl.max(rows, 0) >= top) & (tl.min(rows, 0) < bottom)
    touched = touched & (tl.max(columns, 0) >= left) & (tl.min(columns, 0) < right)
    pixels = tl.zeros([ROWS, COLUMNS], dtype=tl.uint8)
    if touched:
        y0, y1, a0, a1 = axis_cells(rows, y_first, h, y_low, y_high, SIZE, PADDING, CONTINUOUS)
        x0, x1, b0, b1 = axis_cells(columns, x_first, w, x_low, x_high, SIZE, PADDING, CONTINUOUS)
        value = blended(
            masks_ptr + k * SIZE * SIZE,
            y0[:, None], y1[:, None], a0[:, None], a1[:, None],
            x0[None, :], x1[None, :], b0[None, :], b1[None, :],
            drawn, h + w > 128, SIZE, PADDING, CONTINUOUS,
        )  # fmt: skip
        if PROBABILITIES:
            scaled = value * 255.0
            scaled = tl.where(scaled > 0.0, scaled, 0.0)  # a NaN too
            pixels = tl.where(drawn, tl.minimum(scaled, 255.0), 0.0).to(tl.int32).to(tl.uint8)
        elif CONTINUOUS:
            pixels = (drawn & (value >= threshold)).to(tl.uint8)
        else:
            pixels = (drawn & (value > threshold)).to(tl.uint8)
    at = canvas_ptr + (k * height + rows)[:, None] * width + columns[None, :]
    tl.store(at, pixels, mask=(rows < height)[:, None] & (columns < width)[None, :])


def geometry_constants(size: int, padding: int, continuous: bool) -> dict[str, Any]:
    """The constants of a paste that its run-length encoding shares."""
    return {"SIZE": size, "PADDING": 1 if continuous else padding, "CONTINUOUS": continuous}


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> Tensor:
    """Launcher of ``fastrcnn_kernels::paste_masks``."""
    count, size = masks.shape[:2]
    canvas = torch.empty((count, height, width), dtype=torch.uint8, device=masks.device)
    if canvas.numel() == 0:
        return canvas
    masks, boxes = masks.contiguous(), boxes.float().contiguous()
    if masks.dtype == torch.float64:
        masks = masks.float()
    row_tiles, column_tiles = triton.cdiv(height, _ROWS), triton.cdiv(width, _COLUMNS)
    with device_guard(masks):
        _paste_kernel[(count * row_tiles * column_tiles,)](
            masks_ptr=masks,
            boxes_ptr=boxes,
            canvas_ptr=canvas,
            height=height,
            width=width,
            row_tiles=row_tiles,
            column_tiles=column_tiles,
            scale=(size + 2 * padding) / size,
            threshold=threshold,
            PROBABILITIES=threshold < 0,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            **geometry_constants(size, padding, convention == "detectron2"),
            **_OPTIONS,
        )
    return canvas


def _case(name: str, size: int, continuous: bool) -> CompileCase:
    signature = {
        "masks_ptr": f"*{name}",
        "boxes_ptr": "*fp32",
        "canvas_ptr": "*u8",
        **dict.fromkeys(("height", "width", "row_tiles", "column_tiles"), "i32"),
        "scale": "fp32",
        "threshold": "fp32",
    }
    constants = geometry_constants(size, 1, continuous)
    constants |= {"PROBABILITIES": False, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    label = f"paste-{size}-{name}{'-detectron2' if continuous else ''}"
    return CompileCase(label, _paste_kernel, signature, constants, dict(_OPTIONS))


COMPILE_CASES = [_case("fp32", 28, False), _case("fp32", 28, True), _case("bf16", 28, False)]
