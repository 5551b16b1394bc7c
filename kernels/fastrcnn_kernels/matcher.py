"""Which ground truth each anchor or proposal is matched to: maskrcnn-benchmark's Matcher.

A box takes the ground truth of highest IoU, the first one on a tie. It is kept from ``high_threshold`` on, is -1
(background) below ``low_threshold`` and -2 (ignored) between. With low-quality matches, every box whose IoU with
some ground truth equals that ground truth's best IoU over all boxes gets back *its own* best ground truth, which
need not be that one. A consequence, kept because the published models were trained with it: a ground truth that
overlaps no box has the best IoU 0, and every box with IoU 0 to it then counts as matched.

The arithmetic is pinned, and every implementation gives the same integers::

    area  = max((x2 - x1 + o) * (y2 - y1 + o), smallest normal number)          o = box_offset
    inter = max(min(x2) - max(x1) + o, 0) * max(min(y2) - max(y1) + o, 0)
    iou   = inter / ((area_gt + area_box) - inter)

Each operation is rounded to float32 (float64 if any input is float64) and no product is fused into a sum; thresholds
are rounded to the same type. What is exactly equal is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.anchors import anchors_inside_image
from fastrcnn_kernels.boxes import _check_boxes, _check_offset
from fastrcnn_kernels.matcher_reference import (
    BETWEEN_THRESHOLDS,
    compute_dtype,
    match_anchors_reference,
    match_boxes_reference,
    write_anchors,
)


def _rounds_otherwise(cells: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether anchors of these cells, computed in ``dtype``, are not those that ``grid_anchors`` gives."""
    return dtype == torch.float64 and any(cell.dtype != dtype for cell in cells)


def _match_written_out(
    match: Callable[..., Tensor],
    gt_boxes: Tensor,
    gt_count: Tensor,
    cells: Sequence[Tensor],
    grid_sizes: Sequence[int],
    strides: Sequence[int],
    image_sizes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    straddle_thresh: float,
    box_offset: int,
) -> Tensor:
    """``match`` of anchors in memory, for what the kernels do not compute from the index."""
    anchors = write_anchors(cells, grid_sizes, strides, compute_dtype(gt_boxes, *cells))
    matched = match(gt_boxes, gt_count, anchors, high_threshold, low_threshold, allow_low_quality_matches, box_offset)
    return torch.where(anchors_inside_image(anchors, image_sizes, straddle_thresh), matched, BETWEEN_THRESHOLDS)


def _for_cpp(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _match_boxes_cpp(
    gt_boxes: Tensor,
    gt_count: Tensor,
    boxes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    box_offset: int,
) -> Tensor:
    dtype = compute_dtype(gt_boxes, boxes)
    gt_boxes, gt_count, boxes = _for_cpp(gt_boxes, dtype), _for_cpp(gt_count, torch.int64), _for_cpp(boxes, dtype)
    num_images, num_boxes = gt_boxes.shape[0], boxes.shape[-2]
    matched = torch.empty((num_images, num_boxes), dtype=torch.int64)
    if matched.numel():
        _library.extension().match_boxes(
            gt_boxes.data_ptr(),
            gt_count.data_ptr(),
            boxes.data_ptr(),
            dtype == torch.float64,
            num_images,
            gt_boxes.shape[1],
            num_boxes,
            boxes.dim() == 3,
            high_threshold,
            low_threshold,
            allow_low_quality_matches,
            box_offset,
            matched.data_ptr(),
            torch.get_num_threads(),
        )
    return matched


def _match_anchors_cpp(
    gt_boxes: Tensor,
    gt_count: Tensor,
    cells: Sequence[Tensor],
    grid_sizes: Sequence[int],
    strides: Sequence[int],
    image_sizes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    straddle_thresh: float,
    box_offset: int,
) -> Tensor:
    dtype = compute_dtype(gt_boxes, *cells)
    if _rounds_otherwise(cells, dtype):
        return _match_written_out(
            _match_boxes_cpp, gt_boxes, gt_count, cells, grid_sizes, strides, image_sizes, high_threshold,
            low_threshold, allow_low_quality_matches, straddle_thresh, box_offset,
        )  # fmt: skip
    gt_boxes, gt_count = _for_cpp(gt_boxes, dtype), _for_cpp(gt_count, torch.int64)
    image_sizes = _for_cpp(image_sizes, torch.int64)
    level_cells = [_for_cpp(cell, dtype) for cell in cells]
    matched = torch.empty((gt_boxes.shape[0], _num_anchors(cells, grid_sizes)), dtype=torch.int64)
    if matched.numel():
        _library.extension().match_anchors(
            gt_boxes.data_ptr(),
            gt_count.data_ptr(),
            [cell.data_ptr() for cell in level_cells],
            [cell.shape[0] for cell in level_cells],
            list(grid_sizes),
            list(strides),
            image_sizes.data_ptr(),
            dtype == torch.float64,
            gt_boxes.shape[0],
            gt_boxes.shape[1],
            high_threshold,
            low_threshold,
            allow_low_quality_matches,
            straddle_thresh,
            box_offset,
            matched.data_ptr(),
            torch.get_num_threads(),
        )
    return matched


def _match_boxes_triton(
    gt_boxes: Tensor,
    gt_count: Tensor,
    boxes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    box_offset: int,
) -> Tensor:
    from fastrcnn_kernels.triton import matcher as launcher

    dtype = compute_dtype(gt_boxes, boxes)
    return launcher.match_boxes(
        gt_boxes.to(dtype),
        gt_count,
        boxes.to(dtype),
        high_threshold,
        low_threshold,
        allow_low_quality_matches,
        box_offset,
    )


def _match_anchors_triton(
    gt_boxes: Tensor,
    gt_count: Tensor,
    cells: Sequence[Tensor],
    grid_sizes: Sequence[int],
    strides: Sequence[int],
    image_sizes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    straddle_thresh: float,
    box_offset: int,
) -> Tensor:
    from fastrcnn_kernels.triton import matcher as launcher

    dtype = compute_dtype(gt_boxes, *cells)
    if _rounds_otherwise(cells, dtype) or len(cells) > launcher.MAX_LEVELS:
        return _match_written_out(
            _match_boxes_triton, gt_boxes, gt_count, cells, grid_sizes, strides, image_sizes, high_threshold,
            low_threshold, allow_low_quality_matches, straddle_thresh, box_offset,
        )  # fmt: skip
    return launcher.match_anchors(
        gt_boxes.to(dtype),
        gt_count,
        [cell.to(dtype) for cell in cells],
        list(grid_sizes),
        list(strides),
        image_sizes,
        high_threshold,
        low_threshold,
        allow_low_quality_matches,
        straddle_thresh,
        box_offset,
    )


def _match_boxes_fake(gt_boxes: Tensor, gt_count: Tensor, boxes: Tensor, *_: object) -> Tensor:
    return gt_boxes.new_empty((gt_boxes.shape[0], boxes.shape[-2]), dtype=torch.int64)


def _match_anchors_fake(
    gt_boxes: Tensor, gt_count: Tensor, cells: Sequence[Tensor], grid_sizes: Sequence[int], *_: object
) -> Tensor:
    return gt_boxes.new_empty((gt_boxes.shape[0], _num_anchors(cells, grid_sizes)), dtype=torch.int64)


def _num_anchors(cells: Sequence[Tensor], grid_sizes: Sequence[int]) -> int:
    return sum(
        height * width * cell.shape[0]
        for cell, height, width in zip(cells, grid_sizes[::2], grid_sizes[1::2], strict=True)
    )


_match_boxes = _library.define(
    "match_boxes(Tensor gt_boxes, Tensor gt_count, Tensor boxes, float high_threshold, float low_threshold, "
    "bool allow_low_quality_matches, int box_offset) -> Tensor",
    reference=match_boxes_reference,
    fake=_match_boxes_fake,
    cpp=_match_boxes_cpp,
    triton="fastrcnn_kernels.matcher:_match_boxes_triton",
)
_match_anchors = _library.define(
    "match_anchors(Tensor gt_boxes, Tensor gt_count, Tensor[] cells, SymInt[] grid_sizes, int[] strides, "
    "Tensor image_sizes, float high_threshold, float low_threshold, bool allow_low_quality_matches, "
    "float straddle_thresh, int box_offset) -> Tensor",
    reference=match_anchors_reference,
    fake=_match_anchors_fake,
    cpp=_match_anchors_cpp,
    triton="fastrcnn_kernels.matcher:_match_anchors_triton",
)


def _check(gt_boxes: Tensor, gt_count: Tensor, high_threshold: float, low_threshold: float, box_offset: int) -> None:
    if gt_boxes.dim() != 3 or gt_boxes.shape[-1] != 4:
        raise ValueError(f"gt_boxes must have the shape [N, G, 4], got {list(gt_boxes.shape)}")
    if gt_count.shape != gt_boxes.shape[:1]:
        raise ValueError(f"gt_count must have the shape [{gt_boxes.shape[0]}], got {list(gt_count.shape)}")
    _check_offset(box_offset)
    if not 0 <= low_threshold <= high_threshold:
        raise ValueError(f"0 <= low_threshold <= high_threshold is needed, got {low_threshold} and {high_threshold}")


def match_boxes(
    gt_boxes: Tensor,
    gt_count: Tensor,
    boxes: Tensor,
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    box_offset: int = 0,
) -> Tensor:
    """Match every box of every image to a ground truth of that image.

    The IoU matrix is never stored: memory grows with the number of boxes plus the number of ground truths.

    Args:
        gt_boxes: [N, G, 4], padded; entries from ``gt_count`` on are never matched and never count.
        gt_count: integer [N], not read on the host.
        boxes: [A, 4], anchors common to all images, or [N, A, 4].
        high_threshold: IoU from which a box is matched.
        low_threshold: IoU below which a box is background; from 0 to ``high_threshold``.
        allow_low_quality_matches: the RPN's rule, see the head of this file.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        int64 [N, A]: index of the ground truth, -1 for background, -2 for ignored. Images without ground truth are
        all background (maskrcnn-benchmark skips such batches). A box whose coordinates or area are not finite has
        IoU 0 with everything, such a ground truth is never matched.

    Raises:
        ValueError: for wrong shapes, thresholds or another ``box_offset``.
    """
    _check(gt_boxes, gt_count, high_threshold, low_threshold, box_offset)
    _check_boxes(boxes)
    num_images = gt_boxes.shape[0]
    if boxes.dim() not in (2, 3) or (boxes.dim() == 3 and boxes.shape[0] != num_images):
        raise ValueError(f"boxes must have the shape [A, 4] or [{num_images}, A, 4], got {list(boxes.shape)}")
    return _match_boxes(gt_boxes, gt_count, boxes, high_threshold, low_threshold, allow_low_quality_matches, box_offset)


def match_anchors(
    gt_boxes: Tensor,
    gt_count: Tensor,
    cells: Sequence[Tensor],
    grid_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    image_sizes: Tensor,
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = True,
    straddle_thresh: float = 0,
    box_offset: int = 0,
) -> Tensor:
    """:func:`match_boxes` of the anchors of a pyramid, each computed from its index and never read from memory.

    Equal, integer for integer, to ``match_boxes`` of ``grid_anchors`` of all levels, with the anchors that
    ``anchors_inside_image`` excludes set to -2 afterwards: they take no part in training, but they take part in the
    matching (an excluded anchor can be the best of a ground truth), as in maskrcnn-benchmark.

    Args:
        gt_boxes: [N, G, 4], padded.
        gt_count: integer [N], not read on the host.
        cells: for each level [A_l, 4], from ``cell_anchors``.
        grid_sizes: for each level (height, width) of the feature map.
        strides: for each level the pixels between neighbouring feature-map pixels.
        image_sizes: integer [N, 2], (height, width) before padding; not read on the host.
        high_threshold, low_threshold, allow_low_quality_matches, box_offset: as in ``match_boxes``.
        straddle_thresh: pixels by which an anchor may stick out of the image; negative: all take part.

    Returns:
        int64 [N, A]: index of the ground truth, -1 for background, -2 for ignored. A counts the anchors of all levels
        in their order, each in the order (y, x, anchor of the cell).

    Raises:
        ValueError: for wrong shapes, thresholds or another ``box_offset``.
    """
    _check(gt_boxes, gt_count, high_threshold, low_threshold, box_offset)
    if not len(cells) == len(grid_sizes) == len(strides) or not cells:
        raise ValueError(
            f"cells, grid_sizes and strides must have an entry a level, "
            f"got {len(cells)}, {len(grid_sizes)} and {len(strides)}"
        )
    for cell in cells:
        if cell.dim() != 2 or cell.shape[1] != 4:
            raise ValueError(f"cells must have the shape [A, 4] each, got {list(cell.shape)}")
    if image_sizes.shape != (gt_boxes.shape[0], 2):
        raise ValueError(f"image_sizes must have the shape [{gt_boxes.shape[0]}, 2], got {list(image_sizes.shape)}")
    sizes = [extent for size in grid_sizes for extent in size]
    return _match_anchors(
        gt_boxes,
        gt_count,
        list(cells),
        sizes,
        list(strides),
        image_sizes,
        high_threshold,
        low_threshold,
        allow_low_quality_matches,
        straddle_thresh,
        box_offset,
    )
