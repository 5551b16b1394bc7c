"""``fastrcnn_kernels.conv2d`` on a GPU: cuDNN's convolution, then bias, residual and ReLU in one pass of ours.

cuDNN has convolutions with bias, residual and ReLU inside (``convolve_by_cudnn``); benchmarks/convs.py measures them
beside these, and ``EPILOGUE`` says which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrcnn_kernels.triton import norm

_aten = torch.ops.aten

# "triton" or "cudnn"; cuDNN's has not been measured, and knows neither float64 nor every dtype on every card.
EPILOGUE = "triton"


def _layout(x: Tensor) -> torch.memory_format:
    """As in ``conv.py``, which this layer must not import."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::conv2d``."""
    layout = _layout(x)
    weight = weight.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    if EPILOGUE == "cudnn" and relu and x.is_cuda and x.numel() and x.dtype != torch.float64:
        return convolve_by_cudnn(x, weight, bias, residual, stride, padding, dilation, groups)
    plain = residual is None and not relu
    inside = bias.to(x.dtype) if plain and bias is not None else None
    out = _aten.convolution(x, weight, inside, stride, padding, dilation, False, [0, 0], groups)
    out = out.contiguous(memory_format=layout)
    if plain:
        return out
    return norm.scale_shift(out, None, bias, residual, relu, out)


def convolve_by_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """relu(conv(x) + bias + residual) by one cuDNN operator. CUDA tensors only."""
    bias = x.new_zeros(weight.shape[0]) if bias is None else bias.to(x.dtype)
    if residual is None:
        return _aten.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return _aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::conv2d_backward``."""
    layout = _layout(x)
    through = grad.contiguous(memory_format=layout)
    if out is not None:
        through = norm.scale_shift_backward(through, out, None, False)[0]
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        through, x, weight.contiguous(memory_format=layout), [weight.shape[0]], stride, padding, dilation, False,
        [0, 0], groups, wanted[:3],
    )  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = (through.clone() if out is None else through) if wanted[3] else grad.new_empty(0)
    return (
        grad_x.contiguous(memory_format=layout) if wanted[0] else grad.new_empty(0),
        grad_weight.contiguous() if wanted[1] else grad.new_empty(0),
        grad_bias.to(dtype) if wanted[2] else grad.new_empty(0),
        residual,
    )
