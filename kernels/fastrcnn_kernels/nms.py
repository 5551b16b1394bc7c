"""Greedy non-maximum suppression: for a list, for groups of a list, and for many padded lists at once.

Boxes are visited in decreasing score, ties by lower index; a box is dropped if its intersection over union with a box
kept before it exceeds the threshold. The comparison is pinned, and every implementation gives the same integers::

    area  = (x2 - x1 + o) * (y2 - y1 + o)                      o = box_offset
    inter = max(min(x2) - max(x1) + o, 0) * max(min(y2) - max(y1) + o, 0)
    drop  = inter / ((area_i + area_j) - inter) > threshold

Each operation is rounded to float32 (float64 for float64 boxes; half types are cast up first), no product is fused
into a sum, and a float32 ratio is compared with the largest float32 not above the threshold, which is what
torchvision's comparison with a double amounts to. A box with a NaN coordinate has a NaN area: it drops nothing and
is not dropped. Scores order as in ``torch.sort(descending=True, stable=True)``: NaN comes first.

Greedy NMS as in Fast R-CNN (Girshick, 2015), ``>`` as in torchvision and in maskrcnn-benchmark's CUDA kernel;
``box_offset=1`` is maskrcnn-benchmark's box with inclusive pixels. Nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastrcnn_kernels import _library

_BLOCK_ELEMENTS = 1 << 20  # pairs looked at together by the reference: bounds its memory to some 40 MB

Resolve = Callable[[Tensor, Tensor], Tensor]


def comparison_threshold(iou_threshold: float, dtype: torch.dtype) -> float:
    """The value that a ratio of type ``dtype`` is compared with: the largest such number not above the threshold.

    For float32 ratios ``ratio > comparison_threshold(t)`` is ``double(ratio) > t``, exactly.
    """
    if dtype == torch.float64 or not math.isfinite(iou_threshold):
        return iou_threshold
    nearest = ctypes.c_float(iou_threshold)
    if nearest.value > iou_threshold:
        # One step down: towards zero for positive numbers, away from it for negative ones.
        bits = ctypes.c_int32.from_buffer(nearest)
        bits.value += -1 if nearest.value > 0 else 1
    return nearest.value


def compute_dtype(boxes: Tensor) -> torch.dtype:
    """The type that the overlaps are computed in: float64 for float64 boxes, float32 for all others."""
    return torch.float64 if boxes.dtype == torch.float64 else torch.float32


def _overlaps(rows: Tensor, columns: Tensor, threshold: float, box_offset: int) -> Tensor:
    """Whether each pair's IoU exceeds the threshold: [S, R, 4], [S, C, 4] -> bool [S, R, C]."""
    row_x1, row_y1, row_x2, row_y2 = rows[:, :, None].unbind(-1)  # [S, R, 1]
    column_x1, column_y1, column_x2, column_y2 = columns[:, None].unbind(-1)  # [S, 1, C]
    row_area = (row_x2 - row_x1 + box_offset) * (row_y2 - row_y1 + box_offset)  # [S, R, 1]
    column_area = (column_x2 - column_x1 + box_offset) * (column_y2 - column_y1 + box_offset)  # [S, 1, C]
    width = torch.minimum(row_x2, column_x2) - torch.maximum(row_x1, column_x1) + box_offset  # [S, R, C]
    height = torch.minimum(row_y2, column_y2) - torch.maximum(row_y1, column_y1) + box_offset  # [S, R, C]
    inter = width.clamp_(min=0) * height.clamp_(min=0)  # [S, R, C]
    return inter / (row_area + column_area - inter) > threshold


def _resolve_in_order(alive: Tensor, drops: Tensor) -> Tensor:
    """Greedy choice inside a block by its definition, row by row: B steps whatever the data, so no host sync.

    ``alive`` bool [S, B], ``drops`` bool [S, B, B] with i < j only -> bool [S, B].
    """
    keep = alive.clone()  # [S, B]
    for row in range(alive.shape[1] - 1):
        keep[:, row + 1 :] &= ~(drops[:, row, row + 1 :] & keep[:, row : row + 1])
    return keep


def _resolve_fixed_point(alive: Tensor, drops: Tensor) -> Tensor:
    """The same by iteration: greedy NMS is the only fixed point, reached in a few rounds. Looks at the data."""
    keep = alive
    for _ in range(alive.shape[1]):  # each round settles at least one more row
        dropped = (drops & keep[:, :, None]).any(1)  # [S, B]
        new = alive & ~dropped
        if torch.equal(new, keep):
            break
        keep = new
    return keep


def _greedy(boxes: Tensor, alive: Tensor, threshold: float, box_offset: int, resolve: Resolve) -> Tensor:
    """Which of the boxes [S, P, 4], best first, survive among those alive, bool [S, P] -> bool [S, P]."""
    segments, size = alive.shape
    block = max(1, min(256, size, _BLOCK_ELEMENTS // max(1, segments * size)))
    alive = alive.clone()
    for start in range(0, size, block):
        stop = min(start + block, size)
        drops = _overlaps(boxes[:, start:stop], boxes[:, start:], threshold, box_offset)  # [S, B, P - start]
        inside = drops[:, :, : stop - start].triu(1)  # [S, B, B]
        keep = resolve(alive[:, start:stop], inside)  # [S, B]
        alive[:, start:stop] = keep
        if stop < size:
            later = (drops[:, :, stop - start :] & keep[:, :, None]).any(1)  # [S, P - stop]
            alive[:, stop:] &= ~later
    return alive


def nms_padded_reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, box_offset: int
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`nms_padded`. Static shapes, no host sync, bounded memory."""
    dtype = compute_dtype(boxes)
    order = scores.sort(dim=1, descending=True, stable=True).indices  # [S, P]
    ranked = boxes.to(dtype).gather(1, order[:, :, None].expand(-1, -1, 4))  # [S, P, 4]
    present = scores.gather(1, order) != -math.inf  # [S, P]
    threshold = comparison_threshold(iou_threshold, dtype)
    kept = _greedy(ranked, present, threshold, box_offset, _resolve_in_order)  # [S, P]
    place = kept.cumsum(1) - 1  # [S, P]
    # What is dropped, and what is kept beyond max_output, goes to one more column that is cut off again.
    place = torch.where(kept, place.clamp(max=max_output), max_output)  # [S, P]
    keep = order.new_full((boxes.shape[0], max_output + 1), -1).scatter_(1, place, order)  # [S, max_output + 1]
    return keep[:, :max_output].contiguous(), kept.sum(1).clamp(max=max_output)


def _nms_rows(boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    dtype = compute_dtype(boxes)
    order = scores.sort(descending=True, stable=True).indices  # [N]
    alive = torch.ones_like(order, dtype=torch.bool)[None]  # [1, N]
    threshold = comparison_threshold(iou_threshold, dtype)
    ranked = boxes.to(dtype)[order][None]  # [1, N, 4]
    return order[_greedy(ranked, alive, threshold, box_offset, _resolve_fixed_point)[0]]


def nms_reference(boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    """The specification of :func:`nms`."""
    return _nms_rows(boxes, scores, iou_threshold, box_offset)


def batched_nms_reference(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    """The specification of :func:`batched_nms`: one suppression for each group, then all by score."""
    kept = torch.zeros_like(idxs, dtype=torch.bool)  # [N]
    for group in idxs.unique():
        members = (idxs == group).nonzero()[:, 0]  # [n]
        kept[members[_nms_rows(boxes[members], scores[members], iou_threshold, box_offset)]] = True
    order = scores.sort(descending=True, stable=True).indices  # [N]
    return order[kept[order]]


def _for_cpp(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    score_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return boxes.to(compute_dtype(boxes)).contiguous(), scores.to(score_dtype).contiguous()


def _segments_cpp(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, box_offset: int, skip_absent: bool
) -> tuple[Tensor, Tensor]:
    boxes, scores = _for_cpp(boxes, scores)
    segments, size = scores.shape
    keep = torch.empty((segments, max_output), dtype=torch.int64)
    count = torch.empty((segments,), dtype=torch.int64)
    _library.extension().nms_segments(
        boxes.data_ptr(),
        boxes.dtype == torch.float64,
        scores.data_ptr(),
        scores.dtype == torch.float64,
        segments,
        size,
        comparison_threshold(iou_threshold, boxes.dtype),
        box_offset,
        max_output,
        skip_absent,
        keep.data_ptr(),
        count.data_ptr(),
        torch.get_num_threads(),
    )
    return keep, count


def _nms_padded_cpp(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, box_offset: int
) -> tuple[Tensor, Tensor]:
    return _segments_cpp(boxes, scores, iou_threshold, max_output, box_offset, True)


def _nms_cpp(boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    size = scores.shape[0]
    keep, count = _segments_cpp(boxes[None], scores[None], iou_threshold, size, box_offset, False)
    return keep[0, : count[0]].clone()


def _batched_nms_cpp(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    boxes, scores = _for_cpp(boxes, scores)
    idxs = idxs.to(torch.int64).contiguous()
    keep = torch.empty((scores.shape[0],), dtype=torch.int64)
    count = _library.extension().nms_groups(
        boxes.data_ptr(),
        boxes.dtype == torch.float64,
        scores.data_ptr(),
        scores.dtype == torch.float64,
        idxs.data_ptr(),
        scores.shape[0],
        comparison_threshold(iou_threshold, boxes.dtype),
        box_offset,
        keep.data_ptr(),
        torch.get_num_threads(),
    )
    return keep[:count].clone()


def _nms_padded_triton(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, box_offset: int
) -> tuple[Tensor, Tensor]:
    from fastrcnn_kernels.triton import nms as launcher

    threshold = comparison_threshold(iou_threshold, compute_dtype(boxes))
    return launcher.nms_padded(boxes, scores, threshold, max_output, box_offset)


def _nms_triton(boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    from fastrcnn_kernels.triton import nms as launcher

    return launcher.nms(boxes, scores, comparison_threshold(iou_threshold, compute_dtype(boxes)), box_offset)


def _batched_nms_triton(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    from fastrcnn_kernels.triton import nms as launcher

    threshold = comparison_threshold(iou_threshold, compute_dtype(boxes))
    return launcher.batched_nms(boxes, scores, idxs, threshold, box_offset)


def _nms_padded_fake(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, box_offset: int
) -> tuple[Tensor, Tensor]:
    segments = boxes.shape[0]
    return (
        boxes.new_empty((segments, max_output), dtype=torch.int64),
        boxes.new_empty((segments,), dtype=torch.int64),
    )


def _dynamic_fake(boxes: Tensor, *_: object) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


_nms_padded = _library.define(
    "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, SymInt max_output, int box_offset) "
    "-> (Tensor, Tensor)",
    reference=nms_padded_reference,
    fake=_nms_padded_fake,
    cpp=_nms_padded_cpp,
    triton="fastrcnn_kernels.nms:_nms_padded_triton",
)
_nms = _library.define(
    "nms(Tensor boxes, Tensor scores, float iou_threshold, int box_offset) -> Tensor",
    reference=nms_reference,
    fake=_dynamic_fake,
    cpp=_nms_cpp,
    triton="fastrcnn_kernels.nms:_nms_triton",
)
_batched_nms = _library.define(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, int box_offset) -> Tensor",
    reference=batched_nms_reference,
    fake=_dynamic_fake,
    cpp=_batched_nms_cpp,
    triton="fastrcnn_kernels.nms:_batched_nms_triton",
)


def _check(name: str, boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int, dims: int) -> None:
    lead = "N" if dims == 1 else "S, P"
    if boxes.dim() != dims + 1 or boxes.shape[-1] != 4:
        raise ValueError(f"{name}: boxes must be [{lead}, 4], got {list(boxes.shape)}")
    if scores.shape != boxes.shape[:-1]:
        raise ValueError(f"{name}: scores must be [{lead}] as boxes are, got {list(scores.shape)} for boxes "
                         f"{list(boxes.shape)}")  # fmt: skip
    for argument, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {argument} must be floating point, got {tensor.dtype}")
    if scores.device != boxes.device:
        raise ValueError(f"{name}: boxes are on {boxes.device} but scores on {scores.device}")
    if math.isnan(iou_threshold):
        raise ValueError(f"{name}: iou_threshold is NaN")
    if box_offset not in (0, 1):
        raise ValueError(f"{name}: box_offset must be 0 (width x2 - x1) or 1 (inclusive pixels), got {box_offset}")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, box_offset: int = 0) -> Tensor:
    """Drop every box that overlaps a better one by more than ``iou_threshold`` (torchvision's ``nms``).

    Args:
        boxes: float [N, 4], (x1, y1, x2, y2) in any unit and frame. Boxes of no or negative size drop nothing and
            stay, as long as the threshold is not negative.
        scores: float [N]. Ties go to the lower index, NaN counts as the best.
        iou_threshold: a box is dropped if its IoU with a kept box is greater than this.
        box_offset: 0 for width x2 - x1; 1 for maskrcnn-benchmark's inclusive pixels, width x2 - x1 + 1.

    Returns:
        int64 [K]: indices of the boxes kept, in decreasing score. The size depends on the data, so a GPU has to be
        waited for; :func:`nms_padded` is the form for a training step.

    Raises:
        ValueError: for wrong shapes, devices, a NaN threshold or another ``box_offset``.
        TypeError: for boxes or scores that are not floating point.
    """
    _check("nms", boxes, scores, iou_threshold, box_offset, 1)
    return _nms(boxes, scores, iou_threshold, box_offset)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, box_offset: int = 0) -> Tensor:
    """:func:`nms` within each group: boxes of different groups do not drop each other (torchvision's ``batched_nms``).

    Groups are compared as integers. No offset is added to the coordinates to keep groups apart, so the result is the
    same as that of one ``nms`` a group, for boxes of any size and sign.

    Args:
        boxes: float [N, 4], (x1, y1, x2, y2).
        scores: float [N].
        idxs: integer [N]: the group of each box (class, or level); any values.
        iou_threshold: a box is dropped if its IoU with a kept box of its group is greater than this.
        box_offset: 0 for width x2 - x1; 1 for inclusive pixels.

    Returns:
        int64 [K]: indices of the boxes kept in all groups, in decreasing score, ties by lower index.

    Raises:
        ValueError: for wrong shapes, devices, a NaN threshold or another ``box_offset``.
        TypeError: for boxes or scores that are not floating point, or idxs that are not integers.
    """
    _check("batched_nms", boxes, scores, iou_threshold, box_offset, 1)
    if idxs.shape != scores.shape:
        raise ValueError(f"batched_nms: idxs must be [N] as scores are, got {list(idxs.shape)} for scores "
                         f"{list(scores.shape)}")  # fmt: skip
    if idxs.is_floating_point() or idxs.is_complex() or idxs.dtype == torch.bool:
        raise TypeError(f"batched_nms: idxs must be integers, got {idxs.dtype}")
    if idxs.device != boxes.device:
        raise ValueError(f"batched_nms: boxes are on {boxes.device} but idxs on {idxs.device}")
    return _batched_nms(boxes, scores, idxs, iou_threshold, box_offset)


def nms_padded(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, *, box_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`nms` for S independent lists at once, with shapes that do not depend on the data and no host sync.

    Args:
        boxes: float [S, P, 4], (x1, y1, x2, y2): a list for each segment (image and level, say), padded to P.
        scores: float [S, P]. An entry of -inf is absent: it is never kept and drops nothing.
        iou_threshold: a box is dropped if its IoU with a kept box of its segment is greater than this.
        max_output: how many to keep at most, the best first.
        box_offset: 0 for width x2 - x1; 1 for inclusive pixels.

    Returns:
        ``keep`` int64 [S, max_output]: indices into P of the boxes kept, in decreasing score, padded with -1, and
        ``count`` int64 [S]: how many they are.

    Raises:
        ValueError: for wrong shapes, devices, a negative ``max_output``, a NaN threshold or another ``box_offset``.
        TypeError: for boxes or scores that are not floating point.
    """
    _check("nms_padded", boxes, scores, iou_threshold, box_offset, 2)
    if max_output < 0:
        raise ValueError(f"nms_padded: max_output must not be negative, got {max_output}")
    return _nms_padded(boxes, scores, iou_threshold, max_output, box_offset)
