"""Gradient of the deformable convolution, without atomics; rules in ``fastrcnn_kernels/deform_conv.py``.

The gradient of the columns is a matrix product. From it one kernel makes the gradients of offsets and mask (a program
owns a block of positions at one tap, and all channels of the offset group), the columns themselves, whose product
with the output's gradient is the weight's, and for each sample its cell, the pixel of its low corner, and four
weights. The samples are sorted by cell, stably, and a second kernel gathers: a program owns 16 pixels and adds, in
order, the samples of the four cells that touch each. So every pixel is written once, the same bits every time; the
price against atomics is the sort of N * OG * K * OH * OW integers and reading each gradient of a column four times,
mostly from L2. Images are taken in chunks that bound the memory of the columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.deform_conv import (
    COMPILED,
    SIZES,
    TYPE_NAMES,
    by_tap,
    check_dtype,
    constants_of,
    is_channels_last,
    place_samples,
    read_corner,
)

_CHUNK_BYTES = 1 << 29  # of columns and their gradient held at once, unless one image has more
_PIXELS = 16  # of a program of the gather


@triton.jit(do_not_specialize=SIZES)
def _samples_kernel(
    input_ptr, offset_ptr, mask_ptr, grad_columns_ptr, columns_ptr, grad_offset_ptr, grad_mask_ptr, cell_ptr,
    share_ptr, positions, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of positions, offset groups times taps."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    OFFSET_IN: tl.constexpr = CHANNELS // OFFSET_GROUPS
    number = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offset_group = tl.program_id(1) // TAPS
    tap = tl.program_id(1) % TAPS
    live = number < positions
    spatial = out_height.to(tl.int64) * out_width
    image = number // spatial
    at = number % spatial
    image_ptr = input_ptr + image * height * width * CHANNELS
    low_y, low_x, far_y, far_x, outside, modulation = place_samples(
        offset_ptr, mask_ptr, number, live, image, at, spatial, offset_group, tap, out_width, height, width,
        OFFSET_GROUPS, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, MASKED, COMPUTE,
    )  # fmt: skip
    # An infinite coordinate lies outside, and its distances are NaN.
    inside = tl.where(outside, 0.0, 1.0)
    far_y = tl.where(outside, 0.0, far_y)
    far_x = tl.where(outside, 0.0, far_x)
    grad_y = tl.zeros([BLOCK_P], dtype=COMPUTE)
    grad_x = tl.zeros([BLOCK_P], dtype=COMPUTE)
    grad_m = tl.zeros([BLOCK_P], dtype=COMPUTE)
    for block in range(0, OFFSET_IN, BLOCK_C):
        in_group = block + tl.arange(0, BLOCK_C)
        channel = offset_group * OFFSET_IN + in_group
        row = (channel // GROUP_IN).to(tl.int64)[None, :] * positions + number[:, None]
        spot = (row * TAPS + tap) * GROUP_IN + (channel % GROUP_IN)[None, :]
        write = live[:, None] & (in_group < OFFSET_IN)[None, :]
        grad = tl.load(grad_columns_ptr + spot, mask=write, other=0.0).to(COMPUTE)
        sampled = tl.zeros([BLOCK_P, BLOCK_C], dtype=COMPUTE)
        along_y = tl.zeros([BLOCK_P, BLOCK_C], dtype=COMPUTE)
        along_x = tl.zeros([BLOCK_P, BLOCK_C], dtype=COMPUTE)
        for corner in tl.static_range(4):
            value = read_corner(
                image_ptr, low_y, low_x, outside | (live == 0), channel, in_group < OFFSET_IN, height, width, CHANNELS,
                corner // 2, corner % 2, COMPUTE,
            )  # fmt: skip
            wy = far_y if corner // 2 == 1 else 1.0 - far_y
            wx = far_x if corner % 2 == 1 else 1.0 - far_x
            sampled += (wy * wx * inside)[:, None] * value
            along_y += (wx if corner // 2 == 1 else -wx)[:, None] * value
            along_x += (wy if corner % 2 == 1 else -wy)[:, None] * value
        grad_m += tl.sum(sampled * grad, axis=1)
        grad_y += tl.sum(along_y * grad, axis=1)
        grad_x += tl.sum(along_x * grad, axis=1)
        columns = sampled * modulation[:, None]
        tl.store(columns_ptr + spot, columns.to(columns_ptr.dtype.element_ty), mask=write)
    plane = (image * OFFSET_GROUPS + offset_group) * TAPS + tap
    moved = grad_offset_ptr + plane * 2 * spatial + at
    tl.store(moved, (grad_y * modulation).to(grad_offset_ptr.dtype.element_ty), mask=live)
    tl.store(moved + spatial, (grad_x * modulation).to(grad_offset_ptr.dtype.element_ty), mask=live)
    if MASKED:
        tl.store(grad_mask_ptr + plane * spatial + at, grad_m.to(grad_mask_ptr.dtype.element_ty), mask=live)
    # Cells are counted from (-1, -1). What has no cell, outside or NaN, comes after all.
    seated = (outside == 0) & (low_y == low_y) & (low_x == low_x)
    cells = (height.to(tl.int64) + 1) * (width + 1)
    row_cell = tl.where(seated, low_y + 1.0, 0.0).to(tl.int64)
    cell = row_cell * (width + 1) + tl.where(seated, low_x + 1.0, 0.0).to(tl.int64)
    cell += (image * OFFSET_GROUPS + offset_group) * cells
    last = positions // spatial * OFFSET_GROUPS * cells
    sample = (offset_group * TAPS + tap).to(tl.int64) * positions + number
    tl.store(cell_ptr + sample, tl.where(seated, cell, last), mask=live)
    for corner in tl.static_range(4):
        wy = far_y if corner // 2 == 1 else 1.0 - far_y
        wx = far_x if corner % 2 == 1 else 1.0 - far_x
        tl.store(share_ptr + sample * 4 + corner, wy * wx * modulation, mask=live)


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _gather_kernel(
    grad_columns_ptr, order_ptr, begin_ptr, share_ptr, grad_input_ptr, positions, height, width,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, OFFSET_GROUPS: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images times offset groups times blocks of pixels, blocks of channels of an offset group."""
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    OFFSET_IN: tl.constexpr = CHANNELS // OFFSET_GROUPS
    pixels = height.to(tl.int64) * width
    blocks = (pixels + BLOCK_X - 1) // BLOCK_X
    owner = tl.program_id(0) // blocks  # image * OFFSET_GROUPS + offset group
    pixel = tl.program_id(0) % blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    in_group = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = owner % OFFSET_GROUPS * OFFSET_IN + in_group
    live = pixel < pixels
    row_of_group = (channel // GROUP_IN).to(tl.int64) * positions
    column = (channel % GROUP_IN).to(tl.int64)
    acc = tl.zeros([BLOCK_X, BLOCK_C], dtype=COMPUTE)
    for corner in tl.static_range(4):
        # The samples of which this pixel is that corner have their low corner so many pixels up and left.
        row = owner * (height.to(tl.int64) + 1) + pixel // width + 1 - corner // 2
        cell = row * (width + 1) + pixel % width + 1 - corner % 2
        begin = tl.load(begin_ptr + cell, mask=live, other=0)
        count = tl.load(begin_ptr + cell + 1, mask=live, other=0) - begin
        for step in range(tl.max(count, axis=0)):
            present = step < count
            sample = tl.load(order_ptr + begin + step, mask=present, other=0)
            share = tl.load(share_ptr + sample * 4 + corner, mask=present, other=0.0)
            number = sample % positions
            tap = sample // positions % TAPS
            spot = (row_of_group[None, :] + number[:, None]) * TAPS + tap[:, None]
            read = present[:, None] & (in_group < OFFSET_IN)[None, :]
            grad = tl.load(grad_columns_ptr + spot * GROUP_IN + column[None, :], mask=read, other=0.0).to(COMPUTE)
            acc += share[:, None] * grad
    image = owner // OFFSET_GROUPS
    if CHANNELS_LAST:
        offset = (image * pixels + pixel)[:, None] * CHANNELS + channel[None, :]
    else:
        offset = (image * CHANNELS + channel[None, :]) * pixels + pixel[:, None]
    mask = live[:, None] & (in_group < OFFSET_IN)[None, :]
    tl.store(grad_input_ptr + offset, acc.to(grad_input_ptr.dtype.element_ty), mask=mask)


def _sample_blocks(channels: int, offset_groups: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    most = 64 if dtype != torch.float64 else 16
    block_c = min(most, triton.next_power_of_2(channels // offset_groups))
    return {"BLOCK_P": 32, "BLOCK_C": block_c}, {"num_warps": 4}


def _gather_blocks(channels: int, offset_groups: int) -> tuple[dict[str, int], dict[str, int]]:
    block_c = min(128, triton.next_power_of_2(channels // offset_groups))
    return {"BLOCK_X": _PIXELS, "BLOCK_C": block_c}, {"num_warps": 4}


def _input_and_offsets(
    part: tuple[Tensor, Tensor, Tensor | None], grad_columns: Tensor, columns: Tensor,
    grads: tuple[Tensor, Tensor, Tensor | None], channels_last: bool, constants: dict[str, Any],
) -> None:  # fmt: skip
    """Of some images: fill the gradients of input, offset and mask, and the columns."""
    input, offset, mask = part
    grad_input, grad_offset, grad_mask = grads
    n, channels, height, width = input.shape
    oh, ow = offset.shape[2:]
    positions, offset_groups = n * oh * ow, constants["OFFSET_GROUPS"]
    taps = constants["KERNEL_H"] * constants["KERNEL_W"]
    cell = torch.empty(offset_groups * taps * positions, dtype=torch.int64, device=input.device)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    share = torch.empty(cell.numel() * 4, dtype=compute, device=input.device)
    blocks, options = _sample_blocks(channels, offset_groups, input.dtype)
    _samples_kernel[triton.cdiv(positions, blocks["BLOCK_P"]), offset_groups * taps](
        input, offset, offset if mask is None else mask, grad_columns, columns, grad_offset,
        grad_offset if grad_mask is None else grad_mask, cell, share, positions, height, width, oh, ow,
        **constants, **blocks, **options,
    )  # fmt: skip
    ranked, order = cell.sort(stable=True)
    cells = n * offset_groups * (height + 1) * (width + 1)
    begin = torch.searchsorted(ranked, torch.arange(cells + 1, device=input.device))
    blocks, options = _gather_blocks(channels, offset_groups)
    grid = (
        n * offset_groups * triton.cdiv(height * width, blocks["BLOCK_X"]),
        triton.cdiv(channels // offset_groups, blocks["BLOCK_C"]),
    )
    shared = {name: constants[name] for name in ("CHANNELS", "GROUPS", "OFFSET_GROUPS", "COMPUTE")}
    _gather_kernel[grid](
        grad_columns, order, begin, share, grad_input, positions, height, width, TAPS=taps,
        CHANNELS_LAST=channels_last, **shared, **blocks, **options,
    )  # fmt: skip


def deform_conv2d_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::deform_conv2d_backward``. Deterministic, as far as torch's products are."""
    check_dtype(input.dtype)
    n, channels, _, _ = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    oh, ow = offset.shape[2:]
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * kh * kw)
    channels_last = is_channels_last(input)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_input = torch.empty_like(input, memory_format=layout)
    input, offset = input.contiguous(memory_format=torch.channels_last), offset.contiguous()
    grad_offset = torch.empty_like(offset)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    mask = None if mask is None else mask.contiguous()
    grad_mask = input.new_empty(0, dtype=compute) if mask is None else torch.empty_like(mask)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if grad_output.numel() == 0 or input.numel() == 0:
        return grad_input.zero_(), grad_offset.zero_(), grad_mask.zero_(), grad_weight.zero_()
    constants = constants_of(
        channels, group_channels, offset_groups, (kh, kw), stride, padding, dilation, mask is not None, input.dtype
    )
    kernels = by_tap(weight, groups).mT  # [G, O / G, K * C / G]
    grad_kernels = torch.zeros(kernels.shape, dtype=compute, device=input.device)
    each = max(1, 2 * kh * kw * channels * oh * ow * input.element_size())
    step = max(1, _CHUNK_BYTES // each)
    with device_guard(input):
        for first in range(0, n, step):
            images = slice(first, first + step)
            rows = grad_output[images].permute(0, 2, 3, 1).reshape(-1, groups, out_channels // groups).transpose(0, 1)
            grad_columns = torch.bmm(rows, kernels)  # [G, P, K * C / G]
            columns = torch.empty_like(grad_columns)
            _input_and_offsets(
                (input[images], offset[images], None if mask is None else mask[images]), grad_columns, columns,
                (grad_input[images], grad_offset[images], None if mask is None else grad_mask[images]),
                channels_last, constants,
            )  # fmt: skip
            grad_kernels += torch.bmm(rows.mT, columns)
    ordered = grad_kernels.view(out_channels, kh * kw, group_channels).mT  # [O, C / G, K]
    return grad_input, grad_offset, grad_mask, grad_weight.copy_(ordered.reshape(weight.shape))


def _cases(
    dtype: torch.dtype, moves: torch.dtype, channels: int, groups: int, channels_last: bool, masked: bool
) -> list[CompileCase]:
    name, moved = f"*{TYPE_NAMES[dtype]}", f"*{TYPE_NAMES[moves]}"
    compute = "*fp64" if dtype == torch.float64 else "*fp32"
    constants = constants_of(channels, channels // groups, 1, (3, 3), [1, 1], [1, 1], [1, 1], masked, dtype)
    label = f"{TYPE_NAMES[dtype]}-{'nhwc' if channels_last else 'nchw'}-C{channels}{'-mask' if masked else ''}"
    samples = {
        "input_ptr": name, "offset_ptr": moved, "mask_ptr": moved, "grad_columns_ptr": name, "columns_ptr": name,
        "grad_offset_ptr": moved, "grad_mask_ptr": moved, "cell_ptr": "*i64", "share_ptr": compute,
        **dict.fromkeys(SIZES, "i32"),
    }  # fmt: skip
    gather = {
        "grad_columns_ptr": name, "order_ptr": "*i64", "begin_ptr": "*i64", "share_ptr": compute,
        "grad_input_ptr": name, **dict.fromkeys(SIZES[:3], "i32"),
    }  # fmt: skip
    shared = {key: constants[key] for key in ("CHANNELS", "GROUPS", "OFFSET_GROUPS", "COMPUTE")}
    shared.update(TAPS=9, CHANNELS_LAST=channels_last)
    blocks, options = _sample_blocks(channels, 1, dtype)
    gather_blocks, gather_options = _gather_blocks(channels, 1)
    return [
        CompileCase(f"samples-{label}", _samples_kernel, samples, {**constants, **blocks}, options),
        CompileCase(f"gather-{label}", _gather_kernel, gather, {**shared, **gather_blocks}, gather_options),
    ]


COMPILE_CASES = [compiled for case in COMPILED for compiled in _cases(*case)]
