"""From detections in the network's frame to COCO results in the original image."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.collate import Normalization
from fastrcnn.data.loader import make_test_loader
from fastrcnn.data.transforms import TestTransform
from fastrcnn.engine import inference
from fastrcnn.engine.in_order import InOrder
from fastrcnn.engine.inference import (
    as_metrics,
    evaluate_dataset,
    in_original_image,
    predict,
    result_folders,
)
from fastrcnn.engine.judge import judge_for
from fastrcnn.engine.signals import Stopped, StopSignals
from fastrcnn.structures import BoxList, ImageList
from tests.engine.standin import CPU

T = TypeVar("T")


class Oracle(nn.Module):
    """Finds the ground truth: boxes resized to the network's input, masks of the whole box."""

    def __init__(self, dataset: CocoDataset, wrong: bool = False) -> None:
        super().__init__()
        self.by_id = {dataset.image_info(i)["id"]: dataset.target(i) for i in range(len(dataset))}
        self.wrong = wrong

    def forward(self, images: ImageList) -> list[BoxList]:
        assert not self.training
        assert not torch.is_grad_enabled()
        found = []
        for (height, width), image_id in zip(images.image_sizes, images.ids.tolist(), strict=True):
            truth = self.by_id[image_id].resize((width, height))
            n = len(truth)
            boxes = truth.boxes + (1000 if self.wrong else 0)
            masks = torch.ones((n, 1, 28, 28))
            scores = torch.linspace(0.9, 0.8, n) if n else torch.zeros(0)
            found.append(BoxList(boxes, truth.size, labels=truth.labels, scores=scores, masks=masks))
        return found


@pytest.fixture(scope="module")
def dataset(shapes_data: Path) -> CocoDataset:
    return CocoDataset(shapes_data / "annotations/instances_val.json", shapes_data / "images")


def loader(dataset: CocoDataset, size: int = 150) -> Any:
    return make_test_loader(
        dataset,
        ims_per_batch=3,
        normalization=Normalization(size_divisible=32),
        transform=TestTransform(size, 2 * size),
    )


def run(dataset: CocoDataset, folder: Path, **kwargs: Any) -> Any:
    return evaluate_dataset(
        kwargs.pop("model", None) or Oracle(dataset),
        loader(dataset),
        name="val",
        num_images=len(dataset),
        judge=judge_for(dataset),
        output_dir=folder,
        world=CPU,
        **kwargs,
    )


def test_the_truth_scores_one(dataset: CocoDataset, tmp_path: Path) -> None:
    """Only if boxes go back to the original size, labels to category ids and widths count both end pixels."""
    drawn = []
    results = run(dataset, tmp_path, about={"iteration": 7}, draw=lambda found, folder: drawn.append((found, folder)))
    assert results.stats["bbox"]["AP"] == pytest.approx(1.0)
    assert 0 < results.stats["segm"]["AP50"] <= 1.0
    assert as_metrics(results)["bbox/AP"] == results.stats["bbox"]["AP"]
    boxes = json.loads((tmp_path / "bbox.json").read_text())
    assert len(boxes) == dataset.num_instances == len(json.loads((tmp_path / "segm.json").read_text()))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iteration"] == 7
    assert summary["num_detections"] == dataset.num_instances
    assert summary["results"]["bbox"]["AP"] == results.stats["bbox"]["AP"]
    ((found, folder),) = drawn
    assert [p.index for p in found] == list(range(len(dataset)))
    assert folder == tmp_path / "images"


def test_wrong_boxes_score_nothing(dataset: CocoDataset, tmp_path: Path) -> None:
    assert run(dataset, tmp_path, model=Oracle(dataset, wrong=True)).stats["bbox"]["AP"] == 0.0


def test_boxes_are_scaled_plainly_and_masks_pasted() -> None:
    found = BoxList(
        torch.tensor([[20.0, 40.0, 60.0, 80.0]]),
        (200, 100),
        labels=torch.tensor([1]),
        scores=torch.tensor([0.5]),
        masks=torch.ones((1, 1, 28, 28)),
    )
    prediction = in_original_image(found, 5, 0, (50, 100))
    assert prediction.found.boxes.tolist() == [[10.0, 20.0, 30.0, 40.0]]
    assert prediction.found.size == (100, 50)
    assert prediction.found.masks is None
    assert prediction.masks is not None
    assert prediction.masks[0]["size"] == [50, 100]


def test_no_detections(dataset: CocoDataset, tmp_path: Path) -> None:
    class Blind(nn.Module):
        def forward(self, images: ImageList) -> list[BoxList]:
            fields = {"labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            masks = torch.zeros((0, 1, 28, 28))
            return [BoxList(torch.zeros((0, 4)), (w, h), masks=masks, **fields) for h, w in images.image_sizes]

    results = run(dataset, tmp_path, model=Blind())
    assert results.stats["bbox"]["AP"] == 0.0
    assert json.loads((tmp_path / "segm.json").read_text()) == []


def test_masks_pasted_in_other_threads_are_the_same(dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device they are; here the threads are asked for."""
    plain, _ = predict(Oracle(dataset), loader(dataset), device=CPU.device)
    used = []

    class Threaded(InOrder[T]):
        def __init__(self, threads: int) -> None:
            used.append(threads)
            super().__init__(2, ahead=1)

    monkeypatch.setattr(inference, "InOrder", Threaded)
    beside, _ = predict(Oracle(dataset), loader(dataset), device=CPU.device)
    assert used == [0]
    assert [(p.index, p.image_id, p.masks) for p in beside] == [(p.index, p.image_id, p.masks) for p in plain]
    for mine, theirs in zip(beside, plain, strict=True):
        assert torch.equal(mine.found.boxes, theirs.found.boxes)


def test_a_signal_ends_the_evaluation(dataset: CocoDataset) -> None:
    with StopSignals(CPU) as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="while evaluating"):
            predict(Oracle(dataset), loader(dataset), device=CPU.device, stop=stop)


def test_folders_of_data_sets() -> None:
    names = ["coco_2014_minival", "a/instances_val.json@images", "b/instances_val.json@images", "x/y"]
    assert result_folders(names) == ["coco_2014_minival", "instances_val", "instances_val.2", "x_y"]
    assert result_folders(["voc:d/VOC2007@val"]) == ["VOC2007_val"]
