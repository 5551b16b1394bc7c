"""What travels between the data, the model and the user.

Public: :class:`ImageList`, :class:`BoxList`, :class:`SegmentationMask`, with the meaning they have in
maskrcnn-benchmark, but with named, typed fields instead of a bag of strings, and without mutation: every method
returns a new object. Inside the model: :class:`Targets` and :class:`Proposals`, padded batches whose real lengths are
tensors on the device, so that nothing on the training path has to ask the device for a size.

Frames: a ``BoxList`` is in the frame of an image of ``size`` (width, height) pixels. Boxes are inclusive pixels:
a box of one pixel has x1 == x2, and widths are x2 - x1 + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from fastrcnn.outlines import mask_to_polygon

FLIP_LEFT_RIGHT = 0
FLIP_TOP_BOTTOM = 1

Size = tuple[int, int]
Mode = Literal["xyxy", "xywh"]


class ImageList:
    """A batch of images of different sizes, padded with zeros at the bottom and the right.

    Attributes:
        tensors: float [N, 3, H, W].
        image_sizes: (height, width) of each image before padding, on the host.
        sizes: the same as int64 [N, 2], on the device of ``tensors``.
        ids: int64 [N], an identity of each image (its id in the data set): random choices made for an image depend
            on it, so that they do not depend on which worker or rank the image is on. Default: 0, 1, ... N-1.
    """

    def __init__(self, tensors: Tensor, image_sizes: Sequence[Size], ids: Tensor | None = None) -> None:
        if tensors.dim() != 4:
            raise ValueError(f"ImageList: tensors must be [N, C, H, W], got shape {tuple(tensors.shape)}")
        if len(image_sizes) != len(tensors):
            raise ValueError(f"ImageList: {len(image_sizes)} sizes for {len(tensors)} images")
        self.tensors = tensors
        self.image_sizes: list[Size] = [(int(h), int(w)) for h, w in image_sizes]
        self.sizes = torch.tensor(self.image_sizes, dtype=torch.int64).reshape(-1, 2).to(tensors.device)
        self.ids = ids if ids is not None else torch.arange(len(tensors), device=tensors.device)

    def _map(self, function: Any) -> ImageList:
        new = object.__new__(ImageList)
        new.image_sizes = self.image_sizes
        new.tensors, new.sizes, new.ids = function(self.tensors), function(self.sizes), function(self.ids)
        return new

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageList:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageList:
        return self._map(lambda t: t.pin_memory())

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __repr__(self) -> str:
        return f"ImageList(num_images={len(self)}, padded={tuple(self.tensors.shape[-2:])}, sizes={self.image_sizes})"


def to_image_list(images: Tensor | Sequence[Tensor] | ImageList, size_divisible: int = 0) -> ImageList:
    """Batch images, padding with zeros to the largest height and width, rounded up to ``size_divisible``.

    Args:
        images: float [C, H, W] tensors of one dtype and device; or a batch [N, C, H, W]; or an ImageList, returned as
            it is.
        size_divisible: 0 or 1 pads to the largest image only; FPN models need 32.
    """
    if isinstance(images, ImageList):
        return images
    if isinstance(images, Tensor):
        images = list(images) if images.dim() == 4 else [images]
    if len(images) == 0:
        raise ValueError("to_image_list: needs at least one image")
    step = max(1, size_divisible)
    height = max(-(-int(image.shape[-2]) // step) * step for image in images)
    width = max(-(-int(image.shape[-1]) // step) * step for image in images)
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[-2], : image.shape[-1]].copy_(image)
    return ImageList(batch, [(int(i.shape[-2]), int(i.shape[-1])) for i in images])


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

    def transpose(self, method: int) -> SegmentationMask:
        """Flip; maskrcnn-benchmark's rule: x' = width - x - 1, y' = height - y - 1."""
        axis = {FLIP_LEFT_RIGHT: 0, FLIP_TOP_BOTTOM: 1}[method]

        def flip(polygon: Tensor) -> Tensor:
            polygon = polygon.clone()
            polygon[:, axis] = self.size[axis] - polygon[:, axis] - 1
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


@dataclass(frozen=True, eq=False, repr=False)
class BoxList:
    """The boxes of one image and what belongs to each of them.

    Attributes:
        boxes: float [n, 4]: (x1, y1, x2, y2) of inclusive pixels, or (x, y, width, height) in mode ``xywh``.
        size: (width, height) of the image.
        mode: ``xyxy`` or ``xywh``.
        labels: int64 [n], 0 is the background.
        scores: float [n].
        objectness: float [n].
        masks: ground truth: a SegmentationMask; detections: mask probabilities, float [n, 1, M, M], in the box's frame.
        keypoints: float [n, k, 3]: x, y, visibility.
    """

    boxes: Tensor
    size: Size
    mode: Mode = "xyxy"
    labels: Tensor | None = None
    scores: Tensor | None = None
    objectness: Tensor | None = None
    masks: SegmentationMask | Tensor | None = None
    keypoints: Tensor | None = None

    def __post_init__(self) -> None:
        boxes = torch.as_tensor(self.boxes)
        if not boxes.is_floating_point():
            boxes = boxes.float()
        if boxes.numel() == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"BoxList: boxes must be [n, 4], got shape {tuple(boxes.shape)}")
        if self.mode not in ("xyxy", "xywh"):
            raise ValueError(f"BoxList: mode must be 'xyxy' or 'xywh', got {self.mode!r}")
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
        for name, field in self.fields().items():
            if len(field) != len(boxes):
                raise ValueError(f"BoxList: {len(field)} {name} for {len(boxes)} boxes")

    def fields(self) -> dict[str, Any]:
        """The fields that are set, by name, without the boxes."""
        names = ("labels", "scores", "objectness", "masks", "keypoints")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def convert(self, mode: Mode) -> BoxList:
        """To ``xyxy`` or ``xywh``; widths and heights count both end pixels."""
        if mode == self.mode:
            return self
        first, second = self.boxes[:, :2], self.boxes[:, 2:]
        if mode == "xywh":
            second = second - first + 1
        else:
            second = first + (second - 1).clamp(min=0)
        return replace(self, boxes=torch.cat([first, second], dim=1), mode=mode)

    def resize(self, size: Size) -> BoxList:
        """Scale to an image of ``size`` (width, height): corners are scaled plainly, as in maskrcnn-benchmark."""
        ratios = (size[0] / self.size[0], size[1] / self.size[1])
        scale = self.boxes.new_tensor([*ratios, *ratios])
        changed: dict[str, Any] = {"boxes": self.boxes * scale, "size": size}
        if isinstance(self.masks, SegmentationMask):
            changed["masks"] = self.masks.resize(size)
        if self.keypoints is not None:
            changed["keypoints"] = self.keypoints * self.keypoints.new_tensor([*ratios, 1.0])
        return replace(self, **changed)

    def transpose(self, method: int) -> BoxList:
        """Flip. maskrcnn-benchmark's rule: x' = width - x - 1, but y' = height - y (its inconsistency, kept)."""
        boxes = self.convert("xyxy").boxes
        x1, y1, x2, y2 = boxes.unbind(1)
        width, height = self.size
        changed: dict[str, Any] = {}
        if method == FLIP_LEFT_RIGHT:
            flipped = torch.stack([width - x2 - 1, y1, width - x1 - 1, y2], dim=1)
        elif method == FLIP_TOP_BOTTOM:
            flipped = torch.stack([x1, height - y2, x2, height - y1], dim=1)
        else:
            raise ValueError(f"BoxList.transpose: method must be 0 (left-right) or 1 (top-bottom), got {method!r}")
        if isinstance(self.masks, SegmentationMask):
            changed["masks"] = self.masks.transpose(method)
        elif self.masks is not None:
            changed["masks"] = self.masks.flip(-1 if method == FLIP_LEFT_RIGHT else -2)
        if self.keypoints is not None:
            raise ValueError("BoxList.transpose: keypoints need the left-right map of their data set to be flipped")
        return replace(self, boxes=flipped, mode="xyxy", **changed).convert(self.mode)

    def crop(self, box: Sequence[float]) -> BoxList:
        """Move into the frame of ``box`` (x1, y1, x2, y2), clamping to it; the new size is (x2 - x1, y2 - y1)."""
        width, height = float(box[2] - box[0]), float(box[3] - box[1])
        boxes = self.convert("xyxy").boxes
        corner = boxes.new_tensor([box[0], box[1], box[0], box[1]])
        limit = boxes.new_tensor([width, height, width, height])
        moved = torch.minimum((boxes - corner).clamp(min=0), limit)
        changed: dict[str, Any] = {}
        if isinstance(self.masks, SegmentationMask):
            changed["masks"] = self.masks.crop(box)
        return replace(self, boxes=moved, size=(int(width), int(height)), mode="xyxy", **changed).convert(self.mode)

    def clip_to_image(self, remove_empty: bool = True) -> BoxList:
        """Clamp to [0, width - 1] x [0, height - 1]; ``remove_empty`` drops what is left without an extent."""
        boxes = self.convert("xyxy").boxes
        limit = boxes.new_tensor([self.size[0] - 1, self.size[1] - 1] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        clipped = replace(self, boxes=boxes, mode="xyxy")
        if remove_empty:
            clipped = clipped[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
        return clipped.convert(self.mode)

    def area(self) -> Tensor:
        """float [n], in square pixels."""
        wide = self.convert("xywh").boxes
        return wide[:, 2] * wide[:, 3]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BoxList:
        moved: dict[str, Any] = {
            name: field if isinstance(field, SegmentationMask) else field.to(device, non_blocking=non_blocking)
            for name, field in self.fields().items()
        }
        return replace(self, boxes=self.boxes.to(device, non_blocking=non_blocking), **moved)

    def __getitem__(self, index: int | slice | Tensor) -> BoxList:
        if isinstance(index, int):
            index = slice(index, index + 1) if index >= 0 else slice(index, index + 1 or None)
        return replace(self, boxes=self.boxes[index], **{name: f[index] for name, f in self.fields().items()})

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        return (
            f"BoxList(num_boxes={len(self)}, image_width={self.size[0]}, image_height={self.size[1]}, mode={self.mode})"
        )


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
    """

    boxes: Tensor
    labels: Tensor
    count: Tensor
    vertices: Tensor
    polygon_offsets: Tensor
    instance_offsets: Tensor
    max_vertices: int
    max_polygons: int

    @classmethod
    def from_boxlists(cls, boxlists: Sequence[BoxList], min_capacity: int = 1) -> Targets:
        """Pad ``boxlists`` (one an image; labels required, masks optional) to the most boxes of one of them.

        ``min_capacity`` is the least to pad to. Works on the host: call it before the batch goes to the device.
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

    def to_boxlists(self, image_sizes: Sequence[Size]) -> list[BoxList]:
        """One BoxList an image with its ``objectness``; reads the counts, so it waits for the device."""
        return [
            BoxList(boxes[:n], (width, height), objectness=scores[:n])
            for boxes, scores, n, (height, width) in zip(
                self.boxes, self.scores, self.count.tolist(), image_sizes, strict=True
            )
        ]
