"""The evaluation against known answers, and its behaviour on what pycocotools swallows or trips over."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from fastrcnn.evaluation import (
    EvaluationError,
    Results,
    check_expected,
    detections_to_coco,
    encode_mask,
    evaluate_coco,
)
from fastrcnn.structures import BoxList

DATA = Path(os.environ.get("FASTRCNN_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
REFERENCE = DATA / "cocoeval-reference"
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")


def reference_cases() -> list[Any]:
    if not (REFERENCE / "expected.json").exists():
        return [pytest.param("", {}, marks=pytest.mark.skip(reason=f"no reference answers at {REFERENCE}"))]
    cases = json.loads((REFERENCE / "expected.json").read_text())["cases"]
    return [pytest.param(file, case, id=file.removesuffix("_results.json")) for file, case in cases.items()]


@pytest.mark.parametrize(("file", "case"), reference_cases())
def test_evaluate_coco_reference_answers(file: str, case: dict[str, Any]) -> None:
    truth = REFERENCE / case["gt"]
    if not truth.exists():
        pytest.skip(f"the ground truth {truth.name} of {truth.parents[1].name} is not part of the data")
    kind = case["iouType"]
    results = evaluate_coco(truth, {kind: REFERENCE / file})
    assert list(results.stats) == [kind]
    names = KEYPOINT_STATS if kind == "keypoints" else STATS
    assert [results.stats[kind][name] for name in names] == pytest.approx(case["stats"], abs=1e-6)
    if isinstance(case["published"], list):
        assert [results.stats[kind][name] for name in names] == pytest.approx(case["published"], abs=1e-6)
    if "per_category_AP" in case:
        assert list(results.per_class[kind]) == list(case["per_category_AP"])
        for name, expected in case["per_category_AP"].items():
            found = results.per_class[kind][name]
            assert (found is None) == (expected is None), name
            assert found == (None if expected is None else pytest.approx(expected, abs=1e-6)), name


def rectangle(x: int, y: int, w: int, h: int) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def truth() -> dict[str, Any]:
    """Two images of 60 x 80 (height x width), a cat on the first and a dog and a cat on the second; birds nowhere."""
    boxes = [(1, 1, 3, (10, 10, 20, 20)), (2, 2, 5, (5, 5, 40, 30)), (3, 2, 3, (50, 10, 20, 40))]
    return {
        "images": [{"id": i, "height": 60, "width": 80, "file_name": f"{i}.jpg"} for i in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 9, "name": "bird"}],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": rectangle(*box),
            }
            for i, image, category, box in boxes
        ],
    }


def perfect(truth: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"bbox": [], "segm": []}
    for a in truth["annotations"]:
        entry = {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9}
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], 60, 80)))
        found["bbox"].append({**entry, "bbox": list(a["bbox"])})
        found["segm"].append({**entry, "segmentation": encode_mask(mask)})
    return found


def test_evaluate_coco_perfect(truth: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = perfect(truth)
    truth_before, found_before = copy.deepcopy(truth), copy.deepcopy(found)
    results = evaluate_coco(truth, found)
    for kind in ("bbox", "segm"):
        assert results.stats[kind]["AP"] == pytest.approx(1)
        assert results.per_class[kind] == {"cat": pytest.approx(1), "dog": pytest.approx(1), "bird": None}
        assert results.stats[kind]["APl"] == -1, "there is nothing large"
    assert (truth, found) == (truth_before, found_before), "the caller's data must stay as it was"
    assert capsys.readouterr() == ("", ""), "pycocotools must not print"


def test_evaluate_coco_files(truth: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "bbox.json").write_text(json.dumps(perfect(truth)["bbox"]))
    results = evaluate_coco(str(tmp_path / "truth.json"), {"bbox": tmp_path / "bbox.json"})
    assert results.stats["bbox"]["AP50"] == pytest.approx(1)


def test_evaluate_coco_empty_results(truth: dict[str, Any]) -> None:
    results = evaluate_coco(truth, {"bbox": [], "segm": []})
    for kind in ("bbox", "segm"):
        values = results.stats[kind]
        assert values == dict.fromkeys(STATS, 0.0) | {"APl": -1.0, "ARl": -1.0}
        assert results.per_class[kind] == {"cat": 0.0, "dog": 0.0, "bird": None}


def test_evaluate_coco_no_ground_truth(truth: dict[str, Any]) -> None:
    found = perfect(truth)
    truth["annotations"] = []
    results = evaluate_coco(truth, found)
    assert results.stats["segm"] == dict.fromkeys(STATS, -1.0)
    assert set(results.per_class["bbox"].values()) == {None}


def test_evaluate_coco_image_ids(truth: dict[str, Any]) -> None:
    found = {"bbox": perfect(truth)["bbox"][1:]}  # the cat of image 1 is not found
    assert evaluate_coco(truth, found).per_class["bbox"]["cat"] < 0.6
    assert evaluate_coco(truth, found, image_ids=[2]).stats["bbox"]["AP"] == pytest.approx(1)
    assert evaluate_coco(truth, found, image_ids=[1]).stats["bbox"]["AP"] == 0
    with pytest.raises(EvaluationError, match="image_ids: image 7 is not in the annotations"):
        evaluate_coco(truth, found, image_ids=[1, 7])


def test_evaluate_coco_annotation_id_zero(truth: dict[str, Any]) -> None:
    """pycocotools itself counts a match with annotation 0 as a miss."""
    for i, annotation in enumerate(truth["annotations"]):
        annotation["id"] = i
    assert evaluate_coco(truth, perfect(truth)).stats["bbox"]["AP"] == pytest.approx(1)


def test_evaluate_coco_optional_fields(truth: dict[str, Any]) -> None:
    found = perfect(truth)
    expected = evaluate_coco(truth, found)
    for annotation in truth["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    assert evaluate_coco(truth, found) == expected


def test_evaluate_coco_segm_is_sized_by_the_mask(truth: dict[str, Any]) -> None:
    """A false positive is small or large by its mask, also when the result brings a box with it."""
    found = {"segm": perfect(truth)["segm"]}
    wrong = np.zeros((60, 80), np.uint8)
    wrong[40:45, 0:5] = 1
    found["segm"].append({"image_id": 1, "category_id": 3, "score": 0.99, "segmentation": encode_mask(wrong)})
    expected = evaluate_coco(truth, found)
    found["segm"][-1]["bbox"] = [0, 0, 80, 60]
    assert evaluate_coco(truth, found) == expected


def test_evaluate_coco_uncompressed_rle(truth: dict[str, Any]) -> None:
    found = {"segm": perfect(truth)["segm"]}
    for entry in found["segm"]:
        flat = coco_mask.decode(entry["segmentation"]).flatten(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
        entry["segmentation"] = {"size": [60, 80], "counts": np.diff([0, *edges, flat.size]).tolist()}
    assert evaluate_coco(truth, found).stats["segm"]["AP"] == pytest.approx(1)
    found["segm"][1]["segmentation"]["counts"].append(1)
    with pytest.raises(EvaluationError, match="result 1: the counts of the RLE do not cover its 60 x 80 pixels"):
        evaluate_coco(truth, found)


BAD_RESULTS = {
    "unknown image": ({"image_id": 99}, "bbox results: result 1: image 99 is not in the annotations"),
    "image id of another type": ({"image_id": "1"}, "result 1: image '1' is not in"),
    "unknown category": ({"category_id": 0}, "result 1: category 0 is not in"),
    "nan score": ({"score": math.nan}, "result 1: score nan is not a finite number"),
    "infinite box": ({"bbox": [0, 0, math.inf, 1]}, r"result 1: bbox \[0, 0, inf, 1\] is not four finite"),
    "short box": ({"bbox": [0, 0, 1]}, r"result 1: bbox \[0, 0, 1\] is not four finite"),
}


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_evaluate_coco_bad_result(truth: dict[str, Any], change: dict[str, Any], message: str) -> None:
    found = {"bbox": perfect(truth)["bbox"]}
    found["bbox"][1].update(change)
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate_coco(truth, found)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["image_id", "category_id", "score", "bbox"])
def test_evaluate_coco_missing_field(truth: dict[str, Any], key: str) -> None:
    found = {"bbox": perfect(truth)["bbox"]}
    del found["bbox"][2][key]
    with pytest.raises(EvaluationError, match=f"result 2 has no {key}"):
        evaluate_coco(truth, found)


def test_evaluate_coco_mask_of_another_size(truth: dict[str, Any]) -> None:
    found = {"segm": perfect(truth)["segm"]}
    found["segm"][0]["segmentation"] = encode_mask(np.ones((80, 60), np.uint8))
    with pytest.raises(EvaluationError, match=r"mask of 80 x 60 \(height x width\) for image 1 of 60 x 80"):
        evaluate_coco(truth, found)


def test_evaluate_coco_bad_ground_truth(truth: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"annotation file .*none.json: cannot be read \(No such file"):
        evaluate_coco(tmp_path / "none.json", {"bbox": []})
    (tmp_path / "text.json").write_text("<html>")
    with pytest.raises(EvaluationError, match=r"text.json: not json"):
        evaluate_coco(tmp_path / "text.json", {"bbox": []})
    with pytest.raises(EvaluationError, match=r"result file .*none.json: cannot be read"):
        evaluate_coco(truth, {"bbox": tmp_path / "none.json"})
    with pytest.raises(EvaluationError, match="needs the keys images, annotations and categories"):
        evaluate_coco({"images": []}, {"bbox": []})
    with pytest.raises(EvaluationError, match="unknown result type 'boxes': choose from bbox, segm"):
        evaluate_coco(truth, {"boxes": []})
    truth["annotations"][1]["segmentation"] = []
    with pytest.raises(EvaluationError, match="annotation 2 has no segmentation"):
        evaluate_coco(truth, {"segm": []})
    assert evaluate_coco(truth, {"segm": []}, image_ids=[1]).stats["segm"]["AP"] == 0


def test_evaluate_coco_classes_of_one_name(truth: dict[str, Any]) -> None:
    truth["categories"][1]["name"] = "cat"
    assert list(evaluate_coco(truth, perfect(truth)).per_class["bbox"]) == ["cat (3)", "cat (5)", "bird"]


def some_results() -> Results:
    values = dict(zip(STATS, [0.368, 0.585, 0.4, 0.21, 0.4, -1.0, *[0.5] * 6], strict=True))
    return Results(
        {"bbox": values},
        {"bbox": {"cat": 0.5, "dog": None, "a long name": 1.0, "bird": 0.123}},
        {"bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    )


def test_coco_results_repr() -> None:
    assert repr(some_results()) == (
        "Task: bbox\nAP, AP50, AP75, APs, APm, APl\n0.3680, 0.5850, 0.4000, 0.2100, 0.4000, -1.0000\n"
    )


def test_coco_results_to_dict_and_table() -> None:
    values = json.loads(json.dumps(some_results().to_dict()))
    assert values["bbox"]["AP50"] == 0.585
    assert values["bbox"]["per_class"] == {"cat": 0.5, "dog": None, "a long name": 1.0, "bird": 0.123}
    assert some_results().table("bbox", columns=2) == (
        "cat          50.0  dog             -\na long name 100.0  bird         12.3"
    )


@pytest.mark.parametrize("flat", [True, False])
def test_check_expected(flat: bool, caplog: pytest.LogCaptureFixture) -> None:
    def row(mean: float, std: float) -> list[Any]:
        return ["bbox", "AP", mean, std] if flat else ["bbox", "AP", [mean, std]]

    caplog.set_level(logging.INFO, logger="fastrcnn.evaluation")
    assert check_expected(some_results(), [], 4)
    assert check_expected(some_results(), [row(0.37, 0.001)], 4)
    assert not check_expected(some_results(), [row(0.38, 0.001), row(0.37, 0.001)], 4)
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR", "INFO"]
    assert caplog.messages[0] == (
        "PASS: bbox > AP sanity check (actual vs. expected): 0.368 vs. mean=0.3700, std=0.001, range=(0.3660, 0.3740)"
    )
    assert caplog.messages[1].startswith("FAIL: bbox > AP")
    with pytest.raises(EvaluationError, match="segm AP was not evaluated"):
        check_expected(some_results(), [["segm", "AP", 0.3, 0.1]], 4)
    with pytest.raises(EvaluationError, match=r"is not \[task, metric, mean, std\]"):
        check_expected(some_results(), [["bbox", "AP", 0.3 if flat else [0.3]]], 4)


def test_detections_to_coco() -> None:
    boxes = torch.tensor([[10.0, 20.0, 29.0, 59.0], [0.0, 0.0, 0.0, 0.0]])
    found = BoxList(boxes, (80, 60), labels=torch.tensor([2, 1]), scores=torch.tensor([0.75, 0.5]))
    empty = BoxList(torch.zeros(0, 4), (80, 60), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    rles = [encode_mask(np.ones((60, 80), np.uint8))] * 2
    results = detections_to_coco([(7, found, rles), (8, empty, [])], {1: 3, 2: 5})
    assert results["bbox"] == [
        {"image_id": 7, "category_id": 5, "score": 0.75, "bbox": [10.0, 20.0, 20.0, 40.0]},
        {"image_id": 7, "category_id": 3, "score": 0.5, "bbox": [0.0, 0.0, 1.0, 1.0]},
    ]
    assert [entry["segmentation"] for entry in json.loads(json.dumps(results["segm"]))] == rles
    assert detections_to_coco([(7, found, None)], {1: 3, 2: 5}).keys() == {"bbox"}
    assert detections_to_coco([(8, empty, [])], {}) == {"bbox": [], "segm": []}


def test_detections_to_coco_bad_input() -> None:
    found = BoxList(torch.zeros(1, 4), (80, 60), labels=torch.tensor([4]), scores=torch.tensor([0.5]))
    with pytest.raises(EvaluationError, match="image 7: label 4 has no category id"):
        detections_to_coco([(7, found, None)], {1: 3})
    with pytest.raises(EvaluationError, match="image 7: 0 masks for 1 boxes"):
        detections_to_coco([(7, found, [])], {4: 3})
    with pytest.raises(EvaluationError, match="image 7: detections need labels and scores"):
        detections_to_coco([(7, BoxList(torch.zeros(1, 4), (80, 60)), None)], {4: 3})
