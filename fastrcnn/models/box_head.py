"""The box head of Fast R-CNN: sampling of proposals, features, classification and class-specific boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention
from fastrcnn.models.layers import Conv2d, NormFactory, at_least_float32, make_fc, normal_init
from fastrcnn.models.pooler import Pooler, to_rois
from fastrcnn.structures import BoxList, ImageList, Proposals, Targets

SAMPLING_STREAM = 2
IGNORED = -100


@dataclass(frozen=True)
class SampledBoxes:
    """The balanced sample of proposals that the heads train on, S slots an image: positives, negatives, padding.

    Attributes:
        boxes: float [N, S, 4].
        rois: float [N, S, 5], the same with the index of the image in front, -1 where padded.
        labels: int64 [N, S]: the class of the matched ground truth, 0 for background, IGNORED where padded.
        matched_idxs: int64 [N, S]: index of the matched ground truth; 0 where not positive.
        gt_boxes: float [N, S, 4], the box of that ground truth.
        positive_rois: float [N, M, 5], of the slots that can be positive; image -1 where not.
        positive_labels: int64 [N, M]; -1 where not positive.
        instances: int64 [N, M], ``image * G + matched_idxs``; -1 where not positive.
        total_positive: int64 [], of the batch, at least 1.
        num_positive, num_sampled: int64 [N].
    """

    boxes: Tensor
    rois: Tensor
    labels: Tensor
    matched_idxs: Tensor
    gt_boxes: Tensor
    positive_rois: Tensor
    positive_labels: Tensor
    instances: Tensor
    total_positive: Tensor
    num_positive: Tensor
    num_sampled: Tensor

    @classmethod
    def gather(
        cls,
        proposals: Proposals,
        targets: Targets,
        matched: Tensor,
        indices: Tensor,
        num_positive: Tensor,
        num_sampled: Tensor,
        *,
        max_positive: int,
    ) -> SampledBoxes:
        """The sample of :func:`fastrcnn_kernels.sample_balanced` from proposals matched with ``matched`` [N, P].

        ``max_positive`` is M, the most positives an image can have (a host integer).
        """
        found = kernels.gather_regions(
            proposals.boxes, targets.boxes, targets.labels, matched, indices, num_positive, num_sampled,
            most_positives=max_positive, ignore_label=IGNORED,
        )  # fmt: skip
        return cls(*found, num_positive=num_positive, num_sampled=num_sampled)

    def of_positives(self, box_features: Tensor) -> Tensor:
        """The rows [N * M, ...] of the slots that can be positive, of what all slots [N * S, ...] have."""
        images, slots = self.labels.shape
        return box_features.unflatten(0, (images, slots))[:, : self.positive_labels.shape[1]].flatten(0, 1)


class FPN2MLPFeatureExtractor(nn.Module):
    """Pooled features through two linear layers with ReLU."""

    def __init__(self, in_channels: int, pooler: Pooler, hidden: int, norm: NormFactory | None = None) -> None:
        super().__init__()
        self.pooler = pooler
        self.fc6 = make_fc(in_channels * pooler.resolution**2, hidden, norm)
        self.fc7 = make_fc(hidden, hidden, norm)
        self.out_channels = hidden

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, hidden] for rois [K, 5]."""
        x = self.pooler(features, rois).flatten(1)
        return F.relu(self.fc7(F.relu(self.fc6(x))))


class FPNXconv1fcFeatureExtractor(nn.Module):
    """Pooled features through 3x3 convolutions and one linear layer, ReLU after each (``xconvs`` and ``fc6``).

    The head of the recipes with group normalisation (Wu & He, 2018). With a norm the convolutions have no bias; the
    linear layer has no norm.
    """

    def __init__(
        self,
        in_channels: int,
        pooler: Pooler,
        hidden: int,
        *,
        conv_channels: int = 256,
        num_convs: int = 4,
        dilation: int = 1,
        norm: NormFactory | None = None,
    ) -> None:
        super().__init__()
        self.pooler = pooler
        layers: list[nn.Module] = []
        for channels in [in_channels, *[conv_channels] * (num_convs - 1)]:
            conv = Conv2d(channels, conv_channels, 3, padding=dilation, dilation=dilation, bias=norm is None)
            normal_init(conv, std=0.01)
            layers += [conv, *([norm(conv_channels)] if norm else []), nn.ReLU(inplace=True)]
        self.xconvs = nn.Sequential(*layers)
        self.fc6 = make_fc(conv_channels * pooler.resolution**2, hidden)
        self.out_channels = hidden

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, hidden] for rois [K, 5]."""
        return F.relu(self.fc6(self.xconvs(self.pooler(features, rois)).flatten(1)))


class ResNetConv5FeatureExtractor(nn.Module):
    """Pooled features through stage 5 of a ResNet (the "C4" heads): ``head.layer4``.

    The stage halves their side, or keeps it where it is dilated.
    """

    def __init__(self, pooler: Pooler, stage5: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.pooler = pooler
        self.head = nn.ModuleDict({"layer4": stage5})
        self.out_channels = out_channels

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, C, M, M] for rois [K, 5]; M is the pooler's resolution, or half of it."""
        return self.head["layer4"](self.pooler(features, rois))


class BoxPredictor(nn.Module):
    """Linear layers to class logits and box deltas; ``num_box_classes`` is 2 when boxes are class agnostic.

    maskrcnn-benchmark's ``FPNPredictor``, and ``FastRCNNPredictor`` where the features are maps: they are averaged
    first.
    """

    def __init__(self, in_channels: int, num_classes: int, num_box_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, num_box_classes * 4)
        normal_init(self.cls_score, std=0.01)
        normal_init(self.bbox_pred, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.mean(dim=(2, 3)) if x.dim() == 4 else x
        return self.cls_score(x), self.bbox_pred(x)


class BoxHead(nn.Module):
    """Sampling, features, prediction, losses and detections.

    Args (``MODEL.ROI_HEADS.*``): thresholds and sample of the training, ``score_thresh``, ``nms_thresh`` and
    ``detections_per_image`` of the test; ``bbox_reg_weights`` scale the deltas.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        predictor: nn.Module,
        convention: Convention,
        *,
        fg_iou_threshold: float = 0.5,
        bg_iou_threshold: float = 0.5,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        class_agnostic: bool = False,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.predictor = predictor
        self.convention = convention
        self.fg_iou_threshold, self.bg_iou_threshold = fg_iou_threshold, bg_iou_threshold
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.bbox_reg_weights, self.class_agnostic = bbox_reg_weights, class_agnostic
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_image = detections_per_image

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> SampledBoxes:
        """Match proposals to the ground truth and draw the balanced sample."""
        matched = kernels.match_boxes(
            targets.boxes.to(proposals.boxes.dtype),
            targets.count,
            proposals.boxes,
            high_threshold=self.fg_iou_threshold,
            low_threshold=self.bg_iou_threshold,
            allow_low_quality_matches=False,
            box_offset=self.convention.box_offset,
        )  # [N, P]
        indices, num_positive, num_sampled = kernels.sample_balanced(
            matched, self.batch_size_per_image, self.positive_fraction, seeds, first_positive=0, count=proposals.count
        )  # [N, S], [N], [N]
        most = min(int(self.batch_size_per_image * self.positive_fraction), indices.shape[1])
        return SampledBoxes.gather(proposals, targets, matched, indices, num_positive, num_sampled, max_positive=most)

    def forward_train(self, features: Sequence[Tensor], sampled: SampledBoxes) -> tuple[Tensor, dict[str, Tensor]]:
        """The features of the sampled boxes and the losses ``loss_classifier`` and ``loss_box_reg``."""
        x = self.feature_extractor(features, sampled.rois.flatten(0, 1))
        class_logits, box_regression = self.predictor(x)
        return x, self.losses(class_logits, box_regression, sampled)

    def losses(self, class_logits: Tensor, box_regression: Tensor, sampled: SampledBoxes) -> dict[str, Tensor]:
        """Cross entropy and smooth L1 of the matched class's box, both divided by the number of sampled boxes.

        Args:
            class_logits: [N * S, classes]. box_regression: [N * S, 4 * box classes].
        """
        loss_classifier, loss_box_reg = kernels.box_head_loss(
            class_logits,
            box_regression,
            sampled.labels.flatten(),
            sampled.boxes.flatten(0, 1),
            sampled.gt_boxes.flatten(0, 1),
            weights=self.bbox_reg_weights,
            beta=self.convention.box_beta,
            box_offset=self.convention.box_offset,
            ignore_index=IGNORED,
        )
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg}

    def forward_test(self, features: Sequence[Tensor], proposals: Proposals, images: ImageList) -> list[BoxList]:
        """The detections of each image, best first; waits for the device."""
        return [
            self.detect(boxes, probabilities, size, size_on_device)
            for (boxes, probabilities), size, size_on_device in zip(
                self.candidates(features, proposals), images.image_sizes, images.sizes, strict=True
            )
        ]

    def candidates(self, features: Sequence[Tensor], proposals: Proposals) -> list[tuple[Tensor, Tensor]]:
        """For each image what :meth:`detect` chooses from: boxes and probabilities of its P proposals.

        Boxes are [P, 4 * classes], or [P, 4] where they are class agnostic, not clipped; probabilities [P, classes].
        Waits for the device.
        """
        x = self.feature_extractor(features, to_rois(proposals.boxes, proposals.valid))
        class_logits, box_regression = self.predictor(x)
        probabilities = at_least_float32(class_logits).softmax(-1)
        if self.class_agnostic:
            box_regression = box_regression[:, -4:]
        boxes = kernels.decode_boxes(
            at_least_float32(box_regression),
            proposals.boxes.flatten(0, 1),
            self.bbox_reg_weights,
            box_offset=self.convention.box_offset,
            clip=self.convention.delta_clip,
        )
        capacity = proposals.boxes.shape[1]
        return [
            (boxes[image * capacity : image * capacity + count], probabilities[image * capacity :][:count])
            for image, count in enumerate(proposals.count.tolist())
        ]

    def detect(self, boxes: Tensor, probabilities: Tensor, size: tuple[int, int], size_on_device: Tensor) -> BoxList:
        """Detections of one image from boxes [P, 4 * classes], or [P, 4] for all, and probabilities [P, classes].

        Background is column 0.

        As many as ``detections_per_image``; more where the last one's score is tied and the convention keeps ties.
        """
        height, width = size
        convention = self.convention
        found, scores, labels, _ = kernels.multiclass_nms(
            boxes,
            probabilities,
            self.score_thresh,
            self.nms_thresh,
            max(0, self.detections_per_image),
            image_size=size_on_device,
            min_size=convention.detection_min_size,
            background=0,
            keep_ties=convention.detection_ties,
            box_offset=convention.box_offset,
        )
        if convention.drop_empty_detections:
            real = (found[:, 2:] > found[:, :2]).all(dim=1)
            found, scores, labels = found[real], scores[real], labels[real]
        return BoxList(found, (width, height), labels=labels, scores=scores, offset=convention.box_offset)
