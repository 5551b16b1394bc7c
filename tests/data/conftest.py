"""A small COCO data set on disk, with everything that is legal in one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# width, height: landscape, portrait and square images of different sizes
SIZES = [(64, 48), (48, 64), (50, 50), (72, 40), (40, 72), (64, 48), (66, 44)]


def small_coco() -> dict[str, Any]:
    """Seven images with ids in no order, three categories with gaps, polygons and both kinds of RLE, a crowd region."""
    ids = [30, 10, 70, 20, 60, 40, 50]
    images = [
        {"id": i, "width": w, "height": h, "file_name": f"{i:03d}.jpg"} for i, (w, h) in zip(ids, SIZES, strict=True)
    ]
    annotations: list[dict[str, Any]] = []

    def add(image_id: int, category_id: int, bbox: list[float], segmentation: Any, iscrowd: int = 0) -> None:
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": iscrowd,
                "segmentation": segmentation,
            }
        )

    add(30, 7, [10, 5, 20, 30], [[10, 5, 30, 5, 30, 35, 10, 35]])
    add(10, 3, [4.5, 6.5, 11, 21], [[4.5, 6.5, 15.5, 6.5, 15.5, 27.5], [20, 40, 30, 40, 30, 50, 20, 50]])
    add(10, 90, [20, 40, 10, 10], [[20, 40, 30, 40, 30, 50, 20, 50]])
    # Columns first: 24 columns of 50 rows, then 10 columns of 12 pixels each from row 20 on.
    columns = [24 * 50 + 20, 12] + [38, 12] * 9
    add(70, 3, [24, 20, 10, 12], {"size": [50, 50], "counts": [*columns, 2500 - sum(columns)]})
    add(20, 7, [0, 0, 30, 30], {"size": [40, 72], "counts": [0, 40 * 30, 40 * 42]}, iscrowd=1)
    add(20, 7, [5, 5, 20, 20], [[5, 5, 25, 5, 25, 25, 5, 25]])
    add(60, 90, [10, 20, 20, 30], [[10, 20, 30, 20, 30, 50, 10, 50]])
    add(40, 90, [10, 20, 20, 20], [[10, 20, 30, 20, 30, 40, 10, 40]])
    # image 50 has no annotation
    categories = [{"id": 90, "name": "cup"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}]
    return {"images": images, "annotations": annotations, "categories": categories}


class CocoFolder:
    """Writes a COCO data set; ``content`` may be changed before ``write``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.annotations = folder / "annotations.json"
        self.content = copy.deepcopy(small_coco())

    def write(self) -> CocoFolder:
        self.annotations.write_text(json.dumps(self.content))
        self.images.mkdir(exist_ok=True)
        for image in small_coco()["images"]:  # as they are on disk, whatever the test has made of the file
            path = self.images / image["file_name"]
            if not path.exists():
                rng = np.random.default_rng(image["id"])
                coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((image["width"], image["height"]), Image.Resampling.BILINEAR)
                picture.save(path, quality=90)
        return self

    def annotation(self, annotation_id: int) -> dict[str, Any]:
        return next(a for a in self.content["annotations"] if a["id"] == annotation_id)


@pytest.fixture
def coco_folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path)
