"""Region Proposal Network (Ren et al., 2015), after maskrcnn-benchmark's numbers, on padded batches.

Nothing here asks the device for a size: every tensor has a shape known from the image sizes and the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.models.layers import Conv2d, normal_init
from fastrcnn.structures import ImageList, Proposals, Targets

SAMPLING_STREAM = 1


class RPNHead(nn.Module):
    """3x3 convolution and ReLU, then 1x1 convolutions to one objectness and four deltas an anchor."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, in_channels, 3, padding=1)
        self.cls_logits = Conv2d(in_channels, num_anchors, 1)
        self.bbox_pred = Conv2d(in_channels, num_anchors * 4, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            normal_init(layer, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits [N, A, H, W] and deltas [N, 4A, H, W]."""
        objectness: list[Tensor] = []
        deltas: list[Tensor] = []
        for feature in features:
            hidden = self.conv(feature, relu=True)
            objectness.append(self.cls_logits(hidden))
            deltas.append(self.bbox_pred(hidden))
        return objectness, deltas

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Weight and bias of the 3x3 convolution, of the objectness and of the deltas."""
        layers = (self.conv, self.cls_logits, self.bbox_pred)
        return tuple(p for layer in layers for p in (layer.weight, layer.bias) if p is not None)


class RPN(nn.Module):
    """Head, anchors, losses and proposals.

    ``head`` gives, for feature levels, lists of objectness logits and of deltas: :class:`RPNHead`, or another.

    Args (``MODEL.RPN.*``; each pair is training, test):
        fg_iou_threshold, bg_iou_threshold: an anchor at or above the first is positive, below the second negative.
        batch_size_per_image, positive_fraction: the balanced sample of anchors that carries the loss.
        pre_nms_top_n: best anchors a level that enter NMS. post_nms_top_n: survivors a level.
        fpn_post_nms_top_n: proposals over all levels; in training over the whole batch if ``per_batch``, which is
            maskrcnn-benchmark's rule (and makes the number an image gets depend on its neighbours), else an image.
        nms_thresh, min_size: of NMS; the shortest side of a proposal.
        sparse_backward: take the gradient of the losses through the head at the sampled positions alone. Exact, and
            its backward takes a tenth of the time of the dense one, which False chooses. :class:`RPNHead` alone
            has it.
    """

    def __init__(
        self,
        head: nn.Module,
        anchor_generator: AnchorGenerator,
        convention: Convention,
        *,
        fg_iou_threshold: float = 0.7,
        bg_iou_threshold: float = 0.3,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        pre_nms_top_n: tuple[int, int] = (2000, 1000),
        post_nms_top_n: tuple[int, int] = (2000, 1000),
        fpn_post_nms_top_n: tuple[int, int] = (2000, 1000),
        per_batch: bool = True,
        nms_thresh: float = 0.7,
        min_size: float = 0,
        sparse_backward: bool = True,
    ) -> None:
        super().__init__()
        self.anchor_generator = anchor_generator
        self.head = head
        self.convention = convention
        self.fg_iou_threshold, self.bg_iou_threshold = fg_iou_threshold, bg_iou_threshold
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.pre_nms_top_n, self.post_nms_top_n = pre_nms_top_n, post_nms_top_n
        self.fpn_post_nms_top_n, self.per_batch = fpn_post_nms_top_n, per_batch
        self.nms_thresh = nms_thresh
        # sides are compared in float32: from the next number on is the same as above
        wider = torch.nextafter(torch.tensor(float(min_size)), torch.tensor(torch.inf)).item()
        self.smallest_side = min_size if convention.min_size_inclusive else wider
        self.sparse_backward = sparse_backward and isinstance(head, RPNHead)

    def forward(
        self,
        images: ImageList,
        features: Sequence[Tensor],
        targets: Targets | None = None,
        seeds: Tensor | None = None,
        *,
        with_proposals: bool = True,
    ) -> tuple[Proposals | None, dict[str, Tensor]]:
        """Proposals and, with targets, the losses ``loss_objectness`` and ``loss_rpn_box_reg``.

        Args:
            seeds: int64 [N], of the random sample of each image; needed with targets.
            with_proposals: False for a model that trains nothing but the RPN.
        """
        # The gradient of the losses does not go through the dense outputs where it is taken sparsely.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.sparse_backward):
            objectness, deltas = self.head(features)
            deltas = self.anchor_generator.move_deltas(deltas, images.padded_size)
        proposals = None
        if with_proposals:
            with torch.no_grad():
                proposals = self.propose(images, objectness, deltas, targets)
        losses = {}
        if targets is not None:
            if seeds is None:
                raise ValueError("RPN: training needs seeds")
            losses = self.losses(images, features, objectness, deltas, targets, seeds)
        return proposals, losses

    def losses(
        self,
        images: ImageList,
        features: Sequence[Tensor],
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Targets,
        seeds: Tensor,
    ) -> dict[str, Tensor]:
        """Binary cross entropy and smooth L1 over a balanced sample of anchors, both divided by the sample's size.

        ``objectness`` and ``deltas`` are the head's outputs [N, A, H, W] and [N, 4 A, H, W] of each level.
        """
        with torch.no_grad():
            matched = self.anchor_generator.match(
                targets,
                [(f.shape[-2], f.shape[-1]) for f in features],
                images.sizes,
                images.padded_size,
                high_threshold=self.fg_iou_threshold,
                low_threshold=self.bg_iou_threshold,
                box_offset=self.convention.box_offset,
            )  # [N, A]
            sample = kernels.sample_balanced(
                matched, self.batch_size_per_image, self.positive_fraction, seeds, first_positive=0
            )  # indices [N, B], number of positives [N], of all sampled [N]
        arguments: tuple[Any, ...] = (objectness, deltas, *sample, matched, targets.boxes)
        rules: dict[str, Any] = {
            "cells": self.anchor_generator.cells,
            "strides": self.anchor_generator.strides,
            "beta": self.convention.rpn_box_beta,
            "box_offset": self.convention.box_offset,
            "normaliser": None,  # the anchors that were sampled
        }
        if self.convention.rpn_normaliser == "wanted":
            wanted = self.batch_size_per_image * len(images)
            rules["normaliser"] = torch.full((), wanted, dtype=torch.int64, device=matched.device)
        if self.sparse_backward:
            assert isinstance(self.head, RPNHead)
            arguments = (features, *self.head.weights, *arguments)
            objectness_loss, box_loss = kernels.rpn_head_loss(*arguments, **rules)
        else:
            objectness_loss, box_loss = kernels.rpn_loss(*arguments, **rules)
        return {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}

    def propose(
        self,
        images: ImageList,
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Targets | None = None,
    ) -> Proposals:
        """The best boxes after NMS in each level; in training the ground truth is appended with score 1."""
        which = 0 if self.training else 1
        boxes, scores, count = kernels.generate_proposals(
            objectness,
            deltas,
            self.anchor_generator.cells,
            self.anchor_generator.strides,
            images.sizes,
            pre_nms_top_n=self.pre_nms_top_n[which],
            post_nms_top_n=self.post_nms_top_n[which],
            # maskrcnn-benchmark chooses over levels only where there are several
            top_n=self.fpn_post_nms_top_n[which] if len(objectness) > 1 else None,
            per_batch=self.training and self.per_batch,
            # a threshold of 0 or less switches NMS off, as in maskrcnn-benchmark; no IoU exceeds 2
            iou_threshold=self.nms_thresh if self.nms_thresh > 0 else 2.0,
            min_size=self.smallest_side,
            box_offset=self.convention.box_offset,
            clip=self.convention.delta_clip,
        )
        if self.training and targets is not None:
            boxes, scores, count = kernels.append_boxes(boxes, scores, count, targets.boxes, targets.count)
        return Proposals(boxes=boxes, scores=scores, count=count)
