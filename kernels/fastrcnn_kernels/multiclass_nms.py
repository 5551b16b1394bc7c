"""The final detections of an image: suppression within each class, and the best over all classes.

A candidate is a row and a class whose score is *strictly above* ``score_threshold`` (compared in the scores' type).
Its box is clipped, left out if too small, and dropped if its IoU with a better one of its class exceeds
``iou_threshold``, by the arithmetic of ``nms.py``. Results are in decreasing score, ties by lower row, then lower
class. The best ``max_detections`` are kept; ``keep_ties`` also keeps all whose score equals the last one's
(maskrcnn-benchmark's rule; torchvision and detectron2 cut). NaN scores are above no threshold.

mmdetection's ``multiclass_nms``, Caffe2's ``BoxWithNMSLimit``. Computed in float32, in float64 if boxes or scores are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.boxes import clip_boxes_to_image, is_large_enough
from fastrcnn_kernels.nms import comparison_threshold, nms_padded_reference

Detections = tuple[Tensor, Tensor, Tensor, Tensor]
_NO_SIZE = math.nan  # an operator has no optional float: NaN leaves no box out


def _compute_dtype(boxes: Tensor, scores: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def _candidates(
    boxes: Tensor, scores: Tensor, count: Tensor | None, image_sizes: Tensor | None, score_threshold: float,
    min_size: float, background: int, box_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Clipped boxes [N, P, C, 4] and scores [N, P, C], -inf where there is no candidate."""
    dtype = _compute_dtype(boxes, scores)
    _, rows, classes = scores.shape
    boxes = boxes.to(dtype).expand(-1, -1, classes, -1)  # [N, P, C, 4]
    scores = scores.to(dtype)  # [N, P, C]
    if image_sizes is not None:
        boxes = clip_boxes_to_image(boxes.flatten(1, 2), image_sizes, box_offset=box_offset).view_as(boxes)
    present = scores > score_threshold  # [N, P, C]
    if background >= 0:
        present = present & (torch.arange(classes, device=scores.device) != background)
    if count is not None:
        present = present & (torch.arange(rows, device=scores.device) < count[:, None])[..., None]
    if not math.isnan(min_size):
        present = present & is_large_enough(boxes, min_size, box_offset=box_offset)
    return boxes, torch.where(present, scores, -math.inf)


def _best(boxes: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates kept, best first: flat index [N, P * C], its score, and whether it is one."""
    order = torch.where(kept, scores, -math.inf).flatten(1).sort(dim=1, descending=True, stable=True).indices
    kept = kept.flatten(1).gather(1, order)
    # With a threshold of -inf a candidate may score as low as what is absent.
    front = kept.logical_not().to(torch.int8).sort(dim=1, stable=True).indices
    order = order.gather(1, front)
    return order, scores.flatten(1).gather(1, order), kept.gather(1, front)


def _outputs(boxes: Tensor, classes: int, order: Tensor, scores: Tensor, valid: Tensor) -> Detections:
    chosen = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))  # [N, D, 4]
    return (
        torch.where(valid[..., None], chosen, 0),
        torch.where(valid, scores, -math.inf),
        torch.where(valid, order % classes, -1),
        torch.where(valid, order // classes, -1),
    )


def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    """Which candidates are kept: bool [N, P, C]."""
    images, rows, classes = scores.shape
    segments = boxes.transpose(1, 2).reshape(images * classes, rows, 4)  # [N * C, P, 4]
    by_class = scores.transpose(1, 2).reshape(images * classes, rows)  # [N * C, P]
    keep, _ = nms_padded_reference(segments, by_class, iou_threshold, rows, box_offset)  # [N * C, P]
    flags = torch.zeros((images * classes, rows + 1), dtype=torch.bool, device=boxes.device)
    flags = flags.scatter(1, torch.where(keep >= 0, keep, rows), True)[:, :rows]  # [N * C, P]
    return flags.view(images, classes, rows).transpose(1, 2)


def _padded(
    suppress: Any, boxes: Tensor, scores: Tensor, count: Tensor | None, image_sizes: Tensor | None,
    score_threshold: float, iou_threshold: float, max_detections: int, min_size: float, background: int,
    box_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    boxes, scores = _candidates(boxes, scores, count, image_sizes, score_threshold, min_size, background, box_offset)
    classes = scores.shape[2]
    order, best, valid = _best(boxes, scores, suppress(boxes, scores, iou_threshold, box_offset))
    missing = max(0, max_detections - order.shape[1])
    order, best, valid = (torch.nn.functional.pad(t[:, :max_detections], (0, missing)) for t in (order, best, valid))
    if scores.numel() == 0:
        boxes = boxes.new_zeros((boxes.shape[0], 1, 1, 4))
    return (*_outputs(boxes, max(1, classes), order, best, valid), valid.sum(1))


def multiclass_nms_padded_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification of :func:`multiclass_nms_padded`. Static shapes, no host sync."""
    return _padded(_suppress, *arguments)


def _dynamic(
    suppress: Any, boxes: Tensor, scores: Tensor, image_size: Tensor | None, score_threshold: float,
    iou_threshold: float, max_detections: int, keep_ties: bool, min_size: float, background: int, box_offset: int,
) -> Detections:  # fmt: skip
    everything = scores.numel()
    limit = everything if keep_ties or not max_detections else max_detections
    sizes = None if image_size is None else image_size[None]
    *found, count = _padded(
        suppress, boxes[None], scores[None], None, sizes, score_threshold, iou_threshold, limit, min_size, background,
        box_offset,
    )  # fmt: skip
    number = int(count)
    if 0 < max_detections < number:
        number = int((found[1][0, :number] >= found[1][0, max_detections - 1]).sum())
    found_boxes, found_scores, labels, keep = (t[0, :number].clone() for t in found)
    return found_boxes, found_scores, labels, keep


def multiclass_nms_reference(*arguments: Any) -> Detections:
    """The specification of :func:`multiclass_nms`."""
    return _dynamic(_suppress, *arguments)


def _run_cpp(
    boxes: Tensor, scores: Tensor, count: Tensor | None, image_sizes: Tensor | None, score_threshold: float,
    iou_threshold: float, limit: int, capacity: int, ties: bool, padded: bool, min_size: float, background: int,
    box_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _compute_dtype(boxes, scores)
    boxes, scores = boxes.to(dtype).contiguous(), scores.to(dtype).contiguous()
    count = None if count is None else count.to(torch.int64).contiguous()
    image_sizes = None if image_sizes is None else image_sizes.to(torch.int64).contiguous()
    images, rows, classes = scores.shape
    out_boxes = torch.empty((images, capacity, 4), dtype=dtype)
    out_scores = torch.empty((images, capacity), dtype=dtype)
    labels = torch.empty((images, capacity), dtype=torch.int64)
    out_rows = torch.empty((images, capacity), dtype=torch.int64)
    kept = torch.empty((images,), dtype=torch.int64)
    _library.extension().multiclass_nms(
        boxes.data_ptr(),
        dtype == torch.float64,
        scores.data_ptr(),
        0 if count is None else count.data_ptr(),
        0 if image_sizes is None else image_sizes.data_ptr(),
        images,
        rows,
        classes,
        boxes.shape[2],
        background,
        score_threshold,
        comparison_threshold(iou_threshold, dtype),
        min_size,
        box_offset,
        limit,
        capacity,
        ties,
        padded,
        out_boxes.data_ptr(),
        out_scores.data_ptr(),
        labels.data_ptr(),
        out_rows.data_ptr(),
        kept.data_ptr(),
        torch.get_num_threads(),
    )
    return out_boxes, out_scores, labels, out_rows, kept


def _multiclass_nms_padded_cpp(
    boxes: Tensor, scores: Tensor, count: Tensor | None, image_sizes: Tensor | None, score_threshold: float,
    iou_threshold: float, max_detections: int, min_size: float, background: int, box_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _run_cpp(
        boxes, scores, count, image_sizes, score_threshold, iou_threshold, max_detections, max_detections, False, True,
        min_size, background, box_offset,
    )  # fmt: skip


def _multiclass_nms_cpp(
    boxes: Tensor, scores: Tensor, image_size: Tensor | None, score_threshold: float, iou_threshold: float,
    max_detections: int, keep_ties: bool, min_size: float, background: int, box_offset: int,
) -> Detections:  # fmt: skip
    everything = scores.numel()
    limit = max_detections or everything
    # Nothing is written behind what is kept, so the pages of a large buffer stay untouched.
    capacity = everything if keep_ties else min(limit, everything)
    sizes = None if image_size is None else image_size[None]
    *found, kept = _run_cpp(
        boxes[None], scores[None], None, sizes, score_threshold, iou_threshold, limit, capacity, keep_ties, False,
        min_size, background, box_offset,
    )  # fmt: skip
    number = int(kept)
    found_boxes, found_scores, labels, keep = (t[0, :number].clone() for t in found)
    return found_boxes, found_scores, labels, keep


def _suppress_triton(boxes: Tensor, scores: Tensor, iou_threshold: float, box_offset: int) -> Tensor:
    from fastrcnn_kernels.triton import nms as launcher

    return launcher.class_nms(boxes, scores, comparison_threshold(iou_threshold, boxes.dtype), box_offset)


def _multiclass_nms_padded_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _padded(_suppress_triton, *arguments)


def _multiclass_nms_triton(*arguments: Any) -> Detections:
    return _dynamic(_suppress_triton, *arguments)


def _fake_padded(boxes: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, capacity, dtype = scores.shape[0], rest[4], _compute_dtype(boxes, scores)
    return (
        scores.new_empty((images, capacity, 4), dtype=dtype),
        scores.new_empty((images, capacity), dtype=dtype),
        scores.new_empty((images, capacity), dtype=torch.int64),
        scores.new_empty((images, capacity), dtype=torch.int64),
        scores.new_empty((images,), dtype=torch.int64),
    )


def _fake(boxes: Tensor, scores: Tensor, *_: Any) -> Detections:
    number, dtype = torch.library.get_ctx().new_dynamic_size(), _compute_dtype(boxes, scores)
    return (
        scores.new_empty((number, 4), dtype=dtype),
        scores.new_empty((number,), dtype=dtype),
        scores.new_empty((number,), dtype=torch.int64),
        scores.new_empty((number,), dtype=torch.int64),
    )


_multiclass_nms_padded = _library.define(
    "multiclass_nms_padded(Tensor boxes, Tensor scores, Tensor? count, Tensor? image_sizes, float score_threshold, "
    "float iou_threshold, SymInt max_detections, float min_size, int background, int box_offset) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=multiclass_nms_padded_reference,
    fake=_fake_padded,
    cpp=_multiclass_nms_padded_cpp,
    triton="fastrcnn_kernels.multiclass_nms:_multiclass_nms_padded_triton",
)
_multiclass_nms = _library.define(
    "multiclass_nms(Tensor boxes, Tensor scores, Tensor? image_size, float score_threshold, float iou_threshold, "
    "int max_detections, bool keep_ties, float min_size, int background, int box_offset) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=multiclass_nms_reference,
    fake=_fake,
    cpp=_multiclass_nms_cpp,
    triton="fastrcnn_kernels.multiclass_nms:_multiclass_nms_triton",
)


def _check(name: str, boxes: Tensor, scores: Tensor, dims: int, iou_threshold: float, box_offset: int) -> Tensor:
    """Boxes as [..., P, C or 1, 4]."""
    lead = "P, C" if dims == 2 else "N, P, C"
    if scores.dim() != dims:
        raise ValueError(f"{name}: scores must be [{lead}], got {list(scores.shape)}")
    for argument, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {argument} must be floating point, got {tensor.dtype}")
    if boxes.device != scores.device:
        raise ValueError(f"{name}: boxes are on {boxes.device} but scores on {scores.device}")
    classes = scores.shape[-1]
    if boxes.dim() == dims and boxes.shape[-1] in (4, 4 * classes):
        boxes = boxes.unflatten(-1, (boxes.shape[-1] // 4, 4))
    if boxes.dim() != dims + 1 or boxes.shape[:-2] != scores.shape[:-1] or tuple(boxes.shape[-2:]) not in (
        (1, 4), (classes, 4)
    ):  # fmt: skip
        raise ValueError(f"{name}: boxes must be [{lead}, 4], [{lead} * 4] or, for all classes, [{lead[:-3]}, 4] for "
                         f"scores {list(scores.shape)}, got {list(boxes.shape)}")  # fmt: skip
    if math.isnan(iou_threshold):
        raise ValueError(f"{name}: iou_threshold is NaN")
    if box_offset not in (0, 1):
        raise ValueError(f"{name}: box_offset must be 0 (width x2 - x1) or 1 (inclusive pixels), got {box_offset}")
    return boxes


def multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int = 0,
    *,
    image_size: Tensor | None = None,
    min_size: float | None = None,
    background: int = -1,
    keep_ties: bool = False,
    box_offset: int = 0,
) -> Detections:
    """Detections of one image from the boxes and scores of all classes.

    Args:
        boxes: float [P, C * 4] or [P, C, 4], (x1, y1, x2, y2) in pixels, a box for each class; [P, 4] for one box for
            all classes.
        scores: float [P, C].
        score_threshold: candidates have a score above this.
        iou_threshold: a box is dropped if its IoU with a better one of its class is greater than this.
        max_detections: how many to keep, the best first; 0 for all.
        image_size: integers [2], (height, width) that boxes are clipped to; None: they are not.
        min_size: the shortest side of a box after clipping, in pixels; None: any.
        background: a column of ``scores`` that is no class; -1 for none.
        keep_ties: keep more than ``max_detections`` where their scores equal the last one's.
        box_offset: 0 for width x2 - x1; 1 for inclusive pixels.

    Returns:
        ``boxes`` [K, 4] (clipped), ``scores`` [K], ``labels`` int64 [K] (columns of ``scores``) and ``rows`` int64 [K]
        (rows of ``boxes``), in decreasing score. Waits for the GPU; :func:`multiclass_nms_padded` does not.

    Raises:
        ValueError: for wrong shapes, devices, a NaN threshold or another ``box_offset``.
        TypeError: for boxes or scores that are not floating point.
    """
    boxes = _check("multiclass_nms", boxes, scores, 2, iou_threshold, box_offset)
    if max_detections < 0:
        raise ValueError(f"multiclass_nms: max_detections must not be negative, got {max_detections}")
    smallest = _NO_SIZE if min_size is None else float(min_size)
    return _multiclass_nms(
        boxes, scores, image_size, score_threshold, iou_threshold, max_detections, keep_ties, smallest, background,
        box_offset,
    )  # fmt: skip


def multiclass_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    *,
    count: Tensor | None = None,
    image_sizes: Tensor | None = None,
    min_size: float | None = None,
    background: int = -1,
    box_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`multiclass_nms` for a batch, with shapes that do not depend on the data and no host sync.

    Args:
        boxes: float [N, P, C * 4], [N, P, C, 4], or [N, P, 4] for one box for all classes.
        scores: float [N, P, C].
        max_detections: how many an image has room for, the best first; ties beyond it are cut.
        count: integers [N]: how many of the P rows are real; None: all.
        image_sizes: integers [N, 2], (height, width); None: boxes are not clipped.
        score_threshold, iou_threshold, min_size, background, box_offset: as in :func:`multiclass_nms`.

    Returns:
        ``boxes`` [N, D, 4], ``scores`` [N, D], ``labels`` and ``rows`` int64 [N, D], ``count`` int64 [N]; behind the
        real ones zeros, -inf, -1 and -1. D = ``max_detections``.

    Raises:
        ValueError, TypeError: as :func:`multiclass_nms`.
    """
    boxes = _check("multiclass_nms_padded", boxes, scores, 3, iou_threshold, box_offset)
    if max_detections < 0:
        raise ValueError(f"multiclass_nms_padded: max_detections must not be negative, got {max_detections}")
    smallest = _NO_SIZE if min_size is None else float(min_size)
    return _multiclass_nms_padded(
        boxes, scores, count, image_sizes, score_threshold, iou_threshold, max_detections, smallest, background,
        box_offset,
    )  # fmt: skip
