"""The box head's losses; the rules are in ``fastrcnn_kernels/box_head_loss.py``.

Forward: one program for ``_ROWS`` rows (a warp a row) reads their logits once and leaves three partial sums: cross
entropy, box loss and the number of rows that count. One more program adds them up and divides: no atomics, no host.
Backward: one launch reads the logits again and writes both gradients once, zeros included; the four columns of a
positive row are put into the zeros in registers. Besides that the gradients cost what the outputs' bytes cost.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_ROWS = 4
_PARTIALS = 1024
_OPTIONS = {"num_warps": 4}


@triton.jit
def _difference(
    regression_ptr, proposals_ptr, gt_boxes_ptr, row, column, positive, AXIS: tl.constexpr,
    CENTRE_WEIGHT: tl.constexpr, SIZE_WEIGHT: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Predicted minus wanted deltas along one axis, centre and size: [ROWS], 0 where not positive."""
    low = tl.load(proposals_ptr + row * 4 + AXIS, mask=positive, other=0.0)
    high = tl.load(proposals_ptr + row * 4 + AXIS + 2, mask=positive, other=1.0)
    gt_low = tl.load(gt_boxes_ptr + row * 4 + AXIS, mask=positive, other=0.0)
    gt_high = tl.load(gt_boxes_ptr + row * 4 + AXIS + 2, mask=positive, other=1.0)
    extent = high - low + BOX_OFFSET
    gt_extent = gt_high - gt_low + BOX_OFFSET
    shift = gt_low + 0.5 * gt_extent - (low + 0.5 * extent)
    centre = tl.load(regression_ptr + column + AXIS, mask=positive, other=0.0).to(COMPUTE)
    size = tl.load(regression_ptr + column + AXIS + 2, mask=positive, other=0.0).to(COMPUTE)
    centre -= tl.full([], CENTRE_WEIGHT, COMPUTE) * shift / extent
    size -= tl.full([], SIZE_WEIGHT, COMPUTE) * tl.log(gt_extent / extent)
    return tl.where(positive, centre, 0.0), tl.where(positive, size, 0.0)


@triton.jit
def _smooth_l1(difference, BETA: tl.constexpr, COMPUTE: tl.constexpr):
    beta = tl.full([], BETA, COMPUTE)
    distance = tl.abs(difference)
    loss = distance - 0.5 * beta
    if BETA > 0.0:
        loss = tl.where(distance < beta, 0.5 * distance * distance / beta, loss)
    return loss


@triton.jit
def _slope(difference, BETA: tl.constexpr, COMPUTE: tl.constexpr):
    # Comparisons that NaN fails: it stays.
    if BETA > 0.0:
        slope = difference / tl.full([], BETA, COMPUTE)
        slope = tl.where(slope > 1.0, 1.0, tl.where(slope < -1.0, -1.0, slope))
    else:
        slope = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    return slope


@triton.jit
def _first_column(row, label, classes, AGNOSTIC: tl.constexpr):
    """Where the four columns of a positive row begin in the regression, as an offset from its first element."""
    if AGNOSTIC > 0:
        return row * AGNOSTIC + (AGNOSTIC - 4)
    else:
        return row * classes * 4 + label * 4


@triton.jit(do_not_specialize=["rows", "classes"])
def _forward_kernel(
    logits_ptr, regression_ptr, labels_ptr, proposals_ptr, gt_boxes_ptr, lse_ptr, partial_ptr, rows, classes,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr, BETA: tl.constexpr,
    BOX_OFFSET: tl.constexpr, IGNORE: tl.constexpr, AGNOSTIC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row and three partial sums [3, programs]. Grid: blocks of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK_C)
    label = tl.load(labels_ptr + row, mask=inside, other=IGNORE)
    x = tl.load(
        logits_ptr + row[:, None] * classes + column[None, :],
        mask=inside[:, None] & (column < classes)[None, :],
        other=float("-inf"),
    ).to(COMPUTE)
    largest = tl.max(x, axis=1)
    largest = tl.where(inside, largest, 0.0)
    lse = largest + tl.log(tl.sum(tl.exp(x - largest[:, None]), axis=1))
    tl.store(lse_ptr + row, lse, mask=inside)

    counts = inside & (label != IGNORE)
    known = counts & (label >= 0) & (label < classes)
    at_label = tl.load(logits_ptr + row * classes + label, mask=known, other=float("nan")).to(COMPUTE)
    cross_entropy = tl.where(counts, lse - at_label, 0.0)

    positive = known & (label > 0)
    first = _first_column(row, label, classes, AGNOSTIC)
    dx, dw = _difference(
        regression_ptr, proposals_ptr, gt_boxes_ptr, row, first, positive, 0, WX, WW, BOX_OFFSET, COMPUTE
    )
    dy, dh = _difference(
        regression_ptr, proposals_ptr, gt_boxes_ptr, row, first, positive, 1, WY, WH, BOX_OFFSET, COMPUTE
    )
    box = _smooth_l1(dx, BETA, COMPUTE) + _smooth_l1(dy, BETA, COMPUTE)
    box += _smooth_l1(dw, BETA, COMPUTE) + _smooth_l1(dh, BETA, COMPUTE)
    box = tl.where(positive, box, 0.0)

    at = partial_ptr + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(at, tl.sum(cross_entropy, axis=0))
    tl.store(at + programs, tl.sum(box, axis=0))
    tl.store(at + 2 * programs, tl.sum(counts.to(COMPUTE), axis=0))


@triton.jit(do_not_specialize=["programs"])
def _finish_kernel(
    partial_ptr, normaliser_ptr, classifier_ptr, box_ptr, share_ptr, programs,
    NORMALISED: tl.constexpr, PARTIALS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All partial sums, in one program, divided by the normaliser or by the number of rows that count."""
    classifier = tl.zeros([PARTIALS], dtype=COMPUTE)
    box = tl.zeros([PARTIALS], dtype=COMPUTE)
    count = tl.zeros([PARTIALS], dtype=COMPUTE)
    for start in range(0, programs, PARTIALS):
        lanes = start + tl.arange(0, PARTIALS)
        mask = lanes < programs
        classifier += tl.load(partial_ptr + lanes, mask=mask, other=0.0)
        box += tl.load(partial_ptr + programs + lanes, mask=mask, other=0.0)
        count += tl.load(partial_ptr + 2 * programs + lanes, mask=mask, other=0.0)
    if NORMALISED:
        share = 1.0 / tl.load(normaliser_ptr)
    else:
        share = 1.0 / tl.maximum(tl.sum(count, axis=0), 1.0)
    tl.store(classifier_ptr, tl.sum(classifier, axis=0) * share)
    tl.store(box_ptr, tl.sum(box, axis=0) * share)
    tl.store(share_ptr, share)


@triton.jit(do_not_specialize=["rows", "classes"])
def _backward_kernel(
    grad_classifier_ptr, grad_box_ptr, logits_ptr, regression_ptr, labels_ptr, proposals_ptr, gt_boxes_ptr, lse_ptr,
    share_ptr, logits_grad_ptr, regression_grad_ptr, rows, classes,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr, BETA: tl.constexpr,
    BOX_OFFSET: tl.constexpr, IGNORE: tl.constexpr, AGNOSTIC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Both gradients of a block of rows. Grid: blocks of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK_C)
    label = tl.load(labels_ptr + row, mask=inside, other=IGNORE)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    share = tl.load(share_ptr)
    counts = inside & (label != IGNORE)
    at = row[:, None] * classes + column[None, :]
    mask = inside[:, None] & (column < classes)[None, :]
    x = tl.load(logits_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    slope = tl.exp(x - lse[:, None]) - (column[None, :] == label[:, None]).to(COMPUTE)
    slope = tl.where(counts[:, None], slope * (tl.load(grad_classifier_ptr) * share), 0.0)
    tl.store(logits_grad_ptr + at, slope.to(logits_grad_ptr.dtype.element_ty), mask=mask)

    positive = counts & (label > 0) & (label < classes)
    first = _first_column(row, label, classes, AGNOSTIC)
    dx, dw = _difference(
        regression_ptr, proposals_ptr, gt_boxes_ptr, row, first, positive, 0, WX, WW, BOX_OFFSET, COMPUTE
    )
    dy, dh = _difference(
        regression_ptr, proposals_ptr, gt_boxes_ptr, row, first, positive, 1, WY, WH, BOX_OFFSET, COMPUTE
    )
    scale = tl.load(grad_box_ptr) * share
    dx = _slope(dx, BETA, COMPUTE) * scale
    dy = _slope(dy, BETA, COMPUTE) * scale
    dw = _slope(dw, BETA, COMPUTE) * scale
    dh = _slope(dh, BETA, COMPUTE) * scale
    columns = AGNOSTIC if AGNOSTIC > 0 else 4 * classes
    # The offset of an element from the row's four columns: 0 to 3 in them.
    start = first - row * columns
    for part in tl.static_range(1 if AGNOSTIC > 0 else 4):
        wide = part * BLOCK_C + column
        place = wide[None, :] - start[:, None]
        value = tl.where(place == 0, dx[:, None], 0.0)
        value = tl.where(place == 1, dy[:, None], value)
        value = tl.where(place == 2, dw[:, None], value)
        value = tl.where(place == 3, dh[:, None], value)
        value = tl.where(positive[:, None], value, 0.0)
        tl.store(
            regression_grad_ptr + row[:, None] * columns + wide[None, :],
            value.to(regression_grad_ptr.dtype.element_ty),
            mask=inside[:, None] & (wide < columns)[None, :],
        )


def _constants(
    dtype: torch.dtype, classes: int, columns: int, weights: list[float], beta: float, box_offset: int,
    ignore_index: int,
) -> dict[str, Any]:  # fmt: skip
    wx, wy, ww, wh = weights
    return {
        "WX": wx, "WY": wy, "WW": ww, "WH": wh, "BETA": beta, "BOX_OFFSET": box_offset, "IGNORE": ignore_index,
        "AGNOSTIC": 0 if columns == 4 * classes else columns, "ROWS": _ROWS,
        # Not under 8: the columns of class-agnostic boxes are one part.
        "BLOCK_C": max(8, triton.next_power_of_2(classes)),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def box_head_loss(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor,
    normaliser: Tensor | None, loss_classifier: Tensor, loss_box: Tensor, lse: Tensor, share: Tensor,
    weights: list[float], beta: float, box_offset: int, ignore_index: int,
) -> None:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::box_head_loss``: contiguous operands, boxes in the type of the losses."""
    rows, classes = class_logits.shape
    programs = triton.cdiv(rows, _ROWS)
    partial = lse.new_empty((3, programs))
    constants = _constants(
        lse.dtype, classes, box_regression.shape[1], weights, beta, box_offset, ignore_index
    )  # fmt: skip
    with device_guard(class_logits):
        if rows > 0:
            _forward_kernel[(programs,)](
                logits_ptr=class_logits, regression_ptr=box_regression, labels_ptr=labels, proposals_ptr=proposals,
                gt_boxes_ptr=gt_boxes, lse_ptr=lse, partial_ptr=partial, rows=rows, classes=classes,
                **constants, **_OPTIONS,
            )  # fmt: skip
        # With no rows it writes zeros.
        _finish_kernel[(1,)](
            partial_ptr=partial, normaliser_ptr=share if normaliser is None else normaliser,
            classifier_ptr=loss_classifier, box_ptr=loss_box, share_ptr=share, programs=programs,
            NORMALISED=normaliser is not None, PARTIALS=_PARTIALS, COMPUTE=constants["COMPUTE"], **_OPTIONS,
        )  # fmt: skip


def box_head_loss_backward(
    grad_classifier: Tensor, grad_box: Tensor, class_logits: Tensor, box_regression: Tensor, labels: Tensor,
    proposals: Tensor, gt_boxes: Tensor, lse: Tensor, share: Tensor, logits_grad: Tensor, regression_grad: Tensor,
    weights: list[float], beta: float, box_offset: int, ignore_index: int,
) -> None:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::box_head_loss_backward``."""
    rows, classes = class_logits.shape
    if rows == 0:
        return
    constants = _constants(lse.dtype, classes, box_regression.shape[1], weights, beta, box_offset, ignore_index)
    with device_guard(class_logits):
        _backward_kernel[(triton.cdiv(rows, _ROWS),)](
            grad_classifier_ptr=grad_classifier, grad_box_ptr=grad_box, logits_ptr=class_logits,
            regression_ptr=box_regression, labels_ptr=labels, proposals_ptr=proposals, gt_boxes_ptr=gt_boxes,
            lse_ptr=lse, share_ptr=share, logits_grad_ptr=logits_grad, regression_grad_ptr=regression_grad,
            rows=rows, classes=classes, **constants, **_OPTIONS,
        )  # fmt: skip


def _case(label: str, kernel: Any, dtype: torch.dtype, name: str, columns: int = 324) -> CompileCase:
    loss = "*fp64" if dtype == torch.float64 else "*fp32"
    in_type_of_logits = {"logits_ptr", "regression_ptr", "logits_grad_ptr", "regression_grad_ptr"}
    signature = {
        argument: f"*{name}" if argument in in_type_of_logits else loss
        for argument in kernel.arg_names
        if argument.endswith("_ptr")
    }
    signature |= {"labels_ptr": "*i64", "rows": "i32", "classes": "i32"}
    constants = _constants(dtype, 81, columns, [10.0, 10.0, 5.0, 5.0], 1.0, 1, -100)
    return CompileCase(label, kernel, signature, constants, _OPTIONS)


COMPILE_CASES = [
    _case("forward-bf16", _forward_kernel, torch.bfloat16, "bf16"),
    _case("forward-fp16", _forward_kernel, torch.float16, "fp16"),
    _case("forward-fp32-agnostic", _forward_kernel, torch.float32, "fp32", 8),
    _case("forward-fp64", _forward_kernel, torch.float64, "fp64"),
    _case("backward-bf16", _backward_kernel, torch.bfloat16, "bf16"),
    _case("backward-fp16", _backward_kernel, torch.float16, "fp16"),
    _case("backward-fp32-agnostic", _backward_kernel, torch.float32, "fp32", 8),
    _case("backward-fp64", _backward_kernel, torch.float64, "fp64"),
    CompileCase(
        "finish-fp32",
        _finish_kernel,
        {**{f"{name}_ptr": "*fp32" for name in ("partial", "normaliser", "classifier", "box", "share")}}
        | {"programs": "i32"},
        {"NORMALISED": False, "PARTIALS": _PARTIALS, "COMPUTE": tl.float32},
        _OPTIONS,
    ),
]
