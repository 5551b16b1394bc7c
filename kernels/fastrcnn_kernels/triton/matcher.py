"""Matching in one launch, or two with low-quality matches; the rule is in ``fastrcnn_kernels/matcher.py``.

1. ``_best_kernel`` (low-quality matches only): the best IoU of each ground truth over all boxes, by an atomic maximum
   of the bits of the float: the order of the programs does not show.
2. ``_match_kernel``: the best ground truth of each box, whether the box ties the best IoU of some ground truth, the
   thresholds, and the window that anchors have to lie in.

A program holds a block of boxes in registers and walks the ground truths of its image, as many as the count in device
memory says. Sixteen at a time are compared with the box around the block, and those that cannot intersect it are
skipped; both launches compute the IoUs anew instead of storing [G, A]. Anchors are computed from their index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

MAX_LEVELS = 6
_CHUNK = 16  # ground truths compared with a block at once; their bits must be exact as a float32
_FAR = tl.constexpr(1e8)  # a box turned inside out intersects nothing, wherever that is
_TINY32 = tl.constexpr(torch.finfo(torch.float32).tiny)
_TINY64 = tl.constexpr(torch.finfo(torch.float64).tiny)

LEVEL_NUMBERS = [f"{name}{i}" for name in ("end", "width", "stride", "per_cell") for i in range(MAX_LEVELS)]
LAST_END = f"end{MAX_LEVELS - 1}"
TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64"}


@triton.jit
def _next_level(at, end, start, first_cell, width, stride, per_cell, next_width, next_stride, next_per_cell):
    """The numbers of the level after, for the anchors from ``end`` on."""
    past = at >= end
    start = tl.where(past, end, start)
    first_cell = tl.where(past, first_cell + per_cell, first_cell)
    width = tl.where(past, next_width, width)
    stride = tl.where(past, next_stride, stride)
    per_cell = tl.where(past, next_per_cell, per_cell)
    return start, first_cell, width, stride, per_cell


@triton.jit
def _anchors(
    cells_ptr, at,
    end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The anchors with the numbers ``at`` over all levels. Levels that are not there end where the last one does."""
    start, first = at * 0, at * 0
    width, stride, cells = start + width0, start + stride0, start + per_cell0
    start, first, width, stride, cells = _next_level(
        at, end0, start, first, width, stride, cells, width1, stride1, per_cell1
    )
    start, first, width, stride, cells = _next_level(
        at, end1, start, first, width, stride, cells, width2, stride2, per_cell2
    )
    start, first, width, stride, cells = _next_level(
        at, end2, start, first, width, stride, cells, width3, stride3, per_cell3
    )
    start, first, width, stride, cells = _next_level(
        at, end3, start, first, width, stride, cells, width4, stride4, per_cell4
    )
    start, first, width, stride, cells = _next_level(
        at, end4, start, first, width, stride, cells, width5, stride5, per_cell5
    )
    present = at < end5
    within = at - start
    pixel = within // cells
    cell = cells_ptr + (first + within % cells) * 4
    x = (pixel % width).to(COMPUTE) * stride.to(COMPUTE)
    y = (pixel // width).to(COMPUTE) * stride.to(COMPUTE)
    x1 = x + tl.load(cell, mask=present, other=0.0)
    y1 = y + tl.load(cell + 1, mask=present, other=0.0)
    x2 = x + tl.load(cell + 2, mask=present, other=0.0)
    y2 = y + tl.load(cell + 3, mask=present, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _usable(x1, y1, x2, y2, present, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    """Sides, area and whether the box counts: absent ones and ones that are not finite are turned inside out."""
    area = (x2 - x1 + BOX_OFFSET) * (y2 - y1 + BOX_OFFSET)
    usable = present & (tl.abs(area) < float("inf"))
    tiny = _TINY64 if COMPUTE == tl.float64 else _TINY32
    area = tl.where(usable, tl.maximum(area, tiny), 1.0)
    x1, y1 = tl.where(usable, x1, _FAR), tl.where(usable, y1, _FAR)
    x2, y2 = tl.where(usable, x2, -_FAR), tl.where(usable, y2, -_FAR)
    return x1, y1, x2, y2, area, usable


@triton.jit
def _block_of_boxes(
    boxes_ptr, image, num_boxes, boxes_stride, at,
    end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5,
    ANCHORS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The boxes with the numbers ``at`` as they are; zeros from ``num_boxes`` on."""
    if ANCHORS:
        x1, y1, x2, y2 = _anchors(
            boxes_ptr, at, end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
            stride0, stride1, stride2, stride3, stride4, stride5,
            per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5, COMPUTE,
        )  # fmt: skip
    else:
        box = boxes_ptr + image * boxes_stride + at.to(tl.int64) * 4
        x1 = tl.load(box, mask=at < num_boxes, other=0.0)
        y1 = tl.load(box + 1, mask=at < num_boxes, other=0.0)
        x2 = tl.load(box + 2, mask=at < num_boxes, other=0.0)
        y2 = tl.load(box + 3, mask=at < num_boxes, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _load_gts(gt_ptr, gt, present, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    x1 = tl.load(gt_ptr + gt * 4, mask=present, other=0.0)
    y1 = tl.load(gt_ptr + gt * 4 + 1, mask=present, other=0.0)
    x2 = tl.load(gt_ptr + gt * 4 + 2, mask=present, other=0.0)
    y2 = tl.load(gt_ptr + gt * 4 + 3, mask=present, other=0.0)
    return _usable(x1, y1, x2, y2, present, BOX_OFFSET, COMPUTE)


@triton.jit
def _overlap(x1, y1, x2, y2, other_x1, other_y1, other_x2, other_y2, BOX_OFFSET: tl.constexpr):
    """Width and height of the intersection; negative or zero where there is none."""
    width = tl.minimum(x2, other_x2) - tl.maximum(x1, other_x1) + BOX_OFFSET
    height = tl.minimum(y2, other_y2) - tl.maximum(y1, other_y1) + BOX_OFFSET
    return width, height


@triton.jit
def _iou(
    gt_ptr, gt, x1, y1, x2, y2, area, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """IoU of one ground truth, known to be finite, with the block."""
    gt_x1 = tl.load(gt_ptr + gt * 4)
    gt_y1 = tl.load(gt_ptr + gt * 4 + 1)
    gt_x2 = tl.load(gt_ptr + gt * 4 + 2)
    gt_y2 = tl.load(gt_ptr + gt * 4 + 3)
    tiny = _TINY64 if COMPUTE == tl.float64 else _TINY32
    gt_area = tl.maximum((gt_x2 - gt_x1 + BOX_OFFSET) * (gt_y2 - gt_y1 + BOX_OFFSET), tiny)
    width, height = _overlap(x1, y1, x2, y2, gt_x1, gt_y1, gt_x2, gt_y2, BOX_OFFSET)
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    union = gt_area + area - shared
    if COMPUTE == tl.float64:
        return shared / union
    else:
        return tl.div_rn(shared, union)


@triton.jit
def _near(
    gt_x1, gt_y1, gt_x2, gt_y2, left, top, right, bottom, BOX_OFFSET: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bit i: ground truth i may intersect a box of the block. Rounding is monotonic: what the surrounding box does not
    intersect, none in it does."""
    width, height = _overlap(gt_x1, gt_y1, gt_x2, gt_y2, left, top, right, bottom, BOX_OFFSET)
    near = (width > 0.0) & (height > 0.0)
    return tl.sum(near.to(tl.int32) << tl.arange(0, CHUNK), axis=0)


@triton.jit
def _lowest(bits):
    """The number of the lowest bit set: the exponent of a power of two."""
    power = (bits & -bits).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=["num_gts", "num_boxes", "boxes_stride", *LEVEL_NUMBERS])
def _best_kernel(
    gt_ptr, count_ptr, boxes_ptr, best_ptr, num_gts, num_boxes, boxes_stride,
    end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5,
    ANCHORS: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bits of the best IoU of each ground truth, ``best_ptr`` [N, G], zero before. Grid: blocks of boxes, images."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    x1, y1, x2, y2 = _block_of_boxes(
        boxes_ptr, image, num_boxes, boxes_stride, at,
        end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
        stride0, stride1, stride2, stride3, stride4, stride5,
        per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5, ANCHORS, COMPUTE,
    )  # fmt: skip
    x1, y1, x2, y2, area, _box_usable = _usable(x1, y1, x2, y2, at < num_boxes, BOX_OFFSET, COMPUTE)
    left, top, right, bottom = tl.min(x1, 0), tl.min(y1, 0), tl.max(x2, 0), tl.max(y2, 0)
    count = tl.minimum(tl.load(count_ptr + image), num_gts).to(tl.int32)
    gts = gt_ptr + image * num_gts * 4
    best = best_ptr + image * num_gts
    for start in range(0, count, CHUNK):
        lanes = start + tl.arange(0, CHUNK)
        gt_x1, gt_y1, gt_x2, gt_y2, _gt_area, _gt_usable = _load_gts(gts, lanes, lanes < count, BOX_OFFSET, COMPUTE)
        bits = _near(gt_x1, gt_y1, gt_x2, gt_y2, left, top, right, bottom, BOX_OFFSET, CHUNK)
        while bits != 0:
            gt = start + _lowest(bits)
            bits = bits & (bits - 1)
            highest = tl.max(_iou(gts, gt, x1, y1, x2, y2, area, BOX_OFFSET, COMPUTE), axis=0)
            if highest > 0.0:
                # The bits of floats that are not negative are ordered as the floats.
                tl.atomic_max(best + gt, highest.to(best_ptr.dtype.element_ty, bitcast=True))


@triton.jit(do_not_specialize=["num_gts", "num_boxes", "boxes_stride", *LEVEL_NUMBERS])
def _match_kernel(
    gt_ptr, count_ptr, boxes_ptr, best_ptr, sizes_ptr, out_ptr, high, low, straddle, num_gts, num_boxes, boxes_stride,
    end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5,
    ANCHORS: tl.constexpr, WINDOW: tl.constexpr, LOW_QUALITY: tl.constexpr, BOX_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``out_ptr`` int64 [N, num_boxes]. Grid: blocks of boxes, images."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    x1, y1, x2, y2 = _block_of_boxes(
        boxes_ptr, image, num_boxes, boxes_stride, at,
        end0, end1, end2, end3, end4, end5, width0, width1, width2, width3, width4, width5,
        stride0, stride1, stride2, stride3, stride4, stride5,
        per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5, ANCHORS, COMPUTE,
    )  # fmt: skip
    if COMPUTE == tl.float64:
        high_limit, low_limit = tl.load(high), tl.load(low)
    else:
        high_limit, low_limit = high, low
    inside = at < num_boxes
    if WINDOW:
        # The size plus the threshold is a float32, as adding a Python float to an integer tensor gives.
        if COMPUTE == tl.float64:
            margin = tl.load(straddle)
        else:
            margin = straddle
        bottom_limit = (tl.load(sizes_ptr + image * 2).to(tl.float32) + margin.to(tl.float32)).to(COMPUTE)
        right_limit = (tl.load(sizes_ptr + image * 2 + 1).to(tl.float32) + margin.to(tl.float32)).to(COMPUTE)
        inside = inside & (x1 >= -margin) & (y1 >= -margin) & (x2 < right_limit) & (y2 < bottom_limit)
    x1, y1, x2, y2, area, _box_usable = _usable(x1, y1, x2, y2, at < num_boxes, BOX_OFFSET, COMPUTE)
    left, top, right, bottom = tl.min(x1, 0), tl.min(y1, 0), tl.max(x2, 0), tl.max(y2, 0)
    count = tl.minimum(tl.load(count_ptr + image), num_gts).to(tl.int32)
    gts = gt_ptr + image * num_gts * 4
    first = count * 0 + 2147483647  # the first ground truth that is finite
    keep_all = count * 0
    best = tl.zeros([BLOCK], COMPUTE)
    own = tl.zeros([BLOCK], tl.int32)
    tie = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, CHUNK):
        lanes = start + tl.arange(0, CHUNK)
        gt_x1, gt_y1, gt_x2, gt_y2, _gt_area, usable = _load_gts(gts, lanes, lanes < count, BOX_OFFSET, COMPUTE)
        first = tl.minimum(first, tl.min(tl.where(usable, lanes, 2147483647), 0))
        if LOW_QUALITY:
            chunk_bits = tl.load(best_ptr + image * num_gts + lanes, mask=usable, other=1)
            # What is best at IoU 0 is tied by every box.
            keep_all = tl.maximum(keep_all, tl.max((chunk_bits == 0).to(tl.int32), 0))
        bits = _near(gt_x1, gt_y1, gt_x2, gt_y2, left, top, right, bottom, BOX_OFFSET, CHUNK)
        while bits != 0:
            gt = start + _lowest(bits)
            bits = bits & (bits - 1)
            iou = _iou(gts, gt, x1, y1, x2, y2, area, BOX_OFFSET, COMPUTE)
            better = iou > best
            best = tl.where(better, iou, best)
            own = tl.where(better, gt, own)
            if LOW_QUALITY:
                highest = tl.load(best_ptr + image * num_gts + gt).to(COMPUTE, bitcast=True)
                tie = tie | (iou == highest).to(tl.int32)
    own = tl.where(best > 0.0, own, first)
    keep = ((best >= high_limit) | (tie != 0) | (keep_all != 0)) & (first < 2147483647)
    background = (best < low_limit) | (first == 2147483647)
    matched = tl.where(keep, own, tl.where(background, -1, -2))
    matched = tl.where(inside, matched, -2)
    tl.store(out_ptr + image * num_boxes + at, matched.to(tl.int64), mask=at < num_boxes)


def _constants(dtype: torch.dtype, anchors: bool, box_offset: int) -> dict[str, Any]:
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    # Proposals are few: smaller blocks make enough programs of them.
    block = 1024 if anchors else 256
    return {"ANCHORS": anchors, "BOX_OFFSET": box_offset, "COMPUTE": compute, "BLOCK": block, "CHUNK": _CHUNK}


def _options(anchors: bool) -> dict[str, Any]:
    # Four anchors a thread: with eight of float64 the match would spill.
    return {"num_warps": 8 if anchors else 2, "enable_fp_fusion": False}


def _launch(
    gt_boxes: Tensor,
    gt_count: Tensor,
    boxes: Tensor,
    boxes_stride: int,
    num_boxes: int,
    levels: dict[str, int],
    sizes: Tensor | None,
    thresholds: tuple[float, float, float],
    low_quality: bool,
    box_offset: int,
) -> Tensor:
    num_images, num_gts = gt_boxes.shape[:2]
    dtype, device = gt_boxes.dtype, gt_boxes.device
    matched = torch.empty((num_images, num_boxes), dtype=torch.int64, device=device)
    if matched.numel() == 0:
        return matched
    if num_gts == 0 and sizes is None:
        return matched.fill_(-1)
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    best = torch.zeros((num_images, max(num_gts, 1)), dtype=bits, device=device)
    # Triton passes a float argument as float32: doubles go through memory.
    limits: Sequence[Any] = thresholds
    if dtype == torch.float64:
        limits = [gt_boxes.new_full((1,), value) for value in thresholds]
    constants = _constants(dtype, bool(levels), box_offset)
    grid = (triton.cdiv(num_boxes, constants["BLOCK"]), num_images)
    shared = {
        "gt_ptr": gt_boxes,
        "count_ptr": gt_count,
        "boxes_ptr": boxes,
        "best_ptr": best,
        "num_gts": num_gts,
        "num_boxes": num_boxes,
        "boxes_stride": boxes_stride,
        **(levels or dict.fromkeys(LEVEL_NUMBERS, 1)),
        **constants,
        **_options(bool(levels)),
    }
    with device_guard(gt_boxes):
        if low_quality and num_gts:
            _best_kernel[grid](**shared)
        _match_kernel[grid](
            **shared,
            sizes_ptr=gt_count if sizes is None else sizes,
            out_ptr=matched,
            high=limits[0],
            low=limits[1],
            straddle=limits[2],
            WINDOW=sizes is not None and thresholds[2] >= 0,
            LOW_QUALITY=low_quality,
        )
    return matched


def match_boxes(
    gt_boxes: Tensor,
    gt_count: Tensor,
    boxes: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
    box_offset: int,
) -> Tensor:
    """Launcher of ``fastrcnn_kernels::match_boxes``; both kinds of boxes in the same type, float32 or float64."""
    num_boxes = boxes.shape[-2]
    stride = 4 * num_boxes if boxes.dim() == 3 else 0
    limits = (high_threshold, low_threshold, -1.0)
    return _launch(
        gt_boxes.contiguous(), gt_count.contiguous(), boxes.contiguous(), stride, num_boxes, {}, None, limits,
        low_quality, box_offset,
    )  # fmt: skip


def level_numbers(per_cell: list[int], grid_sizes: list[int], strides: list[int]) -> dict[str, int]:
    """The arguments that describe up to ``MAX_LEVELS`` levels, none of them empty."""
    numbers = dict.fromkeys(LEVEL_NUMBERS, 1)
    end = 0
    for i in range(MAX_LEVELS):
        if i < len(strides):
            end += per_cell[i] * grid_sizes[2 * i] * grid_sizes[2 * i + 1]
            numbers.update({f"width{i}": grid_sizes[2 * i + 1], f"stride{i}": strides[i], f"per_cell{i}": per_cell[i]})
        numbers[f"end{i}"] = end
    return numbers


def match_anchors(
    gt_boxes: Tensor,
    gt_count: Tensor,
    cells: list[Tensor],
    grid_sizes: list[int],
    strides: list[int],
    image_sizes: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
    straddle_thresh: float,
    box_offset: int,
) -> Tensor:
    """Launcher of ``fastrcnn_kernels::match_anchors``; up to ``MAX_LEVELS`` levels, in one type with the boxes."""
    kept = [i for i, cell in enumerate(cells) if cell.shape[0] * grid_sizes[2 * i] * grid_sizes[2 * i + 1] > 0]
    if not kept:
        return gt_boxes.new_empty((gt_boxes.shape[0], 0), dtype=torch.int64)
    sizes = [extent for i in kept for extent in grid_sizes[2 * i : 2 * i + 2]]
    levels = level_numbers([cells[i].shape[0] for i in kept], sizes, [strides[i] for i in kept])
    return _launch(
        gt_boxes.contiguous(), gt_count.contiguous(), torch.cat([cells[i] for i in kept]), 0, levels[LAST_END], levels,
        image_sizes.contiguous(), (high_threshold, low_threshold, straddle_thresh), low_quality, box_offset,
    )  # fmt: skip


def _case(
    label: str, kernel: Any, dtype: torch.dtype, anchors: bool, box_offset: int = 1, low_quality: bool = True
) -> CompileCase:
    name = TYPE_NAMES[dtype]
    signature = {
        "gt_ptr": f"*{name}",
        "count_ptr": "*i64",
        "boxes_ptr": f"*{name}",
        "best_ptr": "*i64" if dtype == torch.float64 else "*i32",
        **dict.fromkeys(["num_gts", "num_boxes", "boxes_stride", *LEVEL_NUMBERS], "i32"),
    }
    constants = _constants(dtype, anchors, box_offset)
    if kernel is _match_kernel:
        signature.update({"sizes_ptr": "*i64", "out_ptr": "*i64"})
        signature.update(dict.fromkeys(["high", "low", "straddle"], "*fp64" if dtype == torch.float64 else "fp32"))
        constants.update({"WINDOW": anchors, "LOW_QUALITY": low_quality})
    return CompileCase(label, kernel, signature, constants, _options(anchors))


COMPILE_CASES = [
    _case("best-anchors-fp32", _best_kernel, torch.float32, True),
    _case("best-boxes-fp32", _best_kernel, torch.float32, False),
    _case("best-anchors-fp64", _best_kernel, torch.float64, True),
    _case("match-anchors-fp32", _match_kernel, torch.float32, True),
    _case("match-anchors-fp32-edges", _match_kernel, torch.float32, True, 0),
    _case("match-boxes-fp32", _match_kernel, torch.float32, False, 1, False),
    _case("match-boxes-fp32-low-quality", _match_kernel, torch.float32, False),
    _case("match-anchors-fp64", _match_kernel, torch.float64, True),
]
