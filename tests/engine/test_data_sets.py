"""Each kind of data set through the commands: two steps of training, then its evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrcnn import evaluate, train
from fastrcnn.data import Catalog, VocDataset
from tests.data.test_cityscapes import write_cityscapes
from tests.data.test_voc import voc_object, write_voc
from tests.models.inputs import CONFIGS, KEYPOINTS, SMALL

TWO_STEPS = ["SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


def run(config: str, output: Path, *opts: str, catalog: Catalog | None = None) -> dict[str, Any]:
    """Train two steps; the summary of the evaluation."""
    arguments = ["--config-file", config, "OUTPUT_DIR", str(output), *TWO_STEPS, *opts]
    assert train.main(arguments, catalog) == 0
    (summary,) = output.glob("inference/*/summary.json")
    losses = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in losses if "loss" in line)
    return json.loads(summary.read_text())


def test_voc(small_config: str, tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "format-samples/datumaro-voc_dataset/voc_dataset1"
    names = f"('voc:{folder}@train',)"
    options = ["DATASETS.TRAIN", names, "DATASETS.TEST", names, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "21"]
    summary = run(small_config, tmp_path, *options, "MODEL.MASK_ON", "False", "SOLVER.IMS_PER_BATCH", "1")
    assert set(summary["results"]["voc"]) == {"mAP07", "mAP12", "per_class"}
    assert summary["results"]["voc"]["per_class"]["cat"] is not None
    assert summary["results"]["voc"]["per_class"]["dog"] is None
    folder = tmp_path / "inference/voc_dataset1_train"
    assert (folder / "result.txt").read_text().startswith("mAP: ")
    assert json.loads((folder / "bbox.json").read_text())


@pytest.mark.parametrize("kind", ["cityscapes", "cityscapes-masks"])
def test_cityscapes(small_config: str, tmp_path: Path, kind: str) -> None:
    root = write_cityscapes(tmp_path / "city")
    options = ["DATASETS.OWN", f"(('street', '{kind}:{root}@train'),)", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "11"]
    summary = run(
        small_config, tmp_path / "run", *options, "DATASETS.TRAIN", "('street',)", "DATASETS.TEST", "('street',)"
    )
    assert summary["dataset"] == "street"
    for task in ("bbox", "segm"):
        assert set(summary["results"][task]) == {"AP", "AP50", "AP75", "per_class"}
        assert 0 <= summary["results"][task]["AP"] <= 1
        assert "caravan" not in summary["results"][task]["per_class"]
        assert json.loads((tmp_path / f"run/inference/street/{task}.json").read_text())


def test_cityscapes_sample(small_config: str, tmp_path: Path, shared_data: Path) -> None:
    root = shared_data / "format-samples/datumaro-cityscapes_dataset/train_dataset"
    name = f"('cityscapes-masks:{root}@test',)"
    options = ["DATASETS.TRAIN", name, "DATASETS.TEST", name, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "11"]
    summary = run(small_config, tmp_path, *options)
    assert summary["num_images"] == 2
    assert summary["results"]["segm"]["AP"] == -1, "the instances are smaller than what the benchmark looks at"


def test_proposals(small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "(('box_proposal', 'AR@100', 0.5, 1.0), ('box_proposal', 'ARs@1000', 9.0, 0.1))"
    options = ["MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False", "TEST.EXPECTED_RESULTS", expected]
    summary = run(small_config, tmp_path, *options)
    found = summary["results"]["box_proposal"]
    sizes = {f"AR{size}@{limit}" for size in ("", "s", "m", "l") for limit in (100, 1000)}
    assert set(found) == sizes | {"per_class"}
    assert 0 <= found["AR@100"] <= found["AR@1000"] <= 1
    saved = torch.load(next(tmp_path.glob("inference/*/box_proposals.pth")), weights_only=True)
    assert len(saved["boxes"]) == len(saved["image_ids"]) == 4
    assert summary["num_detections"] == sum(len(boxes) for boxes in saved["boxes"])
    log = "".join(capsys.readouterr())
    assert "PASS: box_proposal > AR@100" in log
    assert "FAIL: box_proposal > ARs@1000" in log


def test_keypoints(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "coco-cc-tiny"
    name = f"('{folder}/annotations/person_keypoints_val.json@{folder}/images',)"
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "128", "SOLVER.IMS_PER_BATCH", "1"]
    heads = ["MODEL.ROI_HEADS.SCORE_THRESH", "0.0", "MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "5", *KEYPOINTS]
    options = [*SMALL, *heads, *sizes, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2", "TEST.IMS_PER_BATCH", "1"]
    options += ["DATASETS.TRAIN", name, "DATASETS.TEST", name, "SOLVER.STEPS", "(1,)", "SOLVER.BASE_LR", "0.0001"]
    summary = run(str(CONFIGS / "e2e_faster_rcnn_R_50_FPN_1x.yaml"), tmp_path, *options)
    assert list(summary["results"]) == ["bbox", "keypoints"]
    assert 0 <= summary["results"]["keypoints"]["AP"] <= 1
    results = json.loads(next(tmp_path.glob("inference/*/keypoints.json")).read_text())
    assert results
    assert all(len(result["keypoints"]) == 51 for result in results)


def test_proposals_on_voc(small_config: str, tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", {"a": [voc_object("cat", 5, 5, 40, 40)]})
    name = f"('voc:{folder}@train',)"
    options = ["DATASETS.TRAIN", name, "DATASETS.TEST", name, "MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False"]
    found = run(small_config, tmp_path / "run", *options)["results"]["box_proposal"]
    assert 0 <= found["ARm@1000"] <= 1
    assert found["ARs@1000"] == -1


def test_augmented_evaluation(small_config: str, tmp_path: Path) -> None:
    """The same model evaluated plainly, in one view, and in three: the first two agree, masks come with all."""
    results = [run(small_config, tmp_path / "run")["results"]]
    for name, options in (
        ("one", ["TEST.BBOX_AUG.ENABLED", "True"]),
        ("three", ["TEST.BBOX_AUG.ENABLED", "True", "TEST.BBOX_AUG.H_FLIP", "True", "TEST.BBOX_AUG.SCALES", "(96,)"]),
    ):
        weights = ["--weights", str(tmp_path / "run/model_final.pth"), "OUTPUT_DIR", str(tmp_path / name)]
        assert evaluate.main(["--config-file", str(tmp_path / "run/config.yml"), *weights, *options]) == 0
        (summary,) = (tmp_path / name).glob("inference/*/summary.json")
        results.append(json.loads(summary.read_text())["results"])
    assert results[0] == results[1]
    assert set(results[2]) == {"bbox", "segm"}
    boxes = [
        json.loads(next((tmp_path / n).glob("inference/*/bbox.json")).read_text()) for n in ("run", "one", "three")
    ]
    assert boxes[0] == boxes[1] != boxes[2]


def test_registered_by_function(small_config: str, tmp_path: Path) -> None:
    """A data set of one's own class, judged as COCO does by what its targets hold; proposals of VOC as well."""
    folder = write_voc(
        tmp_path / "voc", {"a": [voc_object("cat", 5, 5, 40, 40)], "b": [voc_object("dog", 1, 1, 30, 20)]}
    )

    class Own:
        has_masks = False

        def __init__(self) -> None:
            self._inner = VocDataset(folder, "train", class_names=["cat", "dog"])
            self.class_names = self._inner.class_names
            self.label_to_category_id = {1: 7, 2: 3}
            self.num_classes = 3

        def __len__(self) -> int:
            return len(self._inner)

        def __getitem__(self, index: int) -> Any:
            return self._inner[index]

        def image_info(self, index: int) -> Any:
            return self._inner.image_info(index)

    asked: list[bool] = []

    def open_own(is_train: bool) -> Any:
        asked.append(is_train)
        return Own()

    catalog = Catalog()
    catalog.register("own", open_own)
    names = ["DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "3"]
    summary = run(small_config, tmp_path / "run", *names, "MODEL.MASK_ON", "False", catalog=catalog)
    assert asked == [True, False]
    assert set(summary["results"]["bbox"]["per_class"]) == {"cat", "dog"}
    results = json.loads((tmp_path / "run/inference/own/bbox.json").read_text())
    assert {result["category_id"] for result in results} <= {3, 7}
    again = ["--config-file", str(tmp_path / "run/config.yml"), "OUTPUT_DIR", str(tmp_path / "run")]
    assert evaluate.main(again, catalog) == 0
    assert evaluate.main(again) == 2, "the name is known to that catalog alone"
