"""RoIPool and its gradient; the rules are in ``fastrcnn_kernels/roi_pool.py``.

Forward: one program for each region, row of bins and block of channels. Backward, without atomics: one program for
each tile of 8 x 8 pixels and block of channels walks the regions of its image in their order, and of those that touch
the tile the bins that do, and takes the gradients whose winner lies in it. Every pixel is written once, the same bits
every time. Products are not fused into sums, so that every implementation reads the same pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_TILE = 8
_TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _to_pixel(coordinate, SCALE: tl.constexpr):
    """Halves away from zero, as integers that nothing overflows."""
    scaled = coordinate * SCALE
    whole = tl.where(scaled < 0.0, tl.ceil(scaled), tl.floor(scaled))
    up = tl.where(scaled < 0.0, -1.0, 1.0)
    rounded = whole + tl.where(tl.abs(scaled - whole) >= 0.5, up, 0.0)
    return tl.minimum(tl.maximum(rounded, -1073741824.0), 1073741824.0).to(tl.int64)


@triton.jit
def _bin_size(first, last, BINS: tl.constexpr, COMPUTE: tl.constexpr):
    extent = tl.maximum(last - first + 1, 1).to(COMPUTE)
    if COMPUTE == tl.float64:
        return extent / BINS
    else:
        return tl.div_rn(extent, extent * 0.0 + BINS)


@triton.jit
def _bin(index, first, size, extent):
    """First and past-the-last pixel of bins, clamped to the map."""
    start = tl.floor(index.to(size.dtype) * size).to(tl.int64) + first
    stop = tl.ceil((index + 1).to(size.dtype) * size).to(tl.int64) + first
    return tl.minimum(tl.maximum(start, 0), extent), tl.minimum(tl.maximum(stop, 0), extent)


@triton.jit
def _is_finite(x):
    return x - x == 0.0


@triton.jit(do_not_specialize=["num_images", "height", "width"])
def _forward_kernel(
    input_ptr, rois_ptr, out_ptr, argmax_ptr, num_images, height, width,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LOWEST: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: regions times rows of bins, blocks of channels."""
    roi = tl.program_id(0).to(tl.int64) // PH
    ph = tl.program_id(0) % PH
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pw = tl.arange(0, BLOCK_W)
    in_channels = channel < CHANNELS
    image = tl.load(rois_ptr + roi * 5)
    x1 = tl.load(rois_ptr + roi * 5 + 1)
    y1 = tl.load(rois_ptr + roi * 5 + 2)
    x2 = tl.load(rois_ptr + roi * 5 + 3)
    y2 = tl.load(rois_ptr + roi * 5 + 4)
    live = (image >= 0.0) & (image < num_images) & _is_finite(x1) & _is_finite(y1) & _is_finite(x2) & _is_finite(y2)
    best = tl.full([BLOCK_W, BLOCK_C], LOWEST, COMPUTE)
    where = tl.full([BLOCK_W, BLOCK_C], -1, tl.int32)
    empty = pw < BLOCK_W
    if live:
        left = _to_pixel(x1, SCALE)
        top = _to_pixel(y1, SCALE)
        begin_x, end_x = _bin(pw, left, _bin_size(left, _to_pixel(x2, SCALE), PW, COMPUTE), width)
        begin_y, end_y = _bin(ph, top, _bin_size(top, _to_pixel(y2, SCALE), PH, COMPUTE), height)
        columns = tl.max(tl.where(pw < PW, end_x - begin_x, 0), axis=0)
        empty = (end_x <= begin_x) | (end_y <= begin_y)
        pixels = height.to(tl.int64) * width
        f = input_ptr + image.to(tl.int64) * pixels * CHANNELS
        for y in range(begin_y, end_y):
            for step in range(columns):
                x = begin_x + step
                pixel = y * width + x
                if CHANNELS_LAST:
                    offset = pixel[:, None] * CHANNELS + channel[None, :]
                else:
                    offset = channel.to(tl.int64)[None, :] * pixels + pixel[:, None]
                mask = ((x < end_x) & (pw < PW))[:, None] & in_channels[None, :]
                value = tl.load(f + offset, mask=mask, other=LOWEST).to(COMPUTE)
                higher = value > best
                best = tl.where(higher, value, best)
                where = tl.where(higher, pixel.to(tl.int32)[:, None], where)
    best = tl.where(empty[:, None], 0.0, best)
    if CHANNELS_LAST:
        offset = ((roi * PH + ph) * PW + pw[:, None]) * CHANNELS + channel[None, :]
    else:
        offset = ((roi * CHANNELS + channel[None, :]) * PH + ph) * PW + pw[:, None]
    mask = (pw < PW)[:, None] & in_channels[None, :]
    tl.store(out_ptr + offset, best.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(argmax_ptr + offset, where, mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def _backward_kernel(
    grad_ptr, argmax_ptr, grad_input_ptr, order_ptr, begin_ptr, reach_ptr, height, width,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BINS: tl.constexpr, COMPUTE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images times tiles, blocks of channels. reach_ptr [K, bins, 4]: top, bottom, left, right of each bin."""
    tiles_x = tl.cdiv(width, TILE)
    tiles = tl.cdiv(height, TILE) * tiles_x
    image = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0) % tiles
    top = tile // tiles_x * TILE
    left = tile % tiles_x * TILE
    lane = tl.arange(0, TILE * TILE)
    y = top + lane // TILE
    x = left + lane % TILE
    pixel = y * width + x
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < CHANNELS
    acc = tl.zeros([TILE * TILE, BLOCK_C], dtype=COMPUTE)
    for position in range(tl.load(begin_ptr + image), tl.load(begin_ptr + image + 1)):
        roi = tl.load(order_ptr + position)
        # The first bin's top and left and the last one's bottom and right bound the region.
        corner = reach_ptr + roi * BINS * 4
        far = corner + (BINS - 1) * 4
        touches = (tl.load(corner) < top + TILE) & (tl.load(far + 1) > top)
        touches = touches & (tl.load(corner + 2) < left + TILE) & (tl.load(far + 3) > left)
        if touches:
            for b in range(BINS):
                reach = corner + b * 4
                near = (tl.load(reach) < top + TILE) & (tl.load(reach + 1) > top)
                near = near & (tl.load(reach + 2) < left + TILE) & (tl.load(reach + 3) > left)
                if near:
                    if CHANNELS_LAST:
                        offset = (roi * BINS + b) * CHANNELS + channel
                    else:
                        offset = (roi * CHANNELS + channel) * BINS + b
                    winner = tl.load(argmax_ptr + offset, mask=in_channels, other=-1)
                    grad = tl.load(grad_ptr + offset, mask=in_channels, other=0.0).to(COMPUTE)
                    acc += tl.where(winner[None, :] == pixel[:, None], grad[None, :], 0.0)
    pixels = height.to(tl.int64) * width
    if CHANNELS_LAST:
        offset = (image * pixels + pixel[:, None]) * CHANNELS + channel[None, :]
    else:
        offset = (image * CHANNELS + channel[None, :]) * pixels + pixel[:, None]
    mask = ((y < height) & (x < width))[:, None] & in_channels[None, :]
    tl.store(grad_input_ptr + offset, acc.to(grad_input_ptr.dtype.element_ty), mask=mask)


def _is_channels_last(x: Tensor) -> bool:
    """As in ``roi_pool.py``, which this layer must not import."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _compute(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _TYPE_NAMES:
        raise TypeError(f"roi_pool: the Triton kernels take float16, bfloat16, float32 and float64, not {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_constants(
    dtype: torch.dtype, channels: int, channels_last: bool, scale: float, ph: int, pw: int
) -> dict[str, Any]:
    block_w = triton.next_power_of_2(pw)
    return {
        "SCALE": scale,
        "CHANNELS": channels,
        "CHANNELS_LAST": channels_last,
        "PH": ph,
        "PW": pw,
        "LOWEST": torch.finfo(dtype).min,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_W": block_w,
        "BLOCK_C": min(256, triton.next_power_of_2(channels), max(1, 1024 // block_w)),
    }


def _backward_constants(dtype: torch.dtype, channels: int, channels_last: bool, bins: int) -> dict[str, Any]:
    return {
        "CHANNELS": channels,
        "CHANNELS_LAST": channels_last,
        "BINS": bins,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "TILE": _TILE,
        "BLOCK_C": min(32 if dtype == torch.float64 else 64, triton.next_power_of_2(channels)),
    }


_FORWARD_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_BACKWARD_OPTIONS = {"num_warps": 4}


def roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::roi_pool``. An image that does not exist gives zeros."""
    compute = _compute(input.dtype)
    num_images, channels, height, width = input.shape
    channels_last = _is_channels_last(input)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (rois.shape[0], channels, pooled_height, pooled_width)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    argmax = torch.empty(shape, dtype=torch.int32, device=input.device, memory_format=layout)
    if out.numel() == 0:
        return out, argmax
    constants = _forward_constants(input.dtype, channels, channels_last, spatial_scale, pooled_height, pooled_width)
    with device_guard(input):
        _forward_kernel[(rois.shape[0] * pooled_height, triton.cdiv(channels, constants["BLOCK_C"]))](
            input.contiguous(memory_format=layout),
            rois.to(compute).contiguous(),
            out,
            argmax,
            num_images,
            height,
            width,
            **constants,
            **_FORWARD_OPTIONS,
        )
    return out, argmax


def _reach(argmax: Tensor, width: int) -> Tensor:
    """The pixels that won in each bin lie in [top, bottom) x [left, right): int32 [K, bins, 4], nothing where none won.

    The first bin's top and left and the last one's bottom and right are those of the whole region.
    """
    where = argmax.permute(0, 2, 3, 1).flatten(1, 2)  # [K, bins, C]
    won = where >= 0
    row, column = where // width, where % width
    far = torch.iinfo(torch.int32).max
    low = [torch.where(won, t, far).amin(2) for t in (row, column)]
    high = [torch.where(won, t + 1, 0).amax(2) for t in (row, column)]
    reach = torch.stack([low[0], high[0], low[1], high[1]], 2)
    reach[:, 0, 0::2] = reach[:, :, 0::2].amin(1)
    reach[:, -1, 1::2] = reach[:, :, 1::2].amax(1)
    return reach.contiguous()


def roi_pool_backward(grad: Tensor, rois: Tensor, argmax: Tensor, num_images: int, height: int, width: int) -> Tensor:
    """Launcher of ``fastrcnn_kernels::roi_pool_backward``. Deterministic."""
    _compute(grad.dtype)
    channels_last = _is_channels_last(argmax)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    num_rois, channels, ph, pw = grad.shape
    shape = (num_images, channels, height, width)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    if out.numel() == 0 or num_rois == 0:
        return out.zero_()
    image = rois[:, 0]
    group = torch.where((image >= 0) & (image < num_images), image, num_images).long()
    ranked, order = group.sort(stable=True)
    begin = torch.searchsorted(ranked, torch.arange(num_images + 1, device=rois.device))
    constants = _backward_constants(grad.dtype, channels, channels_last, ph * pw)
    tiles = num_images * triton.cdiv(height, _TILE) * triton.cdiv(width, _TILE)
    with device_guard(grad):
        _backward_kernel[(tiles, triton.cdiv(channels, constants["BLOCK_C"]))](
            grad.contiguous(memory_format=layout),
            argmax,
            out,
            order,
            begin,
            _reach(argmax, width),
            height,
            width,
            **constants,
            **_BACKWARD_OPTIONS,
        )
    return out


def _cases(dtype: torch.dtype, channels_last: bool) -> list[CompileCase]:
    name, compute = f"*{_TYPE_NAMES[dtype]}", "*fp64" if dtype == torch.float64 else "*fp32"
    forward = {
        "input_ptr": name, "rois_ptr": compute, "out_ptr": name, "argmax_ptr": "*i32",
        **dict.fromkeys(["num_images", "height", "width"], "i32"),
    }  # fmt: skip
    backward = {
        "grad_ptr": name, "argmax_ptr": "*i32", "grad_input_ptr": name, "order_ptr": "*i64", "begin_ptr": "*i64",
        "reach_ptr": "*i32", "height": "i32", "width": "i32",
    }  # fmt: skip
    label = f"{_TYPE_NAMES[dtype]}-{'nhwc' if channels_last else 'nchw'}"
    return [
        CompileCase(
            f"forward-{label}", _forward_kernel, forward,
            _forward_constants(dtype, 512, channels_last, 1 / 16, 7, 7), _FORWARD_OPTIONS,
        ),
        CompileCase(
            f"backward-{label}", _backward_kernel, backward, _backward_constants(dtype, 512, channels_last, 49),
            _BACKWARD_OPTIONS,
        ),
    ]  # fmt: skip


COMPILE_CASES = [
    *_cases(torch.bfloat16, True),
    *_cases(torch.float32, False),
    *_cases(torch.float64, False),
]
