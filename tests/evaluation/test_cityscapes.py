"""Cityscapes' average precision: by hand, and against a scalar implementation of its scripts on bitmaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastrcnn.evaluation import CityscapesImage, EvaluationError, encode_mask, evaluate_cityscapes
from fastrcnn.evaluation.cityscapes import integrate
from fastrcnn.structures import BoxList

NAMES = ["__background__", "car", "bus", "trailer"]
HEIGHT, WIDTH = 60, 80


def bitmap(box: list[int]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[box[1] : box[3] + 1, box[0] : box[2] + 1] = 1
    return mask


def image(
    truth: list[tuple[int, list[int]]],
    found: list[tuple[int, float, list[int]]],
    ignored: dict[int, np.ndarray] | None = None,
) -> CityscapesImage:
    boxes = torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4)
    return CityscapesImage(
        labels=np.array([label for label, _ in truth], dtype=np.int64),
        masks=[encode_mask(bitmap(box)) for _, box in truth],
        boxes=np.array([box for _, box in truth], dtype=np.float32).reshape(-1, 4),
        found=BoxList(
            boxes,
            (WIDTH, HEIGHT),
            labels=torch.tensor([label for label, _, _ in found], dtype=torch.int64),
            scores=torch.tensor([score for _, score, _ in found], dtype=torch.float64),
        ),
        found_masks=[encode_mask(bitmap(box)) for _, _, box in found],
        ignored={label: encode_mask(mask) for label, mask in (ignored or {}).items()},
    )


CAR, OTHER = [5, 5, 24, 24], [40, 5, 59, 24]


def segm(images: list[CityscapesImage]) -> dict[str, float]:
    return evaluate_cityscapes(images, NAMES, [1, 2]).stats["segm"]


def test_all_found() -> None:
    results = evaluate_cityscapes([image([(1, CAR), (2, OTHER)], [(1, 0.9, CAR), (2, 0.8, OTHER)])], NAMES, [1, 2])
    # one right detection: precision 1 at recall 1 and 0; the central differences give 1/2 + 1/2
    assert results.stats["segm"] == {"AP": 1, "AP50": 1, "AP75": 1}
    assert results.stats["bbox"]["AP"] == 1
    assert results.per_class["segm"] == {"car": 1, "bus": 1}


def test_half_found() -> None:
    assert segm([image([(1, CAR), (1, OTHER)], [(1, 0.9, CAR)])])["AP"] == pytest.approx(0.5)


def test_nothing_found_and_nothing_there() -> None:
    assert segm([image([(1, CAR)], [])])["AP"] == 0
    assert segm([image([], [(1, 0.9, CAR)])])["AP"] == -1
    assert segm([image([(3, CAR)], [(3, 0.9, CAR)])])["AP"] == -1, "a class that is not evaluated"


def test_a_detection_of_another_class_is_wrong() -> None:
    assert segm([image([(1, CAR)], [(2, 0.9, CAR)])])["AP"] == 0


def test_void_and_small_objects_are_ignored() -> None:
    void = bitmap(OTHER)
    spoilt = image([(1, CAR)], [(1, 0.8, CAR), (1, 0.9, OTHER)])
    assert segm([spoilt])["AP"] < 0.9
    assert segm([image([(1, CAR)], [(1, 0.8, CAR), (1, 0.9, OTHER)], {1: void})])["AP"] == 1
    assert segm([image([(1, CAR)], [(1, 0.8, CAR), (1, 0.9, OTHER)], {2: void})])["AP"] < 0.9, "of its class alone"
    small = [70, 50, 78, 58]  # 81 pixels
    assert segm([image([(1, CAR), (1, small)], [(1, 0.8, CAR), (1, 0.9, small)])])["AP"] == 1
    assert segm([image([(1, CAR), (1, small)], [(1, 0.8, CAR)])])["AP"] == 1


def scalar_ap(images: list[tuple[list[Any], list[Any], Any]], threshold: float) -> float:
    """evalInstanceLevelSemanticLabeling for one class: (truth masks, [(score, mask)], ignored mask) an image."""
    y_true: list[int] = []
    y_score: list[float] = []
    hard_misses = 0
    for truth, found, void in images:
        big = [t for t in truth if t.sum() >= 100]
        for t in big:
            score = None
            for s, m in found:
                inter = int((t & m).sum())
                if inter / (t.sum() + m.sum() - inter) > threshold:
                    if score is None:
                        score = s
                    else:
                        y_true.append(0)
                        y_score.append(min(score, s))
                        score = max(score, s)
            if score is None:
                hard_misses += 1
            else:
                y_true.append(1)
                y_score.append(score)
        for s, m in found:
            overlaps = [int((t & m).sum()) / int((t | m).sum()) for t in big]
            if any(o > threshold for o in overlaps):
                continue
            pixels = int((void & m).sum()) + sum(int((t & m).sum()) for t in truth if t.sum() < 100)
            if pixels / m.sum() <= threshold:
                y_true.append(0)
                y_score.append(s)
    if not y_true:
        return 0.0
    points = []
    for t in sorted(set(y_score)):
        tp = sum(y for y, s in zip(y_true, y_score, strict=True) if s >= t)
        fp = sum(1 - y for y, s in zip(y_true, y_score, strict=True) if s >= t)
        points.append((tp / (tp + fp), tp / (sum(y_true) + hard_misses)))
    points.append((1.0, 0.0))
    area = 0.0
    for i, (precision, recall) in enumerate(points):
        before = points[i - 1][1] if i else recall
        after = points[i + 1][1] if i + 1 < len(points) else 0.0
        area += precision * 0.5 * (before - after)
    return area


@pytest.mark.parametrize("seed", range(4))
def test_against_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, plain = [], []
    for _ in range(3):
        truth, found = [], []
        for _ in range(4):
            x, y, w, h = rng.integers(0, 45), rng.integers(0, 30), rng.integers(6, 30), rng.integers(6, 28)
            box = [int(x), int(y), int(x + w), int(y + h)]
            truth.append((1, box))
            for _ in range(2):
                moved = [max(0, v + int(rng.integers(-4, 5))) for v in box]
                moved[2:] = [max(moved[0], moved[2]), max(moved[1], moved[3])]
                found.append((1, float(rng.integers(1, 30) / 30), moved))
        void = (rng.random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
        images.append(image(truth, found, {1: void}))
        plain.append(([bitmap(b) for _, b in truth], [(s, bitmap(b)) for _, s, b in found], void))
    results = evaluate_cityscapes(images, NAMES, [1])
    expected = [scalar_ap(plain, threshold) for threshold in np.arange(0.5, 1.0, 0.05)]
    assert results.stats["segm"]["AP"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert results.stats["segm"]["AP50"] == pytest.approx(expected[0], abs=1e-9)
    assert results.stats["segm"]["AP75"] == pytest.approx(expected[5], abs=1e-9)
    assert 0.02 < expected[0] < 0.98


def test_integrate_by_hand() -> None:
    """Right at .9 and .7, wrong at .8, one missed: precision 2/3, 1/2, 1 and recall 2/3, 1/3, 1/3 from .7 on."""
    expected = 2 / 3 * (2 / 3 - 1 / 3) / 2 + 1 / 2 * (2 / 3 - 1 / 3) / 2 + 1 * (1 / 3) / 2 + 1 * (1 / 3) / 2
    assert integrate(np.array([0.9, 0.7]), np.array([0.8]), 1) == pytest.approx(expected)


def test_boxes_without_masks() -> None:
    one = image([(1, CAR)], [(1, 0.9, CAR)])
    boxes_only = CityscapesImage(one.labels, one.masks, one.boxes, one.found, None)
    assert list(evaluate_cityscapes([boxes_only], NAMES, [1]).stats) == ["bbox"]


def test_errors() -> None:
    one = image([(1, CAR)], [(1, 0.9, CAR)])
    with pytest.raises(EvaluationError, match="image 0: 0 masks for 1 boxes"):
        evaluate_cityscapes([CityscapesImage(one.labels, one.masks, one.boxes, one.found, [])], NAMES, [1])
    bare = BoxList(one.found.boxes, one.found.size)
    with pytest.raises(EvaluationError, match="need labels and scores"):
        evaluate_cityscapes([CityscapesImage(one.labels, one.masks, one.boxes, bare, None)], NAMES, [1])
