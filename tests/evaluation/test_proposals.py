"""Average recall of proposals: against loops, by hand, and against pycocotools where the two rules agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.evaluation import EvaluationError, evaluate_proposals
from fastrcnn.structures import BoxList


def annotation(number: int, image: int, box: list[float], area: float | None = None, iscrowd: int = 0) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": 1 + number % 2,
        "bbox": box,
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": iscrowd,
    }


def scene(seed: int, images: int = 4, objects: int = 6, proposals: int = 30) -> tuple[dict, list[tuple[int, BoxList]]]:
    """Ground truth of all sizes with near and far proposals."""
    rng = np.random.default_rng(seed)
    annotations, found = [], []
    for image in range(1, images + 1):
        corner, side = rng.uniform(0, 300, (objects, 2)), rng.uniform(8, 250, (objects, 2))
        truth = np.concatenate([corner, side], axis=1).round(1)
        annotations += [annotation(len(annotations) + 1 + i, image, box) for i, box in enumerate(truth.tolist())]
        near = truth[rng.integers(0, objects, proposals)] * rng.uniform(0.8, 1.2, (proposals, 4))
        boxes = np.concatenate([near[:, :2], near[:, :2] + near[:, 2:] - 1], axis=1)
        scores = torch.from_numpy(rng.permutation(proposals) / proposals)
        found.append((image, BoxList(torch.from_numpy(boxes).float(), (640, 640), objectness=scores)))
    return {
        "images": [{"id": i, "height": 640, "width": 640} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }, found


def scalar_iou(a: list[float], b: list[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return 0.0
    area = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return w * h / (area[0] + area[1] - w * h)


def scalar_recall(truth: dict, found: list[tuple[int, BoxList]], limit: int, low: float, high: float) -> float:
    """maskrcnn-benchmark's rule, a number at a time."""
    coverage, total = [], 0
    for image, proposals in found:
        wanted = [
            [x, y, x + w - 1, y + h - 1]
            for a in truth["annotations"]
            for x, y, w, h in [a["bbox"]]
            if a["image_id"] == image and not a["iscrowd"] and low <= a["area"] <= high
        ]
        total += len(wanted)
        order = sorted(range(len(proposals)), key=lambda i: -float(proposals.objectness[i]))[:limit]  # type: ignore[index]
        boxes = [proposals.boxes[i].tolist() for i in order]
        pairs = {(p, g): scalar_iou(boxes[p], wanted[g]) for p in range(len(boxes)) for g in range(len(wanted))}
        while pairs:
            best = max(pairs, key=lambda k: pairs[k])
            coverage.append(pairs[best])
            pairs = {k: v for k, v in pairs.items() if k[0] != best[0] and k[1] != best[1]}
    if total == 0:
        return -1.0
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    return sum(sum(c >= t for c in coverage) / total for t in thresholds) / 10


@pytest.mark.parametrize("seed", range(4))
def test_against_loops(seed: int) -> None:
    truth, found = scene(seed)
    truth["annotations"].append(annotation(999, 1, [0, 0, 640, 640], iscrowd=1))
    stats = evaluate_proposals(truth, found, limits=(5, 100)).stats["box_proposal"]
    areas = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    for limit in (5, 100):
        for name, (low, high) in areas.items():
            assert stats[f"AR{name}@{limit}"] == pytest.approx(scalar_recall(truth, found, limit, low, high), abs=1e-5)


def test_against_pycocotools() -> None:
    """Where objects lie apart, every rule of matching gives the same pairs."""
    rng = np.random.default_rng(0)
    annotations, boxes = [], []
    for i in range(9):
        x, y = 200 * (i % 3), 200 * (i // 3)
        side = float(rng.uniform(20, 150))
        annotations.append(annotation(i + 1, 1, [x, y, side, side]))
        grown = side * float(rng.uniform(0.75, 1.3))
        boxes.append([x, y, x + grown - 1, y + grown - 1])
    truth = {
        "images": [{"id": 1, "height": 640, "width": 640}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    scores = torch.linspace(1, 0.1, 9)
    found = BoxList(torch.tensor(boxes), (640, 640), objectness=scores)
    mine = evaluate_proposals(truth, [(1, found)]).stats["box_proposal"]
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
        for box, score in zip(found.convert("xywh").boxes.tolist(), scores.tolist(), strict=True)
    ]
    judge = COCOeval(coco, coco.loadRes(results), "bbox")
    judge.params.useCats = 0
    judge.params.maxDets = [1, 100, 1000]
    judge.evaluate()
    judge.accumulate()
    recall = judge.eval["recall"][:, 0, :, 2]  # [IoU, area]
    for column, name in enumerate(("", "s", "m", "l")):
        if (recall[:, column] > -1).all():
            assert mine[f"AR{name}@1000"] == pytest.approx(recall[:, column].mean(), abs=1e-6)
    assert 0.1 < mine["AR@1000"] < 0.9


def test_one_proposal_covers_one_object() -> None:
    truth = {
        "images": [{"id": 1, "height": 100, "width": 100}, {"id": 2, "height": 100, "width": 100}],
        "annotations": [annotation(i, image, [0, 0, 10, 10]) for i, image in ((1, 1), (2, 1), (3, 2))],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    one = BoxList(torch.tensor([[0.0, 0, 9, 9]]), (100, 100), objectness=torch.tensor([0.3]))
    none = BoxList(torch.zeros((0, 4)), (100, 100), objectness=torch.zeros(0))
    stats = evaluate_proposals(truth, [(1, one), (2, none)]).stats["box_proposal"]
    assert stats["AR@100"] == pytest.approx(1 / 3)
    assert stats["ARl@100"] == -1
    # the image that is not listed does not count
    assert evaluate_proposals(truth, [(1, one)]).stats["box_proposal"]["ARs@1000"] == pytest.approx(0.5)


def test_errors() -> None:
    truth, found = scene(0, images=1)
    with pytest.raises(EvaluationError, match="image 7 is not in"):
        evaluate_proposals(truth, [(7, found[0][1])])
    with pytest.raises(EvaluationError, match="image 1: proposals need objectness"):
        evaluate_proposals(truth, [(1, BoxList(torch.zeros((1, 4)), (9, 9)))])
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate_proposals(truth, [(1, BoxList(torch.full((1, 4), torch.nan), (9, 9), objectness=torch.ones(1)))])
