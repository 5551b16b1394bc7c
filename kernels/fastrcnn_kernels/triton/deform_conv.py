"""Deformable convolution forward as one implicit matrix product; the rules are in ``fastrcnn_kernels/deform_conv.py``.

A program owns BLOCK_P output positions and BLOCK_O output channels. For each tap and block of input channels it
samples a tile of columns into registers and multiplies it on tensor cores: columns never go to memory. What is
sampled again for each block of output channels comes from L2, so BLOCK_O is as large as the registers allow. Maps are
read in contiguous runs of channels: an NCHW map is put into channels_last first, once for all taps and corners.
float32 products are exact (no TF32). The gradient is in ``deform_conv_backward.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
_OPERANDS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
SIZES = ["positions", "height", "width", "out_height", "out_width"]


@triton.jit
def place_samples(
    offset_ptr, mask_ptr, number, live, image, at, spatial, offset_group, tap, out_width, height, width,
    OFFSET_GROUPS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Where one tap of each position samples: low corner (floats), distances from it, whether outside, mask."""
    plane = (image * OFFSET_GROUPS + offset_group) * (KERNEL_H * KERNEL_W) + tap
    moved = offset_ptr + plane * 2 * spatial + at
    move_y = tl.load(moved, mask=live, other=0.0).to(COMPUTE)
    move_x = tl.load(moved + spatial, mask=live, other=0.0).to(COMPUTE)
    y = (at // out_width * STRIDE_H - PAD_H + tap // KERNEL_W * DILATION_H).to(COMPUTE) + move_y
    x = (at % out_width * STRIDE_W - PAD_W + tap % KERNEL_W * DILATION_W).to(COMPUTE) + move_x
    # Written so that NaN is not outside: it must reach the output.
    outside = (y < -1.0) | (y >= height) | (x < -1.0) | (x >= width)
    low_y = tl.floor(y)
    low_x = tl.floor(x)
    modulation = tl.full([number.shape[0]], 1.0, COMPUTE)
    if MASKED:
        modulation = tl.load(mask_ptr + plane * spatial + at, mask=live, other=0.0).to(COMPUTE)
    return low_y, low_x, y - low_y, x - low_x, outside, modulation


@triton.jit
def read_corner(
    image_ptr, low_y, low_x, outside, channel, in_channels, height, width, CHANNELS: tl.constexpr,
    DOWN: tl.constexpr, RIGHT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """[positions, channels] of one of the four pixels of each sample, zero where none is. image_ptr: [positions]"""
    row = low_y + DOWN
    column = low_x + RIGHT
    valid = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (outside == 0)
    # A NaN or a huge number has no integer: those are not read.
    pixel = tl.where(valid, row, 0.0).to(tl.int64) * width + tl.where(valid, column, 0.0).to(tl.int64)
    source = (image_ptr + pixel * CHANNELS)[:, None] + channel[None, :]
    return tl.load(source, mask=valid[:, None] & in_channels[None, :], other=0.0).to(COMPUTE)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input_ptr, offset_ptr, mask_ptr, weight_ptr, bias_ptr, out_ptr,
    positions, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    RUN: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MASKED: tl.constexpr, BIASED: tl.constexpr, CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of positions, weight groups times blocks of their output channels."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    OUT_BLOCKS: tl.constexpr = (GROUP_OUT + BLOCK_O - 1) // BLOCK_O
    number = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = tl.program_id(1) // OUT_BLOCKS
    out_channel = tl.program_id(1) % OUT_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    live = number < positions
    spatial = out_height.to(tl.int64) * out_width
    image = number // spatial
    at = number % spatial
    image_ptr = input_ptr + image * height * width * CHANNELS
    weights = weight_ptr + group.to(tl.int64) * (TAPS * GROUP_IN * GROUP_OUT)
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=COMPUTE)
    # A run is what lies in one weight group and in one offset group.
    for run in range(GROUP_IN // RUN):
        first = group * GROUP_IN + run * RUN
        for tap in range(TAPS):
            low_y, low_x, far_y, far_x, outside, modulation = place_samples(
                offset_ptr, mask_ptr, number, live, image, at, spatial, first // (CHANNELS // OFFSET_GROUPS), tap,
                out_width, height, width, OFFSET_GROUPS, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
                DILATION_H, DILATION_W, MASKED, COMPUTE,
            )  # fmt: skip
            outside = outside | (live == 0)
            modulation = tl.where(outside, 0.0, modulation)
            # An infinite coordinate lies outside, and its distances are NaN.
            far_y = tl.where(outside, 0.0, far_y)
            far_x = tl.where(outside, 0.0, far_x)
            for block in range(0, RUN, BLOCK_C):
                in_run = block + tl.arange(0, BLOCK_C)
                columns = tl.zeros([BLOCK_P, BLOCK_C], dtype=COMPUTE)
                for corner in tl.static_range(4):
                    value = read_corner(
                        image_ptr, low_y, low_x, outside, first + in_run, in_run < RUN, height, width, CHANNELS,
                        corner // 2, corner % 2, COMPUTE,
                    )  # fmt: skip
                    wy = far_y if corner // 2 == 1 else 1.0 - far_y
                    wx = far_x if corner % 2 == 1 else 1.0 - far_x
                    columns += (wy * wx * modulation)[:, None] * value
                row = tap * GROUP_IN + run * RUN + in_run
                w = tl.load(
                    weights + row[:, None] * GROUP_OUT + out_channel[None, :],
                    mask=(in_run < RUN)[:, None] & (out_channel < GROUP_OUT)[None, :],
                    other=0.0,
                )
                acc = tl.dot(columns.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=COMPUTE)
    channel = group * GROUP_OUT + out_channel
    in_group = out_channel < GROUP_OUT
    if BIASED:
        acc += tl.load(bias_ptr + channel, mask=in_group, other=0.0).to(COMPUTE)[None, :]
    if CHANNELS_LAST:
        offset = number[:, None] * OUT_CHANNELS + channel[None, :]
    else:
        offset = (image * OUT_CHANNELS * spatial + at)[:, None] + channel.to(tl.int64)[None, :] * spatial
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & in_group[None, :])


def is_channels_last(input: Tensor) -> bool:
    """As in ``deform_conv_reference.py``, which this layer must not import."""
    return input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in TYPE_NAMES:
        raise TypeError(f"deform_conv2d: the Triton kernels take float16, bfloat16, float32 and float64, not {dtype}")


def constants_of(
    channels: int, group_channels: int, offset_groups: int, kernel: tuple[int, int], stride: list[int],
    padding: list[int], dilation: list[int], masked: bool, dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Constants that the forward and the backward share."""
    return {
        "CHANNELS": channels,
        "GROUPS": channels // group_channels,
        "OFFSET_GROUPS": offset_groups,
        "KERNEL_H": kernel[0],
        "KERNEL_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "MASKED": masked,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _blocks(
    channels: int, group_channels: int, offset_groups: int, out_channels: int, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options of the forward: 64 x 128 sums in 8 warps, half of that where a sum takes two registers."""
    run = math.gcd(group_channels, channels // offset_groups)
    group_out = out_channels // (channels // group_channels)
    narrow = dtype in (torch.float16, torch.bfloat16)
    # The interpreter multiplies bfloat16 as integers: there the operands are float32.
    interpreted = dtype == torch.bfloat16 and not isinstance(_forward_kernel, triton.JITFunction)
    widest = 256 if narrow else 64 if dtype == torch.float32 else 32
    return {
        "RUN": run,
        "OUT_CHANNELS": out_channels,
        "OPERAND": tl.float32 if interpreted else _OPERANDS[dtype],
        "PRECISION": "ieee",
        "BLOCK_P": 64 if dtype != torch.float64 else 32,
        "BLOCK_O": min(widest, max(16, triton.next_power_of_2(group_out))),
        "BLOCK_C": min(32 if narrow else 16, max(16, triton.next_power_of_2(run))),
    }, {"num_warps": 4 if dtype == torch.float32 else 8, "num_stages": 2 if narrow else 1}


def by_tap(weight: Tensor, groups: int) -> Tensor:
    """The weight as [G, K * C / G, O / G]; a view where it can be one."""
    parts = weight.unflatten(0, (groups, -1)).flatten(3)  # [G, O / G, C / G, K]
    return parts.permute(0, 3, 2, 1).reshape(groups, -1, parts.shape[1])


def deform_conv2d(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::deform_conv2d``."""
    check_dtype(input.dtype)
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    oh, ow = offset.shape[2:]
    channels_last = is_channels_last(input)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((n, out_channels, oh, ow), dtype=input.dtype, device=input.device, memory_format=layout)
    if out.numel() == 0:
        return out
    offset_groups, groups = offset.shape[1] // (2 * kh * kw), channels // group_channels
    constants = constants_of(
        channels, group_channels, offset_groups, (kh, kw), stride, padding, dilation, mask is not None, input.dtype
    )
    blocks, options = _blocks(channels, group_channels, offset_groups, out_channels, input.dtype)
    grid = (
        triton.cdiv(n * oh * ow, blocks["BLOCK_P"]),
        groups * triton.cdiv(out_channels // groups, blocks["BLOCK_O"]),
    )
    offset = offset.contiguous()
    with device_guard(input):
        _forward_kernel[grid](
            input.contiguous(memory_format=torch.channels_last),
            offset,
            offset if mask is None else mask.contiguous(),
            by_tap(weight, groups).contiguous(),
            weight if bias is None else bias.contiguous(),
            out,
            n * oh * ow,
            height,
            width,
            oh,
            ow,
            **constants,
            **blocks,
            BIASED=bias is not None,
            CHANNELS_LAST=channels_last,
            **options,
        )
    return out


COMPILED = [
    # input, offsets and mask, channels, groups, channels_last, masked
    (torch.bfloat16, torch.bfloat16, 256, 1, True, True),
    (torch.float16, torch.float32, 512, 1, True, True),
    (torch.float32, torch.float32, 256, 1, False, False),
    (torch.float64, torch.float64, 64, 1, False, True),
]


def _case(
    dtype: torch.dtype, moves: torch.dtype, channels: int, groups: int, channels_last: bool, masked: bool
) -> CompileCase:
    name, moved = f"*{TYPE_NAMES[dtype]}", f"*{TYPE_NAMES[moves]}"
    signature = {
        "input_ptr": name, "offset_ptr": moved, "mask_ptr": moved, "weight_ptr": name, "bias_ptr": name,
        "out_ptr": name, **dict.fromkeys(SIZES, "i32"),
    }  # fmt: skip
    constants = constants_of(channels, channels // groups, 1, (3, 3), [1, 1], [1, 1], [1, 1], masked, dtype)
    blocks, options = _blocks(channels, channels // groups, 1, channels, dtype)
    constants = {**constants, **blocks, "BIASED": masked, "CHANNELS_LAST": channels_last}
    label = f"{TYPE_NAMES[dtype]}-{'nhwc' if channels_last else 'nchw'}-C{channels}{'-mask' if masked else ''}"
    return CompileCase(label, _forward_kernel, signature, constants, options)


COMPILE_CASES = [_case(*case) for case in COMPILED]
