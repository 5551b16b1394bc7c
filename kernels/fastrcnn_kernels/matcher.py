"""Which ground truth each anchor or proposal is matched to: maskrcnn-benchmark's Matcher.

A box takes the ground truth of highest IoU, the first one on a tie. It is kept from ``high_threshold`` on, is -1
(background) below ``low_threshold`` and -2 (ignored) between. With low-quality matches, every box whose IoU with
some ground truth equals that ground truth's best IoU over all boxes gets back *its own* best ground truth, which
need not be that one. A consequence, kept because the published models were trained with it: a ground truth that
overlaps no box has the best IoU 0, and every box with IoU 0 to it then counts as matched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrcnn_kernels.boxes import _at_least_float32, _check_boxes, _check_offset

BELOW_LOW_THRESHOLD = -1
BETWEEN_THRESHOLDS = -2

# Elements of one [N, G, chunk] intermediate, of which three are alive. On a CPU they should stay in the cache,
# elsewhere a launch should be worth its while. It bounds the memory too: 5000 x 250,000 pairs never exist at once.
# Chunks are not narrower than MIN_CHUNK boxes, below which the inner loops are too short to be vectorised.
CPU_CHUNK_ELEMENTS = 1 << 18
CHUNK_ELEMENTS = 1 << 24
MIN_CHUNK = 256


def _usable(boxes: Tensor, box_offset: int) -> tuple[Tensor, Tensor]:
    """Areas, at least the smallest normal number so that no IoU is 0 / 0, and whether the box is finite."""
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    area = (x2 - x1 + box_offset) * (y2 - y1 + box_offset)  # [...]
    return area.clamp(min=torch.finfo(area.dtype).tiny), area.isfinite()


class _Pairs:
    """IoU of all ground truths with a chunk of boxes at a time, bit-equal each time it is computed."""

    def __init__(self, gt_boxes: Tensor, gt_count: Tensor, boxes: Tensor, box_offset: int) -> None:
        num_gts = gt_boxes.shape[1]
        gt_area, gt_finite = _usable(gt_boxes, box_offset)  # [N, G]
        area, finite = _usable(boxes, box_offset)  # [1 or N, A]
        present = torch.arange(num_gts, device=gt_boxes.device) < gt_count.unsqueeze(1)  # [N, G]
        self.valid = present & gt_finite  # [N, G]
        self.box_offset = float(box_offset)
        self.buffers: dict[int, list[Tensor]] = {}
        # Non-finite boxes become empty ones far outside: IoU 0 with everything instead of a NaN that wins every max.
        far = -1e8
        self.gt_area = torch.where(gt_finite, gt_area, 1).unsqueeze(2)  # [N, G, 1]
        self.gt_sides = [side.unsqueeze(2) for side in torch.where(gt_finite[..., None], gt_boxes, far).unbind(-1)]
        self.area = torch.where(finite, area, 1).unsqueeze(1)  # [1 or N, 1, A]
        sides = torch.where(finite.unsqueeze(-1), boxes, far)  # [1 or N, A, 4]
        self.sides = [side.unsqueeze(1) for side in sides.movedim(-1, 0).contiguous()]  # [1 or N, 1, A] each
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


@torch.no_grad()
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

    Args:
        gt_boxes: [N, G, 4], padded; entries from ``gt_count`` on are never matched and never count.
        gt_count: int64 [N], not read on the host.
        boxes: [A, 4], anchors common to all images, or [N, A, 4].
        high_threshold: IoU from which a box is matched.
        low_threshold: IoU below which a box is background; from 0 to ``high_threshold``.
        allow_low_quality_matches: the RPN's rule, see the head of this file.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        int64 [N, A]: index of the ground truth, -1 for background, -2 for ignored. Images without ground truth are
        all background (maskrcnn-benchmark skips such batches). IoUs are float32 (float64 for float64 boxes). A box
        that is not finite has IoU 0 with everything, a ground truth that is not finite is never matched.
    """
    if gt_boxes.dim() != 3 or gt_boxes.shape[-1] != 4:
        raise ValueError(f"gt_boxes must have the shape [N, G, 4], got {list(gt_boxes.shape)}")
    num_images, num_gts = gt_boxes.shape[:2]
    if gt_count.shape != (num_images,):
        raise ValueError(f"gt_count must have the shape [{num_images}], got {list(gt_count.shape)}")
    _check_boxes(boxes)
    _check_offset(box_offset)
    if boxes.dim() not in (2, 3) or (boxes.dim() == 3 and boxes.shape[0] != num_images):
        raise ValueError(f"boxes must have the shape [A, 4] or [{num_images}, A, 4], got {list(boxes.shape)}")
    if not 0 <= low_threshold <= high_threshold:
        raise ValueError(f"0 <= low_threshold <= high_threshold is needed, got {low_threshold} and {high_threshold}")
    num_boxes = boxes.shape[-2]
    if num_images == 0 or num_gts == 0 or num_boxes == 0:
        return gt_count.new_full((num_images, num_boxes), BELOW_LOW_THRESHOLD, dtype=torch.int64)

    gt_boxes, boxes = _at_least_float32(gt_boxes), _at_least_float32(boxes)
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
