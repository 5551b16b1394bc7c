"""Pascal VOC's average precision: by hand, and against a scalar implementation of the devkit's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastrcnn.evaluation import EvaluationError, evaluate_voc
from fastrcnn.evaluation.voc import area_ap, eleven_point_ap, precision_recall, result_text
from fastrcnn.structures import BoxList

NAMES = ["__background__", "cat", "dog", "bird"]
Truth = tuple[BoxList, list[bool]]


def boxes(rows: list[list[float]], labels: list[int], scores: list[float] | None = None) -> BoxList:
    return BoxList(
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        (100, 100),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=None if scores is None else torch.tensor(scores),
    )


def test_by_hand() -> None:
    """Three cats, of which two are found, after one mistake and before another."""
    truth: list[Truth] = [
        (boxes([[0, 0, 9, 9], [20, 20, 29, 29]], [1, 1]), [False, False]),
        (boxes([[0, 0, 9, 9]], [1]), [False]),
    ]
    found = [
        boxes([[50, 50, 59, 59], [0, 0, 9, 9], [1, 0, 10, 9]], [1, 1, 1], [0.9, 0.8, 0.6]),
        boxes([[0, 0, 9, 9]], [1], [0.7]),
    ]
    # in order: wrong, right, right, wrong (a second detection of a found cat): precision 0, 1/2, 2/3, 1/2
    results = evaluate_voc(truth, found, NAMES)
    assert results.per_class["voc"] == {"cat": pytest.approx(7 * (2 / 3) / 11), "dog": None, "bird": None}
    assert results.stats["voc"]["mAP07"] == pytest.approx(7 * (2 / 3) / 11)
    assert results.stats["voc"]["mAP12"] == pytest.approx(2 / 3 * 2 / 3)
    assert result_text(results).splitlines()[:3] == ["mAP: 0.4242", "cat             : 0.4242", "dog             : nan"]


def test_difficult_objects_neither_help_nor_harm() -> None:
    truth: list[Truth] = [(boxes([[0, 0, 9, 9], [20, 20, 29, 29]], [2, 2]), [True, False])]
    both = [boxes([[0, 0, 9, 9], [20, 20, 29, 29]], [2, 2], [0.9, 0.8])]
    assert evaluate_voc(truth, both, NAMES).stats["voc"] == {"mAP07": pytest.approx(1), "mAP12": pytest.approx(1)}
    hard = [boxes([[0, 0, 9, 9], [0, 0, 9, 9]], [2, 2], [0.9, 0.8])]
    assert evaluate_voc(truth, hard, NAMES).per_class["voc"]["dog"] == 0
    all_hard: list[Truth] = [(boxes([[0, 0, 9, 9]], [2]), [True])]
    assert evaluate_voc(all_hard, [both[0]], NAMES).stats["voc"]["mAP07"] == -1


def test_metrics_on_known_curves() -> None:
    right = np.ones(5)
    assert eleven_point_ap(*precision_recall(np.arange(5)[::-1], right, 5)) == pytest.approx(1)
    assert area_ap(*precision_recall(np.arange(5)[::-1], right, 5)) == pytest.approx(1)
    assert area_ap(*precision_recall(np.array([0.9, 0.5]), np.array([1, 1]), 4)) == pytest.approx(0.5)
    assert eleven_point_ap(*precision_recall(np.array([0.9, 0.5]), np.array([1, 1]), 4)) == pytest.approx(6 / 11)
    assert area_ap(*precision_recall(np.zeros(0), np.zeros(0, dtype=int), 4)) == 0


def scalar_ap(truth: list[Truth], found: list[BoxList], label: int, eleven: bool) -> float:
    """The devkit's VOCevaldet with maskrcnn-benchmark's overlap, a detection at a time over the whole set."""
    objects = {
        i: [
            {"box": b, "hard": h, "taken": False}
            for b, cls, h in zip(t.boxes.tolist(), t.labels.tolist(), hard, strict=True)  # type: ignore[union-attr]
            if cls == label
        ]
        for i, (t, hard) in enumerate(truth)
    }
    detections = sorted(
        (-s, i, b)
        for i, f in enumerate(found)
        for b, cls, s in zip(f.boxes.tolist(), f.labels.tolist(), f.scores.tolist(), strict=True)  # type: ignore[union-attr]
        if cls == label
    )
    total = sum(not o["hard"] for image in objects.values() for o in image)
    right = wrong = 0
    curve = []
    for _, i, box in detections:
        best, overlap = None, -1.0
        for candidate in objects[i]:
            other = candidate["box"]
            w, h = (min(box[k + 2], other[k + 2]) - max(box[k], other[k]) + 2 for k in (0, 1))
            sizes = [(c[2] - c[0] + 2) * (c[3] - c[1] + 2) for c in (box, other)]
            iou = w * h / (sizes[0] + sizes[1] - w * h) if w > 0 and h > 0 else 0.0
            if iou > overlap:
                best, overlap = candidate, iou
        if best is None or overlap < 0.5:
            wrong += 1
        elif not best["hard"]:
            right, wrong = (right, wrong + 1) if best["taken"] else (right + 1, wrong)
            best["taken"] = True
        curve.append((right / total, right / max(right + wrong, 1)))
    if eleven:
        return sum(max([p for r, p in curve if r >= t * 0.1], default=0) for t in range(11)) / 11
    area, last = 0.0, 0.0
    for i, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[i:])
        last = recall
    return area


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth: list[Truth] = []
    found = []
    for _ in range(6):
        corner, side = rng.integers(0, 60, (5, 2)), rng.integers(8, 30, (5, 2))
        rows = np.concatenate([corner, corner + side], axis=1).astype(float)
        labels = rng.integers(1, 4, 5).tolist()
        truth.append((boxes(rows.tolist(), labels), (rng.random(5) < 0.25).tolist()))
        moved = np.repeat(rows, 3, axis=0) + rng.integers(-5, 6, (15, 4))
        guesses = np.where(rng.random(15) < 0.8, np.repeat(labels, 3), rng.integers(1, 4, 15)).tolist()
        found.append(boxes(moved.tolist(), guesses, rng.permutation(1000)[:15].astype(float).tolist()))
    results = evaluate_voc(truth, found, NAMES)
    expected = {
        name: [scalar_ap(truth, found, label, e) for e in (True, False)] for label, name in enumerate(NAMES) if label
    }
    for name, (eleven, _) in expected.items():
        assert results.per_class["voc"][name] == pytest.approx(eleven, abs=1e-6)
    assert results.stats["voc"]["mAP12"] == pytest.approx(np.mean([area for _, area in expected.values()]), abs=1e-6)
    assert 0.05 < results.stats["voc"]["mAP07"] < 0.95


def test_errors() -> None:
    one: Truth = (boxes([[0, 0, 9, 9]], [1]), [False])
    with pytest.raises(EvaluationError, match="ground truth of 1 images and detections of 0"):
        evaluate_voc([one], [], NAMES)
    with pytest.raises(EvaluationError, match="image 0: detections need labels and scores"):
        evaluate_voc([one], [one[0]], NAMES)
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate_voc([one], [boxes([[0, 0, 9, 9]], [1], [math.nan])], NAMES)
