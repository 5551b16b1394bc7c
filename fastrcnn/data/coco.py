"""COCO detection and keypoint data: a JSON file of annotations and a folder of images.

Meaning as in maskrcnn-benchmark's ``COCODataset``: images in the order of their ids, crowd regions dropped,
contiguous labels, boxes of inclusive pixels clipped to the image. Unlike there, faults of the file are found when it
is loaded and are either an error that names the annotation or a count in one log line, and annotations are held as a
few flat arrays, so that worker processes share them instead of copying millions of Python objects.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import torch

from fastrcnn.data.coco_file import (
    ImageTable,
    InstanceTable,
    parse_annotations,
    parse_images,
    paused_garbage_collection,
    read_json,
)
from fastrcnn.data.dataset import DataError, ImageInfo, Sample
from fastrcnn.data.image import read_annotated_image
from fastrcnn.structures import PERSON, BoxList, Keypoints, SegmentationMask, Skeleton

logger = logging.getLogger(__name__)

MIN_KEYPOINTS_PER_IMAGE = 10


class CocoDataset:
    """Images with boxes, labels, masks and keypoints from a COCO annotation file.

    Args:
        annotation_file: JSON with ``images``, ``annotations`` and ``categories``.
        image_folder: where the files named by ``images[].file_name`` lie.
        remove_images_without_annotations: keep only images with at least one instance left (training); otherwise keep
            all (evaluation). Crowd regions and boxes that are not wider and higher than one pixel are no instances.
            Where the file has keypoints, an image must have at least ten labelled ones (maskrcnn-benchmark's rule), or
            as many as an instance has.
        name: how messages call the data set; the annotation file by default.

    Attributes:
        class_names: ``"__background__"`` and the category names, by contiguous label.
        label_to_category_id: contiguous labels 1..K, in the order of the category ids, to the file's category ids.
        has_masks: whether any annotation has a polygon or an RLE.
        has_keypoints: whether any annotation has keypoints, and their names are known.
        skeleton: the keypoints' names and connections: the category's, else COCO's for 17 keypoints.
        dropped: number of annotations (or polygons) left out, by reason.
        fingerprint: SHA-256 of the annotation file.

    Raises:
        DataError: on any fault that would make the ground truth wrong.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_folder: str | Path,
        *,
        remove_images_without_annotations: bool = False,
        name: str | None = None,
    ) -> None:
        self.annotation_file = Path(annotation_file)
        self.image_folder = Path(image_folder)
        self.name = name or str(annotation_file)
        with paused_garbage_collection():
            images, instances, total = self._load(remove_images_without_annotations)
        self._images: ImageTable = images
        self._instances: InstanceTable = instances
        # Instances are sorted by image: image i owns the range [first[i], first[i + 1]).
        self._first = np.searchsorted(instances.image, np.arange(len(images.ids) + 1))
        self.has_masks = instances.has_masks
        self.has_keypoints = self.skeleton is not None
        self._check_files()
        self._log_summary(total)

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.class_names)

    @property
    def num_instances(self) -> int:
        """Number of ground-truth boxes."""
        return len(self._instances.labels)

    def __len__(self) -> int:
        return len(self._images.ids)

    def __getitem__(self, index: int) -> Sample:
        info = self.image_info(index)
        image = read_annotated_image(self.image_folder / info["file_name"], info, str(self.annotation_file))
        return Sample(image, self.target(index), info["id"], index)

    def target(self, index: int) -> BoxList:
        """The ground truth of an image in its original frame, without reading the image."""
        images, table = self._images, self._instances
        size = (int(images.widths[index]), int(images.heights[index]))
        span = slice(int(self._first[index]), int(self._first[index + 1]))
        masks = None
        if self.has_masks:
            try:
                masks = SegmentationMask.from_coco(table.segmentations(span), size)
            except ValueError as error:
                raise DataError(
                    f"{self.annotation_file}: an RLE of image {int(images.ids[index])} cannot be decoded: {error}"
                ) from None
        return BoxList(
            boxes=torch.from_numpy(table.boxes[span].copy()),
            size=size,
            labels=torch.from_numpy(table.labels[span].astype(np.int64)),
            masks=masks,
            keypoints=self._keypoints(span, size),
        )

    def _keypoints(self, span: slice, size: tuple[int, int]) -> Keypoints | None:
        if not self.has_keypoints:
            return None
        return Keypoints(torch.from_numpy(self._instances.keypoints[span].copy()), size, self.skeleton)

    def image_info(self, index: int) -> ImageInfo:
        """Id, height, width and file name of the image at ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        images = self._images
        return {
            "id": int(images.ids[index]),
            "height": int(images.heights[index]),
            "width": int(images.widths[index]),
            "file_name": images.file_names[index],
        }

    def _load(self, remove_images_without_annotations: bool) -> tuple[ImageTable, InstanceTable, int]:
        """The images and instances to use, and the number of images in the file."""
        raw, content = read_json(self.annotation_file)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        del raw

        categories = _categories(content, self.annotation_file)
        self.class_names = ["__background__", *categories.values()]
        self.label_to_category_id = dict(enumerate(categories, start=1))
        labels = {category: label for label, category in self.label_to_category_id.items()}

        images = parse_images(content, self.annotation_file)
        instances, self.dropped = parse_annotations(content, self.annotation_file, images, labels)
        self.skeleton = find_skeleton(content["categories"], instances.keypoints.shape[1], self.annotation_file)
        if remove_images_without_annotations:
            usable = np.zeros(len(images.ids), dtype=bool)
            usable[instances.image] = True
            if self.skeleton is not None:
                labelled = (instances.keypoints[:, :, 2] > 0).sum(1)
                in_image = np.bincount(instances.image, labelled, minlength=len(images.ids))
                few = usable & (in_image < min(MIN_KEYPOINTS_PER_IMAGE, len(self.skeleton.names)))
                self.dropped["images with too few labelled keypoints"] = int(few.sum())
                usable &= ~few
            images, instances = _keep_images(images, instances, usable)
        return images, instances, len(content["images"])

    def _check_files(self) -> None:
        """One listing per folder: a missing file is found now, not in the middle of a run."""
        if not self.image_folder.is_dir():
            raise DataError(f"image folder {self.image_folder} does not exist (for {self.annotation_file})")
        listings: dict[str, set[str]] = {}
        missing, first = 0, ""
        for index in range(len(self)):
            folder, base = os.path.split(self._images.file_names[index])
            if folder not in listings:
                try:
                    with os.scandir(self.image_folder / folder) as entries:
                        listings[folder] = {entry.name for entry in entries}
                except OSError:
                    listings[folder] = set()
            if base not in listings[folder]:
                missing += 1
                first = first or str(self.image_folder / self._images.file_names[index])
        if missing:
            raise DataError(
                f"{missing} of the {len(self)} images of {self.annotation_file} are missing; the first is {first}"
            )

    def _log_summary(self, total: int) -> None:
        left_out = "; ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        logger.info(
            "%s: %d of %d images, %d instances of %d classes%s",
            self.name,
            len(self),
            total,
            self.num_instances,
            self.num_classes - 1,
            f"; left out: {left_out}" if left_out else "",
        )
        without = self._instances.num_without_mask
        if self.has_masks and without:
            # Kept as in maskrcnn-benchmark: their boxes are good, but their masks are learnt as empty.
            logger.warning("%s: %d instances have a box but no mask", self.name, without)

    def __repr__(self) -> str:
        return f"CocoDataset({self.name}, num_images={len(self)}, num_instances={self.num_instances})"


def _categories(content: dict, path: Path) -> dict[int, str]:
    """{category id: name}, sorted by id."""
    names: dict[int, str] = {}
    for position, category in enumerate(content["categories"]):
        if not isinstance(category, dict) or not isinstance(category.get("id"), int) or "name" not in category:
            raise DataError(f"{path}: categories[{position}] needs an integer 'id' and a 'name'")
        if category["id"] in names:
            raise DataError(f"{path}: category id {category['id']} appears twice")
        names[category["id"]] = str(category["name"])
    if not names:
        raise DataError(f"{path}: 'categories' is empty")
    return dict(sorted(names.items()))


def find_skeleton(categories: list[dict], num_keypoints: int, path: Path) -> Skeleton | None:
    """What the keypoints of the annotations are called; None without keypoints, or with a warning where nobody knows.

    Raises:
        DataError: two categories, or a category and its annotations, disagree.
    """
    named = [category for category in categories if category.get("keypoints")]
    if num_keypoints == 0:
        return None
    if not named:
        if num_keypoints == len(PERSON.names):
            return PERSON
        logger.warning(
            "%s: no category names its %d keypoints in 'keypoints': they are left out, because a mirrored image needs "
            "to know left from right",
            path,
            num_keypoints,
        )
        return None
    names = tuple(map(str, named[0]["keypoints"]))
    for category in named[1:]:
        if tuple(map(str, category["keypoints"])) != names:
            raise DataError(f"{path}: categories {named[0]['id']} and {category['id']} have different keypoints")
    if len(names) != num_keypoints or len(set(names)) != len(names):
        raise DataError(
            f"{path}: category {named[0]['id']} names {len(set(names))} keypoints, but its annotations have "
            f"{num_keypoints}"
        )
    lines = named[0].get("skeleton") or []
    if names == PERSON.names:
        return PERSON
    if not all(
        isinstance(line, list) and len(line) == 2 and all(1 <= end <= len(names) for end in line) for line in lines
    ):
        raise DataError(f"{path}: category {named[0]['id']} has a 'skeleton' that is not pairs of 1 to {len(names)}")
    return Skeleton(names, tuple((int(a) - 1, int(b) - 1) for a, b in lines))


def _keep_images(images: ImageTable, instances: InstanceTable, keep: np.ndarray) -> tuple[ImageTable, InstanceTable]:
    new_index = np.cumsum(keep) - 1
    rows = np.flatnonzero(keep[instances.image])
    instances = instances.take(rows)
    instances.image = new_index[instances.image]
    return images.take(np.flatnonzero(keep)), instances
