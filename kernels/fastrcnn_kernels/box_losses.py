"""Losses on the overlap of paired boxes: generalized, distance and complete IoU, with their gradients.

For boxes a and b, their overlap I, union U = A + B - I and enclosing box E, all with torchvision's eps::

    iou   = I / (U + eps)
    giou  = 1 - iou + (area(E) - U) / (area(E) + eps)                                  Rezatofighi et al., 2019
    diou  = 1 - iou + |centre a - centre b|^2 / (diagonal(E)^2 + eps)                  Zheng et al., 2020
    ciou  = diou + v^2 / (1 - iou + v + eps),  v = (2 / pi (atan(bw / bh) - atan(aw / ah)))^2

torchvision is the specification: in ciou the factor v / (1 - iou + v + eps) has no gradient, and eps is the caller's
there alone: the terms of diou in it keep 1e-7. Where two coordinates are equal the gradient of their maximum or
minimum is shared equally. Each loss is symmetric, so the gradient by the second box is the same function with the boxes
swapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.boxes import _at_least_float32
from fastrcnn_kernels.losses import (
    DTYPE_CODES,
    once_differentiable,
    reduce_reference,
    reduction_code,
    spread_gradient,
)

GENERALIZED, DISTANCE, COMPLETE = range(3)
DISTANCE_EPS = 1e-7  # torchvision's default, which its complete IoU uses for the terms of the distance IoU

# A kernel by its contiguous operands, its output and its constants.
Launch = Callable[..., None]


def distance_eps(kind: int, eps: float) -> float:
    """The eps of the IoU and of the diagonal."""
    return DISTANCE_EPS if kind == COMPLETE else eps


def _reference(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int) -> Tensor:
    return reduce_reference(_losses(boxes1, boxes2, kind, eps), reduction)


def _losses(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> Tensor:
    ax1, ay1, ax2, ay2 = boxes1.unbind(-1)  # [...] each
    bx1, by1, bx2, by2 = boxes2.unbind(-1)  # [...] each
    width = torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)  # [...]
    height = torch.minimum(ay2, by2) - torch.maximum(ay1, by1)  # [...]
    overlap = torch.where((width > 0) & (height > 0), width * height, 0)  # [...]
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap  # [...]
    iou = overlap / (union + distance_eps(kind, eps))  # [...]
    outer_width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)  # [...]
    outer_height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)  # [...]
    if kind == GENERALIZED:
        outer = outer_width * outer_height  # [...]
        return 1 - iou + (outer - union) / (outer + eps)
    diagonal = outer_width**2 + outer_height**2 + distance_eps(kind, eps)  # [...]
    dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2  # [...]
    loss = 1 - iou + (dx**2 + dy**2) / diagonal  # [...]
    if kind == DISTANCE:
        return loss
    angle = torch.atan((bx2 - bx1) / (by2 - by1)) - torch.atan((ax2 - ax1) / (ay2 - ay1))  # [...]
    v = 4 / math.pi**2 * angle**2  # [...]
    return loss + (v / (1 - iou + v + eps)).detach() * v


def _first_share(a: Tensor, b: Tensor) -> Tensor:
    """The share of ``a`` in the gradient of maximum(a, b): half where they are equal."""
    return torch.where(a == b, 0.5, (a > b).to(a.dtype))


def _backward_reference(grad: Tensor, boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int) -> Tensor:
    low1, high1, low2, high2 = boxes1[..., :2], boxes1[..., 2:], boxes2[..., :2], boxes2[..., 2:]  # [..., 2]: x and y
    size1, size2 = high1 - low1, high2 - low2  # [..., 2]
    extent = torch.minimum(high1, high2) - torch.maximum(low1, low2)  # [..., 2], of the overlap
    outer = torch.maximum(high1, high2) - torch.minimum(low1, low2)  # [..., 2]
    meet = (extent > 0).all(-1, keepdim=True)  # [..., 1]
    overlap = torch.where(meet, extent.prod(-1, keepdim=True), 0)  # [..., 1]
    union = size1.prod(-1, keepdim=True) + size2.prod(-1, keepdim=True) - overlap  # [..., 1]
    divisor = union + distance_eps(kind, eps)  # [..., 1]
    iou = overlap / divisor  # [..., 1]
    # The derivatives by area, overlap, sides of the outer box, sides of this box and by a shift of either corner.
    by_area, by_overlap = iou / divisor, -(1 + iou) / divisor  # [..., 1]
    by_shift = by_size = torch.zeros_like(extent)  # [..., 2]
    if kind == GENERALIZED:
        outer_divisor = outer.prod(-1, keepdim=True) + eps  # [..., 1]
        by_area, by_overlap = by_area - 1 / outer_divisor, by_overlap + 1 / outer_divisor  # [..., 1]
        by_outer = (union + eps) / outer_divisor**2 * outer.flip(-1)  # [..., 2]
    else:
        diagonal = (outer**2).sum(-1, keepdim=True) + distance_eps(kind, eps)  # [..., 1]
        shift = (low1 + high1 - low2 - high2) / 2  # [..., 2]
        by_outer = -2 * (shift**2).sum(-1, keepdim=True) * outer / diagonal**2  # [..., 2]
        by_shift = shift / diagonal  # [..., 2]
    if kind == COMPLETE:
        ratio = size1[..., :1] / size1[..., 1:]  # [..., 1]
        angle = torch.atan(size2[..., :1] / size2[..., 1:]) - torch.atan(ratio)  # [..., 1]
        v = 4 / math.pi**2 * angle**2  # [..., 1]
        by_ratio = v / (1 - iou + v + eps) * (-8 / math.pi**2) * angle / (1 + ratio**2) / size1[..., 1:]  # [..., 1]
        by_size = torch.cat([by_ratio, -by_ratio * ratio], -1)  # [..., 2]
    by_extent = torch.where(meet, by_overlap * extent.flip(-1), 0)  # [..., 2]
    by_size = by_size + by_area * size1.flip(-1)  # [..., 2]
    low_share, high_share = _first_share(low1, low2), _first_share(high2, high1)  # [..., 2], in the overlap
    low = by_shift - by_size - by_extent * low_share - by_outer * (1 - low_share)  # [..., 2]
    high = by_shift + by_size + by_extent * high_share + by_outer * (1 - high_share)  # [..., 2]
    share = spread_gradient(grad, boxes1.numel() // 4, reduction)
    return torch.cat([low, high], -1) * (share if reduction else share[..., None])


def _fake(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int) -> Tensor:
    return boxes1.new_empty(() if reduction else boxes1.shape[:-1])


def _backward_fake(grad: Tensor, boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int) -> Tensor:
    return boxes1.new_empty(boxes1.shape)


def _with(launch: Launch, boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int) -> Tensor:
    out = _fake(boxes1, boxes2, kind, eps, reduction)
    launch(boxes1.contiguous(), boxes2.contiguous(), out, kind, eps, distance_eps(kind, eps), reduction)
    return out


def _backward_with(
    launch: Launch, grad: Tensor, boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int
) -> Tensor:
    out = _backward_fake(grad, boxes1, boxes2, kind, eps, reduction)
    operands = (grad.contiguous(), boxes1.contiguous(), boxes2.contiguous(), out)
    launch(*operands, kind, eps, distance_eps(kind, eps), reduction)
    return out


def _cpp(boxes1: Tensor, boxes2: Tensor, out: Tensor, kind: int, eps: float, inner_eps: float, reduction: int) -> None:
    _library.extension().box_iou_loss_forward(
        boxes1.data_ptr(), boxes2.data_ptr(), out.data_ptr(), DTYPE_CODES[out.dtype], boxes1.numel() // 4, kind, eps,
        inner_eps, reduction, torch.get_num_threads(),
    )  # fmt: skip


def _backward_cpp(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, out: Tensor, kind: int, eps: float, inner_eps: float, reduction: int
) -> None:
    _library.extension().box_iou_loss_backward(
        grad.data_ptr(), boxes1.data_ptr(), boxes2.data_ptr(), out.data_ptr(), DTYPE_CODES[out.dtype],
        boxes1.numel() // 4, kind, eps, inner_eps, reduction, torch.get_num_threads(),
    )  # fmt: skip


def _triton(*arguments: Any) -> Tensor:
    from fastrcnn_kernels.triton import box_losses as launcher

    return _with(launcher.box_iou_loss, *arguments)


def _backward_triton(*arguments: Any) -> Tensor:
    from fastrcnn_kernels.triton import box_losses as launcher

    return _backward_with(launcher.box_iou_loss_backward, *arguments)


_op = _library.define(
    "box_iou_loss(Tensor boxes1, Tensor boxes2, int kind, float eps, int reduction) -> Tensor",
    reference=_reference,
    fake=_fake,
    cpp=partial(_with, _cpp),
    triton="fastrcnn_kernels.box_losses:_triton",
)
_backward_op = _library.define(
    "box_iou_loss_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int kind, float eps, int reduction) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    cpp=partial(_backward_with, _backward_cpp),
    triton="fastrcnn_kernels.box_losses:_backward_triton",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.constants = inputs[2:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes1, boxes2 = ctx.saved_tensors
    first = _backward_op(grad, boxes1, boxes2, *ctx.constants) if ctx.needs_input_grad[0] else None
    second = _backward_op(grad, boxes2, boxes1, *ctx.constants) if ctx.needs_input_grad[1] else None
    return first, second, None, None, None


_library.register_autograd("box_iou_loss", _gradient, _context)
once_differentiable("box_iou_loss_backward")


def _loss(kind: int, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    code = reduction_code(reduction)
    if boxes1.dim() == 0 or boxes1.shape[-1] != 4 or boxes1.shape != boxes2.shape:
        raise ValueError(
            f"boxes1 and boxes2 must be paired boxes of one shape [..., 4], got {list(boxes1.shape)} and "
            f"{list(boxes2.shape)}"
        )
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    if boxes1.dtype != boxes2.dtype:
        boxes1, boxes2 = boxes1.double(), boxes2.double()
    return _op(boxes1, boxes2, kind, float(eps), code)


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Generalized IoU loss of each pair of boxes (Rezatofighi et al., 2019), torchvision's signature and numbers.

    Args:
        boxes1, boxes2: [..., 4], (x1, y1, x2, y2) with x1 < x2 and y1 < y2, in one unit and frame.
        reduction: ``none``, ``sum`` or ``mean``; the mean of nothing is 0 and has a gradient.
        eps: added to the union and to the enclosing area, against a division by zero.

    Returns:
        [...] in [0, 2] or a scalar, float32 (float64 for float64 boxes). Differentiable once, in both boxes; a NaN
        spoils only its own pair.

    Raises:
        ValueError: for shapes that are no pairs of boxes, or an unknown reduction.
    """
    return _loss(GENERALIZED, boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Distance IoU loss of each pair of boxes (Zheng et al., 2020), torchvision's signature and numbers.

    Arguments, result and errors as in :func:`generalized_box_iou_loss`; eps is added to the union and to the squared
    diagonal of the enclosing box.
    """
    return _loss(DISTANCE, boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Complete IoU loss of each pair of boxes (Zheng et al., 2020), torchvision's signature and numbers.

    Arguments, result and errors as in :func:`generalized_box_iou_loss`; eps is added to the denominator of the weight
    of the aspect ratios, which is taken as a constant by the gradient; the other terms keep torchvision's 1e-7.
    """
    return _loss(COMPLETE, boxes1, boxes2, reduction, eps)
