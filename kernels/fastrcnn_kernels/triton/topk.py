"""The best k of each image and level of a pyramid of scores, read in the layout of a convolution's output.

A radix select over keys whose order is that of the scores: one launch of ``histogram_kernel`` for each digit (two for
half types, three for float32, six for float64), in which every program first finds the digits above from the
histograms before. Then ``count_kernel`` counts, tile by tile, what is above the threshold and what equals it, so that
whoever collects knows its place without atomics: the result is the same every time, ties by lower index.

Scores are visited in the order of the anchors, (y * W + x) * A + a, also in NCHW: A streams, each of whole sectors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastrcnn_kernels.triton._launch import CompileCase

MAX_LEVELS = 5
TILE = 1024
SIZES = [f"{name}{i}" for name in ("h", "w") for i in range(MAX_LEVELS)]
TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
_KEY_BITS = {torch.float32: 32, torch.float64: 64, torch.float16: 16, torch.bfloat16: 16}


@triton.jit
def of_level(level, v0, v1, v2, v3, v4, LEVELS: tl.constexpr):
    """The entry of a level."""
    v = v0
    if LEVELS > 1:
        v = tl.where(level == 1, v1, v)
    if LEVELS > 2:
        v = tl.where(level == 2, v2, v)
    if LEVELS > 3:
        v = tl.where(level == 3, v3, v)
    if LEVELS > 4:
        v = tl.where(level == 4, v4, v)
    return v


@triton.jit
def locate(
    tile, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4, LEVELS: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Level of a tile, the number of the first tile of that level, and the cells of that level."""
    level = tile * 0
    first = tile * 0
    end = (h0 * w0 * A + TILE - 1) // TILE
    for i in tl.static_range(1, LEVELS):
        cells = of_level(i, h0 * w0, h1 * w1, h2 * w2, h3 * w3, h4 * w4, LEVELS)
        level += (tile >= end).to(tl.int32)
        first = tl.where(tile >= end, end, first)
        end += (cells * A + TILE - 1) // TILE
    return level, first, of_level(level, h0 * w0, h1 * w1, h2 * w2, h3 * w3, h4 * w4, LEVELS)


@triton.jit
def score_key(score, KEY_BITS: tl.constexpr):
    """An unsigned number that orders as the score: NaN highest, the zeros equal, never 0."""
    if KEY_BITS == 16:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(score.to(tl.float32) == 0.0, 0, bits)
        key = tl.where(bits < 0, ~bits, bits | 0x8000) & 0xFFFF
        return tl.where(score.to(tl.float32) != score.to(tl.float32), 0xFFFF, key).to(tl.uint32)
    elif KEY_BITS == 32:
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(score == 0.0, 0, bits)
        key = tl.where(bits < 0, ~bits, bits ^ -2147483648)
        return tl.where(score != score, -1, key).to(tl.uint32, bitcast=True)
    else:
        bits = score.to(tl.int64, bitcast=True)
        bits = tl.where(score == 0.0, 0, bits)
        key = tl.where(bits < 0, ~bits, bits ^ -9223372036854775808)
        return tl.where(score != score, -1, key).to(tl.uint64, bitcast=True)


@triton.jit
def load_tile(f, image, index, mask, plane, A: tl.constexpr, last):
    """Scores of the anchors ``index`` of an image, in a map [N, A, H, W] that is channels_last if ``last``."""
    cell, anchor = index // A, index % A
    offset = anchor * tl.where(last != 0, 1, plane) + cell * tl.where(last != 0, A, 1)
    return tl.load(f + image * (plane * A) + offset, mask=mask, other=0.0)


@triton.jit
def find_digit(counts, wanted):
    """The digit at which the ``wanted``-th best falls, and how many are still wanted there; counts by digit."""
    at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    digit = tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(at_least < wanted, counts, 0), axis=0)
    return digit, wanted - above


@triton.jit
def find_prefix(hist, wanted, passes, KEY_BITS: tl.constexpr, DIGIT: tl.constexpr):
    """The leading digits of the ``wanted``-th best key from ``passes`` histograms, and how many are wanted there."""
    prefix = (wanted * 0).to(tl.uint64) if KEY_BITS == 64 else (wanted * 0).to(tl.uint32)
    high = wanted * 0 + KEY_BITS
    for i in range(passes):
        counts = tl.load(hist + i * (1 << DIGIT) + tl.arange(0, 1 << DIGIT))
        digit, wanted = find_digit(counts, wanted)
        low = tl.maximum(high - DIGIT, 0)
        prefix = (prefix << (high - low).to(prefix.dtype)) | digit.to(prefix.dtype)
        high = low
    return prefix, high, wanted


@triton.jit(do_not_specialize=["candidates", "passes", "last", *SIZES])
def histogram_kernel(
    o0, o1, o2, o3, o4, hist_ptr, candidates, passes, last, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4,
    LEVELS: tl.constexpr, A: tl.constexpr, KEY_BITS: tl.constexpr, DIGIT: tl.constexpr, PASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Counts digit number ``passes`` of the keys that share the leading digits found so far. Grid: tiles, images.

    ``hist_ptr`` int32 [N, L, PASSES, 2**DIGIT], zero before the first pass.
    """
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    level, first, plane = locate(tile, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4, LEVELS, A, TILE)
    index = (tile - first) * TILE + tl.arange(0, TILE)
    inside = index < plane * A
    score = load_tile(of_level(level, o0, o1, o2, o3, o4, LEVELS), image, index, inside, plane, A, (last >> level) & 1)
    key = score_key(score, KEY_BITS)
    hist = hist_ptr + (image * LEVELS + level) * (PASSES << DIGIT)
    prefix, high, _ = find_prefix(hist, tl.minimum(candidates, plane * A), passes, KEY_BITS, DIGIT)
    # A shift by all the bits is not defined: before the first pass everything matches.
    inside = inside & ((passes == 0) | ((key >> tl.minimum(high, KEY_BITS - 1).to(key.dtype)) == prefix))
    low = tl.maximum(high - DIGIT, 0)
    digit = (key >> low.to(key.dtype)).to(tl.int32) & ((1 << (high - low)) - 1)
    counts = tl.histogram(digit, 1 << DIGIT, mask=inside)
    tl.atomic_add(hist + passes * (1 << DIGIT) + tl.arange(0, 1 << DIGIT), counts, mask=counts > 0)


@triton.jit(do_not_specialize=["candidates", "tiles", "last", *SIZES])
def count_kernel(
    o0, o1, o2, o3, o4, hist_ptr, counts_ptr, candidates, tiles, last, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4,
    LEVELS: tl.constexpr, A: tl.constexpr, KEY_BITS: tl.constexpr, DIGIT: tl.constexpr, PASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """How many of a tile are above the threshold, and how many equal it: int32 [N, tiles, 2]. Grid: tiles, images."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    level, first, plane = locate(tile, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4, LEVELS, A, TILE)
    index = (tile - first) * TILE + tl.arange(0, TILE)
    inside = index < plane * A
    score = load_tile(of_level(level, o0, o1, o2, o3, o4, LEVELS), image, index, inside, plane, A, (last >> level) & 1)
    key = score_key(score, KEY_BITS)
    hist = hist_ptr + (image * LEVELS + level) * (PASSES << DIGIT)
    threshold, _, _ = find_prefix(hist, tl.minimum(candidates, plane * A), PASSES, KEY_BITS, DIGIT)
    counts = counts_ptr + (image * tiles + tile) * 2
    tl.store(counts, tl.sum((inside & (key > threshold)).to(tl.int32), axis=0))
    tl.store(counts + 1, tl.sum((inside & (key == threshold)).to(tl.int32), axis=0))


@triton.jit
def places(key, inside, threshold, quota, counts_ptr, tile, first, BLOCK: tl.constexpr):
    """Whether each key of a tile is chosen, and its place among those chosen of the level, in order of the index.

    ``counts_ptr`` points to the counts of tile 0 of the image.
    """
    above = tile * 0
    equal = tile * 0
    for start in range(first, tile, BLOCK):
        at = start + tl.arange(0, BLOCK)
        above += tl.sum(tl.load(counts_ptr + at * 2, mask=at < tile, other=0), axis=0)
        equal += tl.sum(tl.load(counts_ptr + at * 2 + 1, mask=at < tile, other=0), axis=0)
    is_above = (inside & (key > threshold)).to(tl.int32)
    is_equal = (inside & (key == threshold)).to(tl.int32)
    above_before = above + tl.cumsum(is_above, axis=0) - is_above
    equal_before = equal + tl.cumsum(is_equal, axis=0) - is_equal
    chosen = (is_above != 0) | ((is_equal != 0) & (equal_before < quota))
    return chosen, above_before + tl.minimum(equal_before, quota)


def constants(dtype: torch.dtype) -> dict[str, int]:
    """Bits of a key, bits of a digit, number of digits."""
    bits = _KEY_BITS[dtype]
    digit = 8 if bits == 16 else 11
    return {"KEY_BITS": bits, "DIGIT": digit, "PASSES": -(-bits // digit)}


def key_dtype(dtype: torch.dtype) -> torch.dtype:
    """What keys are stored in."""
    return torch.uint64 if dtype == torch.float64 else torch.uint32


OPTIONS: dict[str, Any] = {"num_warps": 4}


def level_signature(dtype: torch.dtype) -> dict[str, str]:
    """Types of the maps and of the run-time sizes, for COMPILE_CASES."""
    maps = {f"o{i}": f"*{TYPE_NAMES[dtype]}" for i in range(MAX_LEVELS)}
    return {**maps, "hist_ptr": "*i32", "last": "i32", "candidates": "i32", **dict.fromkeys(SIZES, "i32")}


def _case(kernel: Any, name: str, dtype: torch.dtype, extra: dict[str, str]) -> CompileCase:
    values = {"LEVELS": 5, "A": 3, "TILE": TILE, **constants(dtype)}
    return CompileCase(f"{name}-{TYPE_NAMES[dtype]}", kernel, {**level_signature(dtype), **extra}, values, OPTIONS)


COMPILE_CASES = [
    *[_case(histogram_kernel, "histogram", dtype, {"passes": "i32"}) for dtype in TYPE_NAMES],
    *[_case(count_kernel, "count", dtype, {"counts_ptr": "*i32", "tiles": "i32"}) for dtype in TYPE_NAMES],
]
