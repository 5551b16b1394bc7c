"""The boxes of one image and what belongs to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastrcnn.structures.keypoints import Keypoints
from fastrcnn.structures.segmentation import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, SegmentationMask

Size = tuple[int, int]
Mode = Literal["xyxy", "xywh"]


@dataclass(frozen=True, eq=False, repr=False)
class BoxList:
    """The boxes of one image and what belongs to each of them.

    Attributes:
        boxes: float [n, 4]: (x1, y1, x2, y2), or (x, y, width, height) in mode ``xywh``.
        size: (width, height) of the image.
        mode: ``xyxy`` or ``xywh``.
        offset: 1 where x2 and y2 are the last pixels inside (maskrcnn-benchmark), so that a box is x2 - x1 + 1 wide; 0
            where they are its far edges (torchvision, detectron2).
        labels: int64 [n], 0 is the background.
        scores: float [n].
        objectness: float [n].
        masks: ground truth: a SegmentationMask; detections: mask probabilities, float [n, 1, M, M], in the box's frame,
            or bitmaps of the image that the detector saw, bool [n, 1, height, width].
        keypoints: Keypoints, of ground truth and of detections.
    """

    boxes: Tensor
    size: Size
    mode: Mode = "xyxy"
    labels: Tensor | None = None
    scores: Tensor | None = None
    objectness: Tensor | None = None
    masks: SegmentationMask | Tensor | None = None
    keypoints: Keypoints | None = None
    offset: int = 1

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
        """To ``xyxy`` or ``xywh``; with ``offset`` 1 widths and heights count both end pixels."""
        if mode == self.mode:
            return self
        first, second = self.boxes[:, :2], self.boxes[:, 2:]
        if mode == "xywh":
            second = second - first + self.offset
        else:
            second = first + (second - self.offset).clamp(min=0)
        return replace(self, boxes=torch.cat([first, second], dim=1), mode=mode)

    def with_offset(self, offset: int) -> BoxList:
        """The same boxes with far sides in the other reading."""
        boxes = self.convert("xywh").boxes
        return replace(self, boxes=boxes, mode="xywh", offset=offset).convert(self.mode)

    def resize(self, size: Size) -> BoxList:
        """Scale to an image of ``size`` (width, height): corners are scaled plainly, as in maskrcnn-benchmark."""
        ratios = (size[0] / self.size[0], size[1] / self.size[1])
        scale = self.boxes.new_tensor([*ratios, *ratios])
        changed: dict[str, Any] = {"boxes": self.boxes * scale, "size": size}
        if isinstance(self.masks, SegmentationMask):
            changed["masks"] = self.masks.resize(size)
        if self.keypoints is not None:
            changed["keypoints"] = self.keypoints.resize(size)
        return replace(self, **changed)

    def transpose(self, method: int) -> BoxList:
        """Flip: x' = width - x - offset, but y' = height - y (maskrcnn-benchmark's inconsistency, kept)."""
        boxes = self.convert("xyxy").boxes
        x1, y1, x2, y2 = boxes.unbind(1)
        width, height = self.size
        changed: dict[str, Any] = {}
        if method == FLIP_LEFT_RIGHT:
            far = width - self.offset
            flipped = torch.stack([far - x2, y1, far - x1, y2], dim=1)
        elif method == FLIP_TOP_BOTTOM:
            flipped = torch.stack([x1, height - y2, x2, height - y1], dim=1)
        else:
            raise ValueError(f"BoxList.transpose: method must be 0 (left-right) or 1 (top-bottom), got {method!r}")
        if isinstance(self.masks, SegmentationMask):
            changed["masks"] = self.masks.transpose(method, self.offset)
        elif self.masks is not None:
            changed["masks"] = self.masks.flip(-1 if method == FLIP_LEFT_RIGHT else -2)
        if self.keypoints is not None:
            changed["keypoints"] = self.keypoints.transpose(method, self.offset)
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
        if self.keypoints is not None:
            changed["keypoints"] = self.keypoints.crop(box)
        return replace(self, boxes=moved, size=(int(width), int(height)), mode="xyxy", **changed).convert(self.mode)

    def clip_to_image(self, remove_empty: bool = True) -> BoxList:
        """Clamp to [0, width - offset] x [0, height - offset]; ``remove_empty`` drops what has no extent left."""
        boxes = self.convert("xyxy").boxes
        limit = boxes.new_tensor([self.size[0] - self.offset, self.size[1] - self.offset] * 2)
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
