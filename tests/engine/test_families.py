"""The commands with RetinaNet, Keypoint R-CNN and an RPN alone: two iterations, an evaluation, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastrcnn import evaluate, train

RETINANET = """
_BASE_: "{base}"
MODEL:
  RETINANET_ON: True
  RPN_ONLY: True
  MASK_ON: False
  BACKBONE: {{CONV_BODY: R-50-FPN-RETINANET}}
  RESNETS: {{TRANS_FUNC: BottleneckWithGN, STEM_FUNC: StemWithGN}}
  RETINANET: {{NUM_CLASSES: {classes}, NUM_CONVS: 1, INFERENCE_TH: 0.001, STRADDLE_THRESH: -1}}
SOLVER: {{MAX_ITER: 2, STEPS: [1]}}
"""

PERSONS = """
_BASE_: "{base}"
MODEL:
  MASK_ON: False
  KEYPOINT_ON: True
  ROI_BOX_HEAD: {{NUM_CLASSES: 2}}
  ROI_KEYPOINT_HEAD: {{POOLER_RESOLUTION: 7, POOLER_SCALES: [0.25, 0.125, 0.0625, 0.03125], POOLER_SAMPLING_RATIO: 2,
    RESOLUTION: 28, SHARE_BOX_FEATURE_EXTRACTOR: False, CONV_LAYERS: [16, 16]}}
INPUT: {{MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 160, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 160}}
DATASETS:
  TRAIN: ["{data}/annotations/person_keypoints_train.json@{data}/images"]
  TEST: ["{data}/annotations/person_keypoints_val.json@{data}/images"]
SOLVER: {{MAX_ITER: 2, STEPS: [1]}}
"""


def losses_of(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines if line["type"] == "train"]


def write(folder: Path, text: str, **values: object) -> str:
    path = folder / "config.yaml"
    path.write_text(text.format(**values))
    return str(path)


def test_retinanet_trains_and_is_evaluated(small_config: str, shapes_data: Path, tmp_path: Path) -> None:
    """Its configurations set RPN_ONLY, as maskrcnn-benchmark's do: it is judged on classes all the same."""
    annotations = json.loads((shapes_data / "annotations" / "instances_train.json").read_text())
    config = write(tmp_path, RETINANET, base=small_config, classes=len(annotations["categories"]) + 1)
    output = tmp_path / "out"
    assert train.main(["--config-file", config, "OUTPUT_DIR", str(output)]) == 0
    losses = losses_of(output)
    assert len(losses) == 2
    for step in losses:
        assert set(step) == {"loss", "loss_retina_cls", "loss_retina_reg"}
        assert all(math.isfinite(value) for value in step.values())
    found = json.loads((output / "inference" / "instances_val" / "bbox.json").read_text())
    assert found
    assert {entry["category_id"] for entry in found} <= {c["id"] for c in annotations["categories"]}


def test_retinanet_names_its_own_key_for_the_classes(
    small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, RETINANET, base=small_config, classes=77)
    assert train.main(["--config-file", config, "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert "pass MODEL.RETINANET.NUM_CLASSES" in capsys.readouterr().err


def test_keypoints_train_on_photographs(small_config: str, shared_data: Path, tmp_path: Path) -> None:
    config = write(tmp_path, PERSONS, base=small_config, data=shared_data / "coco-cc")
    output = tmp_path / "out"
    assert train.main(["--config-file", config, "--skip-test", "OUTPUT_DIR", str(output)]) == 0
    losses = losses_of(output)
    assert len(losses) == 2
    for step in losses:
        assert list(step)[-1] == "loss_kp"
        assert all(math.isfinite(value) for value in step.values())
        assert 1 < step["loss_kp"] < 100
    arguments = ["--config-file", config, "OUTPUT_DIR", str(output), "TEST.VIS_IMAGES", "1"]
    assert evaluate.main(arguments) == 0
    folder = output / "inference" / "person_keypoints_val"
    assert json.loads((folder / "bbox.json").read_text())
    assert len(list((folder / "images").glob("*.png"))) == 1


def test_training_keypoints_needs_keypoints(
    small_config: str, shapes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, PERSONS, base=small_config, data=tmp_path)
    annotations = shapes_data / "annotations" / "instances_train.json"
    shapes = f"('{annotations}@{shapes_data / 'images'}',)"
    classes = len(json.loads(annotations.read_text())["categories"]) + 1
    overrides = ["DATASETS.TRAIN", shapes, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", str(classes)]
    assert train.main(["--config-file", config, "OUTPUT_DIR", str(tmp_path / "out"), *overrides]) == 2
    assert "has no keypoints, or no names for them: pass MODEL.KEYPOINT_ON False" in capsys.readouterr().err


def test_another_number_of_keypoints_is_refused(
    small_config: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, PERSONS, base=small_config, data=shared_data / "coco-cc")
    arguments = ["--config-file", config, "OUTPUT_DIR", str(tmp_path / "out")]
    assert train.main([*arguments, "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "4"]) == 2
    assert "pass MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES 17" in capsys.readouterr().err
