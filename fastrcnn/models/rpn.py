"""Region Proposal Network (Ren et al., 2015), after maskrcnn-benchmark's numbers, on padded batches.

Nothing here asks the device for a size: every tensor has a shape known from the image sizes and the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.models.layers import at_least_float32, normal_init
from fastrcnn.structures import ImageList, Proposals, Targets

SAMPLING_STREAM = 1


class RPNHead(nn.Module):
    """3x3 convolution and ReLU, then 1x1 convolutions to one objectness and four deltas an anchor."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(in_channels, num_anchors * 4, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            normal_init(layer, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits [N, A, H, W] and deltas [N, 4A, H, W]."""
        objectness, deltas = [], []
        for feature in features:
            hidden = F.relu_(self.conv(feature))
            objectness.append(self.cls_logits(hidden))
            deltas.append(self.bbox_pred(hidden))
        return objectness, deltas


class RPN(nn.Module):
    """Head, anchors, losses and proposals.

    Args (``MODEL.RPN.*``; each pair is training, test):
        fg_iou_threshold, bg_iou_threshold: an anchor at or above the first is positive, below the second negative.
        batch_size_per_image, positive_fraction: the balanced sample of anchors that carries the loss.
        pre_nms_top_n: best anchors a level that enter NMS. post_nms_top_n: survivors a level.
        fpn_post_nms_top_n: proposals over all levels; in training over the whole batch if ``per_batch``, which is
            maskrcnn-benchmark's rule (and makes the number an image gets depend on its neighbours), else an image.
        nms_thresh, min_size: of NMS; the shortest side of a proposal.
    """

    def __init__(
        self,
        in_channels: int,
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
    ) -> None:
        super().__init__()
        self.anchor_generator = anchor_generator
        self.head = RPNHead(in_channels, anchor_generator.num_anchors_per_cell)
        self.convention = convention
        self.fg_iou_threshold, self.bg_iou_threshold = fg_iou_threshold, bg_iou_threshold
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.pre_nms_top_n, self.post_nms_top_n = pre_nms_top_n, post_nms_top_n
        self.fpn_post_nms_top_n, self.per_batch = fpn_post_nms_top_n, per_batch
        self.nms_thresh, self.min_size = nms_thresh, min_size

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
        objectness, deltas = self.head(features)
        proposals = None
        if with_proposals:
            with torch.no_grad():
                proposals = self.propose(images, objectness, deltas, targets)
        losses = {}
        if targets is not None:
            if seeds is None:
                raise ValueError("RPN: training needs seeds")
            objectness = [_flatten(level, 1).squeeze(-1) for level in objectness]  # each [N, A_l]
            deltas = [_flatten(level, 4) for level in deltas]  # each [N, A_l, 4]
            grid_sizes = [(f.shape[-2], f.shape[-1]) for f in features]
            anchors = self.anchor_generator(features)
            losses = self.losses(images, anchors, grid_sizes, objectness, deltas, targets, seeds)
        return proposals, losses

    def losses(
        self,
        images: ImageList,
        anchors: Sequence[Tensor],
        grid_sizes: Sequence[tuple[int, int]],
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Targets,
        seeds: Tensor,
    ) -> dict[str, Tensor]:
        """Binary cross entropy and smooth L1 over a balanced sample of anchors, both divided by the sample's size."""
        all_anchors = torch.cat(list(anchors)).to(targets.boxes.dtype)  # [A, 4]
        with torch.no_grad():
            matched = self.anchor_generator.match(
                targets,
                grid_sizes,
                images.sizes,
                high_threshold=self.fg_iou_threshold,
                low_threshold=self.bg_iou_threshold,
                box_offset=self.convention.box_offset,
            )  # [N, A]
            indices, num_positive, num_sampled = kernels.sample_balanced(
                matched, self.batch_size_per_image, self.positive_fraction, seeds, first_positive=0
            )  # [N, B], [N], [N]
            slot = torch.arange(indices.shape[1], device=indices.device)
            positive = slot < num_positive[:, None]  # [N, B]
            sampled = slot < num_sampled[:, None]  # [N, B]
            indices = indices.clamp(min=0)
            sampled_gt = matched.gather(1, indices).clamp(min=0)  # [N, B]
            gt_boxes = targets.boxes.gather(1, sampled_gt[..., None].expand(-1, -1, 4))  # [N, B, 4]
            regression_targets = kernels.encode_boxes(
                gt_boxes, all_anchors[indices], box_offset=self.convention.box_offset
            )  # [N, B, 4]
            normaliser = num_sampled.sum().clamp(min=1)
        logits = at_least_float32(torch.cat(list(objectness), dim=1).gather(1, indices))  # [N, B]
        predicted = torch.cat(list(deltas), dim=1).gather(1, indices[..., None].expand(-1, -1, 4))  # [N, B, 4]
        objectness_loss = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
        box_loss = kernels.smooth_l1_loss(
            at_least_float32(predicted), regression_targets, beta=self.convention.rpn_box_beta
        )
        # where(), not multiplication: an unused slot must not turn an infinity into a NaN
        return {
            "loss_objectness": torch.where(sampled, objectness_loss, 0).sum() / normaliser,
            "loss_rpn_box_reg": torch.where(positive[..., None], box_loss, 0).sum() / normaliser,
        }

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
            min_size=self.min_size,
            box_offset=self.convention.box_offset,
            clip=self.convention.delta_clip,
        )
        proposals = Proposals(boxes=boxes, scores=scores, count=count)
        return _append(proposals, targets) if self.training and targets is not None else proposals


def _flatten(level: Tensor, values: int) -> Tensor:
    """[N, A * values, H, W] -> [N, H * W * A, values], the order of the anchors."""
    n, channels, height, width = level.shape
    level = level.view(n, channels // values, values, height, width)
    return level.permute(0, 3, 4, 1, 2).reshape(n, -1, values)


def _append(proposals: Proposals, targets: Targets) -> Proposals:
    """The ground truth, with score 1, behind the proposals of each image."""
    room, added = proposals.boxes.shape[1], targets.boxes.shape[1]
    count = proposals.count[:, None]  # [N, 1]
    slot = torch.arange(room + added, device=count.device)  # [P + G]
    last = count + targets.count[:, None]  # [N, 1]
    # Behind the ground truth comes what is left of the proposals' padding, and then that of the ground truth.
    behind = torch.where(slot - targets.count[:, None] < room, slot - targets.count[:, None], slot)  # [N, P + G]
    source = torch.where(slot < count, slot, torch.where(slot < last, slot - count + room, behind))  # [N, P + G]
    ones = torch.where(targets.valid, proposals.scores.new_ones(()), -torch.inf)  # [N, G]
    boxes = torch.cat([proposals.boxes, targets.boxes.to(proposals.boxes.dtype)], dim=1)
    scores = torch.cat([proposals.scores, ones], dim=1)
    return Proposals(
        boxes=boxes.gather(1, source[..., None].expand(-1, -1, 4)),
        scores=scores.gather(1, source),
        count=proposals.count + targets.count,
    )
