"""What a data set is to the rest of the package: a small protocol, the sample it yields, and the error it raises."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor

from fastrcnn.structures import BoxList, Skeleton


class DataError(ValueError):
    """The data are not what they should be; the message is one line naming the file, the image or the annotation."""


class ImageInfo(TypedDict):
    """What is known of an image without reading it; ``height`` and ``width`` in pixels of the original image."""

    id: int
    height: int
    width: int
    file_name: str


@dataclass(frozen=True)
class Sample:
    """One image with its ground truth.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        target: boxes, labels and (where the data set has them) masks and keypoints, in the frame of ``image``.
        image_id: the image's id in its annotation file.
        index: its position in the data set.
    """

    image: Tensor
    target: BoxList
    image_id: int
    index: int


@runtime_checkable
class DetectionDataset(Protocol):
    """Anything with these members trains and is evaluated like the built-in data sets.

    Attributes:
        class_names: ``class_names[label]``; label 0 is ``"__background__"``.
        label_to_category_id: the category id of the annotation file for each label from 1 on.
        has_masks: whether the targets carry a SegmentationMask.

    A data set whose targets carry Keypoints says so with ``has_keypoints`` True and their ``skeleton``.
    """

    class_names: list[str]
    label_to_category_id: dict[int, int]
    has_masks: bool

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def image_info(self, index: int) -> ImageInfo: ...


class ConcatDataset:
    """Several data sets as one, in the given order.

    Targets have masks, or keypoints, only if those of all data sets have (keypoints: of one skeleton).

    Raises:
        DataError: the data sets do not agree on their classes.
    """

    def __init__(self, datasets: Sequence[DetectionDataset]) -> None:
        if not datasets:
            raise DataError("ConcatDataset: needs at least one data set")
        self.datasets = list(datasets)
        first = self.datasets[0]
        for dataset in self.datasets[1:]:
            for name, mine, theirs in (
                ("classes", first.class_names, dataset.class_names),
                ("category ids", first.label_to_category_id, dataset.label_to_category_id),
            ):
                if mine != theirs:
                    raise DataError(
                        f"the data sets {_name(first)} and {_name(dataset)} cannot be joined: their {name} differ "
                        f"({_short(mine)} and {_short(theirs)})"
                    )
        self.class_names = first.class_names
        self.label_to_category_id = first.label_to_category_id
        self.has_masks = all(dataset.has_masks for dataset in self.datasets)
        skeletons = [getattr(dataset, "skeleton", None) for dataset in self.datasets]
        self.has_keypoints = skeletons[0] is not None and all(s == skeletons[0] for s in skeletons)
        self.skeleton: Skeleton | None = skeletons[0] if self.has_keypoints else None
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets]).tolist()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, index within it) of the image at ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        which = bisect_right(self._ends, index)
        return which, index - (self._ends[which - 1] if which else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        which, inner = self.locate(index)
        sample = self.datasets[which][inner]
        target = sample.target if self.has_masks else replace(sample.target, masks=None)
        target = target if self.has_keypoints else replace(target, keypoints=None)
        return Sample(sample.image, target, sample.image_id, index)

    def image_info(self, index: int) -> ImageInfo:
        which, inner = self.locate(index)
        return self.datasets[which].image_info(inner)

    def __repr__(self) -> str:
        return f"ConcatDataset({', '.join(map(repr, self.datasets))})"


def _name(dataset: DetectionDataset) -> str:
    return str(getattr(dataset, "name", None) or repr(dataset))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
