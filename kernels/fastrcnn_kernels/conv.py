"""A convolution with what follows it in a detector: bias, residual and ReLU.

    out = relu(conv(x, weight) * scale + bias + residual)

``scale`` and ``bias`` are what a frozen batch norm comes down to. On a CPU the scale goes into the weights, on a GPU
into the pass that adds the bias. The products are torch's: cuDNN on a GPU, oneDNN on a CPU, or, on a CPU where maps are
NHWC, Winograd's (:mod:`fastrcnn_kernels.winograd`) and plain matrix products for the gradients, where oneDNN is slow.
The backward needs x, the weights and, with a ReLU, the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library, norm, winograd

_aten = torch.ops.aten
_FEWEST_CHANNELS = 4  # of the input, below which the weights' gradient by taps does not pay


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    bias = None if bias is None else bias.to(x.dtype)
    layout = _layout(x)
    weight = weight.contiguous(memory_format=layout)  # what torch takes the layout of its result from as well
    out = _aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return out.contiguous(memory_format=layout)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weights of each output times its scale."""
    if scale is None:
        return weight
    return (weight.to(norm._compute_dtype(weight.dtype)) * scale[:, None, None, None]).to(weight.dtype)


def _reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The specification. In half precision the convolution is rounded, and what follows is float32, rounded once."""
    weight = _scaled(weight, scale)
    if residual is None and not relu:
        return _convolve(x, weight, bias, stride, padding, dilation, groups)
    out = _convolve(x, weight, None, stride, padding, dilation, groups)
    dtype = norm._compute_dtype(x.dtype)
    wide = out.to(dtype)
    if bias is not None:
        wide = wide + bias.to(dtype)[:, None, None]
    if residual is not None:
        wide = wide + residual.to(dtype)
    return torch.empty_like(out).copy_(wide.relu() if relu else wide)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and residual; no elements where not wanted. ``out`` is None without ReLU."""
    layout = _layout(x)
    through = grad if out is None else torch.where(out > 0, grad, 0.0)
    through = through.contiguous(memory_format=layout)
    grad_bias = through.sum((0, 2, 3), dtype=norm._compute_dtype(grad.dtype)) if wanted[2] else grad.new_empty(0)
    grad_x, grad_weight, _ = _aten.convolution_backward(
        through, x, _scaled(weight, scale), None, stride, padding, dilation, False, [0, 0], groups, [*wanted[:2], False]
    )
    # An operator must not return its argument.
    residual = (through.clone() if out is None else through) if wanted[3] else grad.new_empty(0)
    return (
        grad_x.contiguous(memory_format=layout) if wanted[0] else grad.new_empty(0),
        _scaled(grad_weight, scale).contiguous(memory_format=_layout(weight)) if wanted[1] else grad.new_empty(0),
        grad_bias,
        residual,
    )


def _output_shape(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int, int, int]:
    height, width = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return x.shape[0], weight.shape[0], height, width


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    shape = _output_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    nothing = grad.new_empty(0)
    layout = _layout(x)
    return (
        torch.empty_like(x, memory_format=layout) if wanted[0] else nothing,
        torch.empty_like(weight, memory_format=_layout(weight)) if wanted[1] else grad.new_empty(0),
        grad.new_empty(grad.shape[1], dtype=norm._compute_dtype(grad.dtype)) if wanted[2] else grad.new_empty(0),
        torch.empty_like(grad, memory_format=layout) if wanted[3] else grad.new_empty(0),
    )


def _onednn_fuses(x: Tensor) -> bool:
    """Whether oneDNN computes bias, residual and ReLU while its result is still in registers (what Inductor uses)."""
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return x.dtype == torch.float32 and available


def _cpp(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    layout = _layout(x)
    weight = _scaled(weight, scale)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    if layout == torch.channels_last:
        if winograd.suits(x, weight, stride, padding, dilation, groups):
            return winograd.forward(x, weight, bias, residual, relu)
        if x.numel() and (residual is not None or relu) and _onednn_fuses(x):
            weight = weight.contiguous(memory_format=layout)
            rest = (bias, padding, stride, dilation, groups)
            if residual is None:
                return torch.ops.mkldnn._convolution_pointwise(x, weight, *rest, "relu", [None], "")
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, weight, *rest, "add", None, "relu" if relu else None, [None], ""
            )
    if residual is None and not relu:
        return _convolve(x, weight, bias, stride, padding, dilation, groups)
    out = _convolve(x, weight, None, stride, padding, dilation, groups)
    dtype = norm._compute_dtype(x.dtype)
    one = torch.ones(out.shape[1], dtype=dtype)
    norm._launch_cpp(out, one, torch.zeros_like(one) if bias is None else bias.to(dtype), residual, relu, out)
    return out


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] in NHWC as a matrix [N H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _weight_gradient_by_taps(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """One matrix product for each place in the filter: the outputs' gradients by the pixels that it saw there."""
    rows, columns = weight.shape[2:]
    if any(padding):
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = grad.shape[2:]
    outputs = _rows(grad).t()  # [O, N H W]
    total = weight.new_empty((weight.shape[0], weight.shape[1], rows, columns))
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation[0], j * dilation[1]
            seen = x[:, :, top : top + (height - 1) * stride[0] + 1 : stride[0]]
            seen = seen[..., left : left + (width - 1) * stride[1] + 1 : stride[1]]
            total[:, :, i, j] = outputs @ _rows(seen)
    return total


def _input_gradient_of_1x1(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int]) -> Tensor:
    product = (_rows(grad) @ weight.flatten(1)).view(grad.shape[0], *grad.shape[2:], -1).permute(0, 3, 1, 2)
    if stride == [1, 1]:
        return product
    grad_x = torch.zeros_like(x)
    grad_x[:, :, :: stride[0], :: stride[1]] = product
    return grad_x


def _backward_cpp(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _layout(x)
    products = layout == torch.channels_last and groups == 1 and x.dtype in (torch.float32, torch.float64)
    if not products or not x.numel() or not grad.numel():
        return _backward_reference(grad, x, weight, scale, out, stride, padding, dilation, groups, wanted)
    through = grad.contiguous(memory_format=layout)
    if out is not None:
        through = norm._backward_cpp(grad, out, torch.ones(grad.shape[1], dtype=grad.dtype), False)[0]
        through = through.contiguous(memory_format=layout)
    quarter = winograd.suits(x, weight, stride, padding, dilation, groups)
    grad_x, grad_weight = grad.new_empty(0), grad.new_empty(0)
    if wanted[0]:
        filters = _scaled(weight, scale)
        if quarter:
            grad_x = winograd.input_gradient(through, filters)
        elif tuple(weight.shape[2:]) == (1, 1) and list(padding) == [0, 0]:
            grad_x = _input_gradient_of_1x1(through, x, filters, list(stride))
        else:
            grad_x = _aten.convolution_backward(
                through, x, filters, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False]
            )[0].contiguous(memory_format=layout)
    if wanted[1]:
        if quarter:
            grad_weight = winograd.weight_gradient(through, x)
        elif x.shape[1] >= _FEWEST_CHANNELS:
            grad_weight = _weight_gradient_by_taps(through, x, weight, stride, padding, dilation)
        else:  # images: products too thin
            grad_weight = _aten.convolution_backward(
                through, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
            )[1]
        grad_weight = _scaled(grad_weight, scale).contiguous(memory_format=_layout(weight))
    grad_bias = _rows(through).sum(0) if wanted[2] else grad.new_empty(0)
    residual = (through.clone() if out is None else through) if wanted[3] else grad.new_empty(0)
    return grad_x, grad_weight, grad_bias, residual


_conv2d = _library.define(
    "conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    reference=_reference,
    fake=_fake,
    cpp=_cpp,
    triton="fastrcnn_kernels.triton.conv:conv2d",
)
_conv2d_backward = _library.define(
    "conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? scale, Tensor? out, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.conv:conv2d_backward",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, residual, relu, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, scale, output if relu else None)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual = residual is not None


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, scale, out = ctx.saved_tensors
    of_x, of_weight, _, of_bias, of_residual = ctx.needs_input_grad[:5]
    # Without a ReLU the residual's gradient is the output's own.
    wanted = [of_x, of_weight, of_bias, of_residual and out is not None]
    grad_x, grad_weight, grad_bias, grad_residual = _conv2d_backward(grad, x, weight, scale, out, *ctx.geometry, wanted)
    return (
        grad_x if of_x else None,
        grad_weight if of_weight else None,
        None,
        grad_bias.to(ctx.bias_dtype) if of_bias else None,
        (grad_residual if out is not None else grad) if of_residual else None,
        None, None, None, None, None,
    )  # fmt: skip


_library.register_autograd("conv2d", _gradient, _context)


def _pair(value: int | tuple[int, int] | list[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else [int(v) for v in value]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a frozen norm's scale, a residual and a ReLU in the same operator.

    Under autocast x, weight and residual are taken in its dtype, as by torch's convolution.

    Args:
        x (Tensor[N, I, H, W]): NCHW or channels_last; the result has its memory format. float16, bfloat16, float32 or
            float64.
        weight (Tensor[O, I / groups, kH, kW]): of the dtype of ``x``.
        bias (Tensor[O] or None): of the dtype of ``x``, or float32.
        stride, padding, dilation, groups: as in torch; no strings.
        scale (Tensor[O] or None): a factor on each output channel, before ``bias``; a buffer, without gradient. Of the
            dtype of ``x``, or float32.
        residual (Tensor[N, O, H', W'] or None): added before the ReLU; of the dtype of ``x``.
        relu: clamp at 0; a NaN stays one.

    Returns:
        Tensor[N, O, H', W'] in the dtype of ``x``. Differentiable, once, in x, weight, bias
        and residual.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    if x.dim() != 4 or weight.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(
            f"x must be floating-point [N, I, H, W] and weight [O, I / groups, kH, kW], got {x.dtype}{list(x.shape)} "
            f"and {list(weight.shape)}"
        )
    if weight.shape[1] * groups != x.shape[1] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be {x.dtype}[O, {x.shape[1]} / {groups}, kH, kW] on {x.device}, got "
            f"{weight.dtype}{list(weight.shape)} on {weight.device}"
        )
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None and (vector.shape != weight.shape[:1] or vector.device != x.device):
            raise ValueError(
                f"{name} must be [{weight.shape[0]}] on {x.device}, got {list(vector.shape)} on {vector.device}"
            )
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    if residual is not None:
        shape = _output_shape(x, weight, *geometry[:3])
        if (residual.shape, residual.dtype, residual.device) != (shape, x.dtype, x.device):
            raise ValueError(
                f"residual must be {x.dtype}{list(shape)} on {x.device}, got "
                f"{residual.dtype}{list(residual.shape)} on {residual.device}"
            )
    return _conv2d(x, weight, scale, bias, residual, relu, *geometry)
