"""IoU losses of paired boxes; the formulas are in ``fastrcnn_kernels/box_losses.py``.

A lane a pair. Reduced, up to ``_PROGRAMS`` programs leave a partial sum each, which one more program adds up: no
atomics, and the same bits every time. The arctangent is a rational function here, because Triton has none that its
interpreter runs too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.losses import compute_type, load_shared_gradient, sum_partials

_BLOCK = 128
_PROGRAMS = 1024
_OPTIONS = {"num_warps": 4}


@triton.jit
def _arctangent(x):
    """Moshier's (Cephes): a rational function of degree 5 in x^2 after two reductions, exact to double precision."""
    magnitude = tl.abs(x)
    far = magnitude > 2.414213562373095
    middle = magnitude > 0.66
    top = tl.where(far, -1.0, tl.where(middle, magnitude - 1.0, magnitude))
    bottom = tl.where(far, magnitude, tl.where(middle, magnitude + 1.0, 1.0))
    quarter = tl.full([], 0.7853981633974483, x.dtype)
    base = tl.where(far, 2.0 * quarter, tl.where(middle, quarter, 0.0))
    r = top / bottom
    z = r * r
    # As full(): a number in the text of a kernel is a float32.
    p = z * tl.full([], -8.750608600031904122785e-1, x.dtype) + tl.full([], -1.615753718733365076637e1, x.dtype)
    p = p * z + tl.full([], -7.500855792314704667340e1, x.dtype)
    p = p * z + tl.full([], -1.228866684490136173410e2, x.dtype)
    p = p * z + tl.full([], -6.485021904942025371773e1, x.dtype)
    q = z + tl.full([], 2.485846490142306297962e1, x.dtype)
    q = q * z + tl.full([], 1.650270098316988542046e2, x.dtype)
    q = q * z + tl.full([], 4.328810604912902668951e2, x.dtype)
    q = q * z + tl.full([], 4.853903996359136964868e2, x.dtype)
    q = q * z + tl.full([], 1.945506571482613964425e2, x.dtype)
    y = base + (r * (z * p / q) + r)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _load_boxes(pointer, lanes, mask):
    x1 = tl.load(pointer + lanes * 4, mask=mask, other=0.0)
    y1 = tl.load(pointer + lanes * 4 + 1, mask=mask, other=0.0)
    x2 = tl.load(pointer + lanes * 4 + 2, mask=mask, other=1.0)
    y2 = tl.load(pointer + lanes * 4 + 3, mask=mask, other=1.0)
    return x1, y1, x2, y2


@triton.jit
def _inside(a, b):
    """The share of ``a`` in the larger of both: half where they are equal."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0)).to(a.dtype)


@triton.jit
def _pairs(
    boxes1_ptr, boxes2_ptr, lanes, mask,
    KIND: tl.constexpr, EPS: tl.constexpr, INNER_EPS: tl.constexpr, GRADIENT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Losses of the pairs, and where GRADIENT their derivatives by the four coordinates of the first box."""
    ax1, ay1, ax2, ay2 = _load_boxes(boxes1_ptr, lanes, mask)
    bx1, by1, bx2, by2 = _load_boxes(boxes2_ptr, lanes, mask)
    eps = tl.full([], EPS, COMPUTE)
    inner_eps = tl.full([], INNER_EPS, COMPUTE)
    width = ax2 - ax1
    height = ay2 - ay1
    overlap_x = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    overlap_y = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    outer_x = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
    outer_y = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
    meet = (overlap_x > 0.0) & (overlap_y > 0.0)
    overlap = tl.where(meet, overlap_x * overlap_y, 0.0)
    joined = width * height + (bx2 - bx1) * (by2 - by1) - overlap
    divisor = joined + inner_eps
    iou = overlap / divisor
    loss = 1.0 - iou
    # d(1 - iou) = (iou dU - dI) / divisor with dU = dA - dI.
    by_area = iou / divisor
    by_overlap = -(1.0 + iou) / divisor
    shift_x = iou * 0.0
    shift_y = iou * 0.0
    size_x = iou * 0.0
    size_y = iou * 0.0
    if KIND == 0:
        outer = outer_x * outer_y
        outer_divisor = outer + eps
        empty = (outer - joined) / outer_divisor
        loss += empty
        by_area -= 1.0 / outer_divisor
        by_overlap += 1.0 / outer_divisor
        by_outer = (1.0 - empty) / outer_divisor
        by_outer_x = by_outer * outer_y
        by_outer_y = by_outer * outer_x
    else:
        diagonal = outer_x * outer_x + outer_y * outer_y + inner_eps
        dx = 0.5 * (ax1 + ax2 - bx1 - bx2)
        dy = 0.5 * (ay1 + ay2 - by1 - by2)
        distance = (dx * dx + dy * dy) / diagonal
        loss += distance
        by_outer_x = -2.0 * distance * outer_x / diagonal
        by_outer_y = -2.0 * distance * outer_y / diagonal
        shift_x = dx / diagonal
        shift_y = dy / diagonal
    if KIND == 2:
        ratio = width / height
        angle = _arctangent((bx2 - bx1) / (by2 - by1)) - _arctangent(ratio)
        four_over_pi_squared = tl.full([], 0.4052847345693511, COMPUTE)
        v = four_over_pi_squared * angle * angle
        alpha = v / (1.0 - iou + v + eps)
        loss += alpha * v
        by_ratio = alpha * -2.0 * four_over_pi_squared * angle / (1.0 + ratio * ratio) / height
        size_x = by_ratio
        size_y = -by_ratio * ratio
    if GRADIENT:
        inner_x = tl.where(meet, by_overlap * overlap_y, 0.0)
        inner_y = tl.where(meet, by_overlap * overlap_x, 0.0)
        size_x += by_area * height
        size_y += by_area * width
        low_x = _inside(ax1, bx1)
        low_y = _inside(ay1, by1)
        high_x = _inside(bx2, ax2)
        high_y = _inside(by2, ay2)
        x1 = shift_x - size_x - inner_x * low_x - by_outer_x * (1.0 - low_x)
        y1 = shift_y - size_y - inner_y * low_y - by_outer_y * (1.0 - low_y)
        x2 = shift_x + size_x + inner_x * high_x + by_outer_x * (1.0 - high_x)
        y2 = shift_y + size_y + inner_y * high_y + by_outer_y * (1.0 - high_y)
        return x1, y1, x2, y2
    else:
        return loss, loss, loss, loss


@triton.jit(do_not_specialize=["count"])
def _forward_kernel(
    boxes1_ptr, boxes2_ptr, out_ptr, count,
    KIND: tl.constexpr, EPS: tl.constexpr, INNER_EPS: tl.constexpr, REDUCED: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Losses, or where REDUCED a partial sum a program. Grid: blocks, or fewer programs."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    total = tl.zeros([BLOCK], dtype=COMPUTE)
    for start in range(first, count, step):
        lanes = start + tl.arange(0, BLOCK)
        mask = lanes < count
        loss, _, _, _ = _pairs(boxes1_ptr, boxes2_ptr, lanes, mask, KIND, EPS, INNER_EPS, False, COMPUTE)
        if REDUCED:
            total += tl.where(mask, loss, 0.0)
        else:
            tl.store(out_ptr + lanes, loss, mask=mask)
    if REDUCED:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def _backward_kernel(
    grad_ptr, boxes1_ptr, boxes2_ptr, out_ptr, count,
    KIND: tl.constexpr, EPS: tl.constexpr, INNER_EPS: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient by the first box. Grid: blocks."""
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    x1, y1, x2, y2 = _pairs(boxes1_ptr, boxes2_ptr, lanes, mask, KIND, EPS, INNER_EPS, True, COMPUTE)
    if REDUCTION == 0:
        scale = tl.load(grad_ptr + lanes, mask=mask, other=0.0)
    else:
        scale = load_shared_gradient(grad_ptr, count, REDUCTION, COMPUTE)
    tl.store(out_ptr + lanes * 4, x1 * scale, mask=mask)
    tl.store(out_ptr + lanes * 4 + 1, y1 * scale, mask=mask)
    tl.store(out_ptr + lanes * 4 + 2, x2 * scale, mask=mask)
    tl.store(out_ptr + lanes * 4 + 3, y2 * scale, mask=mask)


def _constants(dtype: torch.dtype, kind: int, eps: float, inner_eps: float) -> dict[str, Any]:
    return {"KIND": kind, "EPS": eps, "INNER_EPS": inner_eps, "BLOCK": _BLOCK, "COMPUTE": compute_type(dtype)}


def box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, out: Tensor, kind: int, eps: float, inner_eps: float, reduction: int
) -> None:
    """Launcher of ``fastrcnn_kernels::box_iou_loss``: contiguous boxes of the type of ``out``."""
    count = boxes1.numel() // 4
    if count == 0:
        out.zero_()
        return
    blocks = triton.cdiv(count, _BLOCK)
    programs = min(blocks, _PROGRAMS) if reduction else blocks
    result = out.new_empty((programs,)) if reduction else out
    with device_guard(out):
        _forward_kernel[(programs,)](
            boxes1_ptr=boxes1, boxes2_ptr=boxes2, out_ptr=result, count=count, REDUCED=reduction > 0,
            **_constants(out.dtype, kind, eps, inner_eps), **_OPTIONS,
        )  # fmt: skip
        if reduction:
            sum_partials(result, out, count if reduction == 2 else 1)


def box_iou_loss_backward(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, out: Tensor, kind: int, eps: float, inner_eps: float, reduction: int
) -> None:
    """Launcher of ``fastrcnn_kernels::box_iou_loss_backward``."""
    count = boxes1.numel() // 4
    if count == 0:
        return
    with device_guard(out):
        _backward_kernel[(triton.cdiv(count, _BLOCK),)](
            grad_ptr=grad, boxes1_ptr=boxes1, boxes2_ptr=boxes2, out_ptr=out, count=count, REDUCTION=reduction,
            **_constants(out.dtype, kind, eps, inner_eps), **_OPTIONS,
        )  # fmt: skip


def _case(label: str, kernel: Any, dtype: torch.dtype, kind: int, reduction: int) -> CompileCase:
    name = "*fp64" if dtype == torch.float64 else "*fp32"
    signature = {argument: name for argument in kernel.arg_names if argument.endswith("_ptr")} | {"count": "i32"}
    how = {"REDUCTION": reduction} if "grad_ptr" in signature else {"REDUCED": reduction > 0}
    return CompileCase(label, kernel, signature, {**_constants(dtype, kind, 1e-7, 1e-7), **how}, _OPTIONS)


COMPILE_CASES = [
    _case("generalized-none", _forward_kernel, torch.float32, 0, 0),
    _case("generalized-sum", _forward_kernel, torch.float32, 0, 1),
    _case("distance-sum", _forward_kernel, torch.float32, 1, 1),
    _case("complete-sum", _forward_kernel, torch.float32, 2, 1),
    _case("complete-sum-fp64", _forward_kernel, torch.float64, 2, 1),
    _case("generalized-backward-sum", _backward_kernel, torch.float32, 0, 1),
    _case("distance-backward-sum", _backward_kernel, torch.float32, 1, 1),
    _case("complete-backward-none", _backward_kernel, torch.float32, 2, 0),
    _case("complete-backward-sum", _backward_kernel, torch.float32, 2, 1),
    _case("complete-backward-sum-fp64", _backward_kernel, torch.float64, 2, 1),
]
