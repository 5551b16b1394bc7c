"""Pascal VOC's average precision of boxes, as maskrcnn-benchmark (after chainercv) and the devkit compute it.

Boxes overlap from IoU 0.5 on. Objects marked difficult are neither to be found nor wrong to find. A detection that
overlaps a found object again is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrcnn.evaluation.results import EvaluationError, Results
from fastrcnn.structures import BoxList
from fastrcnn_kernels import box_iou

Array = NDArray[Any]


def evaluate_voc(
    truth: Sequence[tuple[BoxList, Sequence[bool] | Array]],
    detections: Sequence[BoxList],
    class_names: Sequence[str],
    *,
    iou_threshold: float = 0.5,
) -> Results:
    """Average precision of each class and its mean, by the metrics of 2007 and of 2010 to 2012.

    Args:
        truth: for each image its objects (labels; inclusive pixels) and which of them are difficult.
        detections: for each image what was found, with labels and scores, in pixels of the original image.
        class_names: by label, ``__background__`` first.
        iou_threshold: an overlap from this on counts. As in maskrcnn-benchmark the overlap is that of boxes grown by
            one pixel at the right and the bottom, of inclusive pixels.

    Returns:
        Task ``voc``: ``mAP07`` (mean of the precision at 11 recalls) and ``mAP12`` (area under the curve), the means
        over the classes that have an object that is not difficult; -1 if none has. ``per_class``: the metric of 2007.

    Raises:
        EvaluationError: other numbers of images, detections without labels or scores, or with a score or box that is
            not finite.
    """
    if len(truth) != len(detections):
        raise EvaluationError(f"VOC: ground truth of {len(truth)} images and detections of {len(detections)}")
    for image, found in enumerate(detections):
        if found.labels is None or found.scores is None:
            raise EvaluationError(f"VOC: image {image}: detections need labels and scores")
        if not bool(found.scores.isfinite().all() and found.boxes.isfinite().all()):
            raise EvaluationError(f"VOC: image {image}: a score or box is not finite")
    old: dict[str, float | None] = {}
    new: dict[str, float | None] = {}
    for label, name in enumerate(class_names):
        if label == 0:
            continue
        scores, verdicts, count = judge_class(truth, detections, label, iou_threshold)
        if count == 0:
            old[name] = new[name] = None
            continue
        precision, recall = precision_recall(scores, verdicts, count)
        old[name], new[name] = eleven_point_ap(precision, recall), area_ap(precision, recall)
    return Results({"voc": {"mAP07": _mean(old), "mAP12": _mean(new)}}, {"voc": old})


def judge_class(
    truth: Sequence[tuple[BoxList, Sequence[bool] | Array]],
    detections: Sequence[BoxList],
    label: int,
    iou_threshold: float,
) -> tuple[Array, Array, int]:
    """(scores float [n], verdicts int [n], number of objects to find) of the detections of one class.

    A verdict is 1 for right, 0 for wrong, -1 for the overlap with a difficult object, which does not count. Detections
    are looked at by decreasing score within an image, each for the object that it overlaps most.
    """
    scores: list[float] = []
    verdicts: list[int] = []
    count = 0
    for (objects, difficult), found in zip(truth, detections, strict=True):
        assert objects.labels is not None
        assert found.labels is not None
        mine = objects.labels == label
        hard = np.asarray(difficult, dtype=bool)[mine.numpy()]
        count += int((~hard).sum())
        chosen = found[found.labels == label]
        assert chosen.scores is not None
        chosen = chosen[chosen.scores.argsort(descending=True, stable=True)]
        assert chosen.scores is not None
        scores += chosen.scores.tolist()
        if not len(hard):
            verdicts += [0] * len(chosen)
            continue
        # chainercv grows the boxes, and maskrcnn-benchmark's overlap counts both end pixels on top of that.
        one, other = (b.convert("xyxy").boxes.float() + torch.tensor([0, 0, 1, 1]) for b in (chosen, objects[mine]))
        iou = box_iou(one, other, box_offset=1)
        taken = np.zeros(len(hard), dtype=bool)
        for row in iou.numpy():
            best = int(row.argmax())
            if row[best] < iou_threshold:
                verdicts.append(0)
                continue
            verdicts.append(-1 if hard[best] else int(not taken[best]))
            taken[best] = True
    return np.array(scores), np.array(verdicts, dtype=np.int64), count


def precision_recall(scores: Array, verdicts: Array, count: int) -> tuple[Array, Array]:
    """Precision (0 where nothing counts yet) and recall after each detection in decreasing score, float64 [n]."""
    order = np.argsort(-scores, kind="stable")
    right, wrong = np.cumsum(verdicts[order] == 1), np.cumsum(verdicts[order] == 0)
    return right / np.maximum(right + wrong, 1), right / count


def eleven_point_ap(precision: Array, recall: Array) -> float:
    """The metric of 2007: the mean over the recalls 0, 0.1, ..., 1 of the best precision from that recall on.

    The recalls are multiples of 0.1 in float64, as in maskrcnn-benchmark: three of ten found do not reach the third.
    """
    best = [float(precision[recall >= t].max(initial=0)) for t in np.arange(0.0, 1.1, 0.1)]
    return sum(best) / 11


def area_ap(precision: Array, recall: Array) -> float:
    """The metric from 2010 on: the area under the precision, made to fall with the recall."""
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * falling))


def result_text(results: Results) -> str:
    """maskrcnn-benchmark's ``result.txt``: the mean and the classes, by the metric of 2007."""
    lines = [f"mAP: {results.stats['voc']['mAP07']:.4f}"]
    for name, ap in results.per_class["voc"].items():
        lines.append(f"{name:<16}: {float('nan') if ap is None else ap:.4f}")
    return "\n".join(lines) + "\n"


def _mean(values: dict[str, float | None]) -> float:
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else -1.0
