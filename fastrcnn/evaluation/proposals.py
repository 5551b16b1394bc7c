"""Average recall of box proposals, as maskrcnn-benchmark's ``evaluate_box_proposals``.

Recall over ground truth, not over images: a proposal covers at most one box and a box is covered by at most one
proposal, chosen greedily by overlap; the average is over IoU thresholds .50:.05:.95. pycocotools' recall differs in
small ways: it matches in the order of the scores and counts a box at the border of two area ranges once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrcnn.evaluation.coco import load_truth
from fastrcnn.evaluation.results import EvaluationError, Results
from fastrcnn.structures import BoxList
from fastrcnn_kernels import box_iou

LIMITS = (100, 1000)
# Square pixels of the annotation's "area", both ends included, as there.
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}


def evaluate_proposals(
    annotations: str | Path | Mapping[str, Any],
    proposals: Sequence[tuple[Any, BoxList]],
    *,
    limits: Sequence[int] = LIMITS,
) -> Results:
    """Average recall of the best proposals of each image, classes aside.

    Args:
        annotations: ground truth in COCO's format, a file or its content. Crowd regions are left out.
        proposals: for each image (image id, BoxList with ``objectness``) in pixels of the original image, any order.
            Ground truth of images that are not listed does not count.
        limits: how many of the best proposals of an image are looked at.

    Returns:
        Task ``box_proposal``: ``AR@100``, ``ARs@100``, ``ARm@100``, ``ARl@100`` and the same for each other limit; -1
        where there is no ground truth of that size.

    Raises:
        EvaluationError: an unknown image, proposals without objectness, or with a coordinate that is not finite.
    """
    truth, name = load_truth(annotations)
    images = {image["id"] for image in truth["images"]}
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    covered: dict[tuple[int, str], list[Tensor]] = {(limit, area): [] for limit in limits for area in AREAS}
    for image_id, found in proposals:
        if image_id not in images:
            raise EvaluationError(f"proposals: image {image_id!r} is not in {name}")
        if found.objectness is None:
            raise EvaluationError(f"image {image_id}: proposals need objectness")
        boxes = found.convert("xyxy").boxes.float()
        if not bool(torch.isfinite(boxes).all()):
            raise EvaluationError(f"image {image_id}: a proposal has a coordinate that is not finite")
        boxes = boxes[found.objectness.argsort(descending=True, stable=True)]
        wanted = by_image.get(image_id, [])
        given = torch.tensor([a["bbox"] for a in wanted], dtype=torch.float32).reshape(-1, 4)
        corners = torch.cat([given[:, :2], given[:, :2] + (given[:, 2:] - 1).clamp(min=0)], dim=1)
        size = torch.tensor([a["area"] for a in wanted], dtype=torch.float64)
        iou = box_iou(boxes, corners, box_offset=1)  # [P, G]
        for (limit, area), lists in covered.items():
            low, high = AREAS[area]
            lists.append(greedy_coverage(iou[:limit, (size >= low) & (size <= high)]))
    stats = {
        f"AR{area}@{limit}": average_recall(torch.cat(lists) if lists else torch.zeros(0))
        for (limit, area), lists in covered.items()
    }
    return Results({"box_proposal": stats})


def greedy_coverage(iou: Tensor) -> Tensor:
    """float [G]: the overlap that each ground truth is covered with, in no particular order.

    The largest overlap of all is taken, its proposal and its ground truth are set aside, and so on.

    Args:
        iou: float [P, G]; not changed.
    """
    count = iou.shape[1]
    coverage = iou.new_zeros(count)
    if iou.numel() == 0:
        return coverage
    left = iou.clone()
    for i in range(min(left.shape)):
        best, proposal = left.max(dim=0)  # [G]
        ground_truth = int(best.argmax())
        coverage[i] = best[ground_truth]
        left[proposal[ground_truth]] = -1
        left[:, ground_truth] = -1
    return coverage


def average_recall(coverage: Tensor) -> float:
    """The mean over the thresholds .50:.05:.95 of the share of ``coverage`` that reaches them; -1 of nothing."""
    if coverage.numel() == 0:
        return -1.0
    thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05, dtype=torch.float32)
    return float((coverage[:, None] >= thresholds).float().mean(dim=0).mean())
