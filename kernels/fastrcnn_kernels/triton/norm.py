"""Frozen batch normalisation, residual and ReLU in one pass, and its gradient; rules in ``fastrcnn_kernels/norm.py``.

Bound by memory: a program takes 1024 elements in the order of memory, whatever the layout, and finds each one's channel
by a division. Scale and shift come from L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_BLOCK = 1024
_TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _positive(v):
    # NaN is not below zero: it stays.
    return tl.where(v < 0.0, 0.0, v)


@triton.jit(do_not_specialize=["count", "inner"])
def _forward_kernel(
    x_ptr, scale_ptr, shift_ptr, residual_ptr, out_ptr, count, inner,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    dtype = tl.float64 if WIDE else tl.float32
    channel = at % CHANNELS if CHANNELS_LAST else at // inner % CHANNELS
    v = tl.load(x_ptr + at, mask=live, other=0.0).to(dtype)
    if SCALE:
        v *= tl.load(scale_ptr + channel, mask=live, other=0.0)
    if SHIFT:
        v += tl.load(shift_ptr + channel, mask=live, other=0.0).to(dtype)
    if RESIDUAL:
        v += tl.load(residual_ptr + at, mask=live, other=0.0).to(dtype)
    if RELU:
        v = _positive(v)
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["count", "inner"])
def _backward_kernel(
    grad_ptr, out_ptr, scale_ptr, grad_x_ptr, grad_residual_ptr, count, inner,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    dtype = tl.float64 if WIDE else tl.float32
    grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(dtype)
    if RELU:
        grad = tl.where(tl.load(out_ptr + at, mask=live, other=0.0).to(dtype) > 0.0, grad, 0.0)
    if RESIDUAL:
        tl.store(grad_residual_ptr + at, grad.to(grad_residual_ptr.dtype.element_ty), mask=live)
    if SCALE:
        channel = at % CHANNELS if CHANNELS_LAST else at // inner % CHANNELS
        grad *= tl.load(scale_ptr + channel, mask=live, other=0.0)
    tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=live)


def _layout(x: Tensor) -> torch.memory_format:
    """As in ``norm.py``, which this layer must not import."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _check(dtype: torch.dtype) -> None:
    if dtype not in _TYPE_NAMES:
        raise TypeError(f"frozen_batch_norm: the Triton kernels take float16, bfloat16, float32, float64, not {dtype}")


def scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Launcher of ``fastrcnn_kernels::scale_shift``; ``out`` may be x itself, dense and in its layout."""
    _check(x.dtype)
    layout = _layout(x)
    out = torch.empty_like(x, memory_format=layout) if out is None else out
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=layout)
    with device_guard(x):
        _forward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x,
            x if scale is None else scale.contiguous(),
            x if shift is None else shift.contiguous(),
            x if residual is None else residual.contiguous(memory_format=layout),
            out,
            x.numel(),
            x.shape[2] * x.shape[3],
            CHANNELS=x.shape[1],
            CHANNELS_LAST=layout == torch.channels_last,
            SCALE=scale is not None,
            SHIFT=shift is not None,
            RESIDUAL=residual is not None,
            RELU=relu,
            WIDE=x.dtype == torch.float64,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


def scale_shift_backward(
    grad: Tensor, out: Tensor | None, scale: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::scale_shift_backward``."""
    _check(grad.dtype)
    layout = _layout(grad)
    grad_x = torch.empty_like(grad, memory_format=layout)
    grad_residual = torch.empty_like(grad_x) if residual else grad.new_empty(0)
    if grad.numel() == 0:
        return grad_x, grad_residual
    grad = grad.contiguous(memory_format=layout)
    with device_guard(grad):
        _backward_kernel[(triton.cdiv(grad.numel(), _BLOCK),)](
            grad,
            grad if out is None else out.contiguous(memory_format=layout),
            grad if scale is None else scale.contiguous(),
            grad_x,
            grad_residual,
            grad.numel(),
            grad.shape[2] * grad.shape[3],
            CHANNELS=grad.shape[1],
            CHANNELS_LAST=layout == torch.channels_last,
            SCALE=scale is not None,
            RESIDUAL=residual,
            RELU=out is not None,
            WIDE=grad.dtype == torch.float64,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return grad_x, grad_residual


def _cases(dtype: torch.dtype, channels_last: bool, residual: bool) -> list[CompileCase]:
    name, compute = f"*{_TYPE_NAMES[dtype]}", "*fp64" if dtype == torch.float64 else "*fp32"
    forward = {
        "x_ptr": name, "scale_ptr": compute, "shift_ptr": compute, "residual_ptr": name, "out_ptr": name,
        "count": "i32", "inner": "i32",
    }  # fmt: skip
    backward = {
        "grad_ptr": name, "out_ptr": name, "scale_ptr": compute, "grad_x_ptr": name, "grad_residual_ptr": name,
        "count": "i32", "inner": "i32",
    }  # fmt: skip
    constants = {
        "CHANNELS": 256, "CHANNELS_LAST": channels_last, "SCALE": True, "SHIFT": True, "RESIDUAL": residual,
        "RELU": True, "WIDE": dtype == torch.float64, "BLOCK": _BLOCK,
    }  # fmt: skip
    of_backward = {name: value for name, value in constants.items() if name != "SHIFT"}
    label = f"{_TYPE_NAMES[dtype]}-{'nhwc' if channels_last else 'nchw'}{'-residual' if residual else ''}"
    return [
        CompileCase(f"forward-{label}", _forward_kernel, forward, constants, {"num_warps": 4}),
        CompileCase(f"backward-{label}", _backward_kernel, backward, of_backward, {"num_warps": 4}),
    ]


COMPILE_CASES = [
    *_cases(torch.bfloat16, True, True),
    *_cases(torch.float32, False, False),
]
