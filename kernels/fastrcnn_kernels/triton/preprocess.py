"""Images of different sizes to one normalised batch in one launch.

``preprocess_kernel``: a program makes a tile of one image of the batch, padding included. For each output pixel it
walks the taps along y, for each of them the taps along x, and rounds to a grey level after either pass, as Pillow does;
the neighbours' loads hit the cache. Weights are computed where they are used, in float64 for the columns and rows of a
tile (not for its pixels), and rounded to 22 bits: the grey levels are Pillow's to the bit.

Each image is read once (0.9 MB for 640 x 480) and the batch written once (13 MB for 800 x 1344 in float32, 8.6 MB in
bfloat16 with four channels): bound by the stores. Images are found by address, so they need no common buffer, or by
offset in an arena (:mod:`fastrcnn_kernels.triton.preprocess_arena`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

FIELDS = 7  # of an image: address, height, width, output height, output width, flip, row stride
ARENA_FIELDS = 6  # the same of an image in an arena: its offset there, and no stride, as rows are not apart
_PRECISION = tl.constexpr(22)
_HALF = tl.constexpr(1 << 21)


@triton.jit
def _axis(out, size, wanted):
    """Pillow's window of each output: first input, number of inputs, centre, and 1 / the filter's widening."""
    scale = size.to(tl.float64) / wanted.to(tl.float64)
    widening = tl.maximum(scale, 1.0)
    centre = (out.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - widening + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + widening + 0.5).to(tl.int32), size)
    inverse = tl.full([1], 1.0, tl.float64) / widening
    return first, last - first, centre, inverse


@triton.jit
def _raw_weight(tap, first, count, centre, inverse):
    distance = tl.abs(((first + tap).to(tl.float64) - centre + 0.5) * inverse)
    return tl.where((tap < count) & (distance < 1.0), 1.0 - distance, 0.0)


@triton.jit
def _total(taps, first, count, centre, inverse):
    total = centre * 0.0
    for tap in range(taps):
        total += _raw_weight(tap, first, count, centre, inverse)
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def _weight(tap, first, count, centre, inverse, total):
    share = _raw_weight(tap, first, count, centre, inverse) / total
    return (share * 4194304.0 + 0.5).to(tl.int32)


@triton.jit
def _taps(size, wanted):
    """No output has more taps than this."""
    scale = size.to(tl.float64) / wanted.to(tl.float64)
    return 2 * tl.ceil(tl.maximum(scale, 1.0)).to(tl.int32) + 1


@triton.jit(do_not_specialize=["height", "width", "tiles_x", "tiles"])
def preprocess_kernel(
    arena_ptr,
    images_ptr,
    out_ptr,
    height,
    width,
    tiles_x,
    tiles,
    mean_0,
    mean_1,
    mean_2,
    std_0,
    std_1,
    std_2,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    ARENA: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
):
    """One tile of one image. Grid: images x tiles, flat.

    ``images_ptr`` int64: FIELDS or, with ``ARENA``, ARENA_FIELDS of each image; flip is 1 for left and right, plus 2
    for top and bottom. ``NORMALIZE`` false: bytes out, no padding.
    """
    pid = tl.program_id(0).to(tl.int64)
    image = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    about = images_ptr + image * (6 if ARENA else 7)
    in_height = tl.load(about + 1).to(tl.int32)
    in_width = tl.load(about + 2).to(tl.int32)
    out_height = tl.load(about + 3).to(tl.int32)
    out_width = tl.load(about + 4).to(tl.int32)
    flip = tl.load(about + 5)
    if ARENA:
        pixels = arena_ptr + tl.load(about)
        row_stride = in_width.to(tl.int64) * 3
    else:
        pixels = tl.load(about).to(tl.pointer_type(tl.uint8))
        row_stride = tl.load(about + 6)

    y = (tile // tiles_x) * BY + tl.arange(0, BY)[:, None]
    x = (tile % tiles_x) * BX + tl.arange(0, BX)[None, :]
    drawn = (y < out_height) & (x < out_width)
    # Outside the image: any pixel of it, not used.
    source_x = tl.minimum(tl.where((flip & 1) != 0, tl.maximum(out_width - 1 - x, 0), x), out_width - 1)
    source_y = tl.minimum(tl.where((flip & 2) != 0, tl.maximum(out_height - 1 - y, 0), y), out_height - 1)
    x_first, x_count, x_centre, x_inverse = _axis(source_x, in_width, out_width)
    y_first, y_count, y_centre, y_inverse = _axis(source_y, in_height, out_height)
    x_taps = _taps(in_width, out_width)
    y_taps = _taps(in_height, out_height)
    # A tile of padding alone has nothing to add up.
    padding = ((tile // tiles_x) * BY >= out_height) | ((tile % tiles_x) * BX >= out_width)
    x_taps = tl.where(padding, 0, x_taps)
    y_taps = tl.where(padding, 0, y_taps)
    x_total = _total(x_taps, x_first, x_count, x_centre, x_inverse)
    y_total = _total(y_taps, y_first, y_count, y_centre, y_inverse)

    red = tl.zeros([BY, BX], tl.int32) + _HALF
    green = red
    blue = red
    for y_tap in range(y_taps):
        y_weight = _weight(y_tap, y_first, y_count, y_centre, y_inverse, y_total)
        row = pixels + tl.minimum(y_first + y_tap, in_height - 1).to(tl.int64) * row_stride
        inside = drawn & (y_weight != 0)
        across_red = tl.zeros([BY, BX], tl.int32) + _HALF
        across_green = across_red
        across_blue = across_red
        for x_tap in range(x_taps):
            weight = _weight(x_tap, x_first, x_count, x_centre, x_inverse, x_total)
            pixel = row + tl.minimum(x_first + x_tap, in_width - 1) * 3
            across_red += tl.load(pixel, mask=inside, other=0).to(tl.int32) * weight
            across_green += tl.load(pixel + 1, mask=inside, other=0).to(tl.int32) * weight
            across_blue += tl.load(pixel + 2, mask=inside, other=0).to(tl.int32) * weight
        red += (across_red >> _PRECISION) * y_weight
        green += (across_green >> _PRECISION) * y_weight
        blue += (across_blue >> _PRECISION) * y_weight

    plane = height.to(tl.int64) * width
    if CHANNELS_LAST:
        base = out_ptr + image * plane * CHANNELS + (y.to(tl.int64) * width + x) * CHANNELS
        step = plane * 0 + 1
    else:
        base = out_ptr + image * plane * CHANNELS + y.to(tl.int64) * width + x
        step = plane
    stored = (y < height) & (x < width)
    for channel in tl.static_range(CHANNELS):
        if channel == 3:
            value = tl.zeros([BY, BX], tl.float32)
        else:
            if channel == 1:
                level = green >> _PRECISION
            elif (channel == 0) != REVERSE:
                level = red >> _PRECISION
            else:
                level = blue >> _PRECISION
            value = level.to(tl.float32)
            if NORMALIZE:
                if not REVERSE:
                    value = tl.div_rn(value, 255.0)
                if channel == 0:
                    mean, std = mean_0, std_0
                elif channel == 1:
                    mean, std = mean_1, std_1
                else:
                    mean, std = mean_2, std_2
                value = value - tl.full([1, 1], mean, tl.float32)
                value = tl.div_rn(value, tl.full([1, 1], std, tl.float32))
                value = tl.where(drawn, value, 0.0)
        tl.store(base + channel * step, value.to(out_ptr.dtype.element_ty), mask=stored)


def constants(
    channels: int, channels_last: bool, reverse: bool, *, normalize: bool = True, arena: bool = False
) -> dict[str, Any]:
    """What the kernel is compiled with."""
    tile = {"ARENA": arena, "BY": 8, "BX": 64}
    return {"CHANNELS": channels, "CHANNELS_LAST": channels_last, "NORMALIZE": normalize, "REVERSE": reverse, **tile}


OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def launch(
    arena: Tensor | None,
    table: Tensor,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    out: Tensor,
    height: int,
    width: int,
    options: dict[str, Any],
) -> None:
    """``table``: int64 [N, FIELDS], or [N, ARENA_FIELDS] of images in ``arena``. Copies nothing to the device."""
    tiles_x, tiles_y = triton.cdiv(width, options["BX"]), triton.cdiv(height, options["BY"])
    with device_guard(out):
        preprocess_kernel[(len(table) * tiles_x * tiles_y,)](
            arena_ptr=table if arena is None else arena,
            images_ptr=table,
            out_ptr=out,
            height=height,
            width=width,
            tiles_x=tiles_x,
            tiles=tiles_x * tiles_y,
            **{f"mean_{channel}": float(value) for channel, value in enumerate(pixel_mean)},
            **{f"std_{channel}": float(value) for channel, value in enumerate(pixel_std)},
            **options,
            **OPTIONS,
        )


def _table(images: Sequence[Tensor], flip: Sequence[bool], sizes: Sequence[int], device: torch.device) -> Tensor:
    rows = [
        [image.data_ptr(), image.shape[0], image.shape[1], h, w, int(mirrored), image.stride(0)]
        for image, h, w, mirrored in zip(images, sizes[::2], sizes[1::2], flip, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def _packed(images: Sequence[Tensor]) -> list[Tensor]:
    return [image if image.stride(2) == 1 and image.stride(1) == 3 else image.contiguous() for image in images]


def preprocess_images(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    flip: Sequence[bool],
    sizes: Sequence[int],
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Launcher of ``fastrcnn_kernels::preprocess_images``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(images), channels, height, width)
    batch = torch.empty(shape, dtype=dtype, device=images[0].device, memory_format=memory_format)
    packed = _packed(images)
    table = _table(packed, flip, sizes, batch.device)
    launch(None, table, pixel_mean, pixel_std, batch, height, width, constants(channels, channels_last, to_bgr255))
    return batch


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """Launcher of ``fastrcnn_kernels::resize_image``."""
    out = torch.empty((height, width, 3), dtype=torch.uint8, device=image.device)
    packed = _packed([image])
    table = _table(packed, [False], [height, width], out.device)
    options = constants(3, True, False, normalize=False)
    launch(None, table, [0.0] * 3, [1.0] * 3, out, height, width, options)
    return out


def compile_case(
    label: str,
    out: str,
    channels: int,
    channels_last: bool,
    reverse: bool,
    *,
    normalize: bool = True,
    arena: bool = False,
) -> CompileCase:
    """The kernel, compiled for such a launch."""
    signature = {
        "arena_ptr": "*u8" if arena else "*i64",
        "images_ptr": "*i64",
        "out_ptr": f"*{out}",
        "height": "i32",
        "width": "i32",
        "tiles_x": "i32",
        "tiles": "i32",
        **{f"{name}_{channel}": "fp32" for name in ("mean", "std") for channel in range(3)},
    }
    options = constants(channels, channels_last, reverse, normalize=normalize, arena=arena)
    return CompileCase(label, preprocess_kernel, signature, options, OPTIONS)


COMPILE_CASES = [
    compile_case("resize", "u8", 3, True, False, normalize=False),
    compile_case("fp32-nchw-bgr", "fp32", 3, False, True),
    compile_case("fp32-nchw-rgb", "fp32", 3, False, False),
    compile_case("fp16-nhwc4-bgr", "fp16", 4, True, True),
    compile_case("bf16-nhwc4-bgr", "bf16", 4, True, True),
]
