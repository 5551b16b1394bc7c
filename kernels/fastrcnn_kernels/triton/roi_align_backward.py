"""Gradient of RoIAlign in all levels, in one launch and without atomics; rules in ``fastrcnn_kernels/roi_align.py``.

One program for each tile of 8 x 8 pixels of a gradient and block of channels. It walks the regions of its image and
level that touch the tile, in their order, and adds ``W[pixels, bins] @ G[bins, channels]``, W being the product of the
two axes' weights. Every pixel is written once, by one program: no zero-fill, no cast, and bitwise the same gradient
every time. A launch before it puts the regions in order of level and image: a region's place is the number of those
that come before it, which for some thousand regions is less than a sort, and one launch instead of fifteen.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.roi_align import (
    COMPILE_SCALES,
    COMPILED,
    LEVEL_SIZES,
    TYPE_NAMES,
    axis_bins,
    check_maps,
    compile_signature,
    compute_dtype,
    first_sample,
    kernel_constants,
    map_arguments,
    new_map,
    pick_level,
    place_sample,
)

_TILE = 8  # pixels along each side of a tile of the backward
_BINS = 32  # bins multiplied at once in the backward on tensor cores
_SCAN = 128  # regions tested at once against a tile


@triton.jit
def _pixel_weights(
    start, size, grid, bin_index, pixel, first, extent, RATIO: tl.constexpr, TILE: tl.constexpr, COMPUTE: tl.constexpr
):
    """Weights [pixels, bins] of one axis: bilinear weights are hats of width one about each clamped sample."""
    weights = tl.zeros([pixel.shape[0], bin_index.shape[0]], dtype=COMPUTE)
    if RATIO > 0:
        for i in tl.static_range(RATIO):
            at, inside = place_sample(start, size, grid, bin_index, bin_index * 0 + i, extent, COMPUTE)
            hat = tl.maximum(1.0 - tl.abs(at[None, :] - pixel[:, None]), 0.0)
            weights += tl.where(inside[None, :], hat, 0.0)
    else:
        # Clamped samples sit on the outermost pixels: from the first tile on, those before the map count too.
        skipped = first_sample(start, size, grid, bin_index, first - 1.0)
        count = tl.minimum(grid, 2.0 * TILE + 14.0).to(tl.int32)
        for i in range(count):
            at, inside = place_sample(start, size, grid, bin_index, skipped + i, extent, COMPUTE)
            hat = tl.maximum(1.0 - tl.abs(at[None, :] - pixel[:, None]), 0.0)
            weights += tl.where(inside[None, :], hat, 0.0)
    return weights


@triton.jit
def _reach(start, size, BINS: tl.constexpr):
    """Lowest and highest pixel that a region can touch along one axis, as floats, generously."""
    end = start + size * BINS
    return tl.minimum(start, end) - 2.0, tl.maximum(start, end) + 2.0


@triton.jit(do_not_specialize=["num_images", *LEVEL_SIZES])
def _backward_kernel(
    f0, f1, f2, f3, f4, grad_ptr, rois_ptr, order_ptr, begin_ptr, num_images,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    SCALE0: tl.constexpr, SCALE1: tl.constexpr, SCALE2: tl.constexpr, SCALE3: tl.constexpr, SCALE4: tl.constexpr,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_BINS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One tile of one image at one level. Grid: tiles of all levels and images, blocks of channels."""
    tile = tl.program_id(0).to(tl.int32)
    # Tiles are numbered level by level, image by image, row by row.
    level = tile * 0
    for i in tl.static_range(LEVELS - 1):
        _, height, width, _ = pick_level(
            i, f0, f1, f2, f3, f4, height0, height1, height2, height3, height4,
            width0, width1, width2, width3, width4, SCALE0, SCALE1, SCALE2, SCALE3, SCALE4, LEVELS, COMPUTE,
        )  # fmt: skip
        tiles = num_images * tl.cdiv(height, TILE) * tl.cdiv(width, TILE)
        past = (level == i) & (tile >= tiles)
        tile = tl.where(past, tile - tiles, tile)
        level = tl.where(past, level + 1, level)
    f, height, width, scale = pick_level(
        level, f0, f1, f2, f3, f4, height0, height1, height2, height3, height4,
        width0, width1, width2, width3, width4, SCALE0, SCALE1, SCALE2, SCALE3, SCALE4, LEVELS, COMPUTE,
    )  # fmt: skip
    across = tl.cdiv(width, TILE)
    tiles = across * tl.cdiv(height, TILE)
    image = tile // tiles
    top = (tile % tiles) // across * TILE
    left = tile % across * TILE
    pixel = tl.arange(0, TILE * TILE)
    y = top + pixel // TILE
    x = left + pixel % TILE
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([TILE * TILE, BLOCK_C], dtype=COMPUTE)

    group = level * num_images + image
    position = tl.load(begin_ptr + group).to(tl.int32)
    end = tl.load(begin_ptr + group + 1).to(tl.int32)
    lanes = tl.arange(0, SCAN)
    bins = tl.arange(0, BLOCK_BINS)
    while position < end:
        listed = position + lanes < end
        rois = tl.load(order_ptr + position + lanes, mask=listed, other=0)
        x1 = tl.load(rois_ptr + rois * 5 + 1, mask=listed, other=0.0)
        y1 = tl.load(rois_ptr + rois * 5 + 2, mask=listed, other=0.0)
        x2 = tl.load(rois_ptr + rois * 5 + 3, mask=listed, other=0.0)
        y2 = tl.load(rois_ptr + rois * 5 + 4, mask=listed, other=0.0)
        start_y, size_y, _grid_y = axis_bins(y1, y2, scale, PH, RATIO, ALIGNED, COMPUTE)
        start_x, size_x, _grid_x = axis_bins(x1, x2, scale, PW, RATIO, ALIGNED, COMPUTE)
        low_y, high_y = _reach(start_y, size_y, PH)
        low_x, high_x = _reach(start_x, size_x, PW)
        touches = listed & (low_y < top + TILE) & (high_y > top) & (low_x < left + TILE) & (high_x > left)
        next_lane = tl.min(tl.where(touches, lanes, SCAN), axis=0)
        while next_lane < SCAN:
            roi = tl.load(order_ptr + position + next_lane)
            # Again for this region alone, as scalars.
            rx1 = tl.load(rois_ptr + roi * 5 + 1)
            ry1 = tl.load(rois_ptr + roi * 5 + 2)
            rx2 = tl.load(rois_ptr + roi * 5 + 3)
            ry2 = tl.load(rois_ptr + roi * 5 + 4)
            begin_y, bin_y, samples_y = axis_bins(ry1, ry2, scale, PH, RATIO, ALIGNED, COMPUTE)
            begin_x, bin_x, samples_x = axis_bins(rx1, rx2, scale, PW, RATIO, ALIGNED, COMPUTE)
            norm = 1.0 / tl.maximum(samples_y * samples_x, 1.0)
            grad = grad_ptr + roi * (CHANNELS * PH * PW)
            for first_bin in range(0, PH * PW, BLOCK_BINS):
                bin_index = first_bin + bins
                in_bins = bin_index < PH * PW
                by = (bin_index // PW).to(COMPUTE)
                bx = (bin_index % PW).to(COMPUTE)
                wy = _pixel_weights(begin_y, bin_y, samples_y, by, y.to(COMPUTE), top, height, RATIO, TILE, COMPUTE)
                wx = _pixel_weights(begin_x, bin_x, samples_x, bx, x.to(COMPUTE), left, width, RATIO, TILE, COMPUTE)
                w = tl.where(in_bins[None, :], wy * wx * norm, 0.0)
                if CHANNELS_LAST:
                    offset = bin_index[:, None] * CHANNELS + channel[None, :]
                else:
                    offset = channel[None, :] * (PH * PW) + bin_index[:, None]
                # A gradient of which this tile has no share is not read: were it NaN, it would spoil the sum.
                needed = in_bins & (tl.max(w, axis=0) > 0.0)
                g = tl.load(grad + offset, mask=needed[:, None] & (channel < CHANNELS)[None, :], other=0.0).to(COMPUTE)
                acc += tl.dot(w, g, input_precision=PRECISION, out_dtype=COMPUTE)
            next_lane = tl.min(tl.where(touches & (lanes > next_lane), lanes, SCAN), axis=0)
        position += SCAN

    target = f + image.to(tl.int64) * height * width * CHANNELS
    spot = y.to(tl.int64) * width + x
    if CHANNELS_LAST:
        offset = spot[:, None] * CHANNELS + channel[None, :]
    else:
        offset = channel.to(tl.int64)[None, :] * (height.to(tl.int64) * width) + spot[:, None]
    mask = ((y < height) & (x < width))[:, None] & (channel < CHANNELS)[None, :]
    tl.store(target + offset, acc.to(f0.dtype.element_ty), mask=mask)


def _blocks(dtype: torch.dtype, channels: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options of the backward.

    float16 and bfloat16 gradients are exact in TF32, and its error in the weights (2**-11) is below the rounding of the
    result; float32 takes exact products.
    """
    narrow = dtype in (torch.float16, torch.bfloat16)
    block_c = min(128 if narrow else 32, max(16, triton.next_power_of_2(channels)))
    # Without a limit stated ptxas aims at two blocks a multiprocessor and spills a few words.
    constants = {
        "PRECISION": "tf32" if narrow else "ieee",
        "TILE": _TILE,
        "BLOCK_C": block_c,
        "BLOCK_BINS": _BINS if narrow else 16,
        "SCAN": _SCAN,
    }
    return constants, {"num_warps": 4 if narrow and block_c < 128 else 8, "num_stages": 1, "maxnreg": 248}


@triton.jit
def _group_of(rois_ptr, levels_ptr, index, listed, num_images, LEVELS: tl.constexpr):
    """level * num_images + image of each region; LEVELS * num_images for those that are absent."""
    image = tl.load(rois_ptr + index * 5, mask=listed, other=-1.0)
    level = tl.load(levels_ptr + index, mask=listed, other=-1)
    live = listed & (image >= 0) & (image < num_images) & (level >= 0) & (level < LEVELS)
    for side in tl.static_range(1, 5):
        # Infinity and NaN less themselves are not zero.
        corner = tl.load(rois_ptr + index * 5 + side, mask=listed, other=0.0)
        live = live & (corner - corner == 0.0)
    group = level.to(tl.int32) * num_images + tl.where(live, image, 0.0).to(tl.int32)
    return tl.where(live, group, LEVELS * num_images)


@triton.jit(do_not_specialize=["count", "num_images"])
def _order_kernel(
    rois_ptr, levels_ptr, order_ptr, begin_ptr, count, num_images,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``order_ptr`` [count], ``begin_ptr`` [groups + 1]. Grid: blocks of regions, and of groups behind them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    region = row < count
    groups = LEVELS * num_images
    # A row behind the regions stands for the first place of a group: before all its regions.
    group = _group_of(rois_ptr, levels_ptr, row, region, num_images, LEVELS)
    group = tl.where(region, group, row - count)
    index = tl.where(region, row, -1)
    place = tl.zeros([ROWS], tl.int32)
    for start in range(0, count, COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        theirs = _group_of(rois_ptr, levels_ptr, other, other < count, num_images, LEVELS)
        before = (theirs[None, :] < group[:, None]) | (
            (theirs[None, :] == group[:, None]) & (other[None, :] < index[:, None])
        )
        place += tl.sum((before & (other < count)[None, :]).to(tl.int32), axis=1)
    tl.store(order_ptr + place, row.to(tl.int64), mask=region)
    tl.store(begin_ptr + row - count, place.to(tl.int64), mask=(row >= count) & (row - count <= groups))


_ORDER = {"ROWS": 32, "COLUMNS": 32}
_ORDER_OPTIONS = {"num_warps": 4}


def _in_order(rois: Tensor, levels: Tensor, num_images: int, num_levels: int) -> tuple[Tensor, Tensor]:
    """Regions by (level, image), in their order within each, absent ones last; and where each group begins."""
    count, groups = rois.shape[0], num_levels * num_images
    order = torch.empty((count,), dtype=torch.int64, device=rois.device)
    begin = torch.empty((groups + 1,), dtype=torch.int64, device=rois.device)
    _order_kernel[(triton.cdiv(count + groups + 1, _ORDER["ROWS"]),)](
        rois, levels, order, begin, count, num_images, LEVELS=num_levels, **_ORDER, **_ORDER_OPTIONS
    )
    return order, begin


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, levels: Tensor, sizes: list[int], spatial_scales: list[float],
    sampling_ratio: int, aligned: bool, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::roi_align_backward``. Deterministic."""
    num_images, channels = sizes[:2]
    shapes = list(zip(sizes[2::2], sizes[3::2], strict=True))
    check_maps(len(shapes), grad_output.dtype)
    grad = grad_output.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    maps = [new_map((num_images, channels, h, w), grad, channels_last) for h, w in shapes]
    tiles = sum(num_images * triton.cdiv(h, _TILE) * triton.cdiv(w, _TILE) for h, w in shapes)
    if tiles * channels == 0:
        return maps
    rois = rois.to(compute_dtype(grad.dtype)).contiguous()
    blocks, options = _blocks(grad.dtype, channels)
    _, _, ph, pw = grad.shape
    with device_guard(grad):
        order, begin = _in_order(rois, levels.contiguous(), num_images, len(shapes))
        _backward_kernel[(tiles, triton.cdiv(channels, blocks["BLOCK_C"]))](
            **map_arguments(maps),
            grad_ptr=grad,
            rois_ptr=rois,
            order_ptr=order,
            begin_ptr=begin,
            **kernel_constants(
                grad.dtype, channels, channels_last, list(spatial_scales), ph, pw, sampling_ratio, aligned
            ),
            **blocks,
            **options,
        )
    return maps


def _case(dtype: torch.dtype, channels_last: bool, bins: int, ratio: int) -> CompileCase:
    signature = {
        **compile_signature(dtype),
        "grad_ptr": f"*{TYPE_NAMES[dtype]}",
        "order_ptr": "*i64",
        "begin_ptr": "*i64",
    }
    constants = kernel_constants(dtype, 256, channels_last, COMPILE_SCALES, bins, bins, ratio, ratio == 0)
    blocks, options = _blocks(dtype, 256)
    label = f"{TYPE_NAMES[dtype]}-{'nhwc' if channels_last else 'nchw'}-{bins}-ratio{ratio}"
    return CompileCase(label, _backward_kernel, signature, {**constants, **blocks}, options)


def _order_case(name: str) -> CompileCase:
    signature = {"rois_ptr": f"*{name}", "levels_ptr": "*i64", "order_ptr": "*i64", "begin_ptr": "*i64",
                 "count": "i32", "num_images": "i32"}  # fmt: skip
    return CompileCase(f"order-{name}", _order_kernel, signature, {"LEVELS": 4, **_ORDER}, _ORDER_OPTIONS)


COMPILE_CASES = [*[_case(*case) for case in COMPILED], *[_order_case(name) for name in ("fp32", "fp64")]]
