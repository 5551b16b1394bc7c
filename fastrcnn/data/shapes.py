"""A generated data set in COCO format: textured ellipses, triangles, rectangles, stars and bars that overlap.

    python -m fastrcnn.data.shapes --output datasets/shapes --num-train 400 --num-val 100 --image-size 192 --seed 0

writes ``images/{train,val}_*.jpg`` and ``annotations/instances_{train,val}.json``. It serves demonstrations and tests
where real data may not be shipped: small enough to learn on a CPU in minutes, with what makes real data hard in small:
occlusion, objects in several parts, objects cut by the border, thin objects. The polygons are exact: of the shape where
nothing covers it, of its visible pixels where something does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from fastrcnn.data.dataset import DataError
from fastrcnn.data.shapes_render import OUTLINES, Shape, draw_image
from fastrcnn.outlines import mask_to_polygon

CLASSES = tuple(OUTLINES)
_SPLITS = ("train", "val")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShapesImage:
    """A generated image: pixels uint8 [S, S, 3] and its objects from back to front, with their visible pixels."""

    pixels: NDArray[np.uint8]
    shapes: list[Shape]


def generate_image(
    seed: int,
    split: str,
    index: int,
    *,
    image_size: int = 192,
    classes: Sequence[str] = CLASSES,
    min_objects: int = 2,
    max_objects: int = 6,
) -> ShapesImage:
    """Image ``index`` of a split: the same whichever other images are generated, on every machine."""
    key = np.random.SeedSequence((seed & 0xFFFFFFFFFFFFFFFF, _SPLITS.index(split), index))
    rng = np.random.Generator(np.random.Philox(key))
    return ShapesImage(*draw_image(rng, image_size, classes, min_objects, max_objects))


def annotate(shape: Shape) -> dict[str, Any]:
    """``segmentation``, ``bbox`` and ``area`` of a shape, consistent with each other and with its visible pixels.

    The polygon is the drawn outline where that rasterises to the visible pixels but for a little rounding, else (the
    shape is partly covered, cut by the border or very thin) the outline of the pixels, a polygon for each connected
    part.
    """
    height, width = shape.full.shape
    polygons = [shape.outline]
    inside = bool((shape.outline >= 0).all() and (shape.outline <= (width, height)).all())
    if not inside or _agreement(_rasterise(polygons, height, width), shape.visible) < 0.98:
        polygons = [mask_to_polygon(part).astype(np.float64) for part in _connected_parts(shape.visible)]
    points = np.concatenate(polygons)
    low, high = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": [polygon.reshape(-1).tolist() for polygon in polygons],
        "bbox": np.round([*low, *(high - low)], 2).tolist(),
        "area": float(_rasterise(polygons, height, width).sum()),
        "iscrowd": 0,
    }


def write_dataset(
    output: str | Path,
    *,
    num_train: int = 400,
    num_val: int = 100,
    image_size: int = 192,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write the data set; returns ``ANNOTATIONS.json@IMAGE_FOLDER`` of each split.

    Raises:
        DataError: an unknown class, an image size under 64, or ``output`` is not empty and ``overwrite`` is not set.
    """
    output = Path(output)
    for name in classes:
        if name not in OUTLINES:
            raise DataError(f"unknown class {name!r}: choose from {', '.join(CLASSES)}")
    if not classes or len(set(classes)) != len(classes):
        raise DataError("classes must be given, each once")
    if image_size < 64:
        raise DataError(f"image size must be at least 64 pixels, got {image_size}")
    if min(num_train, num_val) < 0:
        raise DataError(f"the number of images must not be negative, got {num_train} and {num_val}")
    _prepare_folder(output, overwrite)
    names = {}
    for split, count in zip(_SPLITS, (num_train, num_val), strict=True):
        content = _write_images(output / "images", split, count, image_size, seed, classes)
        path = output / "annotations" / f"instances_{split}.json"
        # Last and in one piece: a folder without this file is visibly unfinished.
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
        names[split] = f"{path}@{output / 'images'}"
        logger.info("%s: %d images, %d objects", split, count, len(content["annotations"]))
    return names


def _prepare_folder(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} exists and is not a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise DataError(f"{output} is not empty: give another folder, or --overwrite to replace the data set in it")
        # Only what this program writes: a mistyped folder must not lose anything else.
        for split in _SPLITS:
            (output / "annotations" / f"instances_{split}.json").unlink(missing_ok=True)
            for image in (output / "images").glob(f"{split}_[0-9]*.jpg"):
                image.unlink()
    (output / "annotations").mkdir(parents=True, exist_ok=True)
    (output / "images").mkdir(exist_ok=True)


def _write_images(
    folder: Path, split: str, count: int, image_size: int, seed: int, classes: Sequence[str]
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        generated = generate_image(seed, split, index, image_size=image_size, classes=classes)
        file_name = f"{split}_{index:06d}.jpg"
        Image.fromarray(generated.pixels).save(folder / file_name, quality=95, subsampling=0)
        images.append({"id": index + 1, "file_name": file_name, "height": image_size, "width": image_size})
        for shape in generated.shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": list(classes).index(shape.name) + 1,
                    **annotate(shape),
                }
            )
    return {
        "info": {
            "description": "fastrcnn generated shapes",
            "split": split,
            "num_images": count,
            "image_size": image_size,
            "seed": seed,
            "classes": list(classes),
        },
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(classes, start=1)],
    }


def _rasterise(polygons: Sequence[NDArray[np.float64]], height: int, width: int) -> NDArray[np.bool_]:
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))).astype(bool)


def _agreement(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((first & second).sum() / max(1, (first | second).sum()))


def _connected_parts(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The parts of a mask whose pixels touch along an edge, in reading order."""
    padded = np.pad(mask, 1)
    row = padded.shape[1]
    left = bytearray(padded.tobytes())
    parts = []
    start = left.find(1)
    while start >= 0:
        left[start] = 0
        pixels = [start]
        for pixel in pixels:  # grows while it is walked
            for neighbour in (pixel - 1, pixel + 1, pixel - row, pixel + row):
                if left[neighbour]:
                    left[neighbour] = 0
                    pixels.append(neighbour)
        part = np.zeros(padded.size, dtype=bool)
        part[pixels] = True
        parts.append(part.reshape(padded.shape)[1:-1, 1:-1])
        start = left.find(1, start)
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrcnn.data.shapes", description="Generate the data set 'shapes'."
    )
    parser.add_argument("--output", required=True, help="folder to write; must be empty or new")
    parser.add_argument("--num-train", type=int, default=400, help="training images (%(default)s)")
    parser.add_argument("--num-val", type=int, default=100, help="validation images (%(default)s)")
    parser.add_argument("--image-size", type=int, default=192, help="height and width in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (%(default)s)")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="NAME", help=", ".join(CLASSES))
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        names = write_dataset(
            args.output,
            num_train=args.num_train,
            num_val=args.num_val,
            image_size=args.image_size,
            seed=args.seed,
            classes=args.classes,
            overwrite=args.overwrite,
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, name in names.items():
        print(f"{split}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
