"""Greedy non-maximum suppression of many segments in two launches, without the host.

1. ``_mask_kernel``: one program for each 64 x 64 tile of the upper triangle of each segment's overlap matrix. Bit j of
   row i says that i, if kept, drops j. N^2 / 8 bytes written at most; bound by arithmetic (a division a pair).
2. ``_sweep_kernel``: one program a segment walks its rows 64 at a time, best first: decides the 64 among themselves,
   then adds the rows kept to the set of boxes dropped. Inside a block the greedy choice is the only fixed point of
   "alive and not dropped by one that is kept", reached in a few rounds of bit operations. The program writes the
   compact, padded result itself.

A segment is a row of a padded batch, or, ``RAGGED``, a run of a list sorted by group. The arithmetic is pinned in
``fastrcnn_kernels/nms.py``: products are not fused into sums (``enable_fp_fusion=False``), the division is rounded
(``div_rn``; Triton's ``/`` is not).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_TILE = 64
_TILE_WORDS = 4096  # words of the overlap matrix that the sweep holds at once
_MOST_WORDS = 4096  # a row of the overlap matrix that fits the registers without spills: 131,072 boxes


@triton.jit
def _or_combine(a, b):
    return a | b


@triton.jit
def _load_boxes(boxes_ptr, index, mask, COMPUTE: tl.constexpr, BOX_OFFSET: tl.constexpr):
    base = boxes_ptr + index * 4
    x1 = tl.load(base, mask=mask, other=0.0).to(COMPUTE)
    y1 = tl.load(base + 1, mask=mask, other=0.0).to(COMPUTE)
    x2 = tl.load(base + 2, mask=mask, other=0.0).to(COMPUTE)
    y2 = tl.load(base + 3, mask=mask, other=0.0).to(COMPUTE)
    area = (x2 - x1 + BOX_OFFSET) * (y2 - y1 + BOX_OFFSET)
    return x1, y1, x2, y2, area


@triton.jit
def _segment_start(start_ptr, segment, size, RAGGED: tl.constexpr):
    """First row of the segment in the flat order."""
    if RAGGED:
        return tl.load(start_ptr + segment)
    else:
        return segment * size


@triton.jit(do_not_specialize=["size", "words", "tiles"])
def _mask_kernel(
    boxes_ptr,
    order_ptr,
    start_ptr,
    length_ptr,
    mask_ptr,
    threshold,
    size,
    words,
    tiles,
    COMPUTE: tl.constexpr,
    BOX_OFFSET: tl.constexpr,
    RAGGED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Overlap bits of one tile. Grid: segments x tiles of the upper triangle (diagonal included), flat."""
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    # The tile is number `tile` of the triangle counted by columns; the root may be off by one after rounding.
    column = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > tile, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)
    row = tile - column * (column + 1) // 2

    length = tl.load(length_ptr + segment).to(tl.int32)
    if column * TILE < length:
        first = _segment_start(start_ptr, segment, size, RAGGED)
        # Padded orders count inside the segment, ragged ones over the whole list.
        shift = segment * 0 if RAGGED else first
        rows = row * TILE + tl.arange(0, TILE)
        row_index = tl.load(order_ptr + first + rows, mask=rows < length, other=0) + shift
        x1, y1, x2, y2, area = _load_boxes(boxes_ptr, row_index, rows < length, COMPUTE, BOX_OFFSET)
        if COMPUTE == tl.float64:
            limit = tl.load(threshold)
        else:
            limit = threshold
        lanes = tl.arange(0, 32)
        for part in tl.static_range(TILE // 32):
            columns = column * TILE + part * 32 + lanes
            column_index = tl.load(order_ptr + first + columns, mask=columns < length, other=0) + shift
            cx1, cy1, cx2, cy2, column_area = _load_boxes(
                boxes_ptr, column_index, columns < length, COMPUTE, BOX_OFFSET
            )
            width = tl.minimum(x2[:, None], cx2[None, :]) - tl.maximum(x1[:, None], cx1[None, :]) + BOX_OFFSET
            height = tl.minimum(y2[:, None], cy2[None, :]) - tl.maximum(y1[:, None], cy1[None, :]) + BOX_OFFSET
            inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
            union = area[:, None] + column_area[None, :] - inter
            if COMPUTE == tl.float64:
                ratio = inter / union
            else:
                ratio = tl.div_rn(inter, union)
            drops = (ratio > limit) & (columns[None, :] > rows[:, None]) & (columns[None, :] < length)
            bits = tl.sum(drops.to(tl.int32) << lanes[None, :], axis=1)
            word = column * (TILE // 32) + part
            tl.store(mask_ptr + (first + rows) * words + word, bits, mask=(rows < length) & (word < words))


@triton.jit
def _choose(alive, drops, lanes):
    """Greedy choice among 32 rows: bits alive, and for each row the bits that it drops. Bits kept."""
    kept = alive
    changing = True
    while changing:
        dropped = tl.reduce(tl.where(((kept >> lanes) & 1) != 0, drops, 0), 0, _or_combine)
        new = alive & ~dropped
        changing = new != kept
        kept = new
    return kept


@triton.jit(do_not_specialize=["size", "words", "max_output"])
def _sweep_kernel(
    mask_ptr,
    order_ptr,
    start_ptr,
    length_ptr,
    keep_ptr,
    count_ptr,
    size,
    words,
    max_output,
    RAGGED: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One segment from its overlap bits to its result. Grid: segments. WORDS >= words; ROWS x WORDS held at once.

    Padded: ``keep_ptr`` int64 [S, max_output] and ``count_ptr`` int64 [S]. Ragged: ``keep_ptr`` is a flag a box.
    """
    segment = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + segment).to(tl.int32)
    first = _segment_start(start_ptr, segment, size, RAGGED)
    lanes = tl.arange(0, 32)
    block = tl.arange(0, 64)
    word_lanes = tl.arange(0, WORDS)
    gone = tl.zeros([WORDS], dtype=tl.int32)
    total = length * 0
    row = length * 0
    while (row < length) & (total < max_output):
        word = row // 32
        upper_rows = mask_ptr + (first + row + lanes) * words
        lower_rows = mask_ptr + (first + row + 32 + lanes) * words
        in_upper = row + lanes < length
        in_lower = row + 32 + lanes < length
        # Word `word + 1` exists wherever the segment has a row in the lower half.
        has_lower = row + 32 < length
        upper = tl.load(upper_rows + word, mask=in_upper, other=0)
        across = tl.load(upper_rows + word + 1, mask=in_upper & has_lower, other=0)
        lower = tl.load(lower_rows + word + 1, mask=in_lower, other=0)

        alive = tl.sum(in_upper.to(tl.int32) << lanes, axis=0)
        alive = alive & ~tl.sum(tl.where(word_lanes == word, gone, 0), axis=0)
        kept_upper = _choose(alive, upper, lanes)
        dropped = tl.reduce(tl.where(((kept_upper >> lanes) & 1) != 0, across, 0), 0, _or_combine)
        alive = tl.sum(in_lower.to(tl.int32) << lanes, axis=0)
        alive = alive & ~(dropped | tl.sum(tl.where(word_lanes == word + 1, gone, 0), axis=0))
        kept_lower = _choose(alive, lower, lanes)

        # All rows are loaded, kept or not: these loads do not wait for the choice.
        later = (word_lanes > word + 1) & (word_lanes * 32 < length)
        for part in range(64 // ROWS):
            inside = part * ROWS + tl.arange(0, ROWS)
            rows = row + inside
            bits = tl.load(
                mask_ptr + (first + rows)[:, None] * words + word_lanes[None, :],
                mask=(rows < length)[:, None] & later[None, :],
                other=0,
            )
            kept = (tl.where(inside < 32, kept_upper, kept_lower) >> (inside & 31)) & 1
            gone = gone | tl.reduce(tl.where(kept[:, None] != 0, bits, 0), 0, _or_combine)

        kept = (tl.where(block < 32, kept_upper, kept_lower) >> (block & 31)) & 1
        index = tl.load(order_ptr + first + row + block, mask=kept != 0, other=0)
        if RAGGED:
            tl.store(keep_ptr + index, index * 0 + 1, mask=kept != 0)
        else:
            place = total + tl.cumsum(kept, axis=0) - kept
            tl.store(keep_ptr + segment * max_output + place, index, mask=(kept != 0) & (place < max_output))
        total += tl.sum(kept, axis=0)
        row += 64
    if not RAGGED:
        total = tl.minimum(total, max_output)
        tl.store(count_ptr + segment, total.to(tl.int64))
        for start in range(0, max_output, 64):
            place = start + block
            padding = tl.full([64], -1, tl.int64)
            tl.store(keep_ptr + segment * max_output + place, padding, mask=(place >= total) & (place < max_output))


def _mask_options(dtype: torch.dtype) -> dict[str, Any]:
    # In float64 four warps would spill.
    return {"num_warps": 8 if dtype == torch.float64 else 4, "enable_fp_fusion": False}


def _mask_constants(dtype: torch.dtype, box_offset: int, ragged: bool) -> dict[str, Any]:
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return {"COMPUTE": compute, "BOX_OFFSET": box_offset, "RAGGED": ragged, "TILE": _TILE}


def _sweep_constants(words: int, ragged: bool) -> dict[str, Any]:
    padded = triton.next_power_of_2(words)
    return {"RAGGED": ragged, "WORDS": padded, "ROWS": max(1, min(64, _TILE_WORDS // padded))}


def _sweep_options(words: int) -> dict[str, Any]:
    return {"num_warps": 4 if words <= 64 else 8}


def _launch(
    boxes: Tensor,
    order: Tensor,
    start: Tensor | None,
    length: Tensor,
    size: int,
    threshold: float,
    box_offset: int,
    keep: Tensor,
    count: Tensor | None,
    max_output: int,
) -> None:
    """Both kernels. ``order`` ranks the rows of all segments; ``start`` None: segments of ``size`` rows each."""
    words = -(-size // 32)
    if words > _MOST_WORDS:
        raise ValueError(f"nms: the Triton kernels take lists of up to {32 * _MOST_WORDS} boxes, got {size}")
    blocks = -(-size // _TILE)
    tiles = blocks * (blocks + 1) // 2
    segments = length.shape[0]
    ragged = start is not None
    mask = torch.empty((order.numel(), words), dtype=torch.int32, device=boxes.device)
    # Triton passes a float argument as float32: a double goes through memory.
    limit = boxes.new_full((1,), threshold) if boxes.dtype == torch.float64 else threshold
    with device_guard(boxes):
        _mask_kernel[(segments * tiles,)](
            boxes_ptr=boxes,
            order_ptr=order,
            start_ptr=start if start is not None else length,
            length_ptr=length,
            mask_ptr=mask,
            threshold=limit,
            size=size,
            words=words,
            tiles=tiles,
            **_mask_constants(boxes.dtype, box_offset, ragged),
            **_mask_options(boxes.dtype),
        )
        _sweep_kernel[(segments,)](
            mask_ptr=mask,
            order_ptr=order,
            start_ptr=start if start is not None else length,
            length_ptr=length,
            keep_ptr=keep,
            count_ptr=count if count is not None else length,
            size=size,
            words=words,
            max_output=max_output,
            **_sweep_constants(words, ragged),
            **_sweep_options(words),
        )


def nms_padded(
    boxes: Tensor, scores: Tensor, threshold: float, max_output: int, box_offset: int
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::nms_padded``; ``threshold`` as ``comparison_threshold`` gives it."""
    segments, size = scores.shape
    keep = torch.empty((segments, max_output), dtype=torch.int64, device=boxes.device)
    count = torch.empty((segments,), dtype=torch.int64, device=boxes.device)
    if segments == 0 or size == 0 or max_output == 0:
        return keep.fill_(-1), count.zero_()
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    length = (ranked != -math.inf).sum(1)
    _launch(boxes.contiguous(), order, None, length, size, threshold, box_offset, keep, count, max_output)
    return keep, count


def nms(boxes: Tensor, scores: Tensor, threshold: float, box_offset: int) -> Tensor:
    """Launcher of ``fastrcnn_kernels::nms``. Waits for the GPU once: the size of the result depends on the data."""
    size = scores.shape[0]
    keep = torch.empty((1, size), dtype=torch.int64, device=boxes.device)
    if size == 0:
        return keep[0]
    order = scores.sort(descending=True, stable=True).indices
    count = torch.empty((1,), dtype=torch.int64, device=boxes.device)
    length = torch.full((1,), size, dtype=torch.int64, device=boxes.device)
    _launch(boxes.contiguous(), order, None, length, size, threshold, box_offset, keep, count, size)
    return keep[0, : int(count)].clone()


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float, box_offset: int) -> Tensor:
    """Launcher of ``fastrcnn_kernels::batched_nms``: a segment a group, all at once. Waits for the GPU twice."""
    by_score = scores.sort(descending=True, stable=True).indices
    if by_score.numel() == 0:
        return by_score
    groups, within = idxs[by_score].sort(stable=True)
    order = by_score[within]  # by group, within it by score
    length = torch.unique_consecutive(groups, return_counts=True)[1]
    start = length.cumsum(0) - length
    is_kept = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    size = int(length.max())
    flags = is_kept.view(torch.uint8)
    _launch(boxes.contiguous(), order, start, length, size, threshold, box_offset, flags, None, size)
    return by_score[is_kept[by_score]]


def class_nms(boxes: Tensor, scores: Tensor, threshold: float, box_offset: int) -> Tensor:
    """Which of scores [N, P, C] are kept within their image and class, boxes [N, P, C, 4]: bool [N, P, C].

    A score of -inf is absent. Static shapes, no waiting: a tile without boxes costs an early exit.
    """
    images, size, classes = scores.shape
    flags = torch.zeros((images, size, classes), dtype=torch.bool, device=scores.device)
    if flags.numel() == 0:
        return flags
    ranked, rows = scores.transpose(1, 2).sort(dim=2, descending=True, stable=True)  # [N, C, P]
    image = torch.arange(images, device=scores.device)[:, None, None]
    label = torch.arange(classes, device=scores.device)[None, :, None]
    order = ((image * size + rows) * classes + label).contiguous()  # of the flat list of boxes
    length = (ranked != -math.inf).sum(2).flatten()
    start = torch.arange(images * classes, device=scores.device) * size
    flat = flags.view(torch.uint8)
    _launch(boxes.contiguous(), order, start, length, size, threshold, box_offset, flat, None, size)
    return flags


def _mask_case(label: str, dtype: torch.dtype, name: str, box_offset: int, ragged: bool) -> CompileCase:
    signature = {
        "boxes_ptr": f"*{name}",
        "order_ptr": "*i64",
        "start_ptr": "*i64",
        "length_ptr": "*i64",
        "mask_ptr": "*i32",
        "threshold": "*fp64" if dtype == torch.float64 else "fp32",
        "size": "i32",
        "words": "i32",
        "tiles": "i32",
    }
    constants = _mask_constants(dtype, box_offset, ragged)
    return CompileCase(label, _mask_kernel, signature, constants, _mask_options(dtype))


def _sweep_case(size: int, ragged: bool) -> CompileCase:
    signature = {
        "mask_ptr": "*i32",
        "order_ptr": "*i64",
        "start_ptr": "*i64",
        "length_ptr": "*i64",
        "keep_ptr": "*u8" if ragged else "*i64",
        "count_ptr": "*i64",
        "size": "i32",
        "words": "i32",
        "max_output": "i32",
    }
    words = -(-size // 32)
    label = f"sweep-{size}-{'ragged' if ragged else 'padded'}"
    return CompileCase(label, _sweep_kernel, signature, _sweep_constants(words, ragged), _sweep_options(words))


COMPILE_CASES = [
    _mask_case("mask-fp32-padded", torch.float32, "fp32", 0, False),
    _mask_case("mask-fp32-padded-inclusive", torch.float32, "fp32", 1, False),
    _mask_case("mask-fp32-ragged", torch.float32, "fp32", 0, True),
    _mask_case("mask-bf16-padded", torch.bfloat16, "bf16", 0, False),
    _mask_case("mask-fp16-padded", torch.float16, "fp16", 0, False),
    _mask_case("mask-fp64-padded", torch.float64, "fp64", 0, False),
    *[_sweep_case(size, ragged) for size in (20, 1000, 2000, 16_000, 131_072) for ragged in (False, True)],
]
