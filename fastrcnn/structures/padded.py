"""Padded batches: what the model computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrcnn.structures.box_list import BoxList
from fastrcnn.structures.segmentation import SegmentationMask

Size = tuple[int, int]


@dataclass(frozen=True)
class Targets:
    """The ground truth of a batch, padded to one number of boxes an image.

    Attributes:
        boxes: float [N, G, 4], inclusive pixels of the network's input image; zeros where padded.
        labels: int64 [N, G]; 0 where padded.
        count: int64 [N], the real number of boxes of each image.
        vertices: float32 [V, 2], the vertices of all polygons of the batch.
        polygon_offsets: int64 [Q + 1], polygon q owns vertices[polygon_offsets[q]:polygon_offsets[q + 1]].
        instance_offsets: int64 [N * G + 1], instance n * G + g owns a range of polygons; empty where padded.
        max_vertices, max_polygons: the largest number of vertices and of polygons of one instance (host integers,
            known from the data: they bound loops without asking the device).
        keypoints: float [N, G, K, 3], x, y and visibility; zeros where padded. None where the data have none.
    """

    boxes: Tensor
    labels: Tensor
    count: Tensor
    vertices: Tensor
    polygon_offsets: Tensor
    instance_offsets: Tensor
    max_vertices: int
    max_polygons: int
    keypoints: Tensor | None = None

    @classmethod
    def from_boxlists(cls, boxlists: Sequence[BoxList], min_capacity: int = 1) -> Targets:
        """Pad ``boxlists`` (one an image) to the most boxes of one of them; labels are required.

        ``min_capacity`` is the least to pad to. Masks and keypoints are optional. Works on the
        host: call it before the batch goes to the device.
        """
        capacity = max([min_capacity, *(len(b) for b in boxlists)])
        dtype = boxlists[0].boxes.dtype if boxlists else torch.float32
        boxes = torch.zeros((len(boxlists), capacity, 4), dtype=dtype)
        labels = torch.zeros((len(boxlists), capacity), dtype=torch.int64)
        instances: list[list[Tensor]] = []
        for row, boxlist in enumerate(boxlists):
            n = len(boxlist)
            if boxlist.labels is None:
                raise ValueError(f"targets[{row}] has no labels: every ground-truth BoxList needs them")
            boxes[row, :n] = boxlist.convert("xyxy").boxes
            labels[row, :n] = boxlist.labels
            polygons = boxlist.masks.polygons if isinstance(boxlist.masks, SegmentationMask) else [[]] * n
            instances += [*polygons, *([[]] * (capacity - n))]
        flat = [polygon for instance in instances for polygon in instance]
        return cls(
            boxes=boxes,
            labels=labels,
            count=torch.tensor([len(b) for b in boxlists], dtype=torch.int64),
            vertices=torch.cat(flat) if flat else torch.zeros((0, 2)),
            polygon_offsets=_offsets([len(polygon) for polygon in flat]),
            instance_offsets=_offsets([len(instance) for instance in instances]),
            max_vertices=max((sum(len(p) for p in instance) for instance in instances), default=0),
            max_polygons=max((len(instance) for instance in instances), default=0),
            keypoints=_pad_keypoints(boxlists, capacity),
        )

    def _map(self, function: Any) -> Targets:
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Targets:
        return self._map(lambda t: t.pin_memory())

    @property
    def valid(self) -> Tensor:
        """bool [N, G]: which entries are real."""
        return torch.arange(self.labels.shape[1], device=self.labels.device) < self.count[:, None]


def _pad_keypoints(boxlists: Sequence[BoxList], capacity: int) -> Tensor | None:
    """[N, capacity, K, 3], or None where no BoxList has keypoints."""
    first = next((b.keypoints.points for b in boxlists if b.keypoints is not None), None)
    if first is None:
        return None
    padded = first.new_zeros((len(boxlists), capacity, *first.shape[1:]))
    for row, boxlist in enumerate(boxlists):
        if boxlist.keypoints is None:
            if len(boxlist):
                raise ValueError(f"targets[{row}] has no keypoints, but other targets of the batch have")
        elif boxlist.keypoints.points.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"targets[{row}] has {boxlist.keypoints.points.shape[1]} keypoints an instance, others have "
                f"{first.shape[1]}"
            )
        else:
            padded[row, : len(boxlist)] = boxlist.keypoints.points
    return padded


def _offsets(lengths: Sequence[int]) -> Tensor:
    """[0, l0, l0 + l1, ...] as int64."""
    return torch.tensor([0, *np.cumsum(np.asarray(lengths, dtype=np.int64)).tolist()], dtype=torch.int64)


@dataclass(frozen=True)
class Proposals:
    """Region proposals of a batch, padded to one number an image; the real ones come first.

    Attributes:
        boxes: float [N, P, 4], inclusive pixels of the network's input image.
        scores: float [N, P], objectness in [0, 1]; -inf where padded.
        count: int64 [N].
    """

    boxes: Tensor
    scores: Tensor
    count: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [N, P]: which entries are real."""
        return torch.arange(self.boxes.shape[1], device=self.boxes.device) < self.count[:, None]

    def to_boxlists(self, image_sizes: Sequence[Size], offset: int = 1) -> list[BoxList]:
        """One BoxList an image with its ``objectness``; reads the counts, so it waits for the device.

        ``offset``: see :class:`BoxList`.
        """
        return [
            BoxList(boxes[:n], (width, height), objectness=scores[:n], offset=offset)
            for boxes, scores, n, (height, width) in zip(
                self.boxes, self.scores, self.count.tolist(), image_sizes, strict=True
            )
        ]
