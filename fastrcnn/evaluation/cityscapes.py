"""Average precision of instances by Cityscapes' rules (``evalInstanceLevelSemanticLabeling`` of its scripts).

It differs from COCO's: a detection is matched to whatever ground truth it overlaps by *more than* the threshold; of
several on one ground truth the best is right and the others are wrong; ground truth of fewer than 100 pixels is
ignored, as are void pixels and groups; the curve is integrated by its own rule.

maskrcnn-benchmark evaluates boxes by the same rules, and so does this. Of what it does otherwise nothing is kept: it
matches detections to ground truth of any class, leaves out the last row and column of each mask, and ignores no void.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastrcnn.evaluation.results import EvaluationError, Results
from fastrcnn.structures import BoxList

Array = NDArray[Any]
Rle = Mapping[str, Any]

OVERLAPS = np.arange(0.5, 1.0, 0.05)
MIN_SIZE = 100


@dataclass(frozen=True)
class CityscapesImage:
    """Ground truth and detections of one image, in its original frame.

    Attributes:
        labels: int [g], of the instances.
        masks: RLE of each instance. boxes: float [g, 4], inclusive pixels.
        found: detections with labels and scores.
        found_masks: RLE of each detection; None from a model without masks.
        ignored: for each label an RLE of the pixels where a detection is neither right nor wrong.
    """

    labels: Array
    masks: Sequence[Rle]
    boxes: Array
    found: BoxList
    found_masks: Sequence[Rle] | None
    ignored: Mapping[int, Rle] = field(default_factory=dict)


@dataclass(frozen=True)
class Overlaps:
    """Sizes and overlaps of one class in one image, in pixels.

    Attributes:
        truth: [g] and found: [d], sizes. common: [g, d], intersections.
        ignored: [d], intersection with what is ignored. scores: float [d].
    """

    truth: Array
    found: Array
    common: Array
    ignored: Array
    scores: Array


def evaluate_cityscapes(
    images: Sequence[CityscapesImage], class_names: Sequence[str], evaluated: Sequence[int]
) -> Results:
    """Average precision of boxes and, where the detections have them, masks.

    Args:
        class_names: by label, ``__background__`` first.
        evaluated: the labels that count.

    Returns:
        Tasks ``bbox`` and ``segm`` with ``AP`` (mean over the overlaps .50:.05:.95 and the classes with ground truth),
        ``AP50``, ``AP75``; -1 without ground truth. Boxes are truncated to whole pixels and measure x2 - x1, as in
        maskrcnn-benchmark.

    Raises:
        EvaluationError: detections without labels or scores, a score or box that is not finite, or another number of
            masks than of boxes.
    """
    for number, image in enumerate(images):
        _check(number, image)
    with_masks = bool(images) and all(image.found_masks is not None for image in images)
    measures: dict[str, Callable[[CityscapesImage, int], Overlaps]] = {"bbox": box_overlaps}
    if with_masks:
        measures["segm"] = mask_overlaps
    stats: dict[str, dict[str, float]] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    for kind, measure in measures.items():
        ap = np.full((len(evaluated), len(OVERLAPS)), np.nan)
        for row, label in enumerate(evaluated):
            overlaps = [measure(image, label) for image in images]
            ap[row] = [average_precision(overlaps, threshold) for threshold in OVERLAPS]
        stats[kind] = {"AP": _mean(ap), "AP50": _mean(ap[:, 0]), "AP75": _mean(ap[:, 5])}
        means = {class_names[label]: float(ap[row].mean()) for row, label in enumerate(evaluated)}
        per_class[kind] = {name: None if np.isnan(mean) else mean for name, mean in means.items()}
    return Results(stats, per_class)


def average_precision(images: Sequence[Overlaps], threshold: float) -> float:
    """Of one class at one overlap; NaN where there is no ground truth that counts."""
    right: list[float] = []  # scores of the detections that are right, and of those that are wrong
    wrong: list[float] = []
    missed = instances = detections = 0
    for one in images:
        counts = one.truth >= MIN_SIZE  # [g]
        instances += int(counts.sum())
        detections += len(one.scores)
        union = one.truth[:, None] + one.found[None, :] - one.common
        hit = (one.common > threshold * union) & counts[:, None]  # [g, d]
        for row in hit:
            if counts.any() and row.any():
                scores = np.sort(one.scores[row])
                right.append(scores[-1])
                wrong += scores[:-1].tolist()
        missed += int((counts & ~hit.any(axis=1)).sum())
        ignored = one.ignored + one.common[~counts].sum(axis=0)
        wrong += one.scores[~hit.any(axis=0) & (ignored <= threshold * one.found)].tolist()
    if instances == 0:
        return float("nan")
    return integrate(np.array(right), np.array(wrong), missed) if detections else 0.0


def integrate(right: Array, wrong: Array, missed: int) -> float:
    """The area under precision over recall, by the central differences of the recall.

    The curve has a point for each score at which it changes, from the lowest on, and ends in recall 0, precision 1.
    """
    if len(right) + len(wrong) == 0:
        return 0.0
    scores = np.unique(np.concatenate([right, wrong]))  # ascending
    true = len(right) - np.searchsorted(np.sort(right), scores, side="left")  # with at least that score
    false = len(wrong) - np.searchsorted(np.sort(wrong), scores, side="left")
    found = len(right) + missed
    precision = np.append(true / (true + false), 1.0)
    recall = np.append(true / found if found else np.zeros(len(scores)), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (0.5 * (padded[:-2] - padded[2:])))


def mask_overlaps(image: CityscapesImage, label: int) -> Overlaps:
    """By the pixels of the masks; detections without a pixel are left out."""
    assert image.found_masks is not None
    assert image.found.labels is not None
    assert image.found.scores is not None
    truth = [dict(image.masks[i]) for i in np.flatnonzero(image.labels == label).tolist()]
    chosen = np.flatnonzero(image.found.labels.numpy() == label)
    found = [dict(image.found_masks[i]) for i in chosen.tolist()]
    sizes = np.asarray(coco_mask.area(found), dtype=np.float64).reshape(-1) if found else np.zeros(0)
    filled = np.flatnonzero(sizes > 0)
    found, sizes = [found[i] for i in filled], sizes[filled]
    common = np.array([[_common(one, other) for other in found] for one in truth]).reshape(len(truth), len(found))
    void = image.ignored.get(label)
    return Overlaps(
        truth=np.asarray(coco_mask.area(truth), dtype=np.float64).reshape(-1) if truth else np.zeros(0),
        found=sizes,
        common=common,
        ignored=np.array([0.0 if void is None else _common(void, one) for one in found]),
        scores=image.found.scores.double().numpy()[chosen[filled]],
    )


def box_overlaps(image: CityscapesImage, label: int) -> Overlaps:
    """By whole pixels of the boxes, the last row and column left out."""
    assert image.found.labels is not None
    assert image.found.scores is not None
    chosen = (image.found.labels == label).numpy()
    truth = np.trunc(image.boxes[image.labels == label].astype(np.float64)).reshape(-1, 4)
    found = np.trunc(image.found.convert("xyxy").boxes.double().numpy()[chosen]).reshape(-1, 4)
    low = np.maximum(truth[:, None, :2], found[None, :, :2])
    high = np.minimum(truth[:, None, 2:], found[None, :, 2:])
    return Overlaps(
        truth=np.prod(truth[:, 2:] - truth[:, :2], axis=1),
        found=np.prod(found[:, 2:] - found[:, :2], axis=1),
        common=np.prod(np.maximum(high - low, 0), axis=2),
        ignored=np.zeros(len(found)),
        scores=image.found.scores.double().numpy()[chosen],
    )


def _common(one: Rle, other: Rle) -> float:
    return float(coco_mask.area(coco_mask.merge([dict(one), dict(other)], intersect=True)))


def _check(number: int, image: CityscapesImage) -> None:
    found = image.found
    if found.labels is None or found.scores is None:
        raise EvaluationError(f"Cityscapes: image {number}: detections need labels and scores")
    if image.found_masks is not None and len(image.found_masks) != len(found):
        raise EvaluationError(f"Cityscapes: image {number}: {len(image.found_masks)} masks for {len(found)} boxes")
    if not bool(found.scores.isfinite().all() and found.boxes.isfinite().all()):
        raise EvaluationError(f"Cityscapes: image {number}: a score or box is not finite")


def _mean(values: Array) -> float:
    return -1.0 if np.isnan(values).all() else float(np.nanmean(values))
