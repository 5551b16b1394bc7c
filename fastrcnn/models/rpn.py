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
        objectness = [_flatten(level, 1).squeeze(-1) for level in objectness]  # each [N, A_l]
        deltas = [_flatten(level, 4) for level in deltas]  # each [N, A_l, 4]
        anchors = self.anchor_generator(features)
        proposals = None
        if with_proposals:
            with torch.no_grad():
                proposals = self.propose(images, anchors, objectness, deltas, targets)
        losses = {}
        if targets is not None:
            if seeds is None:
                raise ValueError("RPN: training needs seeds")
            grid_sizes = [(f.shape[-2], f.shape[-1]) for f in features]
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
                matched + 1, self.batch_size_per_image, self.positive_fraction, seeds
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
        anchors: Sequence[Tensor],
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Targets | None = None,
    ) -> Proposals:
        """The best boxes after NMS in each level; in training the ground truth is appended with score 1."""
        which = 0 if self.training else 1
        boxes, scores = self._candidates(images, anchors, objectness, deltas, self.pre_nms_top_n[which])
        num_images, num_levels, num_candidates = scores.shape
        max_output = min(self.post_nms_top_n[which], num_candidates)
        keep, _ = kernels.nms_padded(
            boxes.flatten(0, 1),
            scores.flatten(0, 1),
            # a threshold of 0 or less switches NMS off, as in maskrcnn-benchmark; no IoU exceeds 2
            self.nms_thresh if self.nms_thresh > 0 else 2.0,
            max_output,
            box_offset=self.convention.box_offset,
        )  # [N * L, max_output]
        keep = keep.view(num_images, num_levels, max_output)
        index = keep.clamp(min=0)
        boxes = boxes.gather(2, index[..., None].expand(-1, -1, -1, 4)).flatten(1, 2)  # [N, L * max_output, 4]
        scores = torch.where(keep >= 0, scores.gather(2, index), -torch.inf).flatten(1, 2)  # [N, L * max_output]

        top_n = self.fpn_post_nms_top_n[which]
        if num_levels == 1:
            chosen = scores > -torch.inf
        elif self.training and self.per_batch:
            chosen = _top(scores.flatten(), top_n).view_as(scores)
        else:
            # detections are made from proposals in order of objectness
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
            scores, boxes = scores[:, :top_n], boxes[:, :top_n]
            chosen = scores > -torch.inf
        capacity = min(chosen.shape[1], top_n if num_levels > 1 else chosen.shape[1])
        if self.training and targets is not None:
            boxes = torch.cat([boxes, targets.boxes.to(boxes.dtype)], dim=1)
            scores = torch.cat([scores, scores.new_ones(targets.labels.shape)], dim=1)
            chosen = torch.cat([chosen, targets.valid], dim=1)
            capacity += targets.labels.shape[1]
        return _compact(boxes, scores, chosen, capacity)

    def _candidates(
        self,
        images: ImageList,
        anchors: Sequence[Tensor],
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        pre_nms_top_n: int,
    ) -> tuple[Tensor, Tensor]:
        """The best ``pre_nms_top_n`` anchors of each level, decoded and clipped: boxes [N, L, K, 4], scores [N, L, K].

        Levels with fewer anchors than K, and boxes that are too small, have the score -inf.
        """
        offset = self.convention.box_offset
        capacity = min(pre_nms_top_n, max(level.shape[1] for level in objectness))
        all_boxes, all_scores = [], []
        for level_anchors, level_objectness, level_deltas in zip(anchors, objectness, deltas, strict=True):
            probabilities = at_least_float32(level_objectness).sigmoid()
            scores, index = probabilities.topk(min(capacity, probabilities.shape[1]), dim=1, sorted=True)  # [N, k]
            boxes = kernels.decode_boxes(
                at_least_float32(level_deltas.gather(1, index[..., None].expand(-1, -1, 4))),
                level_anchors[index],
                box_offset=offset,
                clip=self.convention.delta_clip,
            )
            boxes = kernels.clip_boxes_to_image(boxes, images.sizes, box_offset=offset)
            large = kernels.is_large_enough(boxes, self.min_size, box_offset=offset)
            scores = torch.where(large, scores, -torch.inf)
            missing = capacity - scores.shape[1]
            all_boxes.append(F.pad(boxes, (0, 0, 0, missing)))
            all_scores.append(F.pad(scores, (0, missing), value=-torch.inf))
        return torch.stack(all_boxes, dim=1), torch.stack(all_scores, dim=1)


def _flatten(level: Tensor, values: int) -> Tensor:
    """[N, A * values, H, W] -> [N, H * W * A, values], the order of the anchors."""
    n, channels, height, width = level.shape
    level = level.view(n, channels // values, values, height, width)
    return level.permute(0, 3, 4, 1, 2).reshape(n, -1, values)


def _top(scores: Tensor, count: int) -> Tensor:
    """bool [M]: the ``count`` best of ``scores`` [M] that are not -inf."""
    best, index = scores.topk(min(count, len(scores)))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, index, best > -torch.inf)


def _compact(boxes: Tensor, scores: Tensor, chosen: Tensor, capacity: int) -> Proposals:
    """The chosen rows of each image in their order, moved to the front and padded to ``capacity``."""
    order = chosen.logical_not().to(torch.int8).sort(dim=1, stable=True).indices[:, :capacity]
    count = chosen.sum(dim=1)
    valid = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return Proposals(
        boxes=torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0),
        scores=torch.where(valid, scores.gather(1, order), -torch.inf),
        count=count,
    )
