"""Test-time augmentation: the detections of several views of an image as one.

Boxes as in maskrcnn-benchmark's ``im_detect_bbox_aug``: the candidates of all views, every class of every proposal, go
together through one score threshold, one NMS a class and one limit. Masks (which it cannot do) as in detectron2: the
mask head looks at the merged boxes in each view, and the probabilities are averaged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastrcnn.models.box_head import BoxHead
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.models.mask_head import MaskHead
from fastrcnn.structures import BoxList, ImageList, Views
from fastrcnn_kernels import clip_boxes_to_image


class TestTimeAugmentation(nn.Module):
    """``model(views)`` gives a BoxList an image like the detector, in the frame of the first view.

    With one view it is what the detector gives.

    Args:
        model: with a box head, and a mask head or none.

    Raises:
        ValueError: the model has no box head, or a keypoint head, or pastes its masks.
    """

    __test__ = False  # pytest would take the class for tests

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        if "box" not in model.roi_heads or "keypoint" in model.roi_heads:
            raise ValueError("test-time augmentation needs a model with boxes, and masks or none; no keypoints")
        if "mask" in model.roi_heads and model.roi_heads["mask"].paste_threshold is not None:
            raise ValueError("test-time augmentation averages mask probabilities: the mask head must not paste them")
        self.model = model

    @torch.no_grad()
    def forward(self, views: Views) -> list[BoxList]:
        first = views.images[0]
        box: BoxHead = self.model.roi_heads["box"]  # type: ignore[assignment]
        boxes: list[list[Tensor]] = [[] for _ in range(len(views))]
        probabilities: list[list[Tensor]] = [[] for _ in range(len(views))]
        for images, flipped in zip(views.images, views.flipped, strict=True):
            features = self.model.features(images)
            proposals, _ = self.model.rpn(images, features)
            for i, (found, scores) in enumerate(box.candidates(features, proposals)):
                size = images.image_sizes[i]
                shape = found.shape
                found = clip_boxes_to_image(found.reshape(-1, 4), size, box_offset=box.convention.box_offset)
                found = self._between(found, size, first.image_sizes[i], flipped)
                boxes[i].append(found.reshape(shape))
                probabilities[i].append(scores)
        detections = [
            box.detect(torch.cat(boxes[i]), torch.cat(probabilities[i]), first.image_sizes[i], first.sizes[i])
            for i in range(len(views))
        ]
        return self._with_masks(views, detections) if "mask" in self.model.roi_heads else detections

    def _with_masks(self, views: Views, detections: list[BoxList]) -> list[BoxList]:
        """The detections with ``masks``: probabilities of the predicted class, the mean over the views."""
        mask: MaskHead = self.model.roi_heads["mask"]  # type: ignore[assignment]
        total: list[Tensor] = []
        for images, flipped in zip(views.images, views.flipped, strict=True):
            moved = [self._seen_in(images, i, found, flipped) for i, found in enumerate(detections)]
            seen = mask.forward_test(self.model.features(images), moved)
            masks: list[Tensor] = [one.masks for one in seen]  # type: ignore[misc]
            masks = [mask.flip(-1) for mask in masks] if flipped else masks
            total = [a + b for a, b in zip(total, masks, strict=True)] if total else masks
        count = len(views.images)
        return [replace(found, masks=masks / count) for found, masks in zip(detections, total, strict=True)]

    def _seen_in(self, images: ImageList, index: int, found: BoxList, flipped: bool) -> BoxList:
        """Detections in the frame of the first view, in that of another."""
        width, height = found.size
        size = images.image_sizes[index]
        # The way back of what brought them here: there, mirrored first and scaled then.
        scaled = self._between(found.boxes, (height, width), size, flipped=False)
        boxes = self._between(scaled, size, size, flipped)
        return replace(found, boxes=boxes, size=(size[1], size[0]))

    def _between(self, boxes: Tensor, size: tuple[int, int], target: tuple[int, int], flipped: bool) -> Tensor:
        """[n, 4] boxes of a view of ``size`` (height, width), mirrored back if it is, scaled to ``target``."""
        if flipped:
            right = size[1] - self.model.roi_heads["box"].convention.box_offset  # type: ignore[operator, union-attr]
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([right - x2, y1, right - x1, y2], dim=1)
        if size != target:
            ratios = (target[1] / size[1], target[0] / size[0])
            boxes = boxes * boxes.new_tensor([*ratios, *ratios])
        return boxes
