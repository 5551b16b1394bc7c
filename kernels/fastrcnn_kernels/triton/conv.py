"""``fastrcnn_kernels.conv2d`` on a GPU: cuDNN's convolution, then scale, bias, residual and ReLU in one pass of ours.

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
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::conv2d``."""
    layout = _layout(x)
    weight = weight.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    if EPILOGUE == "cudnn" and relu and x.is_cuda and x.numel() and x.dtype != torch.float64:
        return convolve_by_cudnn(x, weight, scale, bias, residual, stride, padding, dilation, groups)
    plain = residual is None and scale is None and not relu
    inside = bias.to(x.dtype) if plain and bias is not None else None
    out = _aten.convolution(x, weight, inside, stride, padding, dilation, False, [0, 0], groups)
    out = out.contiguous(memory_format=layout)
    if plain:
        return out
    return norm.scale_shift(out, scale, bias, residual, relu, out)


def convolve_by_cudnn(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """relu(conv(x) * scale + bias + residual) by one cuDNN operator, the scale on the weights. CUDA tensors only."""
    if scale is not None:
        weight = (weight * scale[:, None, None, None]).to(x.dtype)
    bias = x.new_zeros(weight.shape[0]) if bias is None else bias.to(x.dtype)
    if residual is None:
        return _aten.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return _aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::conv2d_backward``."""
    layout = _layout(x)
    grad = grad.contiguous(memory_format=layout)
    through = scaled = grad  # the gradients of the sum with the residual, and of the convolution
    if out is not None or scale is not None:
        # Without a scale the two are one tensor.
        scaled, residual = norm.scale_shift_backward(grad, out, scale, scale is not None and (wanted[3] or wanted[2]))
        through = residual if residual.numel() else scaled
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        scaled, x, weight.contiguous(memory_format=layout), [weight.shape[0]], stride, padding, dilation, False,
        [0, 0], groups, [wanted[0], wanted[1], wanted[2] and scale is None],
    )  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if wanted[2]:
        grad_bias = grad_bias.to(dtype) if scale is None else through.sum((0, 2, 3), dtype=dtype)
    # An operator must not return its argument.
    residual = through.clone() if through is grad and wanted[3] else through
    return (
        grad_x.contiguous(memory_format=layout) if wanted[0] else grad.new_empty(0),
        grad_weight.contiguous(memory_format=_layout(weight)) if wanted[1] else grad.new_empty(0),
        grad_bias if wanted[2] else grad.new_empty(0),
        residual if wanted[3] else grad.new_empty(0),
    )
