"""Elementwise losses: smooth L1 and the sigmoid focal loss, with their gradients.

With d = input - target, and for the focal loss p = sigmoid(x), t the target in [0, 1], q = p (1 - t) + (1 - p) t the
probability given to the wrong answer (1 - p_t in the paper)::

    smooth_l1 = 0.5 d^2 / beta  where |d| < beta, else  |d| - 0.5 beta
    focal     = w q^gamma (max(x, 0) - x t + log(1 + exp(-|x|)))      w = alpha t + (1 - alpha) (1 - t)
    d focal   = w q^gamma (p - t + gamma ce (1 - 2 t) p (1 - p) / q)   ce the parenthesis above, the cross entropy

Every implementation computes in float32 (float64 for float64 inputs) and gives losses of that type. Sums are made in a
fixed order, from partial sums whose number depends on the size alone: the same bits every time, whatever the number of
threads. Nothing of the size of the input is kept for the backward but the input itself: it computes from the start
again, which costs less than a pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library

# A kernel by its operands in the memory order of its output, the output, and constants.
Launch = Callable[..., None]

REDUCTIONS = ("none", "sum", "mean")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def reduction_code(reduction: str) -> int:
    """0 none, 1 sum, 2 mean."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    return REDUCTIONS.index(reduction)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that losses are computed and given in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_reference(loss: Tensor, reduction: int) -> Tensor:
    """The losses, their sum, or their mean; 0 for the mean of nothing."""
    if reduction == 0:
        return loss
    return loss.mean() if reduction == 2 and loss.numel() else loss.sum()


def spread_gradient(grad: Tensor, count: int, reduction: int) -> Tensor:
    """The gradient of each loss from that of the result of ``reduce_reference``."""
    return grad / max(count, 1) if reduction == 2 else grad


def loss_fake(inputs: Tensor, reduction: int) -> Tensor:
    """An output of a loss: one number for each of ``inputs``, in their memory order, or one in all."""
    dtype = loss_dtype(inputs.dtype)
    return inputs.new_empty((), dtype=dtype) if reduction else torch.empty_like(inputs, dtype=dtype)


def in_one_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape as dense memory in one order, that of the first; copied only where they are not.

    The order is the one that ``torch.empty_like`` of the first tensor has.
    """
    if all(t.is_contiguous() for t in tensors):
        return tensors
    stride = torch.empty_like(tensors[0], device="meta").stride()
    return tuple(t if t.stride() == stride else t.new_empty_strided(t.shape, stride).copy_(t) for t in tensors)


def _smooth_l1_reference(input: Tensor, target: Tensor, beta: float, reduction: int) -> Tensor:
    dtype = loss_dtype(input.dtype)
    input, target = in_one_order(input, target)
    distance = (input.to(dtype) - target.to(dtype)).abs()  # [...]
    loss = torch.where(distance < beta, 0.5 * distance * distance / beta if beta else distance, distance - 0.5 * beta)
    return reduce_reference(loss, reduction)


def _smooth_l1_backward_reference(grad: Tensor, input: Tensor, target: Tensor, beta: float, reduction: int) -> Tensor:
    dtype = loss_dtype(input.dtype)
    input, target = in_one_order(input, target)
    difference = input.to(dtype) - target.to(dtype)  # [...]
    if beta:
        slope = (difference / beta).clamp(-1, 1)  # [...]
    else:
        slope = torch.where(difference.isnan(), difference, difference.sign())  # [...]
    return (slope * spread_gradient(grad, input.numel(), reduction)).to(input.dtype)


def _smooth_l1_with(launch: Launch, input: Tensor, target: Tensor, beta: float, reduction: int) -> Tensor:
    out = loss_fake(input, reduction)
    launch(*in_one_order(input, target), out, beta, reduction)
    return out


def _smooth_l1_backward_with(
    launch: Launch, grad: Tensor, input: Tensor, target: Tensor, beta: float, reduction: int
) -> Tensor:
    out = torch.empty_like(input)
    launch(grad if reduction else gradient_in_order(grad, out), *in_one_order(input, target), out, beta, reduction)
    return out


def _smooth_l1_cpp(input: Tensor, target: Tensor, out: Tensor, beta: float, reduction: int) -> None:
    _library.extension().smooth_l1_forward(
        input.data_ptr(), target.data_ptr(), out.data_ptr(), DTYPE_CODES[input.dtype], input.numel(), beta, reduction,
        torch.get_num_threads(),
    )  # fmt: skip


def _smooth_l1_backward_cpp(
    grad: Tensor, input: Tensor, target: Tensor, out: Tensor, beta: float, reduction: int
) -> None:
    _library.extension().smooth_l1_backward(
        grad.data_ptr(), input.data_ptr(), target.data_ptr(), out.data_ptr(), DTYPE_CODES[input.dtype], input.numel(),
        beta, reduction, torch.get_num_threads(),
    )  # fmt: skip


def _smooth_l1_triton(*arguments: Any) -> Tensor:
    from fastrcnn_kernels.triton import losses as launcher

    return _smooth_l1_with(launcher.smooth_l1_loss, *arguments)


def _smooth_l1_backward_triton(*arguments: Any) -> Tensor:
    from fastrcnn_kernels.triton import losses as launcher

    return _smooth_l1_backward_with(launcher.smooth_l1_loss_backward, *arguments)


def gradient_in_order(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of losses that were not reduced, in the memory order of ``like``."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like, dtype=grad.dtype).copy_(grad)


def one_hot(labels: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Targets [..., C] of the type of ``inputs`` [..., C] and which count, bool [..., 1], from labels [...]."""
    columns = torch.arange(1, inputs.shape[-1] + 1, device=labels.device)  # [C]
    return (labels[..., None] == columns).to(inputs.dtype), (labels >= 0)[..., None]


def _focal_terms(inputs: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """p (1 - t), (1 - p) t, cross entropy and weight, all [...], of the type computed in."""
    x, t = inputs, targets
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    cross_entropy = x.clamp(min=0) - x * t + torch.log1p(torch.exp(-x.abs()))
    weight = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else torch.ones_like(t)
    return p * (1 - t), not_p * t, cross_entropy, weight


def _focal_reference(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int) -> Tensor:
    inputs, targets, classes = focal_operands(inputs, targets)
    x = inputs.to(loss_dtype(inputs.dtype))
    t, counts = one_hot(targets, x) if classes else (targets.to(x.dtype), None)  # [...]
    above, below, cross_entropy, weight = _focal_terms(x, t, alpha)
    loss = weight * (above + below) ** gamma * cross_entropy  # [...]
    return reduce_reference(loss if counts is None else torch.where(counts, loss, 0), reduction)


def _focal_backward_reference(
    grad: Tensor, inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int
) -> Tensor:
    inputs, targets, classes = focal_operands(inputs, targets)
    x = inputs.to(loss_dtype(inputs.dtype))
    t, counts = one_hot(targets, x) if classes else (targets.to(x.dtype), None)  # [...]
    above, below, cross_entropy, weight = _focal_terms(x, t, alpha)
    q = above + below  # [...]
    # p (1 - p) / q tends to 1 where q underflows.
    ratio = torch.where(q > 0, torch.sigmoid(x) * torch.sigmoid(-x) / q, 1.0)  # [...]
    slope = weight * q**gamma * (above - below + cross_entropy * (gamma * (1 - t - t) * ratio))  # [...]
    slope = slope * spread_gradient(grad, x.numel(), reduction)
    return (slope if counts is None else torch.where(counts, slope, 0)).to(inputs.dtype)


def focal_operands(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
    """Inputs and targets as a kernel reads them, and the number of classes, 0 for targets of the shape of inputs."""
    if targets.dim() == inputs.dim():
        inputs, targets = in_one_order(inputs, targets)
        return inputs, targets, 0
    return inputs.contiguous(), targets.contiguous(), max(inputs.shape[-1], 1)


def focal_fake(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int) -> Tensor:
    """The loss's output: contiguous where labels say which row an element is in."""
    return loss_fake(inputs if targets.dim() == inputs.dim() else inputs.contiguous(), reduction)


def focal_backward_fake(
    grad: Tensor, inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int
) -> Tensor:
    """The gradient's output, in the same order."""
    return torch.empty_like(inputs if targets.dim() == inputs.dim() else inputs.contiguous())


def _focal_with(launch: Launch, inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int) -> Tensor:
    out = focal_fake(inputs, targets, alpha, gamma, reduction)
    launch(*focal_operands(inputs, targets), out, alpha, gamma, reduction)
    return out


def _focal_backward_with(
    launch: Launch, grad: Tensor, inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int
) -> Tensor:
    out = focal_backward_fake(grad, inputs, targets, alpha, gamma, reduction)
    grad = grad if reduction else gradient_in_order(grad, out)
    launch(grad, *focal_operands(inputs, targets), out, alpha, gamma, reduction)
    return out


def _focal_cpp(
    inputs: Tensor, targets: Tensor, classes: int, out: Tensor, alpha: float, gamma: float, reduction: int
) -> None:
    _library.extension().focal_loss_forward(
        inputs.data_ptr(), targets.data_ptr(), classes, out.data_ptr(), DTYPE_CODES[inputs.dtype], inputs.numel(),
        alpha, gamma, reduction, torch.get_num_threads(),
    )  # fmt: skip


def _focal_backward_cpp(
    grad: Tensor, inputs: Tensor, targets: Tensor, classes: int, out: Tensor, alpha: float, gamma: float, reduction: int
) -> None:
    _library.extension().focal_loss_backward(
        grad.data_ptr(), inputs.data_ptr(), targets.data_ptr(), classes, out.data_ptr(), DTYPE_CODES[inputs.dtype],
        inputs.numel(), alpha, gamma, reduction, torch.get_num_threads(),
    )  # fmt: skip


def _focal_triton(*arguments: Any) -> Tensor:
    from fastrcnn_kernels.triton import losses as launcher

    return _focal_with(launcher.sigmoid_focal_loss, *arguments)


def _focal_backward_triton(*arguments: Any) -> Tensor:
    from fastrcnn_kernels.triton import losses as launcher

    return _focal_backward_with(launcher.sigmoid_focal_loss_backward, *arguments)


def _smooth_l1_fake(input: Tensor, target: Tensor, beta: float, reduction: int) -> Tensor:
    return loss_fake(input, reduction)


def _smooth_l1_backward_fake(grad: Tensor, input: Tensor, target: Tensor, beta: float, reduction: int) -> Tensor:
    return torch.empty_like(input)


_smooth_l1 = _library.define(
    "smooth_l1_loss(Tensor input, Tensor target, float beta, int reduction) -> Tensor",
    reference=_smooth_l1_reference,
    fake=_smooth_l1_fake,
    cpp=partial(_smooth_l1_with, _smooth_l1_cpp),
    triton="fastrcnn_kernels.losses:_smooth_l1_triton",
)
_smooth_l1_backward = _library.define(
    "smooth_l1_loss_backward(Tensor grad, Tensor input, Tensor target, float beta, int reduction) -> Tensor",
    reference=_smooth_l1_backward_reference,
    fake=_smooth_l1_backward_fake,
    cpp=partial(_smooth_l1_backward_with, _smooth_l1_backward_cpp),
    triton="fastrcnn_kernels.losses:_smooth_l1_backward_triton",
)
_focal = _library.define(
    "sigmoid_focal_loss(Tensor inputs, Tensor targets, float alpha, float gamma, int reduction) -> Tensor",
    reference=_focal_reference,
    fake=focal_fake,
    cpp=partial(_focal_with, _focal_cpp),
    triton="fastrcnn_kernels.losses:_focal_triton",
)
_focal_backward = _library.define(
    "sigmoid_focal_loss_backward(Tensor grad, Tensor inputs, Tensor targets, float alpha, float gamma, "
    "int reduction) -> Tensor",
    reference=_focal_backward_reference,
    fake=focal_backward_fake,
    cpp=partial(_focal_backward_with, _focal_backward_cpp),
    triton="fastrcnn_kernels.losses:_focal_backward_triton",
)


def _smooth_l1_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.constants = inputs[2:]


def _smooth_l1_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input_grad = _smooth_l1_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return input_grad, -input_grad if ctx.needs_input_grad[1] else None, None, None


def _focal_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.constants = inputs[2:]


def _focal_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _focal_backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def once_differentiable(name: str) -> None:
    """Make the gradient of a gradient an error: without a formula autograd would leave it out silently."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name} has no second derivative")

    _library.register_autograd(name, refuse, lambda ctx, inputs, output: None)


_library.register_autograd("smooth_l1_loss", _smooth_l1_gradient, _smooth_l1_context)
_library.register_autograd("sigmoid_focal_loss", _focal_gradient, _focal_context)
once_differentiable("smooth_l1_loss_backward")
once_differentiable("sigmoid_focal_loss_backward")


def same_floating_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that they promote to, at least a floating one."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if dtype not in DTYPE_CODES:
        dtype = torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def smooth_l1_loss(input: Tensor, target: Tensor, beta: float = 1.0, reduction: str = "none") -> Tensor:
    """Huber's loss divided by beta: ``0.5 d^2 / beta`` where d = |input - target| < beta, else ``d - 0.5 beta``.

    maskrcnn-benchmark uses beta 1/9 in the RPN and 1 in the box head (Fast R-CNN); detectron2 beta 0.

    Args:
        input: predictions, any shape.
        target: the same shape.
        beta: where the parabola ends, >= 0; 0 is the L1 loss, whose gradient at 0 is 0.
        reduction: ``none``, ``sum`` or ``mean``.

    Returns:
        The shape of ``input`` or a scalar, float32 (float64 for float64 inputs): a sum of half-precision losses
        would overflow or stall. The mean of nothing is 0, not NaN (fvcore's rule), and has a gradient. Differentiable
        once, in both arguments.

    Raises:
        ValueError: if the shapes differ, beta is negative or the reduction is unknown.
    """
    if input.shape != target.shape:
        raise ValueError(f"input {list(input.shape)} and target {list(target.shape)} must have one shape")
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    code = reduction_code(reduction)
    if input.dtype != target.dtype or input.dtype not in DTYPE_CODES:
        input, target = same_floating_dtype(input, target)
    return _smooth_l1(input, target, float(beta), code)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """The focal loss of RetinaNet (Lin et al., 2017), with torchvision's signature and numbers.

    Args:
        inputs: logits, floating point, any shape ``[...]`` or ``[..., C]``.
        targets: the probability of the positive answer, the shape of ``inputs``; or, as in maskrcnn-benchmark, integer
            labels ``[...]`` for logits ``[..., C]``: label k makes column k - 1 positive, 0 is background, and a row
            with a negative label has loss 0. Labels need no matrix of targets.
        alpha: weight of the positives, 1 - alpha that of the negatives; -1 for none.
        gamma: exponent that discounts what is already right, >= 0.
        reduction: ``none``, ``sum`` or ``mean`` (over all elements, those of ignored rows too).

    Returns:
        The shape of ``inputs`` or a scalar, float32 (float64 for float64 inputs). Differentiable once, in ``inputs``.
        Finite for every finite logit; an infinite one gives NaN, as in torchvision. The mean of nothing is 0.

    Raises:
        ValueError: for shapes that do not fit, alpha or gamma out of range, an unknown reduction, or targets that
            require a gradient.
        TypeError: for inputs that are not floating point, or labels that are not integers.
    """
    code = reduction_code(reduction)
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"alpha must be in [0, 1], or -1 for no weight, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    if inputs.dtype not in DTYPE_CODES:
        raise TypeError(f"inputs must be floating point, got {inputs.dtype}")
    if targets.requires_grad:
        raise ValueError("the focal loss is not differentiable in its targets: detach them")
    if targets.shape == inputs.shape:
        if targets.dtype != inputs.dtype:
            inputs, targets = same_floating_dtype(inputs, targets)
    elif inputs.dim() > 0 and targets.shape == inputs.shape[:-1]:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(f"labels {list(targets.shape)} for inputs {list(inputs.shape)} must be integers, got "
                            f"{targets.dtype}")  # fmt: skip
        targets = targets.to(torch.int64)
    else:
        raise ValueError(f"targets must have the shape of inputs {list(inputs.shape)}, or be labels "
                         f"{list(inputs.shape[:-1])}, got {list(targets.shape)}")  # fmt: skip
    return _focal(inputs, targets, float(alpha), float(gamma), code)
