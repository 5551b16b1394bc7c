"""The regions of a training step, a launch each; the rules are in ``fastrcnn_kernels/regions.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

MAX_LEVELS = 5
_BLOCK = 128
_OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["room", "more"])
def _append_kernel(
    boxes_ptr, scores_ptr, count_ptr, added_ptr, added_count_ptr, out_ptr, out_scores_ptr, out_count_ptr, room, more,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of slots, images."""
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < room + more
    first = tl.load(count_ptr + image)
    last = first + tl.load(added_count_ptr + image)
    old = inside & (slot < first)
    new = inside & (slot >= first) & (slot < last)
    row = image * (room + more) + slot
    for side in tl.static_range(4):
        value = tl.load(boxes_ptr + (image * room + slot) * 4 + side, mask=old, other=0.0)
        value = tl.where(new, tl.load(added_ptr + (image * more + slot - first) * 4 + side, mask=new, other=0.0), value)
        tl.store(out_ptr + row * 4 + side, value, mask=inside)
    score = tl.load(scores_ptr + image * room + slot, mask=old, other=float("-inf"))
    tl.store(out_scores_ptr + row, tl.where(new, 1.0, score), mask=inside)
    tl.store(out_count_ptr + image, last)


@triton.jit(do_not_specialize=["images", "slots", "room", "ground_truths", "most_positives", "ignore_label"])
def _gather_kernel(
    boxes_ptr, gt_boxes_ptr, gt_labels_ptr, matched_ptr, indices_ptr, num_positive_ptr, num_sampled_ptr,
    out_ptr, rois_ptr, labels_ptr, matched_idxs_ptr, wanted_ptr, positive_rois_ptr, positive_labels_ptr, instances_ptr,
    total_ptr, images, slots, room, ground_truths, most_positives, ignore_label, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of slots, images."""
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    positives = tl.load(num_positive_ptr + image)
    positive = inside & (slot < positives)
    valid = inside & (slot < tl.load(num_sampled_ptr + image))
    row = image * slots + slot
    index = tl.maximum(tl.load(indices_ptr + row, mask=inside, other=0), 0)
    there = inside & (room > 0)
    gt = tl.load(matched_ptr + image * room + index, mask=positive & there, other=0)
    known = positive & (ground_truths > 0)
    label = tl.load(gt_labels_ptr + image * ground_truths + gt, mask=known, other=0)
    label = tl.where(valid, label, ignore_label.to(tl.int64))
    tl.store(labels_ptr + row, label, mask=inside)
    tl.store(matched_idxs_ptr + row, gt, mask=inside)

    first = inside & (slot < most_positives)
    place = image * most_positives + slot
    tl.store(positive_labels_ptr + place, tl.where(positive, label, -1), mask=first)
    tl.store(instances_ptr + place, tl.where(positive, image * ground_truths + gt, -1), mask=first)
    one = slot * 0 + image
    number = out_ptr.dtype.element_ty
    tl.store(rois_ptr + row * 5, tl.where(valid, one, -1).to(number), mask=inside)
    tl.store(positive_rois_ptr + place * 5, tl.where(positive, one, -1).to(number), mask=first)
    for side in tl.static_range(4):
        value = tl.load(boxes_ptr + (image * room + index) * 4 + side, mask=there, other=0.0)
        tl.store(out_ptr + row * 4 + side, value, mask=inside)
        tl.store(rois_ptr + row * 5 + 1 + side, value, mask=inside)
        tl.store(positive_rois_ptr + place * 5 + 1 + side, value, mask=first)
        # Where not positive the first one, as the reference takes it.
        goal = tl.load(
            gt_boxes_ptr + (image * ground_truths + gt) * 4 + side, mask=inside & (ground_truths > 0), other=0.0
        )
        tl.store(wanted_ptr + row * 4 + side, goal, mask=inside)

    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        total = positives * 0
        for i in range(images):
            total += tl.load(num_positive_ptr + i)
        tl.store(total_ptr, tl.maximum(total, 1))


@triton.jit(do_not_specialize=["count", "stride"])
def _levels_kernel(
    boxes_ptr, levels_ptr, count, stride, BOX_OFFSET: tl.constexpr,
    LEVELS: tl.constexpr, AREA1: tl.constexpr, AREA2: tl.constexpr, AREA3: tl.constexpr, AREA4: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of boxes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    box = boxes_ptr + at * stride
    width = tl.load(box + 2, mask=inside, other=0.0) - tl.load(box, mask=inside, other=0.0) + BOX_OFFSET
    height = tl.load(box + 3, mask=inside, other=0.0) - tl.load(box + 1, mask=inside, other=0.0) + BOX_OFFSET
    area = width * height
    number = boxes_ptr.dtype.element_ty
    level = tl.zeros([BLOCK], tl.int64)
    # A constant in the arithmetic would be a float32 beside float64 boxes, too.
    if LEVELS > 1:
        level += (area >= tl.full([], AREA1, number)).to(tl.int64)
    if LEVELS > 2:
        level += (area >= tl.full([], AREA2, number)).to(tl.int64)
    if LEVELS > 3:
        level += (area >= tl.full([], AREA3, number)).to(tl.int64)
    if LEVELS > 4:
        level += (area >= tl.full([], AREA4, number)).to(tl.int64)
    tl.store(levels_ptr + at, level, mask=inside)


def append_boxes(operands: list[Tensor], out: tuple[Tensor, ...]) -> None:
    """Launcher of ``fastrcnn_kernels::append_boxes``: contiguous operands of one type."""
    images, capacity = out[1].shape
    if images == 0:
        return
    with device_guard(out[0]):
        # With no slot at all the count is still written.
        _append_kernel[(max(1, triton.cdiv(capacity, _BLOCK)), images)](
            *operands, *out, operands[0].shape[1], operands[3].shape[1], BLOCK=_BLOCK, **_OPTIONS
        )


def gather_regions(operands: list[Tensor], out: tuple[Tensor, ...], ignore_label: int) -> None:
    """Launcher of ``fastrcnn_kernels::gather_regions``: contiguous operands."""
    images, slots = out[2].shape
    if images == 0:
        out[8].fill_(1)
        return
    with device_guard(out[0]):
        _gather_kernel[(max(1, triton.cdiv(slots, _BLOCK)), images)](
            *operands, *out, images, slots, operands[0].shape[1], operands[1].shape[1], out[6].shape[1], ignore_label,
            BLOCK=_BLOCK, **_OPTIONS,
        )  # fmt: skip


def _level_constants(areas: tuple[float, ...], box_offset: int) -> dict[str, Any]:
    padded = [*areas, *[0.0] * (MAX_LEVELS - 1 - len(areas))]
    named = {f"AREA{level}": area for level, area in enumerate(padded, start=1)}
    return {"BOX_OFFSET": box_offset, "LEVELS": len(areas) + 1, **named, "BLOCK": _BLOCK}


def assign_levels(boxes: Tensor, levels: Tensor, areas: tuple[float, ...], box_offset: int) -> None:
    """Launcher of ``fastrcnn_kernels::assign_levels``: rows of four neighbours, ``areas`` the least of each level."""
    if boxes.shape[0] == 0:
        return
    with device_guard(boxes):
        _levels_kernel[(triton.cdiv(boxes.shape[0], _BLOCK),)](
            boxes, levels, boxes.shape[0], boxes.stride(0), **_level_constants(areas, box_offset), **_OPTIONS
        )


def _case(label: str, kernel: Any, name: str, constants: dict[str, Any]) -> CompileCase:
    floats = {"boxes_ptr", "scores_ptr", "added_ptr", "out_ptr", "out_scores_ptr", "gt_boxes_ptr", "rois_ptr",
              "wanted_ptr", "positive_rois_ptr"}  # fmt: skip
    signature = {
        argument: (f"*{name}" if argument in floats else "*i64") if argument.endswith("_ptr") else "i32"
        for argument in kernel.arg_names
        if argument not in constants
    }
    return CompileCase(f"{label}-{name}", kernel, signature, constants, _OPTIONS)


COMPILE_CASES = [
    case
    for name in ("fp32", "fp64")
    for case in (
        _case("append", _append_kernel, name, {"BLOCK": _BLOCK}),
        _case("gather", _gather_kernel, name, {"BLOCK": _BLOCK}),
        _case("levels", _levels_kernel, name, _level_constants((12544.0, 50176.0, 200704.0), 1)),
    )
]
