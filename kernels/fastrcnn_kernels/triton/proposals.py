"""Region proposals in a fixed number of launches: eight and one for each digit of the logits' keys.

1. ``topk.histogram_kernel`` for each digit, ``topk.count_kernel``: the threshold of each image and level.
2. ``_collect_kernel``: what reaches it, in order of the anchors, decoded and clipped. Only these deltas are read.
3. ``_rank_kernel``: the rank of each by counting what comes before it, K comparisons a candidate: no limit on K.
4. ``nms._mask_kernel`` and ``nms._sweep_kernel``.
5. ``_cut_kernel`` (choice over the batch only): how many of each image and level are among the best of all.
6. ``_write_kernel``: each survivor to its place, which is a sum of cuts or found by bisection of the other levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton import nms
from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.box_coder import clip_coordinate, decode_box, divide, exponential
from fastrcnn_kernels.triton.topk import (
    MAX_LEVELS,
    OPTIONS,
    SIZES,
    TILE,
    TYPE_NAMES,
    constants,
    count_kernel,
    find_digit,
    find_prefix,
    histogram_kernel,
    key_dtype,
    level_signature,
    load_tile,
    locate,
    of_level,
    places,
    score_key,
)

_ROWS = 64  # of _rank_kernel: candidates a program
_COLUMNS = 64
_CUT_BLOCK = 2048
_CUT_OPTIONS = {"num_warps": 16}  # with 8 a few words spill
_WRITE_BLOCK = 128
_EXACT = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["candidates", "tiles", "last", "deltas_last", *SIZES])
def _collect_kernel(
    o0, o1, o2, o3, o4, d0, d1, d2, d3, d4, cells_ptr, sizes_ptr, hist_ptr, counts_ptr, boxes_ptr, logits_ptr, keys_ptr,
    candidates, tiles, last, deltas_last, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, S4: tl.constexpr,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr, CLIP: tl.constexpr,
    MIN_SIZE: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
    LEVELS: tl.constexpr, A: tl.constexpr, KEY_BITS: tl.constexpr, DIGIT: tl.constexpr, PASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Chosen anchors of a tile to boxes [N, L, K, 4], logits [N, L, K] and keys [N, L, K]. Grid: tiles, images.

    The key of a box that is too small is 0, and so are, from before, those of places without a candidate.
    """
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    level, first, plane = locate(tile, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4, LEVELS, A, TILE)
    width = of_level(level, w0, w1, w2, w3, w4, LEVELS)
    stride = of_level(level, S0 + tile * 0, S1, S2, S3, S4, LEVELS)
    index = (tile - first) * TILE + tl.arange(0, TILE)
    inside = index < plane * A
    score = load_tile(of_level(level, o0, o1, o2, o3, o4, LEVELS), image, index, inside, plane, A, (last >> level) & 1)
    key = score_key(score, KEY_BITS)
    segment = image * LEVELS + level
    hist = hist_ptr + segment * (PASSES << DIGIT)
    threshold, _, quota = find_prefix(hist, tl.minimum(candidates, plane * A), PASSES, KEY_BITS, DIGIT)
    chosen, place = places(key, inside, threshold, quota, counts_ptr + image * tiles * 2, tile, first, 256)

    cell, anchor = index // A, index % A
    deltas = of_level(level, d0, d1, d2, d3, d4, LEVELS) + image * (plane * A * 4)
    deltas_are_last = ((deltas_last >> level) & 1) != 0
    deltas += cell * tl.where(deltas_are_last, 4 * A, 1) + anchor * tl.where(deltas_are_last, 4, 4 * plane)
    apart = tl.where(deltas_are_last, 1, plane)
    dx = tl.load(deltas, mask=chosen, other=0.0).to(COMPUTE)
    dy = tl.load(deltas + apart, mask=chosen, other=0.0).to(COMPUTE)
    dw = tl.load(deltas + 2 * apart, mask=chosen, other=0.0).to(COMPUTE)
    dh = tl.load(deltas + 3 * apart, mask=chosen, other=0.0).to(COMPUTE)
    x = (cell % width * stride).to(COMPUTE)
    y = (cell // width * stride).to(COMPUTE)
    base = cells_ptr + (level * A + anchor) * 4
    x1, y1, x2, y2 = decode_box(
        dx, dy, dw, dh,
        x + tl.load(base, mask=chosen, other=0.0), y + tl.load(base + 1, mask=chosen, other=0.0),
        x + tl.load(base + 2, mask=chosen, other=0.0), y + tl.load(base + 3, mask=chosen, other=0.0),
        WX, WY, WW, WH, CLIP, BOX_OFFSET, COMPUTE,
    )  # fmt: skip
    bottom = (tl.load(sizes_ptr + image * 2) - BOX_OFFSET).to(COMPUTE)
    right = (tl.load(sizes_ptr + image * 2 + 1) - BOX_OFFSET).to(COMPUTE)
    x1, x2 = clip_coordinate(x1, right), clip_coordinate(x2, right)
    y1, y2 = clip_coordinate(y1, bottom), clip_coordinate(y2, bottom)
    large = (x2 - x1 + BOX_OFFSET >= MIN_SIZE) & (y2 - y1 + BOX_OFFSET >= MIN_SIZE)
    at = segment * candidates + place
    tl.store(boxes_ptr + at * 4, x1, mask=chosen)
    tl.store(boxes_ptr + at * 4 + 1, y1, mask=chosen)
    tl.store(boxes_ptr + at * 4 + 2, x2, mask=chosen)
    tl.store(boxes_ptr + at * 4 + 3, y2, mask=chosen)
    tl.store(logits_ptr + at, score.to(COMPUTE), mask=chosen)
    tl.store(keys_ptr + at, tl.where(large, key, 0), mask=chosen)


@triton.jit(do_not_specialize=["candidates"])
def _rank_kernel(keys_ptr, order_ptr, length_ptr, candidates, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """order [S, K]: candidates by decreasing key, ties by lower place, those with key 0 left out; length [S].

    Grid: blocks of rows, segments.
    """
    segment = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keys = keys_ptr + segment * candidates
    own = tl.load(keys + row, mask=row < candidates, other=0)
    rank = tl.zeros([ROWS], dtype=tl.int32)
    length = candidates * 0
    for start in range(0, candidates, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other = tl.load(keys + column, mask=column < candidates, other=0)
        before = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (column[None, :] < row[:, None]))
        rank += tl.sum(before.to(tl.int32), axis=1)
        length += tl.sum((other != 0).to(tl.int32), axis=0)
    tl.store(order_ptr + segment * candidates + rank, row.to(tl.int64), mask=own != 0)
    if tl.program_id(0) == 0:
        tl.store(length_ptr + segment, length.to(tl.int64))


@triton.jit
def _kept_keys(keys_ptr, keep_ptr, segment, place, mask, candidates, survivors):
    """Keys of survivors by segment and place; 0 where masked."""
    index = tl.load(keep_ptr + segment * survivors + place, mask=mask, other=0)
    return tl.load(keys_ptr + segment * candidates + index, mask=mask, other=0)


@triton.jit(do_not_specialize=["segments", "candidates", "survivors", "top_n"])
def _cut_kernel(
    keys_ptr, keep_ptr, count_ptr, cut_ptr, segments, candidates, survivors, top_n,
    KEY_BITS: tl.constexpr, DIGIT: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of each segment are among the ``top_n`` best of all, ties by lower segment. One program."""
    total = top_n * 0
    for segment in range(segments):
        total += tl.load(count_ptr + segment).to(tl.int32)
    wanted = tl.minimum(total, top_n)
    prefix = (top_n * 0).to(tl.uint64) if KEY_BITS == 64 else (top_n * 0).to(tl.uint32)
    if wanted > 0:
        high = top_n * 0 + KEY_BITS
        for _ in range(PASSES):
            low = tl.maximum(high - DIGIT, 0)
            counts = tl.zeros([1 << DIGIT], dtype=tl.int32)
            for start in range(0, segments * survivors, BLOCK):
                at = start + tl.arange(0, BLOCK)
                of = (at // survivors).to(tl.int64)
                there = at < segments * survivors
                there = there & (at % survivors < tl.load(count_ptr + of, mask=there, other=0))
                key = _kept_keys(keys_ptr, keep_ptr, of, at % survivors, there, candidates, survivors)
                # A shift by all the bits is not defined: before the first pass everything matches.
                above = (key >> tl.minimum(high, KEY_BITS - 1).to(key.dtype)) == prefix
                there = there & ((high == KEY_BITS) | above)
                counts += tl.histogram(
                    (key >> low.to(key.dtype)).to(tl.int32) & ((1 << (high - low)) - 1), 1 << DIGIT, mask=there
                )
            digit, wanted = find_digit(counts, wanted)
            prefix = (prefix << (high - low).to(prefix.dtype)) | digit.to(prefix.dtype)
            high = low
    # `wanted` is now how many of those that equal the threshold are taken.
    for segment in range(segments):
        above = top_n * 0
        equal = top_n * 0
        count = tl.load(count_ptr + segment).to(tl.int32)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            there = place < count
            key = _kept_keys(
                keys_ptr, keep_ptr, tl.full([], 0, tl.int64) + segment, place, there, candidates, survivors
            )
            above += tl.sum((there & (key > prefix)).to(tl.int32), axis=0)
            equal += tl.sum((there & (key == prefix)).to(tl.int32), axis=0)
        taken = tl.minimum(equal, wanted)
        wanted -= taken
        tl.store(cut_ptr + segment, (above + taken).to(tl.int64))


@triton.jit(do_not_specialize=["candidates", "survivors", "capacity", "steps"])
def _write_kernel(
    boxes_in, logits_ptr, keys_ptr, keep_ptr, cut_ptr, boxes_ptr, scores_ptr, total_ptr,
    candidates, survivors, capacity, steps,
    LEVELS: tl.constexpr, SORTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``cut`` survivors of each level to their image's row. Grid: blocks, images. 2**steps > survivors."""
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level = tl.minimum(slot // survivors, LEVELS - 1)
    place = slot - level * survivors
    segment = image * LEVELS + level
    valid = (slot < LEVELS * survivors) & (place < tl.load(cut_ptr + segment))
    index = tl.load(keep_ptr + segment * survivors + place, mask=valid, other=0)
    own = tl.load(keys_ptr + segment * candidates + index, mask=valid, other=0)
    target = place
    total = survivors * 0
    for other in tl.static_range(LEVELS):
        count = tl.load(cut_ptr + image * LEVELS + other).to(tl.int32)
        total += count
        if SORTED:
            # How many of that level come before: those with a higher key, and with the same one in a lower level.
            low = tl.zeros([BLOCK], dtype=tl.int32)
            high = low + count
            for _ in range(steps):
                middle = (low + high) // 2
                open_ = low < high
                key = _kept_keys(
                    keys_ptr, keep_ptr, image * LEVELS + other, middle, valid & open_, candidates, survivors
                )
                before = (key > own) | ((key == own) & (other < level))
                low = tl.where(open_ & before, middle + 1, low)
                high = tl.where(open_ & (before == 0), middle, high)
            target += tl.where(level == other, 0, low)
        else:
            target += tl.where(other < level, count, 0)
    total = tl.minimum(total, capacity)
    tl.store(total_ptr + image, total.to(tl.int64))
    written = valid & (target < capacity)
    source = segment * candidates + index
    out = image * capacity + target
    for corner in tl.static_range(4):
        value = tl.load(boxes_in + source * 4 + corner, mask=written, other=0.0)
        tl.store(boxes_ptr + out * 4 + corner, value, mask=written)
    logit = tl.load(logits_ptr + source, mask=written, other=0.0)
    score = divide(tl.full([BLOCK], 1.0, COMPUTE), exponential(-logit, COMPUTE) + 1.0, COMPUTE)
    tl.store(scores_ptr + out, score, mask=written)
    empty = (slot >= total) & (slot < capacity)
    nothing = tl.zeros([BLOCK], dtype=COMPUTE)
    out = image * capacity + slot
    for corner in tl.static_range(4):
        tl.store(boxes_ptr + out * 4 + corner, nothing, mask=empty)
    tl.store(scores_ptr + out, nothing - float("inf"), mask=empty)


def _maps(levels: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Levels that the kernels can read, and a bit for each that is channels_last."""
    maps, last = [], 0
    for i, level in enumerate(levels):
        if not level.is_contiguous() and level.is_contiguous(memory_format=torch.channels_last):
            last |= 1 << i
        else:
            level = level.contiguous()
        maps.append(level)
    return maps, last


def _collect_constants(
    strides: Sequence[int], weights: Sequence[float], clip: float, min_size: float, box_offset: int, dtype: torch.dtype
) -> dict[str, Any]:
    padded = [*strides, *[1] * (MAX_LEVELS - len(strides))]
    return {
        **{f"S{i}": stride for i, stride in enumerate(padded)},
        **dict(zip(("WX", "WY", "WW", "WH"), weights, strict=True)),
        "CLIP": clip, "MIN_SIZE": min_size, "BOX_OFFSET": box_offset,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def generate_proposals(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor, capacities: tuple[int, int, int], top_n: int, per_batch: bool, threshold: float,
    min_size: float, weights: Sequence[float], box_offset: int, clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::generate_proposals``; ``threshold`` as ``comparison_threshold`` gives it."""
    levels, first = len(objectness), objectness[0]
    if levels > MAX_LEVELS:
        raise ValueError(f"generate_proposals: the Triton kernels take up to {MAX_LEVELS} levels, got {levels}")
    anchors = first.shape[1]
    if any(level.shape[1] != anchors for level in objectness):
        raise ValueError("generate_proposals: the Triton kernels take one number of anchors a cell for all levels")
    candidates, survivors, capacity = capacities
    images, device = image_sizes.shape[0], first.device
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    boxes = torch.empty((images, capacity, 4), dtype=dtype, device=device)
    scores = torch.empty((images, capacity), dtype=dtype, device=device)
    count = torch.empty((images,), dtype=torch.int64, device=device)
    if images == 0 or capacity == 0:
        return boxes, scores, count.zero_()

    segments = images * levels
    selection = {"LEVELS": levels, "A": anchors, "TILE": TILE, **constants(first.dtype)}
    maps, last = _maps(objectness)
    offsets, deltas_last = _maps(deltas)
    heights = [level.shape[2] for level in maps] + [0] * (MAX_LEVELS - levels)
    widths = [level.shape[3] for level in maps] + [0] * (MAX_LEVELS - levels)
    tiles = sum(-(-h * w * anchors // TILE) for h, w in zip(heights, widths, strict=True))
    pad = MAX_LEVELS - levels
    shared = {f"o{i}": level for i, level in enumerate([*maps, *maps[:1] * pad])}
    shared |= {**{f"h{i}": h for i, h in enumerate(heights)}, **{f"w{i}": w for i, w in enumerate(widths)}}
    digits = 1 << selection["DIGIT"]
    hist = torch.zeros((segments, selection["PASSES"], digits), dtype=torch.int32, device=device)
    counts = torch.empty((images, tiles, 2), dtype=torch.int32, device=device)
    candidate_boxes = torch.empty((segments * candidates, 4), dtype=dtype, device=device)
    logits = torch.empty((segments, candidates), dtype=dtype, device=device)
    keys = torch.zeros(
        (segments, candidates), dtype=torch.int64 if dtype == torch.float64 else torch.int32, device=device
    )
    keys = keys.view(key_dtype(first.dtype))
    order = torch.empty((segments, candidates), dtype=torch.int64, device=device)
    length = torch.empty((segments,), dtype=torch.int64, device=device)
    keep = torch.empty((segments, survivors), dtype=torch.int64, device=device)
    kept = torch.empty((segments,), dtype=torch.int64, device=device)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    with device_guard(first):
        for digit in range(selection["PASSES"]):
            histogram_kernel[(tiles, images)](
                hist_ptr=hist, candidates=candidates, passes=digit, last=last, **shared, **selection, **OPTIONS
            )
        shared |= {"hist_ptr": hist, "counts_ptr": counts, "candidates": candidates, "tiles": tiles, "last": last}
        count_kernel[(tiles, images)](**shared, **selection, **OPTIONS)
        _collect_kernel[(tiles, images)](
            **{f"d{i}": level for i, level in enumerate([*offsets, *offsets[:1] * pad])},
            cells_ptr=torch.cat([cell.to(dtype) for cell in cells]),
            sizes_ptr=image_sizes.to(torch.int64).contiguous(),
            boxes_ptr=candidate_boxes, logits_ptr=logits, keys_ptr=keys, deltas_last=deltas_last, **shared, **selection,
            **_collect_constants(strides, weights, clip, min_size, box_offset, dtype), **_collect_options(dtype),
        )  # fmt: skip
        _rank_kernel[(triton.cdiv(candidates, _ROWS), segments)](
            keys, order, length, candidates, ROWS=_ROWS, COLUMNS=_COLUMNS, **OPTIONS
        )
    nms._launch(candidate_boxes, order, None, length, candidates, threshold, box_offset, keep, kept, survivors)
    with device_guard(first):
        if top_n and per_batch:
            cut = torch.empty_like(kept)
            _cut_kernel[(1,)](
                keys, keep, kept, cut, segments, candidates, survivors, top_n,
                **constants(first.dtype), BLOCK=_CUT_BLOCK, **_CUT_OPTIONS,
            )  # fmt: skip
        else:
            cut = kept
        _write_kernel[(triton.cdiv(levels * survivors, _WRITE_BLOCK), images)](
            candidate_boxes, logits, keys, keep, cut, boxes, scores, count,
            candidates, survivors, capacity, survivors.bit_length(),
            LEVELS=levels, SORTED=bool(top_n) and not per_batch, COMPUTE=compute, BLOCK=_WRITE_BLOCK,
            **OPTIONS, **_EXACT,
        )  # fmt: skip
    return boxes, scores, count


def _collect_options(dtype: torch.dtype) -> dict[str, Any]:
    return {"num_warps": 8, **_EXACT}


def _key_name(dtype: torch.dtype) -> str:
    return "*u64" if dtype == torch.float64 else "*u32"


def _collect_case(dtype: torch.dtype, box_offset: int) -> CompileCase:
    compute = "*fp64" if dtype == torch.float64 else "*fp32"
    signature = {
        **level_signature(dtype), **{f"d{i}": f"*{TYPE_NAMES[dtype]}" for i in range(MAX_LEVELS)},
        "cells_ptr": compute, "sizes_ptr": "*i64", "counts_ptr": "*i32", "boxes_ptr": compute, "logits_ptr": compute,
        "keys_ptr": _key_name(dtype), "tiles": "i32", "deltas_last": "i32",
    }  # fmt: skip
    values = {"LEVELS": 5, "A": 3, "TILE": TILE, **constants(dtype)}
    values |= _collect_constants([4, 8, 16, 32, 64], [1.0] * 4, 4.135166556742356, 0.0, box_offset, dtype)
    label = f"collect-{TYPE_NAMES[dtype]}-o{box_offset}"
    return CompileCase(label, _collect_kernel, signature, values, _collect_options(dtype))


def _rank_case(dtype: torch.dtype) -> CompileCase:
    signature = {"keys_ptr": _key_name(dtype), "order_ptr": "*i64", "length_ptr": "*i64", "candidates": "i32"}
    constexprs = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    return CompileCase(f"rank-{TYPE_NAMES[dtype]}", _rank_kernel, signature, constexprs, OPTIONS)


def _cut_case(dtype: torch.dtype) -> CompileCase:
    signature = {"keys_ptr": _key_name(dtype), "keep_ptr": "*i64", "count_ptr": "*i64", "cut_ptr": "*i64"}
    signature |= dict.fromkeys(("segments", "candidates", "survivors", "top_n"), "i32")
    values = {**constants(dtype), "BLOCK": _CUT_BLOCK}
    return CompileCase(f"cut-{TYPE_NAMES[dtype]}", _cut_kernel, signature, values, _CUT_OPTIONS)


def _write_case(dtype: torch.dtype, is_sorted: bool) -> CompileCase:
    compute = "*fp64" if dtype == torch.float64 else "*fp32"
    signature = {
        "boxes_in": compute, "logits_ptr": compute, "keys_ptr": _key_name(dtype), "keep_ptr": "*i64",
        "cut_ptr": "*i64", "boxes_ptr": compute, "scores_ptr": compute, "total_ptr": "*i64",
        **dict.fromkeys(("candidates", "survivors", "capacity", "steps"), "i32"),
    }  # fmt: skip
    values = {
        "LEVELS": 5, "SORTED": is_sorted, "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": _WRITE_BLOCK,
    }  # fmt: skip
    label = f"write-{TYPE_NAMES[dtype]}-{'sorted' if is_sorted else 'by-level'}"
    return CompileCase(label, _write_kernel, signature, values, {**OPTIONS, **_EXACT})


COMPILE_CASES = [
    *[_collect_case(dtype, 1) for dtype in TYPE_NAMES],
    _collect_case(torch.float32, 0),
    *[_rank_case(dtype) for dtype in (torch.float32, torch.float64)],
    *[_cut_case(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)],
    *[_write_case(torch.float32, is_sorted) for is_sorted in (False, True)],
    _write_case(torch.float64, True),
]
