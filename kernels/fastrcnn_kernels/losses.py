"""Losses of the regression heads."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastrcnn_kernels.boxes import _at_least_float32

REDUCTIONS = ("none", "sum", "mean")


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
        would overflow or stall. The mean of nothing is 0, not NaN (fvcore's rule), and has a gradient.

    Raises:
        ValueError: if the shapes differ, beta is negative or the reduction is unknown.
    """
    if input.shape != target.shape:
        raise ValueError(f"input {list(input.shape)} and target {list(target.shape)} must have one shape")
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    input, target = _at_least_float32(input), _at_least_float32(target)
    if input.numel() == 0 and reduction == "mean":
        reduction = "sum"
    return functional.smooth_l1_loss(input, target, reduction=reduction, beta=beta)
