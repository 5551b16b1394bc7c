"""The keypoints of instances: where the joints of a person are, and which of them are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastrcnn.structures.segmentation import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM

Size = tuple[int, int]

_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


@dataclass(frozen=True)
class Skeleton:
    """What the keypoints of an instance are called, and which of them a line joins in pictures.

    Attributes:
        names: of the keypoints, in their order.
        connections: pairs of indices into ``names``.
    """

    names: tuple[str, ...]
    connections: tuple[tuple[int, int], ...] = ()

    @property
    def flip_map(self) -> dict[str, str]:
        """The keypoint of the other side for each one whose name says left or right."""
        pairs = {}
        for name in self.names:
            for side, other in _OTHER_SIDE.items():
                if side in name and name.replace(side, other) in self.names:
                    pairs[name] = name.replace(side, other)
        return pairs

    @property
    def flip_indices(self) -> list[int]:
        """For each keypoint the index of the one that takes its place in a mirrored image."""
        return [self.names.index(self.flip_map.get(name, name)) for name in self.names]


def _person() -> Skeleton:
    """COCO's seventeen keypoints of a person, with the lines that maskrcnn-benchmark draws."""
    sides = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    names = ("nose", *(f"{side}_{part}" for part in sides for side in ("left", "right")))
    lines = [("left_eye", "right_eye"), ("left_eye", "nose"), ("right_eye", "nose")]
    for side in ("right", "left"):
        chain = ("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle"), ("eye", "ear")
        lines += [(f"{side}_{a}", f"{side}_{b}") for c in chain for a, b in pairwise(c)]
    lines += [("right_shoulder", "left_shoulder"), ("right_hip", "left_hip")]
    return Skeleton(names, tuple((names.index(a), names.index(b)) for a, b in lines))


PERSON = _person()


@dataclass(frozen=True, eq=False, repr=False)
class Keypoints:
    """The keypoints of the instances of one image.

    Attributes:
        points: float [n, k, 3]: x, y in pixels of the image and visibility (COCO's: 0 not labelled, 1 labelled but
            hidden, 2 visible; 1 for what a model found).
        size: (width, height) of the image.
        skeleton: names; needed to flip.
        scores: float [n, k], of keypoints that a model found.
    """

    points: Tensor
    size: Size
    skeleton: Skeleton | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        points = torch.as_tensor(self.points)
        if not points.is_floating_point():
            points = points.float()
        if points.dim() == 2 and points.shape[1] % 3 == 0:  # COCO's flat rows
            points = points.unflatten(1, (-1, 3))
        if points.dim() != 3 or points.shape[2] != 3:
            raise ValueError(f"Keypoints: points must be [n, k, 3], got shape {tuple(points.shape)}")
        if self.skeleton is not None and len(self.skeleton.names) != points.shape[1]:
            raise ValueError(f"Keypoints: {points.shape[1]} points for a skeleton of {len(self.skeleton.names)} names")
        if self.scores is not None and self.scores.shape != points.shape[:2]:
            raise ValueError(f"Keypoints: scores {list(self.scores.shape)} for points {list(points.shape)}")
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))

    @property
    def visible(self) -> Tensor:
        """bool [n, k]: which keypoints are labelled, hidden or not."""
        return self.points[..., 2] > 0

    def resize(self, size: Size) -> Keypoints:
        """Scale to an image of ``size`` (width, height)."""
        ratios = (size[0] / self.size[0], size[1] / self.size[1])
        return replace(self, points=self.points * self.points.new_tensor([*ratios, 1.0]), size=size)

    def transpose(self, method: int, offset: int = 1) -> Keypoints:
        """Flip: x' = width - x - offset, or y' = height - y - offset; left and right of the skeleton change places.

        A mirror of either kind turns a left hand into a right one. Unlabelled keypoints become (0, 0, 0), as in
        maskrcnn-benchmark, which only flips left and right.

        Raises:
            ValueError: without a skeleton, or for another ``method``.
        """
        if method not in (FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM):
            raise ValueError(f"Keypoints.transpose: method must be 0 (left-right) or 1 (top-bottom), got {method!r}")
        if self.skeleton is None:
            raise ValueError("Keypoints.transpose: without a skeleton nobody knows which keypoints are left and right")
        axis = 0 if method == FLIP_LEFT_RIGHT else 1
        other_side = self.skeleton.flip_indices
        points = self.points[:, other_side].clone()
        points[..., axis] = self.size[axis] - points[..., axis] - offset
        points = torch.where(points[..., 2:] == 0, 0, points)
        return replace(self, points=points, scores=None if self.scores is None else self.scores[:, other_side])

    def crop(self, box: Sequence[float]) -> Keypoints:
        """Move into the frame of ``box`` (x1, y1, x2, y2); what lies outside it is not labelled any more."""
        width, height = float(box[2] - box[0]), float(box[3] - box[1])
        moved = self.points - self.points.new_tensor([box[0], box[1], 0.0])
        x, y, _ = moved.unbind(-1)
        inside = self.visible & (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
        return replace(self, points=torch.where(inside[..., None], moved, 0), size=(int(width), int(height)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Keypoints:
        scores = None if self.scores is None else self.scores.to(device, non_blocking=non_blocking)
        return replace(self, points=self.points.to(device, non_blocking=non_blocking), scores=scores)

    def __getitem__(self, index: Any) -> Keypoints:
        """The instances that ``index`` (an integer, a slice, or a tensor of indices or bools) chooses."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        scores = None if self.scores is None else self.scores[index]
        return replace(self, points=self.points[index], scores=scores)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        width, height = self.size
        return f"{type(self).__name__}(num_instances={len(self)}, image_width={width}, image_height={height})"


@dataclass(frozen=True, eq=False, repr=False)
class PersonKeypoints(Keypoints):
    """COCO's seventeen keypoints of persons, with the names that maskrcnn-benchmark gives to what is known of them."""

    skeleton: Skeleton | None = PERSON

    NAMES: ClassVar[tuple[str, ...]] = PERSON.names
    FLIP_MAP: ClassVar[dict[str, str]] = PERSON.flip_map
    FLIP_INDS: ClassVar[list[int]] = PERSON.flip_indices
    CONNECTIONS: ClassVar[tuple[tuple[int, int], ...]] = PERSON.connections
