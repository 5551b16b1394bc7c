"""The specification of the matcher: vectorised PyTorch, a chunk of boxes at a time. The rule is in ``matcher.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn_kernels.anchors import anchors_inside_image, grid_anchors_reference

BELOW_LOW_THRESHOLD = -1
BETWEEN_THRESHOLDS = -2
FAR = 1e8

# Elements of one [N, G, chunk] intermediate, of which three are alive. On a CPU they should stay in the cache,
# elsewhere a launch should be worth its while. It bounds the memory too: 5000 x 250,000 pairs never exist at once.
# Chunks are not narrower than MIN_CHUNK boxes, below which the inner loops are too short to be vectorised.
CPU_CHUNK_ELEMENTS = 1 << 18
CHUNK_ELEMENTS = 1 << 24
MIN_CHUNK = 256


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that IoUs are computed in: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _usable(boxes: Tensor, box_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sides with those of boxes that are not finite turned inside out, areas, and which boxes are finite.

    A box from FAR to -FAR intersects no other, wherever that is: IoU 0, where a NaN would win every maximum. Areas
    are at least the smallest normal number, so that no IoU is 0 / 0.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    area = (x2 - x1 + box_offset) * (y2 - y1 + box_offset)  # [...]
    # A coordinate that is not finite leaves no finite area.
    finite = area.isfinite()  # [...]
    sides = torch.stack(
        [
            torch.where(finite, x1, FAR),
            torch.where(finite, y1, FAR),
            torch.where(finite, x2, -FAR),
            torch.where(finite, y2, -FAR),
        ]
    )  # [4, ...]
    return sides, torch.where(finite, area, 1).clamp(min=torch.finfo(boxes.dtype).tiny), finite


class _Pairs:
    """IoU of all ground truths with a chunk of boxes at a time, bit-equal each time it is computed."""

    def __init__(self, gt_boxes: Tensor, gt_count: Tensor, boxes: Tensor, box_offset: int) -> None:
        num_gts = gt_boxes.shape[1]
        gt_sides, gt_area, gt_finite = _usable(gt_boxes, box_offset)  # [4, N, G], [N, G], [N, G]
        sides, area, _ = _usable(boxes, box_offset)  # [4, 1 or N, A], [1 or N, A], [1 or N, A]
        present = torch.arange(num_gts, device=gt_boxes.device) < gt_count.unsqueeze(1)  # [N, G]
        self.valid = present & gt_finite  # [N, G]
        self.box_offset = float(box_offset)
        self.buffers: dict[int, list[Tensor]] = {}
        self.gt_area = gt_area.unsqueeze(2)  # [N, G, 1]
        self.gt_sides = gt_sides.unsqueeze(3).unbind()  # [N, G, 1] each
        self.area = area.unsqueeze(1)  # [1 or N, 1, A]
        self.sides = sides.unsqueeze(2).unbind()  # [1 or N, 1, A] each
        # Added to the IoU: 0 is exact for the valid, and -2 puts the others below every valid IoU and every threshold.
        self.penalty = torch.where(self.valid, 0.0, -2.0).to(gt_boxes.dtype).unsqueeze(2)  # [N, G, 1]

    def iou(self, start: int, stop: int) -> Tensor:
        """[N, G, stop - start], overwritten by the next call; negative for ground truths that are not valid."""
        gt_x1, gt_y1, gt_x2, gt_y2 = self.gt_sides  # [N, G, 1] each
        x1, y1, x2, y2 = (side[..., start:stop] for side in self.sides)  # [1 or N, 1, T] each
        width, height, scratch = self._buffers(stop - start)  # [N, G, T] each
        torch.minimum(gt_x2, x2, out=width).sub_(torch.maximum(gt_x1, x1, out=scratch))
        torch.minimum(gt_y2, y2, out=height).sub_(torch.maximum(gt_y1, y1, out=scratch))
        if self.box_offset:
            width.add_(self.box_offset)
            height.add_(self.box_offset)
        intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
        union = torch.add(self.gt_area, self.area[..., start:stop], out=scratch).sub_(intersection)
        return intersection.div_(union).add_(self.penalty)

    def _buffers(self, size: int) -> list[Tensor]:
        # Allocated once a size (at most two occur): fresh memory for each operation costs more than the operation.
        if size not in self.buffers:
            num_images, num_gts = self.valid.shape
            self.buffers[size] = [self.penalty.new_empty(num_images, num_gts, size) for _ in range(3)]
        return self.buffers[size]


def match_boxes_reference(
    gt_boxes: Tensor,
    gt_count: Tensor,
    boxes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    box_offset: int,
) -> Tensor:
    """The specification of :func:`fastrcnn_kernels.match_boxes`."""
    num_images, num_gts = gt_boxes.shape[:2]
    num_boxes = boxes.shape[-2]
    if num_images == 0 or num_gts == 0 or num_boxes == 0:
        return gt_count.new_full((num_images, num_boxes), BELOW_LOW_THRESHOLD, dtype=torch.int64)
    dtype = compute_dtype(gt_boxes, boxes)
    gt_boxes, boxes = gt_boxes.to(dtype), boxes.to(dtype)
    pairs = _Pairs(gt_boxes, gt_count, boxes if boxes.dim() == 3 else boxes.unsqueeze(0), box_offset)
    elements = CPU_CHUNK_ELEMENTS if boxes.device.type == "cpu" else CHUNK_ELEMENTS
    chunk = max(MIN_CHUNK, elements // (num_images * num_gts))
    starts = range(0, num_boxes, chunk)

    best_of_box, own_gt, best_of_gt = [], [], gt_boxes.new_full((num_images, num_gts), -math.inf)
    for start in starts:
        iou = pairs.iou(start, min(start + chunk, num_boxes))  # [N, G, T]
        best, gt = iou.max(dim=1)  # [N, T]: the first maximum
        best_of_box.append(best)
        own_gt.append(gt)
        if allow_low_quality_matches:
            best_of_gt = torch.maximum(best_of_gt, iou.amax(dim=2))  # [N, G]
    best, matched = torch.cat(best_of_box, dim=1), torch.cat(own_gt, dim=1)  # [N, A]

    keep = best >= high_threshold  # [N, A]
    if allow_low_quality_matches:
        # The largest difference to a row maximum is 0 exactly where the box ties one: cheaper than == and any.
        target = torch.where(pairs.valid, best_of_gt, math.inf).unsqueeze(2)  # [N, G, 1]
        ties = [pairs.iou(start, min(start + chunk, num_boxes)).sub_(target).amax(dim=1) >= 0 for start in starts]
        keep = keep | torch.cat(ties, dim=1)  # [N, A]
    unmatched = torch.where(best < low_threshold, BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS)  # [N, A]
    return torch.where(keep, matched, unmatched)  # [N, A]


def write_anchors(
    cells: Sequence[Tensor], grid_sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The anchors of all levels, [A, 4]; half types are cast up before anything is computed."""
    grids = [
        grid_anchors_reference([cell], grid_sizes[2 * level : 2 * level + 2], strides[level : level + 1])
        for level, cell in enumerate(cells)
    ]
    return torch.cat(grids).to(dtype)


def match_anchors_reference(
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
    """The specification of :func:`fastrcnn_kernels.match_anchors`; ``grid_sizes`` is height, width of each level."""
    anchors = write_anchors(cells, grid_sizes, strides, compute_dtype(gt_boxes, *cells))  # [A, 4]
    matched = match_boxes_reference(
        gt_boxes, gt_count, anchors, high_threshold, low_threshold, allow_low_quality_matches, box_offset
    )  # [N, A]
    inside = anchors_inside_image(anchors, image_sizes, straddle_thresh)  # [N, A]
    return torch.where(inside, matched, BETWEEN_THRESHOLDS)  # [N, A]
