"""The specification of deformable convolution in PyTorch: what every other implementation is compared with.

Rules and conventions are in ``deform_conv.py``. Every sample has four corners; each is gathered in turn, so that the
columns [N, C, K, P] are held once, with K = kh * kw taps and P = OH * OW positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Pairs (height, width) of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """(OH, OW) for an input of ``size``."""
        height, width = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return height, width


class Corner(NamedTuple):
    """One of the four pixels of each sample: all [N, OG, K, P]."""

    pixel: Tensor  # flat index into H * W; 0 where there is no such pixel
    valid: Tensor
    weight: Tensor
    weight_dy: Tensor  # derivative of the weight with respect to the sample's y
    weight_dx: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(input: Tensor) -> bool:
    return input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def corners(offset: Tensor, size: tuple[int, int], kernel: tuple[int, int], geometry: Geometry) -> list[Corner]:
    """Where each tap of each output position samples. offset [N, OG * K * 2, OH, OW]"""
    n, _, oh, ow = offset.shape
    kh, kw = kernel
    moved = offset.reshape(n, offset.shape[1] // (2 * kh * kw), kh * kw, 2, oh, ow)  # [N, OG, K, 2, OH, OW]

    def at(axis: int, outputs: int) -> Tensor:
        start = torch.arange(outputs, device=offset.device) * geometry.stride[axis] - geometry.padding[axis]
        tap = torch.arange(kernel[axis], device=offset.device) * geometry.dilation[axis]
        return (tap[:, None] + start).to(offset.dtype)  # [kh, OH] or [kw, OW]

    fixed_y = at(0, oh)[:, None, :, None].expand(kh, kw, oh, ow).reshape(kh * kw, oh, ow)  # [K, OH, OW]
    fixed_x = at(1, ow)[None, :, None, :].expand(kh, kw, oh, ow).reshape(kh * kw, oh, ow)
    y = (fixed_y + moved[:, :, :, 0]).flatten(3)  # [N, OG, K, P]
    x = (fixed_x + moved[:, :, :, 1]).flatten(3)
    height, width = size
    # Written so that NaN is not outside: it must reach the output.
    outside = (y < -1) | (y >= height) | (x < -1) | (x >= width)
    low_y, low_x = y.floor(), x.floor()
    far_y, far_x = y - low_y, x - low_x
    found = []
    for corner in range(4):
        down, right = corner // 2, corner % 2
        at_y, at_x = low_y + down, low_x + right
        valid = (at_y >= 0) & (at_y <= height - 1) & (at_x >= 0) & (at_x <= width - 1) & ~outside
        wy, wx = (far_y if down else 1 - far_y), (far_x if right else 1 - far_x)
        pixel = torch.where(valid, at_y * width + at_x, 0).long()
        parts = (wy * wx, wx if down else -wx, wy if right else -wy)
        found.append(Corner(pixel, valid, *(torch.where(outside, 0.0, part) for part in parts)))
    return found


def _read(flat: Tensor, corner: Corner) -> Tensor:
    """The pixels of one corner, zero where there is none. flat [N, OG, Cog, H * W] -> [N, OG, Cog, K, P]"""
    n, groups, taps, positions = corner.pixel.shape
    index = corner.pixel.reshape(n, groups, 1, taps * positions).expand(-1, -1, flat.shape[2], -1)
    values = flat.gather(3, index).unflatten(3, (taps, positions))
    return torch.where(corner.valid[:, :, None], values, 0.0)


def forward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    """The specification. No host read."""
    dtype = compute_dtype(input.dtype)
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    oh, ow = offset.shape[2:]
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * kh * kw)
    geometry = Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    flat = input.to(dtype).reshape(n, offset_groups, channels // offset_groups, height * width)  # [N, OG, Cog, H * W]
    columns = flat.new_zeros(())
    for corner in corners(offset.to(dtype), (height, width), (kh, kw), geometry):
        columns = columns + _read(flat, corner) * corner.weight[:, :, None]  # [N, OG, Cog, K, P]
    if mask is not None:
        columns = columns * mask.to(dtype).reshape(n, offset_groups, 1, kh * kw, oh * ow)
    columns = columns.reshape(n, groups, group_channels * kh * kw, oh * ow)
    out = (
        weight.to(dtype).reshape(groups, out_channels // groups, group_channels * kh * kw) @ columns
    )  # [N, G, O / G, P]
    out = out.reshape(n, out_channels, oh, ow)
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return torch.empty_like(out, dtype=input.dtype, memory_format=layout).copy_(out)


def backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, offset, mask (no elements without one) and weight."""
    dtype = compute_dtype(input.dtype)
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    oh, ow = offset.shape[2:]
    taps, positions = kh * kw, oh * ow
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * taps)
    geometry = Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    flat = input.to(dtype).reshape(n, offset_groups, channels // offset_groups, height * width)  # [N, OG, Cog, H * W]
    grad = grad_output.to(dtype).reshape(n, groups, out_channels // groups, positions)  # [N, G, O / G, P]
    kernels = weight.to(dtype).reshape(groups, out_channels // groups, group_channels * kh * kw)  # [G, O / G, Cg * K]
    grad_columns = (kernels.mT @ grad).reshape(*flat.shape[:3], taps, positions)  # [N, OG, Cog, K, P]
    modulation = None if mask is None else mask.to(dtype).reshape(n, offset_groups, 1, taps, positions)
    grad_sampled = grad_columns if modulation is None else grad_columns * modulation
    sampled, grad_input = torch.zeros_like(grad_columns), torch.zeros_like(flat)
    grad_y = torch.zeros_like(grad_columns[:, :, 0])  # [N, OG, K, P]
    grad_x = torch.zeros_like(grad_y)
    for corner in corners(offset.to(dtype), (height, width), (kh, kw), geometry):
        values = _read(flat, corner)  # [N, OG, Cog, K, P]
        sampled += values * corner.weight[:, :, None]
        inner = (values * grad_sampled).sum(2)  # [N, OG, K, P]
        grad_y += inner * corner.weight_dy
        grad_x += inner * corner.weight_dx
        share = torch.where(corner.valid[:, :, None], grad_sampled * corner.weight[:, :, None], 0.0)
        index = corner.pixel.reshape(n, offset_groups, 1, taps * positions).expand(-1, -1, flat.shape[2], -1)
        grad_input.scatter_add_(3, index, share.flatten(3))
    grad_mask = flat.new_zeros(0)
    columns = sampled
    if mask is not None and modulation is not None:
        grad_mask = (sampled * grad_columns).sum(2).reshape(mask.shape)  # [N, OG * K, OH, OW]
        columns = sampled * modulation
    columns = columns.reshape(n, groups, group_channels * taps, positions)
    grad_weight = (grad @ columns.mT).sum(0).reshape(weight.shape)
    grad_offset = torch.stack([grad_y, grad_x], 3).reshape(offset.shape)  # [N, OG, K, 2, P] -> as offset
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    grad_image = torch.empty_like(input, memory_format=layout).copy_(grad_input.reshape(input.shape))
    mask_dtype = dtype if mask is None else mask.dtype
    return grad_image, grad_offset.to(offset.dtype), grad_mask.to(mask_dtype), grad_weight.to(weight.dtype)
