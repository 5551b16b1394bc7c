"""Which benchmark judges the predictions on a data set, and which files it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrcnn.data import CityscapesDataset, CocoDataset, DetectionDataset, VocDataset, dataset_to_coco
from fastrcnn.engine.outputs import write_json, write_text
from fastrcnn.evaluation import (
    CityscapesImage,
    Results,
    detections_to_coco,
    evaluate_cityscapes,
    evaluate_coco,
    evaluate_proposals,
    evaluate_voc,
)
from fastrcnn.evaluation.voc import result_text
from fastrcnn.structures import BoxList

logger = logging.getLogger("fastrcnn.inference")


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        index, image_id: of the image in the data set.
        found: boxes, scores and labels (proposals: objectness) in the frame of the original image, on the host.
        masks: COCO RLE of each detection in the original image; None from a model without masks.
    """

    index: int
    image_id: int
    found: BoxList
    masks: list[dict[str, Any]] | None


Judge = Callable[[Sequence[Prediction], Path], Results]


def judge_for(dataset: DetectionDataset, *, proposals: bool = False) -> Judge:
    """What turns the predictions on all images of ``dataset``, in its order, into results and files in a folder.

    Pascal VOC and Cityscapes by their own benchmarks (VOC has no masks), all others by COCO's: a COCO file as it is,
    any other data set, also several joined, by what its targets hold.

    Args:
        proposals: the predictions are those of a region proposal network alone: average recall on every data set.
    """
    if proposals:
        return lambda predictions, folder: _judge_proposals(_coco_truth(dataset), predictions, folder)
    if isinstance(dataset, VocDataset):
        return lambda predictions, folder: _judge_voc(dataset, predictions, folder)
    if isinstance(dataset, CityscapesDataset):
        return lambda predictions, folder: _judge_cityscapes(dataset, predictions, folder)
    return lambda predictions, folder: _judge_coco(dataset, predictions, folder)


def _coco_truth(dataset: DetectionDataset) -> Path | dict[str, Any]:
    return dataset.annotation_file if isinstance(dataset, CocoDataset) else dataset_to_coco(dataset)


def _with_ids(truth: Path | Mapping[str, Any], predictions: Sequence[Prediction]) -> list[tuple[int, Prediction]]:
    """The predictions with the image ids of the ground truth, which are new where data sets were joined."""
    if isinstance(truth, Path):
        return [(p.image_id, p) for p in predictions]
    return [(truth["images"][p.index]["id"], p) for p in predictions]


def _judge_coco(dataset: DetectionDataset, predictions: Sequence[Prediction], folder: Path) -> Results:
    truth = _coco_truth(dataset)
    results = detections_to_coco(
        [(image_id, p.found, p.masks) for image_id, p in _with_ids(truth, predictions)], dataset.label_to_category_id
    )
    for kind, detections in results.items():
        write_json(folder / f"{kind}.json", detections)
    if "segm" in results and not dataset.has_masks:
        logger.warning("the data set has no masks: those that were found are written, not evaluated")
        del results["segm"]
    if "keypoints" in results and not getattr(dataset, "has_keypoints", False):
        logger.warning("the data set has no keypoints: those that were found are written, not evaluated")
        del results["keypoints"]
    return evaluate_coco(truth, results)


def _judge_voc(dataset: VocDataset, predictions: Sequence[Prediction], folder: Path) -> Results:
    found = detections_to_coco([(p.image_id, p.found, None) for p in predictions], dataset.label_to_category_id)
    write_json(folder / "bbox.json", found["bbox"])
    results = evaluate_voc(
        [dataset.ground_truth(p.index) for p in predictions], [p.found for p in predictions], dataset.class_names
    )
    text = result_text(results)
    write_text(folder / "result.txt", text)
    logger.info("\n%s", text)
    return results


def _judge_cityscapes(dataset: CityscapesDataset, predictions: Sequence[Prediction], folder: Path) -> Results:
    found = detections_to_coco([(p.image_id, p.found, p.masks) for p in predictions], dataset.label_to_category_id)
    for kind, detections in found.items():
        write_json(folder / f"{kind}.json", detections)
    images = []
    for p in predictions:
        labels, masks, boxes, ignored = dataset.ground_truth(p.index)
        images.append(CityscapesImage(labels, masks, boxes, p.found, p.masks, ignored))
    return evaluate_cityscapes(images, dataset.class_names, dataset.evaluated)


def _judge_proposals(truth: Path | dict[str, Any], predictions: Sequence[Prediction], folder: Path) -> Results:
    pairs = _with_ids(truth, predictions)
    folder.mkdir(parents=True, exist_ok=True)
    # Of a thousand boxes an image JSON would be half a gigabyte for COCO's 5000 images.
    torch.save(
        {
            "image_ids": [image_id for image_id, _ in pairs],
            "boxes": [p.found.boxes for _, p in pairs],
            "objectness": [p.found.objectness for _, p in pairs],
        },
        folder / "box_proposals.pth",
    )
    return evaluate_proposals(truth, [(image_id, p.found) for image_id, p in pairs])
