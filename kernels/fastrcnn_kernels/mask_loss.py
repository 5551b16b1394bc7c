"""The last layer of a mask head and its loss in one operator: only the channel of each region's class is computed.

Mask R-CNN (He et al., 2017) predicts one mask a class with a 1x1 convolution and trains the matched class's mask alone.
A channel of that convolution is a scalar product, so nothing of shape [K, classes, M, M] is needed::

    h = max(hidden, 0) if relu else hidden                                  hidden [K, C, M, M]
    z[k, y, x] = bias[label_k] + sum_c weight[label_k, c] * h[k, c, y, x]
    loss = sum over regions with a label >= 0 of BCEWithLogits(z, target) / normaliser

Sums are kept in float32 (float64 for float64 features); logits are never rounded to half precision. The gradient of the
weights is a sum for each region, then over the regions of a class in their order: the same bits every time. A region
whose label is negative is absent: no loss, no gradient, its features and targets are not looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastrcnn_kernels import _library

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(hidden: Tensor) -> bool:
    """Whether the features are channels_last and not contiguous as well."""
    return hidden.is_contiguous(memory_format=torch.channels_last) and not hidden.is_contiguous()


def _rows(weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each region is present [K], its row of the weights [K, C] and of the bias [K]."""
    if labels.device.type == "cpu":
        torch._assert_async(
            (labels < weight.shape[0]).all(), f"mask_loss: a label exceeds the {weight.shape[0]} classes of the weights"
        )
    present = (labels >= 0) & (labels < weight.shape[0])  # [K]
    index = torch.where(present, labels, 0)  # [K]
    return present, weight.to(dtype)[index], bias.to(dtype)[index]


def class_logits_reference(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool) -> Tensor:
    """The specification of :func:`mask_class_logits`."""
    dtype = compute_dtype(hidden.dtype)
    present, row, shift = _rows(weight, bias, labels, dtype)  # [K], [K, C], [K]
    h = hidden.relu().to(dtype) if relu else hidden.to(dtype)  # [K, C, M, M]
    logits = torch.einsum("kchw,kc->khw", h, row) + shift[:, None, None]  # [K, M, M]
    return torch.where(present[:, None, None], logits, 0)


def forward_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor, normaliser: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """The specification of the loss: the scalar, and the logits [K, M, M] that its gradient needs."""
    logits = class_logits_reference(hidden, weight, bias, labels, relu)  # [K, M, M]
    loss = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")  # [K, M, M]
    total = torch.where(labels[:, None, None] >= 0, loss, 0).sum()  # []
    return total / normaliser.to(logits.dtype), logits


def backward_reference(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor,
    normaliser: Tensor, logits: Tensor, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of the loss in ``hidden``, ``weight`` and ``bias``."""
    dtype = logits.dtype
    present, row, _ = _rows(weight, bias, labels, dtype)  # [K], [K, C]
    h = hidden.relu().to(dtype) if relu else hidden.to(dtype)  # [K, C, M, M]
    scale = grad_loss.to(dtype) / normaliser.to(dtype)  # []
    g = torch.where(present[:, None, None], (logits.sigmoid() - targets.to(dtype)) * scale, 0)  # [K, M, M]
    grad_hidden = g[:, None] * row[:, :, None, None]  # [K, C, M, M]
    passes = present[:, None, None, None]
    grad_hidden = torch.where(passes & ~(hidden <= 0) if relu else passes, grad_hidden, 0)
    by_region = torch.where(present[:, None], torch.einsum("khw,kchw->kc", g, h), 0)  # [K, C]
    index = torch.where(present, labels, 0)  # [K]
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device).index_add_(0, index, by_region)
    grad_bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device).index_add_(0, index, g.sum((1, 2)))
    layout = torch.channels_last if is_channels_last(hidden) else torch.contiguous_format
    return (
        grad_hidden.to(hidden.dtype).contiguous(memory_format=layout),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )


def _for_cpp(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The tensors that the C++ kernels read, and the arguments that describe them."""
    if hidden.dtype not in _DTYPE_CODES:
        raise TypeError(f"mask_loss: the C++ kernels take float16, bfloat16, float32 and float64, not {hidden.dtype}")
    channels_last = is_channels_last(hidden)
    hidden = hidden.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    dtype = compute_dtype(hidden.dtype)
    weight, bias = weight.to(dtype).contiguous(), bias.to(dtype).contiguous()
    labels = labels.to(torch.int64).contiguous()
    regions, channels, height, width = hidden.shape
    arguments = (
        hidden.data_ptr(), _DTYPE_CODES[hidden.dtype], channels_last, regions, channels, height * width,
        weight.data_ptr(), bias.data_ptr(), weight.shape[0], labels.data_ptr(), relu, torch.get_num_threads(),
    )  # fmt: skip
    return (hidden, weight, bias, labels), arguments


def _run_cpp(wrong: int, labels: Tensor, classes: int) -> None:
    if wrong >= 0:
        raise RuntimeError(f"mask_loss: label {labels[wrong].item()} of region {wrong} exceeds the {classes} classes")


def _class_logits_cpp(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool) -> Tensor:
    held, arguments = _for_cpp(hidden, weight, bias, labels, relu)
    logits = torch.empty((hidden.shape[0], *hidden.shape[2:]), dtype=held[1].dtype)
    wrong = _library.extension().mask_loss_forward(*arguments, 0, 0, logits.data_ptr(), 0)
    _run_cpp(wrong, labels, weight.shape[0])
    return logits


def _forward_cpp(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor, normaliser: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    held, arguments = _for_cpp(hidden, weight, bias, labels, relu)
    targets, normaliser = targets.contiguous(), normaliser.to(torch.float64)
    logits = torch.empty((hidden.shape[0], *hidden.shape[2:]), dtype=held[1].dtype)
    loss = torch.empty((), dtype=logits.dtype)
    wrong = _library.extension().mask_loss_forward(
        *arguments, targets.data_ptr(), normaliser.data_ptr(), logits.data_ptr(), loss.data_ptr()
    )
    _run_cpp(wrong, labels, weight.shape[0])
    return loss, logits


def _backward_cpp(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor,
    normaliser: Tensor, logits: Tensor, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    held, arguments = _for_cpp(hidden, weight, bias, labels, relu)
    targets, logits = targets.contiguous(), logits.contiguous()
    scale = grad_loss.to(torch.float64) / normaliser.to(torch.float64)
    grad_hidden = torch.empty_like(held[0])
    grad_weight, grad_bias = torch.empty_like(held[1]), torch.empty_like(held[2])
    _library.extension().mask_loss_backward(
        *arguments, targets.data_ptr(), scale.data_ptr(), logits.data_ptr(), grad_hidden.data_ptr(),
        grad_weight.data_ptr(), grad_bias.data_ptr(),
    )  # fmt: skip
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _logits_like(hidden: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[0], *hidden.shape[2:]), dtype=compute_dtype(hidden.dtype))


def _class_logits_fake(hidden: Tensor, *_: object) -> Tensor:
    return _logits_like(hidden)


def _forward_fake(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((), dtype=compute_dtype(hidden.dtype)), _logits_like(hidden)


def _backward_fake(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.channels_last if is_channels_last(hidden) else torch.contiguous_format
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device, memory_format=layout)
    return grad_hidden, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


_class_logits_op = _library.define(
    "mask_class_logits(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, bool relu) -> Tensor",
    reference=class_logits_reference,
    fake=_class_logits_fake,
    cpp=_class_logits_cpp,
    triton="fastrcnn_kernels.triton.mask_loss:class_logits",
)
_forward_op = _library.define(
    "mask_loss(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, Tensor targets, Tensor normaliser, bool relu) "
    "-> (Tensor, Tensor)",
    reference=forward_reference,
    fake=_forward_fake,
    cpp=_forward_cpp,
    triton="fastrcnn_kernels.triton.mask_loss:forward",
)
_backward_op = _library.define(
    "mask_loss_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor bias, Tensor labels, Tensor targets, "
    "Tensor normaliser, Tensor logits, bool relu) -> (Tensor, Tensor, Tensor)",
    reference=backward_reference,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.mask_loss:backward",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.relu = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    return (*_backward_op(grad_loss, *ctx.saved_tensors, ctx.relu), None, None, None, None)


_library.register_autograd("mask_loss", _gradient, _context)


def _check(name: str, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Raise for shapes and types that do not fit; the weights as [classes, C]."""
    if hidden.dim() != 4 or not hidden.is_floating_point():
        raise ValueError(f"{name}: hidden must be floating-point [K, C, M, M], got {hidden.dtype}{list(hidden.shape)}")
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}: weight must be [classes, {hidden.shape[1]}] or [classes, {hidden.shape[1]}, 1, 1], "
            f"got {list(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if labels.shape != hidden.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: labels must be int64[{hidden.shape[0]}], got {labels.dtype}{list(labels.shape)}")
    for argument, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: hidden is on {hidden.device} but {argument} on {tensor.device}")
    return weight


def mask_class_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, relu: bool = False) -> Tensor:
    """The mask logits of each region's own class, without those of the others. For inference: no gradient.

    Args:
        hidden (Tensor[K, C, M, M]): features before the 1x1 convolution, NCHW or channels_last, any float type.
        weight (Tensor[classes, C] or [classes, C, 1, 1]), bias (Tensor[classes]): of that convolution.
        labels (int64 Tensor[K]): the class of each region; negative: absent.
        relu: ``hidden`` is taken before the ReLU.

    Returns:
        Tensor[K, M, M], float32 (float64 for float64 features); zeros for absent regions.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
        RuntimeError: on the CPU, for a label that is no class. On CUDA such a region is absent.
    """
    weight = _check("mask_class_logits", hidden, weight, bias, labels)
    return _class_logits_op(hidden.detach(), weight.detach(), bias.detach(), labels, bool(relu))


def mask_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    targets: Tensor,
    normaliser: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Binary cross entropy of the masks of the regions' own classes (Mask R-CNN), the 1x1 convolution included.

    What ``torchvision.models.detection.roi_heads.maskrcnn_loss`` computes from all classes' logits.

    Args:
        hidden (Tensor[K, C, M, M]): features before the 1x1 convolution, NCHW or channels_last, any float type.
        weight (Tensor[classes, C] or [classes, C, 1, 1]), bias (Tensor[classes]): of that convolution.
        labels (int64 Tensor[K]): the class of each region; negative: absent.
        targets (uint8 or bool Tensor[K, M, M]): 0 or 1.
        normaliser: what the sum is divided by, a tensor of one element on the device; None for the mean over the
            pixels of the regions that are present.
        relu: ``hidden`` is taken before the ReLU, whose pass over the features and whose output are then saved.

    Returns:
        A scalar, float32 (float64 for float64 features); 0 where no region is present. Differentiable once, in
        ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
        RuntimeError: on the CPU, for a label that is no class. On CUDA such a region is absent.
    """
    weight = _check("mask_loss", hidden, weight, bias, labels)
    if targets.shape != (hidden.shape[0], *hidden.shape[2:]) or targets.dtype not in (torch.uint8, torch.bool):
        raise ValueError(
            f"mask_loss: targets must be uint8 or bool {[hidden.shape[0], *hidden.shape[2:]]}, got "
            f"{targets.dtype}{list(targets.shape)}"
        )
    if normaliser is None:
        normaliser = (labels >= 0).sum().clamp(min=1) * (hidden.shape[2] * hidden.shape[3])
    elif normaliser.numel() != 1:
        raise ValueError(f"mask_loss: normaliser must have one element, got {list(normaliser.shape)}")
    targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    return _forward_op(hidden, weight, bias, labels, targets, normaliser.reshape(()), bool(relu))[0]
