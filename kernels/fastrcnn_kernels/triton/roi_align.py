"""RoIAlign of all levels in one launch; the rules are in ``fastrcnn_kernels/roi_align.py``.

One program for each region, row of bins and block of channels; level, image and box are read in the program. At
sampling ratio 2 it makes 16 loads of [PW, channels] and is bound by L2 traffic. channels_last maps are read in
contiguous runs of channels, NCHW maps by strides. A padding region costs an early exit. Up to ``MAX_LEVELS`` maps, each
its own pointer. The gradient is in ``roi_align_backward.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

MAX_LEVELS = 5

TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
LEVEL_SIZES = [f"{name}{i}" for name in ("height", "width") for i in range(MAX_LEVELS)]


@triton.jit
def _divide(a, b, COMPUTE: tl.constexpr):
    # Rounded: a bin size one unit off can change the adaptive grid.
    if COMPUTE == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def axis_bins(low, high, scale, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr):
    """Start, bin size and samples a bin along one axis; all of the shape of ``low``."""
    offset: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low * scale - offset
    extent = high * scale - offset - start
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    size = _divide(extent, tl.full([], BINS, COMPUTE) + extent * 0, COMPUTE)
    if RATIO > 0:
        grid = extent * 0 + RATIO
    else:
        grid = tl.minimum(tl.maximum(tl.ceil(size), 0.0), 65536.0)
    return start, size, grid


@triton.jit
def first_sample(start, size, grid, bin_index, pixel):
    """A number not above that of the first sample of a bin past ``pixel``, as a float >= 0."""
    # A bin of size zero or less has no samples.
    before = (pixel - start - bin_index * size) / tl.where(size > 0.0, size, 1.0) * grid - 3.0
    # A comparison that NaN fails.
    return tl.where(before > 0.0, tl.floor(tl.minimum(before, 65536.0)), 0.0)


@triton.jit
def place_sample(start, size, grid, bin_index, sample, extent, COMPUTE: tl.constexpr):
    """Where a sample falls on a map of ``extent`` pixels, clamped, and whether it counts."""
    at = start + bin_index * size + _divide((sample + 0.5) * size, tl.maximum(grid, 1.0), COMPUTE)
    inside = (at >= -1.0) & (at <= extent) & (sample < grid)
    at = tl.where(inside, tl.minimum(tl.maximum(at, 0.0), extent - 1.0), 0.0)
    return at, inside


@triton.jit
def pick_level(
    level, f0, f1, f2, f3, f4, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    SCALE0: tl.constexpr, SCALE1: tl.constexpr, SCALE2: tl.constexpr, SCALE3: tl.constexpr, SCALE4: tl.constexpr,
    LEVELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Pointer, height, width and scale of a level."""
    f, height, width, scale = f0, height0, width0, tl.full([], SCALE0, COMPUTE)
    if LEVELS > 1:
        is_it = level == 1
        f, height, width = tl.where(is_it, f1, f), tl.where(is_it, height1, height), tl.where(is_it, width1, width)
        scale = tl.where(is_it, tl.full([], SCALE1, COMPUTE), scale)
    if LEVELS > 2:
        is_it = level == 2
        f, height, width = tl.where(is_it, f2, f), tl.where(is_it, height2, height), tl.where(is_it, width2, width)
        scale = tl.where(is_it, tl.full([], SCALE2, COMPUTE), scale)
    if LEVELS > 3:
        is_it = level == 3
        f, height, width = tl.where(is_it, f3, f), tl.where(is_it, height3, height), tl.where(is_it, width3, width)
        scale = tl.where(is_it, tl.full([], SCALE3, COMPUTE), scale)
    if LEVELS > 4:
        is_it = level == 4
        f, height, width = tl.where(is_it, f4, f), tl.where(is_it, height4, height), tl.where(is_it, width4, width)
        scale = tl.where(is_it, tl.full([], SCALE4, COMPUTE), scale)
    return f, height, width, scale


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _sample_row(
    f, y, x, inside, row_stride, column_stride, channel, channel_stride, height, width, weight, acc,
    CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add one bilinear sample for each column of bins: y is a scalar, x and inside are [PW], acc is [PW, channels]."""
    y_low = tl.minimum(y.to(tl.int32), height - 1)
    x_low = tl.minimum(x.to(tl.int32), width - 1)
    fy = y - y_low.to(COMPUTE)
    fx = x - x_low.to(COMPUTE)
    in_channels = (channel < CHANNELS)[None, :]
    for corner in tl.static_range(4):
        # The far pixel has weight zero at the edge; what has weight zero is not read.
        wy = fy if corner // 2 == 1 else 1.0 - fy
        wx = fx if corner % 2 == 1 else 1.0 - fx
        w = wy * wx * weight
        row = (y_low + corner // 2).to(tl.int64) * row_stride
        column = (x_low + corner % 2).to(tl.int64) * column_stride
        offset = row + column[:, None] + channel.to(tl.int64)[None, :] * channel_stride
        value = tl.load(f + offset, mask=(inside & (w > 0.0))[:, None] & in_channels, other=0.0)
        acc += w[:, None] * value.to(COMPUTE)
    return acc


@triton.jit(do_not_specialize=["num_images", *LEVEL_SIZES])
def _forward_kernel(
    f0, f1, f2, f3, f4, rois_ptr, levels_ptr, out_ptr, num_images,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    SCALE0: tl.constexpr, SCALE1: tl.constexpr, SCALE2: tl.constexpr, SCALE3: tl.constexpr, SCALE4: tl.constexpr,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of bins of one region. Grid: regions x PH, blocks of channels."""
    pid = tl.program_id(0).to(tl.int64)
    roi = pid // PH
    ph = (pid % PH).to(tl.int32)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pw = tl.arange(0, BLOCK_W)
    image = tl.load(rois_ptr + roi * 5)
    x1 = tl.load(rois_ptr + roi * 5 + 1)
    y1 = tl.load(rois_ptr + roi * 5 + 2)
    x2 = tl.load(rois_ptr + roi * 5 + 3)
    y2 = tl.load(rois_ptr + roi * 5 + 4)
    level = tl.load(levels_ptr + roi)
    live = (image >= 0.0) & (image < num_images) & (level >= 0) & (level < LEVELS)
    live = live & _is_finite(x1) & _is_finite(y1) & _is_finite(x2) & _is_finite(y2)
    acc = tl.zeros([BLOCK_W, BLOCK_C], dtype=COMPUTE)
    if live:
        f, height, width, scale = pick_level(
            level, f0, f1, f2, f3, f4, height0, height1, height2, height3, height4,
            width0, width1, width2, width3, width4, SCALE0, SCALE1, SCALE2, SCALE3, SCALE4, LEVELS, COMPUTE,
        )  # fmt: skip
        f += image.to(tl.int64) * height.to(tl.int64) * width * CHANNELS
        channel_stride = height.to(tl.int64) * width
        row_stride = width.to(tl.int64)
        column_stride = row_stride * 0 + 1
        if CHANNELS_LAST:
            channel_stride, row_stride, column_stride = column_stride, row_stride * CHANNELS, column_stride * CHANNELS
        start_y, size_y, grid_y = axis_bins(y1, y2, scale, PH, RATIO, ALIGNED, COMPUTE)
        start_x, size_x, grid_x = axis_bins(x1, x2, scale, PW, RATIO, ALIGNED, COMPUTE)
        ph_value = ph.to(COMPUTE)
        pw_value = pw.to(COMPUTE)
        norm = 1.0 / tl.maximum(grid_y * grid_x, 1.0)
        if RATIO > 0:
            for iy in tl.static_range(RATIO):
                y, inside_y = place_sample(start_y, size_y, grid_y, ph_value, grid_y * 0 + iy, height, COMPUTE)
                for ix in tl.static_range(RATIO):
                    x, inside_x = place_sample(start_x, size_x, grid_x, pw_value, pw_value * 0 + ix, width, COMPUTE)
                    weight = tl.where(inside_y, norm, 0.0)
                    acc = _sample_row(
                        f, y, x, inside_x & (pw < PW), row_stride, column_stride, channel, channel_stride,
                        height, width, weight, acc, CHANNELS, COMPUTE,
                    )  # fmt: skip
        else:
            # Samples lie at most one pixel apart, at least half a pixel if a bin has several: only those that can
            # fall on the map are visited, however large the region.
            first_y = first_sample(start_y, size_y, grid_y, ph_value, -1.0)
            first_x = first_sample(start_x, size_x, grid_x, pw_value, -1.0)
            count_y = tl.minimum(grid_y, height * 2.0 + 10.0).to(tl.int32)
            count_x = tl.minimum(grid_x, width * 2.0 + 10.0).to(tl.int32)
            for iy in range(count_y):
                y, inside_y = place_sample(start_y, size_y, grid_y, ph_value, first_y + iy, height, COMPUTE)
                if inside_y:
                    for ix in range(count_x):
                        x, inside_x = place_sample(start_x, size_x, grid_x, pw_value, first_x + ix, width, COMPUTE)
                        acc = _sample_row(
                            f, y, x, inside_x & (pw < PW), row_stride, column_stride, channel, channel_stride,
                            height, width, norm, acc, CHANNELS, COMPUTE,
                        )  # fmt: skip
    out = out_ptr + roi * (CHANNELS * PH * PW)
    if CHANNELS_LAST:
        offset = (ph * PW + pw[:, None]) * CHANNELS + channel[None, :]
    else:
        offset = channel[None, :] * (PH * PW) + ph * PW + pw[:, None]
    mask = (pw < PW)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(out + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of coordinates and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(features: list[Tensor]) -> bool:
    """Whether any map is channels_last only: as in ``roi_align_reference.py``, which this layer must not import."""
    return any(f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous() for f in features)


def new_map(shape: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    """An uninitialised tensor in one of the two memory formats."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def kernel_constants(
    dtype: torch.dtype, channels: int, channels_last: bool, scales: list[float], ph: int, pw: int, ratio: int,
    aligned: bool,
) -> dict[str, Any]:  # fmt: skip
    padded = scales + scales[:1] * (MAX_LEVELS - len(scales))
    return {
        **{f"SCALE{i}": scale for i, scale in enumerate(padded)},
        "LEVELS": len(scales),
        "CHANNELS": channels,
        "CHANNELS_LAST": channels_last,
        "PH": ph,
        "PW": pw,
        "RATIO": max(ratio, 0),
        "ALIGNED": aligned,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _blocks(channels: int, channels_last: bool, pw: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of the forward: 2048 sums a program, a quarter of that where loads are not contiguous."""
    block_w = triton.next_power_of_2(pw)
    sums = 2048 if channels_last else 512
    block_c = min(256, triton.next_power_of_2(channels), max(1, sums // block_w))
    return {"BLOCK_W": block_w, "BLOCK_C": block_c}, {"num_warps": 4 if block_w * block_c >= 512 else 1}


def map_arguments(maps: list[Tensor]) -> dict[str, Any]:
    padded = maps + maps[:1] * (MAX_LEVELS - len(maps))
    arguments: dict[str, Any] = {f"f{i}": f for i, f in enumerate(padded)}
    arguments.update({f"height{i}": f.shape[2] for i, f in enumerate(padded)})
    arguments.update({f"width{i}": f.shape[3] for i, f in enumerate(padded)})
    return {**arguments, "num_images": maps[0].shape[0]}


def check_maps(maps: int, dtype: torch.dtype) -> None:
    if maps > MAX_LEVELS:
        raise ValueError(f"roi_align: the Triton kernels take up to {MAX_LEVELS} feature maps, got {maps}")
    if dtype not in TYPE_NAMES:
        raise TypeError(f"roi_align: the Triton kernels take float16, bfloat16, float32 and float64, not {dtype}")


def roi_align(
    features: list[Tensor], rois: Tensor, levels: Tensor, spatial_scales: list[float],
    pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::roi_align``. An image or level that does not exist gives zeros."""
    first = features[0]
    check_maps(len(features), first.dtype)
    channels_last = is_channels_last(features)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [f.contiguous(memory_format=layout) for f in features]
    num_rois, channels = rois.shape[0], first.shape[1]
    out = new_map((num_rois, channels, pooled_height, pooled_width), first, channels_last)
    if out.numel() == 0:
        return out
    blocks, options = _blocks(channels, channels_last, pooled_width)
    with device_guard(first):
        _forward_kernel[(num_rois * pooled_height, triton.cdiv(channels, blocks["BLOCK_C"]))](
            **map_arguments(maps),
            rois_ptr=rois.to(compute_dtype(first.dtype)).contiguous(),
            levels_ptr=levels.contiguous(),
            out_ptr=out,
            **kernel_constants(
                first.dtype, channels, channels_last, list(spatial_scales), pooled_height, pooled_width, sampling_ratio,
                aligned,
            ),
            **blocks,
            **options,
        )  # fmt: skip
    return out


def compile_signature(dtype: torch.dtype) -> dict[str, str]:
    """Types of the run-time arguments that the two kernels share."""
    return {
        **{f"f{i}": f"*{TYPE_NAMES[dtype]}" for i in range(MAX_LEVELS)},
        **dict.fromkeys(["num_images", *LEVEL_SIZES], "i32"),
        "rois_ptr": "*fp64" if dtype == torch.float64 else "*fp32",
    }


def _case(dtype: torch.dtype, channels_last: bool, bins: int, ratio: int) -> CompileCase:
    signature = {**compile_signature(dtype), "levels_ptr": "*i64", "out_ptr": f"*{TYPE_NAMES[dtype]}"}
    constants = kernel_constants(dtype, 256, channels_last, COMPILE_SCALES, bins, bins, ratio, ratio == 0)
    blocks, options = _blocks(256, channels_last, bins)
    label = f"{TYPE_NAMES[dtype]}-{'nhwc' if channels_last else 'nchw'}-{bins}-ratio{ratio}"
    return CompileCase(label, _forward_kernel, signature, {**constants, **blocks}, options)


COMPILE_SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
COMPILED = [
    # dtype, channels_last, bins, sampling ratio
    (torch.bfloat16, True, 7, 2),
    (torch.bfloat16, True, 14, 2),
    (torch.bfloat16, True, 7, 0),
    (torch.float16, True, 7, 2),
    (torch.float32, True, 7, 2),
    (torch.float32, False, 14, 2),
    (torch.float32, False, 14, 0),
    (torch.float64, False, 7, 2),
]
COMPILE_CASES = [_case(*case) for case in COMPILED]
