"""Pascal VOC detection data: a folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.

Meaning as in maskrcnn-benchmark's ``PascalVOCDataset``: boxes lose one pixel, since VOC counts from 1; difficult
objects are left out in training and kept, with their flag, for the evaluation. Unlike there, all annotations are read
and checked when the data set is made, coordinates may be fractions (some of the 2012 ones are), and a missing
``difficult`` means 0.
"""

from __future__ import annotations

import hashlib
import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastrcnn.data.coco_file import StringTable
from fastrcnn.data.dataset import DataError, ImageInfo, Sample
from fastrcnn.data.image import read_annotated_image
from fastrcnn.structures import BoxList

logger = logging.getLogger(__name__)

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


@dataclass(frozen=True)
class VocObject:
    """An object of an annotation file: label, box (x1, y1, x2, y2) from pixel 0 on, whether it is difficult."""

    label: int
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocAnnotation:
    """The content of an annotation file; sizes in pixels."""

    width: int
    height: int
    objects: list[VocObject]


class VocDataset:
    """Images with boxes and labels from a Pascal VOC folder.

    Args:
        folder: such as ``VOCdevkit/VOC2007``.
        split: a file of ``ImageSets/Main`` without ``.txt``: ``train``, ``val``, ``trainval``, ``test`` or one of your
            own; an image name a line.
        keep_difficult: objects marked difficult are ground truth too (evaluation); False leaves them out (training).
        remove_images_without_annotations: keep only images with an object left.
        class_names: of own data in this format, in the order of the labels; VOC's twenty by default.
        name: how messages call the data set.

    Attributes:
        class_names: ``"__background__"`` and the classes.
        label_to_category_id: each label is its own category id.
        has_masks: False.
        fingerprint: SHA-256 over the annotation files.

    Raises:
        DataError: a file is missing or not what it should be; the message names it and the object.
    """

    has_masks = False

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        keep_difficult: bool = False,
        remove_images_without_annotations: bool = False,
        class_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.name = name or f"{folder} {split}"
        self.class_names = ["__background__", *(class_names or CLASSES)]
        self.label_to_category_id = {label: label for label in range(1, len(self.class_names))}
        names = read_split(self.folder / "ImageSets" / "Main" / f"{split}.txt")
        labels = {class_name: label for label, class_name in enumerate(self.class_names) if label}
        digest = hashlib.sha256()
        files = {path.stem: path.name for path in sorted(self._folder("JPEGImages").iterdir())}
        ids, sizes, kept_names, counts = [], [], [], []
        boxes: list[tuple[float, float, float, float]] = []
        all_labels, difficult = [], []
        self.num_difficult = 0
        for number, image in enumerate(names, start=1):
            path = self.folder / "Annotations" / f"{image}.xml"
            if image not in files:
                raise DataError(f"{self.folder / 'JPEGImages'} has no image {image} (of {split}.txt)")
            content = _read(path)
            digest.update(content)
            annotation = parse_annotation(content, path, labels)
            objects = [o for o in annotation.objects if keep_difficult or not o.difficult]
            self.num_difficult += sum(o.difficult for o in annotation.objects)
            if remove_images_without_annotations and not objects:
                continue
            ids.append(number)
            sizes.append((annotation.height, annotation.width))
            kept_names.append(files[image])
            counts.append(len(objects))
            boxes += [o.box for o in objects]
            all_labels += [o.label for o in objects]
            difficult += [o.difficult for o in objects]
        self.fingerprint = digest.hexdigest()
        self._ids, self._files = np.array(ids, dtype=np.int64), StringTable(kept_names)
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self._first = np.cumsum([0, *counts])
        self._boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        self._labels, self._difficult = np.array(all_labels, dtype=np.int64), np.array(difficult, dtype=bool)
        logger.info(
            "%s: %d of %d images, %d objects of %d classes, %d difficult ones %s",
            self.name,
            len(self),
            len(names),
            len(self._labels),
            self.num_classes - 1,
            self.num_difficult,
            "among them" if keep_difficult else "left out",
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        info = self.image_info(index)
        image = read_annotated_image(self.folder / "JPEGImages" / info["file_name"], info, "its annotation")
        return Sample(image, self.target(index), info["id"], index)

    def target(self, index: int) -> BoxList:
        """The ground truth of an image in its original frame; boxes are clipped, and dropped if without extent."""
        return self.ground_truth(index)[0].clip_to_image(remove_empty=True)

    def ground_truth(self, index: int) -> tuple[BoxList, NDArray[np.bool_]]:
        """The objects as they are annotated, and which of them are difficult; for the evaluation."""
        info = self.image_info(index)
        span = slice(int(self._first[index]), int(self._first[index + 1]))
        boxes = BoxList(
            torch.from_numpy(self._boxes[span].copy()),
            (info["width"], info["height"]),
            labels=torch.from_numpy(self._labels[span].copy()),
        )
        return boxes, self._difficult[span].copy()

    def image_info(self, index: int) -> ImageInfo:
        """The image's line in the split (the id), its size and file name."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        height, width = self._sizes[index].tolist()
        return {"id": int(self._ids[index]), "height": height, "width": width, "file_name": self._files[index]}

    def _folder(self, name: str) -> Path:
        if not (self.folder / name).is_dir():
            raise DataError(f"{self.folder} has no folder {name}: it is not a Pascal VOC data set")
        return self.folder / name

    def __repr__(self) -> str:
        return f"VocDataset({self.name}, num_images={len(self)}, num_objects={len(self._labels)})"


def read_split(path: Path) -> list[str]:
    """The image names of a file of ``ImageSets/Main``, the first word of each line.

    Files of one class (``cat_train.txt``) have a second word that says whether the image shows it: refused, since
    training on all of them is not what is meant.

    Raises:
        DataError: the file is missing, empty, of one class, or names an image twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"split file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"split file {path} cannot be read: {error}") from None
    names = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) > 1:
            raise DataError(f"{path}:{number}: expected one image name, got {line.strip()!r} (a list of one class?)")
        names += words
    if not names:
        raise DataError(f"split file {path} names no image")
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"split file {path} names image {twice} twice")
    return names


def parse_annotation(content: bytes, path: Path, labels: dict[str, int]) -> VocAnnotation:
    """An annotation file.

    Args:
        labels: {class name in lower case: label}.

    Raises:
        DataError: it is not XML, or lacks a size or a part of an object.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not valid XML: {error}") from None
    width, height = (_number(root, f"size/{side}", path, "the image") for side in ("width", "height"))
    if width < 1 or height < 1:
        raise DataError(f"{path}: the image's size is {width:g}x{height:g}")
    objects = []
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").lower().strip()
        what = f"object {number} ({name or 'without a name'})"
        if name not in labels:
            raise DataError(f"{path}: {what}: unknown class; known are {', '.join(labels)}")
        x1, y1, x2, y2 = (_number(element, f"bndbox/{k}", path, what) - 1 for k in ("xmin", "ymin", "xmax", "ymax"))
        if x2 < x1 or y2 < y1:
            raise DataError(f"{path}: {what}: the box ends before it begins")
        hard = element.find("difficult") is not None and _number(element, "difficult", path, what) == 1
        objects.append(VocObject(labels[name], (x1, y1, x2, y2), hard))
    return VocAnnotation(int(width), int(height), objects)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"annotation file {path} does not exist (VOC's test sets of 2012 have none)") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None


def _number(element: ElementTree.Element, tag: str, path: Path, what: str) -> float:
    text = element.findtext(tag)
    if text is None:
        raise DataError(f"{path}: {what} has no {tag}")
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{path}: {what}: {tag} is {text.strip()!r}, not a number") from None
    if not np.isfinite(value):
        raise DataError(f"{path}: {what}: {tag} is {text.strip()!r}")
    return value
