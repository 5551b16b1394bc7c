"""Keypoint results and their evaluation; the known answers are in test_coco.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastrcnn.evaluation import EvaluationError, detections_to_coco, evaluate_coco
from fastrcnn.structures import BoxList, Keypoints

SIDE = 50.0


def truth(count: int, sigmas: list[float] | None = None) -> dict[str, Any]:
    """One object of 50 x 50 pixels with ``count`` visible keypoints on a diagonal."""
    points = [[10.0 + 2 * i, 20.0 + i, 2] for i in range(count)]
    category: dict[str, Any] = {"id": 4, "name": "animal"}
    if sigmas is not None:
        category["keypoint_sigmas"] = sigmas
    return {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 4,
                "bbox": [5, 5, SIDE, SIDE],
                "area": SIDE**2,
                "iscrowd": 0,
                "keypoints": [v for p in points for v in p],
                "num_keypoints": count,
            }
        ],
        "categories": [category],
    }


def found(truth: dict[str, Any], shift: float = 0.0) -> BoxList:
    points = torch.tensor(truth["annotations"][0]["keypoints"]).reshape(1, -1, 3)
    points = points + torch.tensor([shift, 0.0, 0.0])
    return BoxList(
        torch.tensor([[5.0, 5, 54, 54]]),
        (100, 100),
        labels=torch.tensor([1]),
        scores=torch.tensor([0.9]),
        keypoints=Keypoints(points, (100, 100)),
    )


def test_results_have_the_points_flat() -> None:
    results = detections_to_coco([(1, found(truth(17)), None)], {1: 4})
    assert list(results) == ["bbox", "keypoints"]
    (entry,) = results["keypoints"]
    assert set(entry) == {"image_id", "category_id", "score", "keypoints"}
    assert entry["keypoints"][:6] == [10, 20, 2, 12, 21, 2]
    assert len(entry["keypoints"]) == 51
    assert entry["category_id"] == 4


def test_perfect_and_far() -> None:
    there = truth(17)
    for shift, expected in ((0.0, 1.0), (200.0, 0.0)):
        results = detections_to_coco([(1, found(there, shift), None)], {1: 4})
        stats = evaluate_coco(there, {"keypoints": results["keypoints"]}).stats["keypoints"]
        assert stats["AP"] == pytest.approx(expected)
        assert list(stats) == ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]


@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_sigmas_of_the_category(sigma: float) -> None:
    """Five keypoints, each 10 pixels off: their similarity exp(-d^2 / (2 area (2 sigma)^2)) decides which AP is 1."""
    there = truth(5, [sigma] * 5)
    results = detections_to_coco([(1, found(there, 10.0), None)], {1: 4})
    similarity = np.exp(-(10.0**2) / (2 * SIDE**2 * (2 * sigma) ** 2))
    expected = np.mean([similarity >= t for t in np.arange(0.5, 1.0, 0.05)])
    stats = evaluate_coco(there, {"keypoints": results["keypoints"]}).stats["keypoints"]
    assert stats["AP"] == pytest.approx(expected)


def test_unlabelled_instances_are_ignored() -> None:
    there = truth(17)
    there["annotations"].append(
        {"id": 2, "image_id": 1, "category_id": 4, "bbox": [60, 60, 20, 20], "area": 400, "iscrowd": 0}
    )
    results = detections_to_coco([(1, found(there), None)], {1: 4})
    assert evaluate_coco(there, {"keypoints": results["keypoints"]}).stats["keypoints"]["AP"] == pytest.approx(1)


def test_errors() -> None:
    there = truth(5)
    results = detections_to_coco([(1, found(there), None)], {1: 4})["keypoints"]
    with pytest.raises(EvaluationError, match="evaluation of 5 keypoints needs 'keypoint_sigmas' in the category"):
        evaluate_coco(there, {"keypoints": results})
    with pytest.raises(EvaluationError, match="keypoint_sigmas must be 5 positive numbers"):
        evaluate_coco(truth(5, [0.1] * 4), {"keypoints": results})
    with pytest.raises(EvaluationError, match="result 0: keypoints must be 51 finite numbers"):
        evaluate_coco(truth(17), {"keypoints": results})
    bare = truth(5)
    del bare["annotations"][0]["keypoints"]
    with pytest.raises(EvaluationError, match="no annotation has keypoints"):
        evaluate_coco(bare, {"keypoints": []})
