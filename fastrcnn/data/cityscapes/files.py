"""The files of Cityscapes: which there are, and what an annotation file says of instances."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from fastrcnn.data.cityscapes.labels import CLASS_IDS, FIRST_INSTANCE_ID
from fastrcnn.data.dataset import DataError

IMAGE_END = "_leftImg8bit.png"
ENDS = {"poly": "_gtFine_polygons.json", "mask": "_gtFine_instanceIds.png"}


@dataclass(frozen=True)
class Instance:
    """One instance: its class, its box of inclusive pixels, its shape as COCO's segmentation (polygons or RLE)."""

    class_name: str
    box: tuple[int, int, int, int]
    segmentation: Any


@dataclass(frozen=True)
class AnnotatedImage:
    """The size of an image in pixels and its instances."""

    width: int
    height: int
    instances: list[Instance]


def find_pairs(image_folder: Path, annotation_folder: Path, split: str, mode: str) -> list[tuple[str, Path]]:
    """(image relative to ``image_folder/split``, its annotation file), by name.

    Raises:
        DataError: a folder or an annotation is missing, or there is no image.
    """
    for folder in (image_folder / split, annotation_folder / split):
        if not folder.is_dir():
            raise DataError(f"Cityscapes folder {folder} does not exist")
    pairs = []
    for path in sorted((image_folder / split).glob(f"*/*{IMAGE_END}")):
        relative = path.relative_to(image_folder / split)
        annotation = annotation_folder / split / relative.parent / (path.name.removesuffix(IMAGE_END) + ENDS[mode])
        if not annotation.is_file():
            raise DataError(f"annotation file {annotation} does not exist (for image {path})")
        pairs.append((str(relative), annotation))
    if not pairs:
        raise DataError(f"Cityscapes folder {image_folder / split} holds no image CITY/*{IMAGE_END}")
    return pairs


def read_annotation(path: Path, mode: str) -> AnnotatedImage:
    """The instances of one annotation file.

    Raises:
        DataError: the file is damaged or not of the format.
    """
    return _read_polygons(path) if mode == "poly" else _read_instance_ids(path)


def read_ids(path: Path) -> NDArray[np.int32]:
    """[H, W]: the ids of an ``instanceIds.png``.

    Raises:
        DataError: it is not a gray image.
    """
    try:
        with Image.open(path) as image:
            ids = np.asarray(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"annotation file {path} is not an image that can be read: {error}") from None
    if ids.ndim != 2:
        raise DataError(f"annotation file {path} is a colour image; the ids are one gray value a pixel")
    return ids.astype(np.int32)


def instances_of(ids: NDArray[np.int32]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """(class, mask) of each instance in the order of the ids; groups and ids of other classes are left out."""
    names = {number: name for name, number in CLASS_IDS.items()}
    for value in np.unique(ids).tolist():
        if value < FIRST_INSTANCE_ID:
            continue
        if value // FIRST_INSTANCE_ID in names:
            yield names[value // FIRST_INSTANCE_ID], ids == value


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A bitmap [H, W] as compressed RLE."""
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def _read_instance_ids(path: Path) -> AnnotatedImage:
    ids = read_ids(path)
    instances = []
    for name, mask in instances_of(ids):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
        instances.append(Instance(name, box, encode(mask)))
    return AnnotatedImage(ids.shape[1], ids.shape[0], instances)


def _read_polygons(path: Path) -> AnnotatedImage:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    try:
        width, height, objects = int(content["imgWidth"]), int(content["imgHeight"]), list(content["objects"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: needs imgWidth, imgHeight and a list objects (Cityscapes polygons)") from None
    instances = []
    for number, item in enumerate(objects):
        try:
            name, deleted = item["label"], item.get("deleted", 0)
            if name not in CLASS_IDS or deleted:
                continue
            points = np.array(item["polygon"], dtype=np.float32).reshape(-1, 2)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}: objects[{number}] needs a label and a polygon of pairs of numbers") from None
        if len(points) == 0 or not np.isfinite(points).all():
            raise DataError(f"{path}: objects[{number}] ({name}) has an empty polygon or one that is not finite")
        (x1, y1), (x2, y2) = points.min(axis=0).astype(int).tolist(), points.max(axis=0).astype(int).tolist()
        instances.append(Instance(name, (x1, y1, x2, y2), [points.reshape(-1).tolist()]))
    return AnnotatedImage(width, height, instances)
