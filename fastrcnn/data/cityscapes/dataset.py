"""Cityscapes as a data set for instances.

Meaning as in maskrcnn-benchmark's ``CityScapesDataset``: ten classes with instances, a box around the polygon (cut
to whole pixels) or around the pixels of the id, groups left out. Unlike there, sizes are those of the files, an image
without instances is not silently replaced by the next one, and pairs are found by name.
"""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrcnn.data.cityscapes.files import ENDS, AnnotatedImage, encode, find_pairs, read_annotation, read_ids
from fastrcnn.data.cityscapes.labels import CLASS_IDS, CLASSES, EVALUATED, VOID_IDS
from fastrcnn.data.coco_file import StringTable
from fastrcnn.data.dataset import DataError, ImageInfo, Sample
from fastrcnn.data.image import read_annotated_image
from fastrcnn.structures import BoxList, SegmentationMask

logger = logging.getLogger(__name__)


class CityscapesDataset:
    """Images with boxes, labels and masks from ``leftImg8bit`` and ``gtFine``.

    Args:
        image_folder: ``leftImg8bit``, with the splits in it.
        annotation_folder: ``gtFine``, likewise.
        split: ``train``, ``val`` or ``test``.
        mode: ``poly`` takes the polygons (they go on behind what covers them), ``mask`` the pixels of the ids.
        mini: take only so many images, spread over the split (maskrcnn-benchmark's ``minival`` has 10).
        remove_images_without_annotations: keep only images with an instance.
        name: how messages call the data set.

    Attributes:
        class_names: ``"__background__"`` and the ten classes with instances.
        evaluated: the labels that the benchmark evaluates (not caravan and trailer).
        fingerprint: SHA-256 over the instances.

    Raises:
        DataError: a file is missing or damaged.
    """

    has_masks = True

    def __init__(
        self,
        image_folder: str | Path,
        annotation_folder: str | Path,
        split: str,
        *,
        mode: str = "poly",
        mini: int | None = None,
        remove_images_without_annotations: bool = False,
        name: str | None = None,
    ) -> None:
        if mode not in ENDS:
            raise DataError(f"Cityscapes: mode must be poly or mask, got {mode!r}")
        self.image_folder, self.split, self.mode = Path(image_folder) / split, split, mode
        self.name = name or f"{image_folder} {split} ({mode})"
        self.class_names = ["__background__", *CLASSES]
        self.label_to_category_id = {label: label for label in range(1, len(self.class_names))}
        self.evaluated = [self.class_names.index(class_name) for class_name in EVALUATED]
        pairs = find_pairs(Path(image_folder), Path(annotation_folder), split, mode)
        total, ids = len(pairs), list(range(1, len(pairs) + 1))
        if mini is not None:
            step = total // mini + 1
            pairs, ids = pairs[::step], ids[::step]
        # Decoding a mask takes 40 ms, for which Python is not needed.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda pair: read_annotation(pair[1], mode), pairs))
        rows = [i for i, one in enumerate(found) if one.instances or not remove_images_without_annotations]
        self._ids = [ids[i] for i in rows]
        self._files = StringTable([pairs[i][0] for i in rows])
        self._annotation_files = StringTable([str(pairs[i][1]) for i in rows])
        self._content: list[AnnotatedImage] = [found[i] for i in rows]
        self.fingerprint = hashlib.sha256(repr(found).encode()).hexdigest()
        logger.info("%s: %d of %d images, %d instances", self.name, len(self), total, self.num_instances)

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.class_names)

    @property
    def num_instances(self) -> int:
        """Number of ground-truth boxes."""
        return sum(len(one.instances) for one in self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, index: int) -> Sample:
        info = self.image_info(index)
        image = read_annotated_image(self.image_folder / info["file_name"], info, "its annotation")
        return Sample(image, self.target(index), info["id"], index)

    def target(self, index: int) -> BoxList:
        """The ground truth of an image in its original frame; boxes are clipped to it, and may be one pixel wide."""
        content = self._content[index]
        size = (content.width, content.height)
        boxes = torch.tensor([i.box for i in content.instances], dtype=torch.float32).reshape(-1, 4)
        return BoxList(
            boxes,
            size,
            labels=torch.tensor([1 + CLASSES.index(i.class_name) for i in content.instances], dtype=torch.int64),
            masks=SegmentationMask.from_coco([i.segmentation for i in content.instances], size),
        ).clip_to_image(remove_empty=False)

    def ground_truth(
        self, index: int
    ) -> tuple[NDArray[np.int64], list[dict[str, Any]], NDArray[np.float32], dict[int, dict[str, Any]]]:
        """For the evaluation: labels, masks as RLE and boxes of the instances; for each label what is ignored, as RLE.

        Ignored are void pixels and groups of the class; only images of ids (mode ``mask``) know of them.
        """
        content = self._content[index]
        labels = np.array([1 + CLASSES.index(i.class_name) for i in content.instances], dtype=np.int64)
        boxes = np.array([i.box for i in content.instances], dtype=np.float32).reshape(-1, 4)
        shapes = [i.segmentation for i in content.instances]
        if self.mode == "poly":
            masks = SegmentationMask.from_coco(shapes, (content.width, content.height)).decode().numpy()
            return labels, [encode(mask != 0) for mask in masks], boxes, {}
        ids = read_ids(Path(self._annotation_files[index]))
        void = np.isin(ids, VOID_IDS)
        ignored = {label: encode(void | (ids == CLASS_IDS[self.class_names[label]])) for label in self.evaluated}
        return labels, shapes, boxes, ignored

    def image_info(self, index: int) -> ImageInfo:
        """The image's number in the split (the id), its size, and its file in the folder of the split."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        content = self._content[index]
        return {
            "id": self._ids[index],
            "height": content.height,
            "width": content.width,
            "file_name": self._files[index],
        }

    def __repr__(self) -> str:
        return f"CityscapesDataset({self.name}, num_images={len(self)}, num_instances={self.num_instances})"
