"""Mask targets from bitmaps in one launch: a program a region and 32 x 32 pixels of its target.

The rules, and the order of the roundings, are in ``fastrcnn_kernels/rasterize_bitmaps.py``. The crop and resize reads
four pixels for each of the target; RoIAlign one sample after the other, the same sample of all bins at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_BLOCK = 32
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _rounded(value):
    """Half to even, int32."""
    below = tl.floor(value)
    fraction = value - below
    whole = below.to(tl.int32)
    odd = (whole & 1) != 0
    return whole + ((fraction > 0.5) | ((fraction == 0.5) & odd)).to(tl.int32)


@triton.jit
def _crop_axis(low, high, extent, pixel, SIZE: tl.constexpr):
    """Whole-pixel crop of one axis: pixels of the bitmap before and behind each pixel of the target, their weights."""
    start = tl.minimum(tl.maximum(_rounded(low), 0), extent - 1)
    stop = tl.maximum(tl.minimum(tl.maximum(_rounded(high), 0), extent), start + 1)
    length = stop - start
    centre = pixel.to(tl.float32) + 0.5
    scale = tl.div_rn(length.to(tl.float32), tl.full([], SIZE, tl.float32))
    source = tl.maximum(tl.fma(centre * 0.0 + scale, centre, centre * 0.0 - 0.5), 0.0)
    cell = tl.minimum(source.to(tl.int32), length - 1)
    far = tl.minimum(tl.maximum(source - cell.to(tl.float32), 0.0), 1.0)
    same = length == SIZE
    cell = tl.where(same, pixel, cell)
    far = tl.where(same, 0.0, far)
    behind = tl.where(same, cell, tl.minimum(cell + 1, length - 1))
    return start + cell, start + behind, 1.0 - far, far


@triton.jit
def _sample(start, bin_size, bins, sample, samples, extent):
    """One sample of each bin of an axis: pixels before and behind, their weights, zero where it lies outside."""
    inside = tl.div_rn((sample.to(tl.float32) + 0.5) * bin_size, samples.to(tl.float32))
    at = (start + bins.to(tl.float32) * bin_size) + inside
    present = (at >= -1.0) & (at <= extent.to(tl.float32))
    at = tl.where(present, tl.maximum(at, 0.0), 0.0)
    cell = at.to(tl.int32)
    last = cell >= extent - 1
    cell = tl.where(last, extent - 1, cell)
    far = tl.where(last, 0.0, at - cell.to(tl.float32))
    near = 1.0 - far
    behind = tl.where(last, cell, cell + 1)
    return cell, behind, tl.where(present, near, 0.0), tl.where(present, far, 0.0)


@triton.jit
def _set(bitmap_ptr, row, column, width, inside):
    return (tl.load(bitmap_ptr + row.to(tl.int64) * width + column, mask=inside, other=0) != 0).to(tl.float32)


@triton.jit(do_not_specialize=["num_bitmaps", "height", "width"])
def _bitmaps_kernel(
    bitmaps_ptr,
    idxs_ptr,
    boxes_ptr,
    masks_ptr,
    num_bitmaps,
    height,
    width,
    SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (regions, row blocks, column blocks)."""
    region = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    x1 = tl.load(boxes_ptr + region * 4)
    y1 = tl.load(boxes_ptr + region * 4 + 1)
    x2 = tl.load(boxes_ptr + region * 4 + 2)
    y2 = tl.load(boxes_ptr + region * 4 + 3)
    instance = tl.load(idxs_ptr + region)
    largest = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2)))
    present = (instance >= 0) & (x2 > x1) & (y2 > y1) & (largest < 32768.0)
    inside = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    pixels = tl.zeros([BLOCK, BLOCK], dtype=tl.uint8)
    if present:
        bitmap = bitmaps_ptr + tl.minimum(instance, num_bitmaps - 1) * height * width
        if ALIGN:
            start_y = y1 - 0.5
            start_x = x1 - 0.5
            side = tl.full([], SIZE, tl.float32)
            bin_y = tl.div_rn((y2 - 0.5) - start_y, side)
            bin_x = tl.div_rn((x2 - 0.5) - start_x, side)
            samples_y = tl.ceil(bin_y).to(tl.int32)
            samples_x = tl.ceil(bin_x).to(tl.int32)
            total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
            i = samples_y * 0
            while i < samples_y:
                top, bottom, hy, ly = _sample(start_y, bin_y, rows, i, samples_y, height)
                j = samples_x * 0
                while j < samples_x:
                    left, right, hx, lx = _sample(start_x, bin_x, columns, j, samples_x, width)
                    value = hy[:, None] * hx[None, :] * _set(bitmap, top[:, None], left[None, :], width, inside)
                    value += hy[:, None] * lx[None, :] * _set(bitmap, top[:, None], right[None, :], width, inside)
                    value += ly[:, None] * hx[None, :] * _set(bitmap, bottom[:, None], left[None, :], width, inside)
                    value += ly[:, None] * lx[None, :] * _set(bitmap, bottom[:, None], right[None, :], width, inside)
                    total += value
                    j += 1
                i += 1
            count = tl.maximum(samples_y * samples_x, 1).to(tl.float32)
            pixels = (tl.div_rn(total, total * 0.0 + count) >= 0.5).to(tl.uint8)
        else:
            top, bottom, a0, a1 = _crop_axis(y1, y2, height, rows, SIZE)
            left, right, b0, b1 = _crop_axis(x1, x2, width, columns, SIZE)
            p00 = _set(bitmap, top[:, None], left[None, :], width, inside)
            p01 = _set(bitmap, top[:, None], right[None, :], width, inside)
            p10 = _set(bitmap, bottom[:, None], left[None, :], width, inside)
            p11 = _set(bitmap, bottom[:, None], right[None, :], width, inside)
            zero = tl.zeros_like(p00)
            a0 = a0[:, None] + zero
            a1 = a1[:, None] + zero
            b0 = b0[None, :] + zero
            b1 = b1[None, :] + zero
            if 2 * SIZE > 128:
                value = tl.fma(tl.fma(p00, b0, p01 * b1), a0, tl.fma(p10, b0, p11 * b1) * a1)
            else:
                upper = tl.fma(p00, a0 * b0, p01 * (a0 * b1))
                value = tl.fma(p11, a1 * b1, tl.fma(p10, a1 * b0, upper))
            pixels = (value >= 1.0).to(tl.uint8)
    at = masks_ptr + region * SIZE * SIZE + rows[:, None] * SIZE + columns[None, :]
    tl.store(at, pixels, mask=inside)


def rasterize_bitmaps(bitmaps: Tensor, instance_idxs: Tensor, boxes: Tensor, mask_size: int, convention: str) -> Tensor:
    """Launcher of ``fastrcnn_kernels::rasterize_bitmaps``."""
    shape = (boxes.shape[0], mask_size, mask_size)
    if bitmaps.numel() == 0 or boxes.shape[0] == 0:
        return torch.zeros(shape, dtype=torch.uint8, device=boxes.device)
    masks = torch.empty(shape, dtype=torch.uint8, device=boxes.device)
    blocks = triton.cdiv(mask_size, _BLOCK)
    with device_guard(boxes):
        _bitmaps_kernel[(boxes.shape[0], blocks, blocks)](
            bitmaps_ptr=bitmaps.contiguous(),
            idxs_ptr=instance_idxs.long().contiguous(),
            boxes_ptr=boxes.contiguous(),
            masks_ptr=masks,
            num_bitmaps=bitmaps.shape[0],
            height=bitmaps.shape[1],
            width=bitmaps.shape[2],
            SIZE=mask_size,
            ALIGN=convention == "detectron2",
            BLOCK=_BLOCK,
            **_OPTIONS,
        )
    return masks


def _case(size: int, align: bool) -> CompileCase:
    signature = {
        "bitmaps_ptr": "*u8",
        "idxs_ptr": "*i64",
        "boxes_ptr": "*fp32",
        "masks_ptr": "*u8",
        **dict.fromkeys(("num_bitmaps", "height", "width"), "i32"),
    }
    constants: dict[str, Any] = {"SIZE": size, "ALIGN": align, "BLOCK": _BLOCK}
    label = f"bitmaps-{size}{'-align' if align else ''}"
    return CompileCase(label, _bitmaps_kernel, signature, constants, dict(_OPTIONS))


COMPILE_CASES = [_case(28, False), _case(28, True)]
