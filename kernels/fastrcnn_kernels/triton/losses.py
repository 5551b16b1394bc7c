"""Smooth L1 and the sigmoid focal loss; the formulas are in ``fastrcnn_kernels/losses.py``.

Elementwise, over memory in whatever order the tensors lie. Not reduced, a program takes one block; reduced, up to
``_PROGRAMS`` programs walk the blocks with that stride and leave a partial sum each, which one more program adds up: no
atomics, and the same bits every time. The backward computes from the inputs again: bound by memory, it would only read
more if something were kept.

Labels are read where a logit needs its row's: no matrix of targets. Blocks that are whole are loaded without a mask,
which would cost the wide loads where the size is not known to be a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_BLOCK = 1024
_PROGRAMS = 1024
_OPTIONS = {"num_warps": 4}


@triton.jit
def load_block(pointer, start, numel, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """The elements from ``start``, 0 beyond ``numel``."""
    lanes = tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        values = tl.load(pointer + start + lanes)
    else:
        values = tl.load(pointer + start + lanes, mask=start + lanes < numel, other=0.0)
    return values.to(COMPUTE)


@triton.jit
def store_block(pointer, start, numel, values, BLOCK: tl.constexpr):
    """The inverse of ``load_block``; casts."""
    lanes = tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        tl.store(pointer + start + lanes, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + start + lanes, values.to(pointer.dtype.element_ty), mask=start + lanes < numel)


@triton.jit
def load_shared_gradient(grad_ptr, numel, REDUCTION: tl.constexpr, COMPUTE: tl.constexpr):
    """What every loss's gradient is multiplied by: the gradient of the sum or of the mean, 1 where not reduced."""
    if REDUCTION == 0:
        scale = tl.full([], 1.0, COMPUTE)
    else:
        scale = tl.load(grad_ptr).to(COMPUTE)
        if REDUCTION == 2:
            scale = scale / numel.to(COMPUTE)
    return scale


@triton.jit(do_not_specialize=["count", "divisor"])
def _sum_kernel(partial_ptr, out_ptr, count, divisor, PARTIALS: tl.constexpr):
    """All partial sums, in one program, divided by ``divisor``."""
    lanes = tl.arange(0, PARTIALS)
    total = tl.sum(tl.load(partial_ptr + lanes, mask=lanes < count, other=0.0), axis=0)
    tl.store(out_ptr, total / divisor.to(total.dtype))


@triton.jit(do_not_specialize=["numel"])
def _smooth_l1_kernel(
    input_ptr, target_ptr, out_ptr, numel,
    BETA: tl.constexpr, REDUCED: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Losses, or where REDUCED a partial sum a program. Grid: blocks, or fewer programs."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    beta = tl.full([], BETA, COMPUTE)
    total = tl.zeros([BLOCK], dtype=COMPUTE)
    for start in range(first, numel, step):
        difference = load_block(input_ptr, start, numel, BLOCK, COMPUTE)
        difference -= load_block(target_ptr, start, numel, BLOCK, COMPUTE)
        distance = tl.abs(difference)
        loss = distance - 0.5 * beta
        if BETA > 0.0:
            loss = tl.where(distance < beta, 0.5 * distance * distance / beta, loss)
        if REDUCED:
            total += tl.where(start + tl.arange(0, BLOCK) < numel, loss, 0.0)
        else:
            store_block(out_ptr, start, numel, loss, BLOCK)
    if REDUCED:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["numel"])
def _smooth_l1_backward_kernel(
    grad_ptr, input_ptr, target_ptr, out_ptr, numel,
    BETA: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient by the input. Grid: blocks."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    difference = load_block(input_ptr, start, numel, BLOCK, COMPUTE)
    difference -= load_block(target_ptr, start, numel, BLOCK, COMPUTE)
    if BETA > 0.0:
        # Comparisons that NaN fails: it stays.
        slope = difference / tl.full([], BETA, COMPUTE)
        slope = tl.where(slope > 1.0, 1.0, tl.where(slope < -1.0, -1.0, slope))
    else:
        slope = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    if REDUCTION == 0:
        slope *= load_block(grad_ptr, start, numel, BLOCK, COMPUTE)
    else:
        slope *= load_shared_gradient(grad_ptr, numel, REDUCTION, COMPUTE)
    store_block(out_ptr, start, numel, slope, BLOCK)


@triton.jit
def _load_targets(targets_ptr, start, numel, CLASSES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """The targets of a block of logits and whether each counts."""
    if CLASSES == 0:
        targets = load_block(targets_ptr, start, numel, BLOCK, COMPUTE)
        counts = tl.full([BLOCK], 1, tl.int1)
    else:
        row = start // CLASSES
        at = (start - row * CLASSES).to(tl.int32) + tl.arange(0, BLOCK)
        inside = start + tl.arange(0, BLOCK) < numel
        label = tl.load(targets_ptr + row + at // CLASSES, mask=inside, other=-1)
        targets = (label == at % CLASSES + 1).to(COMPUTE)
        counts = label >= 0
    return targets, counts


@triton.jit
def _focal_terms(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr, COMPUTE: tl.constexpr):
    """p, 1 - p, p (1 - t), (1 - p) t, their sum to the power gamma times the weight, and the cross entropy."""
    e = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    positive = x >= 0.0
    p = tl.where(positive, inverse, small)
    not_p = tl.where(positive, small, inverse)
    above = p * (1.0 - t)
    below = not_p * t
    q = above + below
    # log(1 + e) loses the last bits of e; the second term is what the sum rounded away.
    rounded = 1.0 + e
    cross_entropy = tl.where(positive, x, 0.0) - x * t + (tl.log(rounded) + (e - (rounded - 1.0)) * inverse)
    if GAMMA == 2.0:
        factor = q * q
    elif GAMMA == 0.0:
        factor = q * 0.0 + 1.0
    else:
        # What multiplies it is 0 where q is.
        factor = tl.exp(tl.log(tl.where(q < 1.1754944e-38, 1.1754944e-38, q)) * tl.full([], GAMMA, COMPUTE))
    if ALPHA >= 0.0:
        factor *= tl.full([], ALPHA, COMPUTE) * t + tl.full([], 1.0 - ALPHA, COMPUTE) * (1.0 - t)
    return p, not_p, above, below, factor, cross_entropy


@triton.jit(do_not_specialize=["numel"])
def _focal_kernel(
    inputs_ptr, targets_ptr, out_ptr, numel,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, CLASSES: tl.constexpr, REDUCED: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Losses, or where REDUCED a partial sum a program. Grid: blocks, or fewer programs. CLASSES 0: no labels."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    total = tl.zeros([BLOCK], dtype=COMPUTE)
    for start in range(first, numel, step):
        x = load_block(inputs_ptr, start, numel, BLOCK, COMPUTE)
        t, counts = _load_targets(targets_ptr, start, numel, CLASSES, BLOCK, COMPUTE)
        _, _, _, _, factor, cross_entropy = _focal_terms(x, t, ALPHA, GAMMA, COMPUTE)
        loss = tl.where(counts, factor * cross_entropy, 0.0)
        if REDUCED:
            total += tl.where(start + tl.arange(0, BLOCK) < numel, loss, 0.0)
        else:
            store_block(out_ptr, start, numel, loss, BLOCK)
    if REDUCED:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["numel"])
def _focal_backward_kernel(
    grad_ptr, inputs_ptr, targets_ptr, out_ptr, numel,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, CLASSES: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits. Grid: blocks."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x = load_block(inputs_ptr, start, numel, BLOCK, COMPUTE)
    t, counts = _load_targets(targets_ptr, start, numel, CLASSES, BLOCK, COMPUTE)
    p, not_p, above, below, factor, cross_entropy = _focal_terms(x, t, ALPHA, GAMMA, COMPUTE)
    q = above + below
    # p (1 - p) / q tends to 1 where q underflows.
    ratio = tl.where(q > 0.0, p * not_p / tl.where(q > 0.0, q, 1.0), 1.0)
    slope = factor * (above - below + cross_entropy * (tl.full([], GAMMA, COMPUTE) * (1.0 - t - t) * ratio))
    if REDUCTION == 0:
        slope *= load_block(grad_ptr, start, numel, BLOCK, COMPUTE)
    else:
        slope *= load_shared_gradient(grad_ptr, numel, REDUCTION, COMPUTE)
    store_block(out_ptr, start, numel, tl.where(counts, slope, 0.0), BLOCK)


def compute_type(dtype: torch.dtype) -> Any:
    """Triton's name of the type computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_partials(partial: Tensor, out: Tensor, divisor: int) -> None:
    """``out``, one number, from up to ``_PROGRAMS`` partial sums."""
    _sum_kernel[(1,)](
        partial_ptr=partial, out_ptr=out, count=partial.numel(), divisor=divisor, PARTIALS=_PROGRAMS, **_OPTIONS
    )  # fmt: skip


def run_loss(
    kernel: Any, pointers: dict[str, Tensor], count: int, out: Tensor, reduction: int, **constants: Any
) -> None:
    """Launch ``kernel`` for every element, or for partial sums of all and add those up."""
    if count == 0:
        out.zero_()
        return
    blocks = triton.cdiv(count, _BLOCK)
    programs = min(blocks, _PROGRAMS) if reduction else blocks
    result = out.new_empty((programs,)) if reduction else out
    with device_guard(out):
        kernel[(programs,)](
            **pointers, out_ptr=result, numel=count, REDUCED=reduction > 0, BLOCK=_BLOCK,
            COMPUTE=compute_type(out.dtype), **constants, **_OPTIONS,
        )  # fmt: skip
        if reduction:
            sum_partials(result, out, count if reduction == 2 else 1)


def run_backward(kernel: Any, pointers: dict[str, Tensor], out: Tensor, reduction: int, **constants: Any) -> None:
    """Launch ``kernel`` for every element of the gradient ``out``."""
    count = out.numel()
    if count == 0:
        return
    with device_guard(out):
        kernel[(triton.cdiv(count, _BLOCK),)](
            **pointers, out_ptr=out, numel=count, REDUCTION=reduction, BLOCK=_BLOCK,
            COMPUTE=compute_type(out.dtype), **constants, **_OPTIONS,
        )  # fmt: skip


def smooth_l1_loss(input: Tensor, target: Tensor, out: Tensor, beta: float, reduction: int) -> None:
    """Launcher of ``fastrcnn_kernels::smooth_l1_loss``; the operands lie in one memory order, that of ``out``."""
    pointers = {"input_ptr": input, "target_ptr": target}
    run_loss(_smooth_l1_kernel, pointers, input.numel(), out, reduction, BETA=beta)


def smooth_l1_loss_backward(
    grad: Tensor, input: Tensor, target: Tensor, out: Tensor, beta: float, reduction: int
) -> None:
    """Launcher of ``fastrcnn_kernels::smooth_l1_loss_backward``."""
    pointers = {"grad_ptr": grad, "input_ptr": input, "target_ptr": target}
    run_backward(_smooth_l1_backward_kernel, pointers, out, reduction, BETA=beta)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, classes: int, out: Tensor, alpha: float, gamma: float, reduction: int
) -> None:
    """Launcher of ``fastrcnn_kernels::sigmoid_focal_loss``; ``classes`` 0: targets as inputs, else labels of rows."""
    pointers = {"inputs_ptr": inputs, "targets_ptr": targets}
    run_loss(_focal_kernel, pointers, inputs.numel(), out, reduction, ALPHA=alpha, GAMMA=gamma, CLASSES=classes)


def sigmoid_focal_loss_backward(
    grad: Tensor, inputs: Tensor, targets: Tensor, classes: int, out: Tensor, alpha: float, gamma: float, reduction: int
) -> None:
    """Launcher of ``fastrcnn_kernels::sigmoid_focal_loss_backward``."""
    pointers = {"grad_ptr": grad, "inputs_ptr": inputs, "targets_ptr": targets}
    run_backward(_focal_backward_kernel, pointers, out, reduction, ALPHA=alpha, GAMMA=gamma, CLASSES=classes)


TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _case(label: str, kernel: Any, dtype: torch.dtype, reduction: int, **constants: Any) -> CompileCase:
    """A case of one of the four kernels; which, its arguments say."""
    name, loss = TYPE_NAMES[dtype], "fp64" if dtype == torch.float64 else "fp32"
    backward = "grad_ptr" in kernel.arg_names
    signature = {argument: f"*{name}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    signature["grad_ptr" if backward else "out_ptr"] = f"*{loss}"
    signature["numel"] = "i32"
    if constants.get("CLASSES"):
        signature["targets_ptr"] = "*i64"
    constants |= {"REDUCTION": reduction} if backward else {"REDUCED": reduction > 0}
    return CompileCase(
        label, kernel, signature, {**constants, "BLOCK": _BLOCK, "COMPUTE": compute_type(dtype)}, _OPTIONS
    )


_SMOOTH = {"BETA": 1 / 9}
_DENSE = {"ALPHA": 0.25, "GAMMA": 2.0, "CLASSES": 0}
_LABELS = {**_DENSE, "CLASSES": 80}
COMPILE_CASES = [
    _case("smooth-fp32-none", _smooth_l1_kernel, torch.float32, 0, **_SMOOTH),
    _case("smooth-bf16-sum", _smooth_l1_kernel, torch.bfloat16, 1, **_SMOOTH),
    _case("smooth-backward-bf16-sum", _smooth_l1_backward_kernel, torch.bfloat16, 1, **_SMOOTH),
    _case("smooth-backward-fp32-none", _smooth_l1_backward_kernel, torch.float32, 0, **_SMOOTH),
    _case("focal-fp32-none", _focal_kernel, torch.float32, 0, **_DENSE),
    _case("focal-bf16-labels-sum", _focal_kernel, torch.bfloat16, 1, **_LABELS),
    _case("focal-fp64-mean", _focal_kernel, torch.float64, 2, **{**_DENSE, "GAMMA": 1.5}),
    _case("focal-backward-fp32-none", _focal_backward_kernel, torch.float32, 0, **_DENSE),
    _case("focal-backward-fp16-labels-sum", _focal_backward_kernel, torch.float16, 1, **_LABELS),
    _case("focal-backward-bf16-labels-sum", _focal_backward_kernel, torch.bfloat16, 1, **_LABELS),
    _case("focal-backward-fp64-mean", _focal_backward_kernel, torch.float64, 2, **{**_DENSE, "GAMMA": 1.5}),
    CompileCase(
        "sum-fp32",
        _sum_kernel,
        {"partial_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32", "divisor": "i32"},
        {"PARTIALS": _PROGRAMS},
        _OPTIONS,
    ),
]
