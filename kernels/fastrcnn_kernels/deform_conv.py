"""Deformable convolution (Dai et al., 2017; with a mask: v2, Zhu et al., 2018), with torchvision's numbers.

Tap (i, j) of output position (oy, ox) reads the input at::

    y = oy * stride - padding + i * dilation + offset_y          x likewise

bilinearly: a sample with y < -1, y >= H, x < -1 or x >= W is zero, and of one that lies across the border only the
pixels inside count. The sample is multiplied by the mask, if there is one, and the convolution is the product of the
weight with these columns. Offsets are [N, OG * K * 2, OH, OW], for each offset group and tap (row by row) first y,
then x; the mask is [N, OG * K, OH, OW]. The channels divide into OG offset groups and, as in ``conv2d``, into weight
groups.

A NaN offset gives a NaN sample, an infinite one lies outside. Coordinates and sums are float32 (float64 for float64)
and are rounded once. Gradients of input, offset, mask, weight and bias; nothing is added with atomics, so that they
are the same every time as far as torch's matrix products are. No second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn_kernels import _library
from fastrcnn_kernels import deform_conv_reference as reference

# Bytes of columns sampled before they are multiplied: they stay in the cache, and a product is still large.
_CHUNK_BYTES = 4 << 20


def _fake(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    layout = torch.channels_last if reference.is_channels_last(input) else torch.contiguous_format
    shape = (input.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _backward_fake(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = torch.channels_last if reference.is_channels_last(input) else torch.contiguous_format
    grad_input = torch.empty_like(input, memory_format=layout)
    if mask is None:
        grad_mask = input.new_empty(0, dtype=reference.compute_dtype(input.dtype))
    else:
        grad_mask = torch.empty_like(mask, memory_format=torch.contiguous_format)
    grad_offset = torch.empty_like(offset, memory_format=torch.contiguous_format)
    return grad_input, grad_offset, grad_mask, torch.empty_like(weight, memory_format=torch.contiguous_format)


class _Sampler:
    """The C++ kernels on one problem: maps in NHWC and in the compute type, columns a chunk at a time."""

    def __init__(
        self, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor,
        stride: list[int], padding: list[int], dilation: list[int], buffers: int,
    ) -> None:  # fmt: skip
        if input.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise TypeError(
                f"deform_conv2d: the C++ kernels take float16, bfloat16, float32 and float64, not {input.dtype}"
            )
        self.native = _library.extension()
        self.dtype = reference.compute_dtype(input.dtype)
        n, channels, height, width = input.shape
        out_channels, group_channels, kh, kw = weight.shape
        oh, ow = offset.shape[2:]
        self.groups, self.out_channels = channels // group_channels, out_channels
        self.positions = n * oh * ow
        self.row = group_channels * kh * kw
        self.input = input.to(self.dtype).contiguous(memory_format=torch.channels_last)
        self.offset = offset.to(self.dtype).contiguous()
        self.mask = None if mask is None else mask.to(self.dtype).contiguous()
        self.problem = self.native.DeformConvProblem(
            [n, channels, height, width, oh, ow, kh, kw], stride, padding, dilation, self.groups,
            offset.shape[1] // (2 * kh * kw), self.input.data_ptr(), self.offset.data_ptr(),
            0 if self.mask is None else self.mask.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        each = max(1, channels * kh * kw * self.dtype.itemsize * buffers)
        self.chunk = max(64, _CHUNK_BYTES // each)
        self.wide = self.dtype == torch.float64

    def chunks(self) -> list[tuple[int, int]]:
        """(first position, number of positions), of nearly equal size."""
        count = -(-self.positions // self.chunk)
        bounds = [self.positions * i // count for i in range(count + 1)]
        return [(a, b - a) for a, b in pairwise(bounds)]

    def kernels(self, weight: Tensor) -> Tensor:
        """The weight as [G, K * C / G, O / G], in the order of the columns."""
        parts = weight.to(self.dtype).unflatten(0, (self.groups, -1)).flatten(3)  # [G, O / G, C / G, K]
        return parts.permute(0, 3, 2, 1).reshape(self.groups, self.row, -1)

    def buffer(self) -> Tensor:
        count = max(count for _, count in self.chunks())
        return self.input.new_empty(self.groups * count * self.row)

    def view(self, buffer: Tensor, count: int) -> Tensor:
        return buffer[: self.groups * count * self.row].view(self.groups, count, self.row)


def _cpp(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    out = _fake(input, offset, mask, weight, bias, stride, padding, dilation)
    if out.numel() == 0:
        return out
    sampler = _Sampler(input, offset, mask, weight, stride, padding, dilation, 1)
    kernels = sampler.kernels(weight)  # [G, K * Cg, Og]
    rows = kernels.new_empty(sampler.positions, sampler.out_channels)  # the output in NHWC
    addend = None if bias is None else bias.to(sampler.dtype)
    buffer = sampler.buffer()
    for start, count in sampler.chunks():
        columns = sampler.view(buffer, count)
        sampler.native.deform_conv_columns(sampler.problem, start, count, columns.data_ptr(), sampler.wide)
        part = rows[start : start + count]
        if sampler.groups > 1:
            part.view(count, sampler.groups, -1).copy_(torch.bmm(columns, kernels).transpose(0, 1))
            if addend is not None:
                part += addend
        elif addend is None:
            torch.mm(columns[0], kernels[0], out=part)
        else:
            torch.addmm(addend, columns[0], kernels[0], out=part)
    n, _, oh, ow = out.shape
    return out.copy_(rows.view(n, oh, ow, -1).permute(0, 3, 1, 2))


def _backward_cpp(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _backward_fake(grad_output, input, offset, mask, weight, stride, padding, dilation)
    if grad_output.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    sampler = _Sampler(input, offset, mask, weight, stride, padding, dilation, 2)
    groups, positions = sampler.groups, sampler.positions
    kernels = sampler.kernels(weight).mT.contiguous()  # [G, Og, K * Cg]
    rows = grad_output.to(sampler.dtype).permute(0, 2, 3, 1).reshape(positions, groups, -1).transpose(0, 1)
    grad_input = torch.zeros_like(sampler.input)
    grad_offset = torch.empty_like(sampler.offset)
    grad_mask = None if sampler.mask is None else torch.empty_like(sampler.mask)
    grad_kernels = torch.zeros_like(kernels)
    columns_buffer, grad_buffer = sampler.buffer(), sampler.buffer()
    for start, count in sampler.chunks():
        columns, grad_columns = sampler.view(columns_buffer, count), sampler.view(grad_buffer, count)
        part = rows[:, start : start + count]  # [G, count, Og]
        if groups > 1:
            torch.bmm(part, kernels, out=grad_columns)
        else:
            torch.mm(part[0], kernels[0], out=grad_columns[0])
        sampler.native.deform_conv_backward(
            sampler.problem, start, count,
            [grad_columns.data_ptr(), columns.data_ptr(), grad_input.data_ptr(), grad_offset.data_ptr(),
             0 if grad_mask is None else grad_mask.data_ptr()],
            sampler.wide,
        )  # fmt: skip
        if groups > 1:
            grad_kernels.baddbmm_(part.mT, columns)
        else:
            grad_kernels[0].addmm_(part[0].mT, columns[0])
    grads[0].copy_(grad_input)
    grads[1].copy_(grad_offset)
    if grad_mask is not None:
        grads[2].copy_(grad_mask)
    by_tap = grad_kernels.view(weight.shape[0], -1, weight.shape[1]).mT  # [O, C / G, K]
    grads[3].copy_(by_tap.reshape(weight.shape))
    return grads


_forward_op = _library.define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    cpp=_cpp,
    triton="fastrcnn_kernels.triton.deform_conv:deform_conv2d",
)
_backward_op = _library.define(
    "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    "int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.deform_conv_backward:deform_conv2d_backward",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    grad_input, grad_offset, grad_mask, grad_weight = _backward_op(grad, input, offset, mask, weight, *ctx.geometry)
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3), dtype=reference.compute_dtype(grad.dtype)).to(ctx.bias_dtype)
    return grad_input, grad_offset, None if mask is None else grad_mask, grad_weight, grad_bias, None, None, None


_library.register_autograd("deform_conv2d", _gradient, _context)


def _pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an integer of at least {least} or a pair of them, got {value!r}")
    return int(pair[0]), int(pair[1])


def _check(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    geometry: reference.Geometry,
) -> None:  # fmt: skip
    for tensor, name in ((input, "input"), (offset, "offset"), (weight, "weight"), (mask, "mask")):
        if tensor is not None and (tensor.dim() != 4 or not tensor.dtype.is_floating_point):
            raise ValueError(f"{name} must be floating-point with 4 dimensions, got {tensor.dtype}{list(tensor.shape)}")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device} and input on {input.device}: they must be together")
    (n, channels, height, width), (out_channels, group_channels, kh, kw) = input.shape, weight.shape
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        raise ValueError(f"weight and bias must have the dtype of the input, {input.dtype}, got {weight.dtype}")
    if min(group_channels, kh, kw) < 1 or channels < group_channels or channels % group_channels:
        raise ValueError(f"weight {list(weight.shape)} does not divide the {channels} channels of the input")
    groups = channels // group_channels
    if out_channels % groups:
        raise ValueError(f"{out_channels} output channels do not divide into {groups} groups")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must be [{out_channels}], got {list(bias.shape)}")
    size = geometry.output_size((height, width), (kh, kw))
    if min(height, width) < 1 or min(size) < 1:
        raise ValueError(f"an input of {height} x {width} gives an output of {size[0]} x {size[1]}")
    offset_groups = offset.shape[1] // (2 * kh * kw)
    if offset_groups < 1 or channels % offset_groups or offset.shape != (n, offset_groups * 2 * kh * kw, *size):
        raise ValueError(
            f"offset must be [{n}, offset groups * 2 * {kh * kw}, {size[0]}, {size[1]}] with offset groups that divide "
            f"{channels} channels, got {list(offset.shape)}"
        )
    if mask is not None and mask.shape != (n, offset_groups * kh * kw, *size):
        raise ValueError(f"mask must be {[n, offset_groups * kh * kw, *size]}, got {list(mask.shape)}")


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, with torchvision's signature and numbers; with ``mask`` the modulated one (v2).

    Args:
        input (Tensor[N, C, H, W]): NCHW or channels_last.
        offset (Tensor[N, OG * 2 * kh * kw, OH, OW]): displacement of each sample in input pixels, y before x. Any float
            dtype: float32 offsets keep their precision beside a half input.
        weight (Tensor[O, C / G, kh, kw]), bias (Tensor[O] or None): as in ``conv2d``; of the input's dtype.
        stride, padding, dilation: an integer or (height, width).
        mask (Tensor[N, OG * kh * kw, OH, OW] or None): factor of each sample. Any float dtype.

    Returns:
        Tensor[N, O, OH, OW] in the dtype and memory format of the input. Differentiable in all tensors. Under autocast
        input, weight and bias are cast to its dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    geometry = reference.Geometry(
        _pair(stride, "stride", 1), _pair(padding, "padding", 0), _pair(dilation, "dilation", 1)
    )
    _check(input, offset, weight, bias, mask, geometry)
    return _forward_op(input, offset, mask, weight, bias, *(list(pair) for pair in geometry))


class DeformConv2d(nn.Module):
    """:func:`deform_conv2d` with weight and bias as parameters; torchvision's module, its names and initial values.

    Raises:
        ValueError: where the channels do not divide into ``groups``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels do not divide into {groups} groups")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size, "kernel_size", 1)
        self.stride = _pair(stride, "stride", 1)
        self.padding = _pair(padding, "padding", 0)
        self.dilation = _pair(dilation, "dilation", 1)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Conv2d``: uniform in +- 1 / sqrt(fan in)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tensors as in :func:`deform_conv2d` -> Tensor[N, O, OH, OW]."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )
