"""Any data set as ground truth in COCO's format, so that any data set can be judged as COCO judges.

maskrcnn-benchmark's ``convert_abstract_to_coco``: areas are counted on the bitmaps, where there are masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fastrcnn.data.dataset import ConcatDataset, DetectionDataset
from fastrcnn.structures import BoxList, SegmentationMask


def dataset_to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    """The ground truth of ``dataset`` with ``images``, ``annotations`` and ``categories``.

    Boxes count both end pixels; masks become compressed RLE; keypoints are kept. Data sets with a method ``target``
    (all built-in ones) are not asked for pixels. Image ids are the data set's where they are unique; else (several data
    sets joined) the position, from 1.
    """
    infos = [dataset.image_info(index) for index in range(len(dataset))]
    ids = [info["id"] for info in infos]
    if len(set(ids)) != len(ids):
        ids = list(range(1, len(infos) + 1))
    skeleton = getattr(dataset, "skeleton", None)
    categories: list[dict[str, Any]] = [
        {"id": category, "name": dataset.class_names[label]} for label, category in dataset.label_to_category_id.items()
    ]
    if skeleton is not None:
        categories = [{**category, "keypoints": list(skeleton.names)} for category in categories]
    annotations: list[dict[str, Any]] = []
    for index, image_id in enumerate(ids):
        target = target_of(dataset, index)
        segmentations = _rles(target)
        assert target.labels is not None
        for i, (box, label) in enumerate(
            zip(target.convert("xywh").boxes.tolist(), target.labels.tolist(), strict=True)
        ):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": dataset.label_to_category_id[label],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            if segmentations is not None:
                annotation["segmentation"] = segmentations[i]
                annotation["area"] = int(coco_mask.area(segmentations[i]))
            if target.keypoints is not None:
                points = target.keypoints.points[i]
                annotation["keypoints"] = points.flatten().tolist()
                annotation["num_keypoints"] = int((points[:, 2] > 0).sum())
            annotations.append(annotation)
    images = [{**info, "id": image_id} for info, image_id in zip(infos, ids, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def target_of(dataset: Any, index: int) -> BoxList:
    """The ground truth of an image in its original frame, without reading the pixels where that can be done."""
    if isinstance(dataset, ConcatDataset):
        which, inner = dataset.locate(index)
        return target_of(dataset.datasets[which], inner)
    target = getattr(dataset, "target", None)
    return dataset[index].target if target is None else target(index)


def _rles(target: BoxList) -> list[dict[str, Any]] | None:
    if not isinstance(target.masks, SegmentationMask):
        return None
    encoded = coco_mask.encode(np.asfortranarray(target.masks.decode().numpy().transpose(1, 2, 0)))
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]
