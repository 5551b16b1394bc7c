"""RetinaNet (Lin et al., 2017): class scores and boxes for every anchor, after maskrcnn-benchmark's numbers.

Training works on every anchor of a padded batch and never asks the device for a size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.models.layers import Conv2d, at_least_float32, normal_init
from fastrcnn.structures import BoxList, ImageList, Targets

# Logits this far under the threshold are certain not to pass it, whatever the rounding of the sigmoid.
LOGIT_MARGIN = 1e-2


class RetinaNetHead(nn.Module):
    """Two towers of 3x3 convolutions with ReLU, one to class logits and one to four deltas an anchor.

    Args:
        in_channels: channels of every level, which the towers keep.
        num_anchors: anchors a cell.
        num_columns: class logits an anchor.
        num_convs: convolutions of each tower.
        prior_prob: the probability that every class of every anchor starts from.
    """

    def __init__(
        self, in_channels: int, num_anchors: int, num_columns: int, *, num_convs: int = 4, prior_prob: float = 0.01
    ) -> None:
        super().__init__()
        self.cls_tower = _tower(in_channels, num_convs)
        self.bbox_tower = _tower(in_channels, num_convs)
        self.cls_logits = Conv2d(in_channels, num_anchors * num_columns, 3, padding=1)
        self.bbox_pred = Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        normal_init(self.cls_logits, std=0.01)
        normal_init(self.bbox_pred, std=0.01)
        assert self.cls_logits.bias is not None
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: class logits [N, A * C, H, W] and deltas [N, A * 4, H, W]."""
        logits = [self.cls_logits(self.cls_tower(feature)) for feature in features]
        deltas = [self.bbox_pred(self.bbox_tower(feature)) for feature in features]
        return logits, deltas


def _tower(channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        conv = Conv2d(channels, channels, 3, padding=1)
        normal_init(conv, std=0.01)
        layers += [conv, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _rows(maps: Tensor, columns: int) -> Tensor:
    """[N, A * columns, H, W] as [N, H * W * A, columns], the order of the anchors."""
    n, channels, height, width = maps.shape
    split = maps.view(n, channels // columns, columns, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(n, -1, columns)


class RetinaNet(nn.Module):
    """Head, anchors, losses and detections; stands where a two-stage detector has its RPN.

    Args (``MODEL.RETINANET.*``):
        num_classes: background included.
        fg_iou_threshold, bg_iou_threshold: an anchor at or above the first is positive, below the second negative,
            between them ignored; the best anchors of a ground truth are positive below them too.
        loss_alpha, loss_gamma: of the focal loss.
        bbox_reg_beta, bbox_reg_weight: where smooth L1 turns linear; the divisor of the box loss beside the positives.
        score_thresh, pre_nms_top_n: of each level the best ``pre_nms_top_n`` pairs of anchor and class that score
            more than ``score_thresh`` are candidates.
        nms_thresh: of the NMS of each class over all levels. detections_per_image: most detections; 0: no limit.
    """

    loss_normalizer: Tensor

    def __init__(
        self,
        in_channels: int,
        anchor_generator: AnchorGenerator,
        convention: Convention,
        *,
        num_classes: int,
        num_convs: int = 4,
        prior_prob: float = 0.01,
        fg_iou_threshold: float = 0.5,
        bg_iou_threshold: float = 0.4,
        loss_alpha: float = 0.25,
        loss_gamma: float = 2.0,
        bbox_reg_beta: float = 0.11,
        bbox_reg_weight: float = 4.0,
        score_thresh: float = 0.05,
        pre_nms_top_n: int = 1000,
        nms_thresh: float = 0.4,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__()
        self.anchor_generator = anchor_generator
        self.convention = convention
        # Where the first column is the background's, label k is column k, else column k - 1.
        self.first_label = 0 if convention.retinanet_background_column else 1
        self.num_columns = num_classes - self.first_label
        self.head = RetinaNetHead(
            in_channels,
            anchor_generator.num_anchors_per_cell,
            self.num_columns,
            num_convs=num_convs,
            prior_prob=prior_prob,
        )
        self.fg_iou_threshold, self.bg_iou_threshold = fg_iou_threshold, bg_iou_threshold
        self.loss_alpha, self.loss_gamma = loss_alpha, loss_gamma
        self.bbox_reg_beta, self.bbox_reg_weight = bbox_reg_beta, bbox_reg_weight
        self.score_thresh, self.pre_nms_top_n = score_thresh, pre_nms_top_n
        self.nms_thresh, self.detections_per_image = nms_thresh, detections_per_image
        if convention.retinanet_normaliser == "moving_average":
            self.register_buffer("loss_normalizer", torch.tensor(100.0), persistent=False)

    def losses(self, images: ImageList, features: Sequence[Tensor], targets: Targets) -> dict[str, Tensor]:
        """``loss_retina_cls``, the focal loss, and ``loss_retina_reg``, smooth L1 of the positive anchors.

        Both are sums over the batch, divided by what ``Convention.retinanet_normaliser`` says.
        """
        logits, deltas = self.head(features)
        class_logits = [_rows(level, self.num_columns) for level in logits]  # [N, A_l, C] each
        predicted = at_least_float32(torch.cat([_rows(level, 4) for level in deltas], dim=1))  # [N, A, 4]
        with torch.no_grad():
            labels, positive, wanted = self._targets(images, features, targets)  # [N, A], [N, A], [N, A, 4]
        # The deltas of other anchors may be anything, and their targets too: neither may reach the sum.
        predicted = torch.where(positive[..., None], predicted, 0)
        wanted = torch.where(positive[..., None], wanted, 0).to(predicted.dtype)

        by_image = self.convention.retinanet_normaliser == "image"
        groups = [slice(n, n + 1) for n in range(len(labels))] if by_image else [slice(None)]
        class_losses, box_losses = [], []
        for group in groups:
            class_normalizer, box_normalizer = self._normalizers(positive[group])
            focal = [
                kernels.sigmoid_focal_loss(level[group], wanted_labels, self.loss_alpha, self.loss_gamma, "sum")
                for level, wanted_labels in zip(
                    class_logits, labels[group].split([x.shape[1] for x in class_logits], dim=1), strict=True
                )
            ]
            box = kernels.smooth_l1_loss(predicted[group], wanted[group], self.bbox_reg_beta, "sum")
            class_losses.append(torch.stack(focal).sum() / class_normalizer)
            box_losses.append(box / box_normalizer)
        return {
            "loss_retina_cls": torch.stack(class_losses).mean(),
            "loss_retina_reg": torch.stack(box_losses).mean(),
        }

    def _targets(
        self, images: ImageList, features: Sequence[Tensor], targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each anchor the label of the focal loss, whether it is positive, and the deltas to its ground truth."""
        matched = self.anchor_generator.match(
            targets,
            [(f.shape[-2], f.shape[-1]) for f in features],
            images.sizes,
            images.padded_size,
            high_threshold=self.fg_iou_threshold,
            low_threshold=self.bg_iou_threshold,
            box_offset=self.convention.box_offset,
        )  # [N, A]
        positive = matched >= 0
        index = matched.clamp(min=0)
        # The focal loss counts columns from 1, 0 is background and a negative label is ignored.
        labels = targets.labels.gather(1, index) + (1 - self.first_label)
        labels = torch.where(positive, labels, torch.where(matched == -1, 0, -1))
        wanted = kernels.encode_boxes(
            targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
            torch.cat(self.anchor_generator(features, images.padded_size)),
            self.convention.retinanet_box_weights,
            box_offset=self.convention.box_offset,
        )
        return labels, positive, wanted

    def _normalizers(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Divisors of the class loss and of the box loss of the images whose positive anchors are ``positive``."""
        count = positive.sum().to(torch.float32)
        rule = self.convention.retinanet_normaliser
        if rule == "batch":
            return count + len(positive), (count * self.bbox_reg_weight).clamp(min=1)
        if rule == "image":
            return count.clamp(min=1), (count * self.bbox_reg_weight).clamp(min=1)
        with torch.no_grad():
            self.loss_normalizer.mul_(0.9).add_(count.clamp(min=1), alpha=0.1)
        average = self.loss_normalizer.clone()  # the next step changes the buffer
        return average, average * self.bbox_reg_weight

    def detect(self, images: ImageList, features: Sequence[Tensor]) -> list[BoxList]:
        """The detections of each image, best first; waits for the device."""
        logits, deltas = self.head(features)
        levels = list(zip(logits, deltas, self.anchor_generator(features, images.padded_size), strict=True))
        return [self._detect(n, levels, size) for n, size in enumerate(images.image_sizes)]

    def _detect(self, n: int, levels: Sequence[tuple[Tensor, Tensor, Tensor]], size: tuple[int, int]) -> BoxList:
        found = [
            self._candidates(_rows(logits[n : n + 1], self.num_columns)[0], _rows(deltas[n : n + 1], 4)[0], anchors)
            for logits, deltas, anchors in levels
        ]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        offset, clips_first = self.convention.box_offset, self.convention.retinanet_clips_before_nms
        if clips_first:
            boxes = kernels.clip_boxes_to_image(boxes, size, box_offset=offset)
        # A threshold of 0 or less switches NMS off, as in maskrcnn-benchmark; no IoU exceeds 2.
        threshold = self.nms_thresh if self.nms_thresh > 0 else 2.0
        keep = kernels.batched_nms(boxes, scores, labels, threshold, box_offset=offset)
        keep = keep[: self._number_to_keep(scores[keep])]
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        real = labels > 0
        if not clips_first:
            boxes = kernels.clip_boxes_to_image(boxes, size, box_offset=offset)
            real &= (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return BoxList(boxes[real], (size[1], size[0]), labels=labels[real], scores=scores[real], offset=offset)

    def _number_to_keep(self, scores: Tensor) -> int:
        """How many of ``scores``, best first: those tied with the last one too (maskrcnn-benchmark's rule)."""
        limit = self.detections_per_image
        if limit <= 0 or len(scores) <= limit:
            return len(scores)
        return int((scores >= scores[limit - 1]).sum()) if self.convention.detection_ties else limit

    def _candidates(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [M, 4], scores [M] and labels [M] of one level of one image, ties by place and then by class.

        Args:
            logits: [A, C]. deltas: [A, 4]. anchors: [A, 4].
        """
        lowest = math.log(self.score_thresh / (1 - self.score_thresh)) if 0 < self.score_thresh < 1 else -math.inf
        logits = at_least_float32(logits).flatten()
        likely = (logits > lowest - LOGIT_MARGIN).nonzero()[:, 0]  # the sigmoid of them all would take longer
        scores = logits[likely].sigmoid()
        passed = scores > self.score_thresh
        scores, likely = scores[passed], likely[passed]
        scores, order = scores.sort(descending=True, stable=True)
        scores, chosen = scores[: self.pre_nms_top_n], likely[order[: self.pre_nms_top_n]]
        place = chosen // self.num_columns
        boxes = kernels.decode_boxes(
            at_least_float32(deltas)[place],
            anchors[place],
            self.convention.retinanet_box_weights,
            box_offset=self.convention.box_offset,
            clip=self.convention.delta_clip,
        )
        return boxes, scores, chosen % self.num_columns + self.first_label
