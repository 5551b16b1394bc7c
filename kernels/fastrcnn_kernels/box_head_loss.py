"""The losses of Fast R-CNN's second stage in one pass: cross entropy, and smooth L1 on the four columns of the label.

For row r with label y (0 the background, ``ignore_index`` a row of padding) and n the normaliser::

    loss_classifier = sum_r (logsumexp(logits[r]) - logits[r, y]) / n
    loss_box        = sum over r with y > 0 of smooth_l1(box_regression[r, columns of y] - t_r) / n

where t_r are the deltas that take proposal r to its ground truth (``encode_boxes``): they are computed here, for the
positive rows alone. The backward computes the softmax from the logits and the row's logsumexp, the only thing kept,
and writes both gradients, mostly zeros, once. Gradients made in the forward would be rounded to the logits' type before
the upstream gradient is known, which loses them to underflow where a float16 loss is scaled, and scaling them would
read and write everything a second time.

The rules are maskrcnn-benchmark's ``FastRCNNLossComputation`` (torchvision's ``fastrcnn_loss``): both losses are
divided by the number of sampled rows, positive or not. A sum over nothing is 0 and has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.box_coder import _check_weights, encode_boxes
from fastrcnn_kernels.boxes import _check_offset
from fastrcnn_kernels.losses import DTYPE_CODES, loss_dtype, once_differentiable

# A kernel by its operands, its outputs and its constants.
Launch = Callable[..., None]


def _box_columns(labels: Tensor, classes: int, columns: int) -> Tensor:
    """The first of the four columns of each row's box: int64 [R] for labels [R]."""
    return 4 * labels if columns == 4 * classes else torch.full_like(labels, columns - 4)


def _box_differences(
    box_regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor, classes: int,
    weights: Sequence[float], box_offset: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Predicted minus wanted deltas [R, 4], 0 where the row is not positive, and their columns [R, 4]."""
    positive = (labels > 0) & (labels < classes)  # [R]
    first = _box_columns(labels.clamp(0, classes - 1), classes, box_regression.shape[1])  # [R]
    columns = first[:, None] + torch.arange(4, device=labels.device)  # [R, 4]
    targets = encode_boxes(gt_boxes.to(dtype), proposals.to(dtype), weights, box_offset=box_offset)  # [R, 4]
    differences = box_regression.gather(1, columns).to(dtype) - targets  # [R, 4]
    return torch.where(positive[:, None], differences, 0), columns


def _reference(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor,
    normaliser: Tensor | None, weights: Sequence[float], beta: float, box_offset: int, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = loss_dtype(class_logits.dtype)
    classes = class_logits.shape[1]
    logits = class_logits.to(dtype)  # [R, C]
    lse = logits.logsumexp(1)  # [R]
    valid = labels != ignore_index  # [R]
    outside = valid & ((labels < 0) | (labels >= classes))  # [R]
    at_label = logits.gather(1, labels.clamp(0, classes - 1)[:, None])[:, 0]  # [R]
    cross_entropy = torch.where(outside, float("nan"), lse - at_label)  # [R]
    differences, _ = _box_differences(
        box_regression, labels, proposals, gt_boxes, classes, weights, box_offset, dtype
    )  # [R, 4]
    total = valid.sum().clamp(min=1) if normaliser is None else normaliser
    share = 1 / total.to(dtype).reshape(())
    box_loss = F.smooth_l1_loss(differences, torch.zeros_like(differences), reduction="sum", beta=beta)
    return torch.where(valid, cross_entropy, 0).sum() * share, box_loss * share, lse, share


def _backward_reference(
    grad_classifier: Tensor, grad_box: Tensor, class_logits: Tensor, box_regression: Tensor, labels: Tensor,
    proposals: Tensor, gt_boxes: Tensor, lse: Tensor, share: Tensor, weights: Sequence[float], beta: float,
    box_offset: int, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = loss_dtype(class_logits.dtype)
    classes = class_logits.shape[1]
    probability = (class_logits.to(dtype) - lse[:, None]).exp()  # [R, C]
    hit = labels[:, None] == torch.arange(classes, device=labels.device)  # [R, C]
    valid = (labels != ignore_index)[:, None]  # [R, 1]
    logits_grad = torch.where(valid, (probability - hit.to(dtype)) * (grad_classifier * share), 0)  # [R, C]
    differences, columns = _box_differences(
        box_regression, labels, proposals, gt_boxes, classes, weights, box_offset, dtype
    )  # [R, 4]
    slope = (differences / beta).clamp(-1, 1) if beta else differences.sign()  # [R, 4]
    slope = (slope * (grad_box * share)).to(box_regression.dtype)
    return logits_grad.to(class_logits.dtype), torch.zeros_like(
        box_regression, memory_format=torch.contiguous_format
    ).scatter_(1, columns, slope)


def _fake(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor,
    normaliser: Tensor | None, weights: Sequence[float], beta: float, box_offset: int, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = loss_dtype(class_logits.dtype)
    empty = class_logits.new_empty
    return empty((), dtype=dtype), empty((), dtype=dtype), empty(labels.shape, dtype=dtype), empty((), dtype=dtype)


def _backward_fake(
    grad_classifier: Tensor, grad_box: Tensor, class_logits: Tensor, box_regression: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return class_logits.new_empty(class_logits.shape), box_regression.new_empty(box_regression.shape)


def _operands(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor
) -> tuple[Tensor, ...]:
    """As a kernel reads them: contiguous, boxes in the type computed in."""
    dtype = loss_dtype(class_logits.dtype)
    boxes = (proposals.to(dtype).contiguous(), gt_boxes.to(dtype).contiguous())
    return (class_logits.contiguous(), box_regression.contiguous(), labels.contiguous(), *boxes)


def _with(launch: Launch, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _fake(*arguments)
    normaliser, *constants = arguments[5:]
    if normaliser is not None:
        normaliser = normaliser.to(out[0].dtype)
    launch(*_operands(*arguments[:5]), normaliser, *out, *constants)
    return out


def _backward_with(launch: Launch, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = _backward_fake(*arguments)
    launch(*arguments[:2], *_operands(*arguments[2:7]), *arguments[7:9], *out, *arguments[9:])
    return out


def _cpp(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor,
    normaliser: Tensor | None, loss_classifier: Tensor, loss_box: Tensor, lse: Tensor, share: Tensor,
    weights: list[float], beta: float, box_offset: int, ignore_index: int,
) -> None:  # fmt: skip
    wrong = _library.extension().box_head_loss_forward(
        class_logits.data_ptr(), box_regression.data_ptr(), labels.data_ptr(), proposals.data_ptr(),
        gt_boxes.data_ptr(), 0 if normaliser is None else normaliser.data_ptr(), loss_classifier.data_ptr(),
        loss_box.data_ptr(), lse.data_ptr(), share.data_ptr(), DTYPE_CODES[class_logits.dtype], *class_logits.shape,
        box_regression.shape[1], weights, beta, box_offset, ignore_index, torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise IndexError(
            f"box_head_loss: label {labels[wrong].item()} of row {wrong} is neither a class of {class_logits.shape[1]} "
            f"nor ignore_index, {ignore_index}"
        )


def _backward_cpp(
    grad_classifier: Tensor, grad_box: Tensor, class_logits: Tensor, box_regression: Tensor, labels: Tensor,
    proposals: Tensor, gt_boxes: Tensor, lse: Tensor, share: Tensor, logits_grad: Tensor, regression_grad: Tensor,
    weights: list[float], beta: float, box_offset: int, ignore_index: int,
) -> None:  # fmt: skip
    _library.extension().box_head_loss_backward(
        grad_classifier.data_ptr(), grad_box.data_ptr(), class_logits.data_ptr(), box_regression.data_ptr(),
        labels.data_ptr(), proposals.data_ptr(), gt_boxes.data_ptr(), lse.data_ptr(), share.data_ptr(),
        logits_grad.data_ptr(), regression_grad.data_ptr(), DTYPE_CODES[class_logits.dtype], *class_logits.shape,
        box_regression.shape[1], weights, beta, box_offset, ignore_index, torch.get_num_threads(),
    )  # fmt: skip


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastrcnn_kernels.triton import box_head_loss as launcher

    return _with(launcher.box_head_loss, *arguments)


def _backward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastrcnn_kernels.triton import box_head_loss as launcher

    return _backward_with(launcher.box_head_loss_backward, *arguments)


_CONSTANTS = "float[] weights, float beta, int box_offset, int ignore_index"
_INPUTS = "Tensor class_logits, Tensor box_regression, Tensor labels, Tensor proposals, Tensor gt_boxes"
_op = _library.define(
    f"box_head_loss({_INPUTS}, Tensor? normaliser, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    cpp=partial(_with, _cpp),
    triton="fastrcnn_kernels.box_head_loss:_triton",
)
_backward_op = _library.define(
    f"box_head_loss_backward(Tensor grad_classifier, Tensor grad_box, {_INPUTS}, Tensor lse, Tensor share, "
    f"{_CONSTANTS}) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cpp=partial(_backward_with, _backward_cpp),
    triton="fastrcnn_kernels.box_head_loss:_backward_triton",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2], output[3])
    ctx.constants = inputs[6:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # two of the four would be zeros that nobody looks at


def _gradient(ctx: Any, grad_classifier: Tensor | None, grad_box: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    share = ctx.saved_tensors[-1]
    grad_classifier = torch.zeros_like(share) if grad_classifier is None else grad_classifier
    grad_box = torch.zeros_like(share) if grad_box is None else grad_box
    grads = _backward_op(grad_classifier, grad_box, *ctx.saved_tensors, *ctx.constants)
    return (*grads, *[None] * 8)


_library.register_autograd("box_head_loss", _gradient, _context)
once_differentiable("box_head_loss_backward")


def _check(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, proposals: Tensor, matched_gt_boxes: Tensor,
    normaliser: Tensor | None, beta: float,
) -> None:  # fmt: skip
    if class_logits.dim() != 2 or class_logits.dtype not in DTYPE_CODES:
        raise ValueError(
            f"class_logits must be floating point [R, C], got {class_logits.dtype} {list(class_logits.shape)}"
        )
    rows, classes = class_logits.shape
    columns = box_regression.shape[1] if box_regression.dim() == 2 else 0
    if box_regression.shape[:1] != (rows,) or columns not in (4, 8, 4 * classes):
        raise ValueError(
            f"box_regression must be [{rows}, {4 * classes}], or [{rows}, 8] or [{rows}, 4] for class-agnostic boxes, "
            f"got {list(box_regression.shape)}"
        )
    if box_regression.dtype != class_logits.dtype:
        raise TypeError(f"box_regression is {box_regression.dtype} but class_logits {class_logits.dtype}")
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{rows}], got {labels.dtype} {list(labels.shape)}")
    for name, boxes in (("proposals", proposals), ("matched_gt_boxes", matched_gt_boxes)):
        if boxes.shape != (rows, 4) or not boxes.is_floating_point():
            raise ValueError(f"{name} must be floating point [{rows}, 4], got {boxes.dtype} {list(boxes.shape)}")
    if normaliser is not None and normaliser.numel() != 1:
        raise ValueError(f"normaliser must hold one number, got {list(normaliser.shape)}")
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")


def box_head_loss(
    class_logits: Tensor,
    box_regression: Tensor,
    labels: Tensor,
    proposals: Tensor,
    matched_gt_boxes: Tensor,
    normaliser: Tensor | None = None,
    *,
    weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    beta: float = 1.0,
    box_offset: int = 0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Classification and box loss of sampled proposals (Fast R-CNN), with the encoding of the boxes.

    Args:
        class_logits: float32, float64, float16 or bfloat16 [R, C]; column 0 is the background.
        box_regression: the same type, [R, 4C], four columns a class; or [R, 8] (maskrcnn-benchmark) or [R, 4]
            (detectron2) for class-agnostic boxes, whose last four columns count.
        labels: int64 [R]: 0 background, 1 .. C - 1 classes, or ``ignore_index``.
        proposals: [R, 4], (x1, y1, x2, y2) in pixels of the network input.
        matched_gt_boxes: [R, 4], the ground truth of each positive row; other rows may hold anything.
        normaliser: one number on the same device, which both losses are divided by; None for the number of rows that
            are not ignored, at least 1.
        weights: (wx, wy, ww, wh) of ``encode_boxes``.
        beta: of ``smooth_l1_loss``; maskrcnn-benchmark 1, torchvision 1/9, detectron2 0.
        box_offset: 0, or 1 for inclusive pixels.
        ignore_index: the label of rows without a loss.

    Returns:
        ``(loss_classifier, loss_box_reg)``, scalars, float32 (float64 for float64 logits). Differentiable once, in the
        logits and the regression.

    Raises:
        ValueError, TypeError: for shapes, types or constants that do not fit.
        IndexError: on the CPU, for a label that is neither a class nor ``ignore_index``. On CUDA, where looking would
            stop the stream, the classification loss is then NaN.
    """
    _check(class_logits, box_regression, labels, proposals, matched_gt_boxes, normaliser, beta)
    _check_weights(weights)
    _check_offset(box_offset)
    constants = ([float(w) for w in weights], float(beta), box_offset, ignore_index)
    loss_classifier, loss_box, _, _ = _op(
        class_logits, box_regression, labels, proposals, matched_gt_boxes, normaliser, *constants
    )
    return loss_classifier, loss_box
