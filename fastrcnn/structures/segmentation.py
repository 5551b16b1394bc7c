"""The shapes of instances, as polygons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from fastrcnn.outlines import mask_to_polygon

FLIP_LEFT_RIGHT = 0
FLIP_TOP_BOTTOM = 1

Size = tuple[int, int]


class SegmentationMask:
    """The shapes of the instances of one image, as polygons.

    A bitmap (COCO RLE) is held as its outline, which gives the bitmap back exactly (:mod:`fastrcnn.outlines`); one
    representation then serves resizing, flipping, cropping and the mask targets.

    Attributes:
        polygons: for each instance its polygons, each float32 [v, 2] (x, y) in pixels; the instance is their union.
        size: (width, height) of the image.
    """

    def __init__(self, polygons: Sequence[Sequence[Tensor]], size: Size) -> None:
        self.polygons = [[torch.as_tensor(p, dtype=torch.float32).reshape(-1, 2) for p in one] for one in polygons]
        self.size = (int(size[0]), int(size[1]))

    @classmethod
    def from_coco(cls, segmentations: Sequence[Any], size: Size) -> SegmentationMask:
        """From COCO annotations: each a list of flat polygons, or an RLE (compressed or not).

        Polygons of fewer than three points enclose nothing and are left out.
        """
        width, height = size
        instances = []
        for segmentation in segmentations:
            if isinstance(segmentation, dict):
                rle = segmentation
                if isinstance(rle["counts"], list):
                    rle = coco_mask.frPyObjects(rle, height, width)
                outline = mask_to_polygon(np.asarray(coco_mask.decode(rle)))
                instances.append([torch.from_numpy(outline)] if len(outline) else [])
            else:
                instances.append(
                    [torch.tensor(p, dtype=torch.float32).reshape(-1, 2) for p in segmentation if len(p) >= 6]
                )
        return cls(instances, size)

    def _map(self, function: Any, size: Size) -> SegmentationMask:
        return SegmentationMask([[function(p) for p in one] for one in self.polygons], size)

    def resize(self, size: Size) -> SegmentationMask:
        """Scale to an image of ``size`` (width, height)."""
        scale = torch.tensor([size[0] / self.size[0], size[1] / self.size[1]], dtype=torch.float32)
        return self._map(lambda p: p * scale, size)

    def transpose(self, method: int, offset: int = 1) -> SegmentationMask:
        """Flip: x' = width - x - offset, or y' = height - y - offset; 1 is maskrcnn-benchmark's."""
        axis = {FLIP_LEFT_RIGHT: 0, FLIP_TOP_BOTTOM: 1}[method]

        def flip(polygon: Tensor) -> Tensor:
            polygon = polygon.clone()
            polygon[:, axis] = self.size[axis] - polygon[:, axis] - offset
            return polygon

        return self._map(flip, self.size)

    def crop(self, box: Sequence[float]) -> SegmentationMask:
        """Move into the frame of ``box``, clamped to the image; vertices are shifted, not clipped."""
        width, height = self.size
        x1, y1 = min(max(float(box[0]), 0), width - 1), min(max(float(box[1]), 0), height - 1)
        x2, y2 = min(max(float(box[2]), 0), width), min(max(float(box[3]), 0), height)
        corner = torch.tensor([x1, y1], dtype=torch.float32)
        return self._map(lambda p: p - corner, (max(int(x2 - x1), 1), max(int(y2 - y1), 1)))

    def decode(self) -> Tensor:
        """The bitmaps, uint8 [n, height, width], as pycocotools rasterises the polygons."""
        width, height = self.size
        masks = torch.zeros((len(self), height, width), dtype=torch.uint8)
        for mask, polygons in zip(masks, self.polygons, strict=True):
            flat = [p.double().flatten().tolist() for p in polygons]
            if flat:
                merged = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
                mask.copy_(torch.from_numpy(np.asarray(coco_mask.decode(merged))))
        return masks

    def to(self, device: torch.device | str) -> SegmentationMask:
        """Polygons stay on the host; :class:`Targets` takes them to the device in one piece."""
        return self

    def __getitem__(self, index: int | slice | Tensor) -> SegmentationMask:
        chosen = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index]
        return SegmentationMask([self.polygons[i] for i in chosen.reshape(-1).tolist()], self.size)

    def __len__(self) -> int:
        return len(self.polygons)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(self.polygons)

    def __repr__(self) -> str:
        return f"SegmentationMask(num_instances={len(self)}, image_width={self.size[0]}, image_height={self.size[1]})"
