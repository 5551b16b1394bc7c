"""Frozen batch normalisation with what follows it: the residual and the ReLU of a bottleneck (He et al., 2016).

    scale = weight / sqrt(running_var + eps),  shift = bias - running_mean * scale
    out   = relu(x * scale + shift + residual)

in one pass that reads each tensor once and writes one. Computed in float32 (float64 for float64) and rounded once.
The statistics and the affine parameters are buffers: they get no gradient. The backward needs the output alone, where
the ReLU let something through, and the output is kept by the convolution that reads it anyway. A NaN stays a NaN
through the ReLU, and no gradient passes where the output is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def scale_shift_reference(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """The specification, given scale and shift. [N, C, H, W]"""
    dtype = _compute_dtype(x.dtype)
    out = x.to(dtype) * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        out = out + residual.to(dtype)
    if relu:
        out = out.relu()
    return torch.empty_like(x, memory_format=_layout(x)).copy_(out)


def scale_shift_backward_reference(
    grad: Tensor, out: Tensor | None, scale: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if asked for, of the residual (else no elements). ``out`` is None without ReLU."""
    dtype = _compute_dtype(grad.dtype)
    through = grad if out is None else torch.where(out > 0, grad, 0.0)
    grad_x = torch.empty_like(grad, memory_format=_layout(grad))
    grad_x.copy_(through.to(dtype) * scale[:, None, None])
    if not residual:
        return grad_x, grad.new_empty(0)
    return grad_x, torch.empty_like(grad, memory_format=_layout(grad)).copy_(through)


def _fake(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _backward_fake(grad: Tensor, out: Tensor | None, scale: Tensor, residual: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad, memory_format=_layout(grad))
    return grad_x, torch.empty_like(grad_x) if residual else grad.new_empty(0)


_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _sizes(x: Tensor, layout: torch.memory_format) -> tuple[int, int, int]:
    """(rows, channels, pixels): NHWC is rows of channels, NCHW planes of pixels."""
    n, channels, height, width = x.shape
    return (n * height * width, channels, 1) if layout == torch.channels_last else (n, channels, height * width)


def _code(x: Tensor) -> int:
    if x.dtype not in _DTYPE_CODES:
        raise TypeError(
            f"frozen_batch_norm: the C++ kernels take float16, bfloat16, float32 and float64, not {x.dtype}"
        )
    return _DTYPE_CODES[x.dtype]


def _cpp(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    layout = _layout(x)
    out = torch.empty_like(x, memory_format=layout)
    _launch_cpp(x.contiguous(memory_format=layout), scale, shift, residual, relu, out)
    return out


def _launch_cpp(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
    layout = _layout(out)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    _library.extension().scale_shift(
        x.data_ptr(), scale.contiguous().data_ptr(), shift.contiguous().data_ptr(),
        0 if residual is None else residual.data_ptr(), out.data_ptr(), *_sizes(out, layout), relu, _code(out),
        torch.get_num_threads(),
    )  # fmt: skip


def _backward_cpp(grad: Tensor, out: Tensor | None, scale: Tensor, residual: bool) -> tuple[Tensor, Tensor]:
    layout = _layout(grad)
    grad_x, grad_residual = _backward_fake(grad, out, scale, residual)
    grad = grad.contiguous(memory_format=layout)
    out = None if out is None else out.contiguous(memory_format=layout)
    _library.extension().scale_shift_backward(
        grad.data_ptr(), 0 if out is None else out.data_ptr(), scale.contiguous().data_ptr(), grad_x.data_ptr(),
        grad_residual.data_ptr() if residual else 0, *_sizes(grad, layout), _code(grad), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_residual


_forward_op = _library.define(
    "scale_shift(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool relu) -> Tensor",
    reference=scale_shift_reference,
    fake=_fake,
    cpp=_cpp,
    triton="fastrcnn_kernels.triton.norm:scale_shift",
)
_backward_op = _library.define(
    "scale_shift_backward(Tensor grad, Tensor? out, Tensor scale, bool residual) -> (Tensor, Tensor)",
    reference=scale_shift_backward_reference,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.norm:scale_shift_backward",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, scale, _, residual, relu = inputs
    ctx.save_for_backward(scale, output if relu else None)
    ctx.residual = residual is not None


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    scale, out = ctx.saved_tensors
    wanted = ctx.residual and ctx.needs_input_grad[3]
    grad_x, grad_residual = _backward_op(grad, out, scale, wanted and out is not None)
    # Without a ReLU the residual's gradient is the output's own.
    return grad_x, None, None, (grad_residual if out is not None else grad) if wanted else None, None


_library.register_autograd("scale_shift", _gradient, _context)


def frozen_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 0.0,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Batch normalisation with fixed statistics, a residual and a ReLU in one pass.

    Args:
        x (Tensor[N, C, H, W]): NCHW or channels_last, float16, bfloat16, float32 or float64.
        weight, bias, running_mean, running_var (Tensor[C]): buffers; no gradient.
        eps: added to the variance: 0 in maskrcnn-benchmark, 1e-5 in torchvision and detectron2.
        residual (Tensor[N, C, H, W] or None): added before the ReLU; of the dtype of ``x``.
        relu: clamp at 0.

    Returns:
        Tensor[N, C, H, W] in the dtype and memory format of ``x``. Differentiable, once, in ``x`` and ``residual``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating-point [N, C, H, W], got {x.dtype}{list(x.shape)}")
    for tensor, name in (
        (weight, "weight"),
        (bias, "bias"),
        (running_mean, "running_mean"),
        (running_var, "running_var"),
    ):
        if tensor.shape != x.shape[1:2] or tensor.device != x.device:
            raise ValueError(
                f"{name} must be [{x.shape[1]}] on {x.device}, got {list(tensor.shape)} on {tensor.device}"
            )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual must be {x.dtype}{list(x.shape)} on {x.device}, got "
            f"{residual.dtype}{list(residual.shape)} on {residual.device}"
        )
    dtype = _compute_dtype(x.dtype)
    with torch.no_grad():
        scale = weight.to(dtype) * (running_var.to(dtype) + eps).rsqrt()
        shift = bias.to(dtype) - running_mean.to(dtype) * scale
    return _forward_op(x, scale, shift, residual, relu)
