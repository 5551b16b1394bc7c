"""The mask head of Mask R-CNN (He et al., 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention
from fastrcnn.models.box_head import SampledBoxes
from fastrcnn.models.layers import Conv2d, NormFactory, at_least_float32, conv_kaiming_normal
from fastrcnn.models.mask_targets import bitmap_targets, polygon_targets
from fastrcnn.models.pooler import Pooler
from fastrcnn.structures import BoxList, ImageList, Targets


class MaskRCNNFPNFeatureExtractor(nn.Module):
    """Pooled features through 3x3 convolutions with ReLU: ``mask_fcn1`` ... in the state dict."""

    def __init__(
        self,
        in_channels: int,
        pooler: Pooler,
        layers: Sequence[int] = (256, 256, 256, 256),
        *,
        dilation: int = 1,
        norm: NormFactory | None = None,
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.names = [f"mask_fcn{index}" for index in range(1, len(layers) + 1)]
        channels = in_channels
        for name, out_channels in zip(self.names, layers, strict=True):
            conv = conv_kaiming_normal(
                channels, out_channels, 3, padding=dilation, dilation=dilation, bias=norm is None
            )
            self.add_module(name, nn.Sequential(conv, norm(out_channels)) if norm else conv)
            channels = out_channels
        self.out_channels = channels

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, C, M, M] for rois [K, 5]."""
        x = self.pooler(features, rois)
        for name in self.names:
            layer = self.get_submodule(name)
            x = layer(x, relu=True) if isinstance(layer, Conv2d) else F.relu(layer(x))
        return x


class MaskRCNNC4Predictor(nn.Module):
    """A transposed convolution that doubles the side, ReLU, and a 1x1 convolution to one mask a class."""

    def __init__(self, in_channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, hidden, 2, stride=2)
        self.mask_fcn_logits = Conv2d(hidden, num_classes, 1)
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The logits of all classes [K, classes, M, M]. Training and detection need one class a region: see below."""
        return self.mask_fcn_logits(F.relu(self.conv5_mask(x)))

    def loss(self, x: Tensor, labels: Tensor, targets: Tensor, normaliser: Tensor) -> Tensor:
        """Binary cross entropy of the masks [K, M, M] of the classes ``labels``; a negative label is padding.

        ``targets`` are uint8, 0 or 1, or floating point between them.
        """
        last = self.mask_fcn_logits
        assert last.bias is not None
        if targets.is_floating_point():
            return _loss_of_shares(F.relu(self.conv5_mask(x)), last, labels, targets, normaliser)
        return kernels.mask_loss(self.conv5_mask(x), last.weight, last.bias, labels, targets, normaliser, relu=True)

    def class_logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """The logits [K, M, M] of the classes ``labels``, at least float32. No gradient."""
        last = self.mask_fcn_logits
        assert last.bias is not None
        return kernels.mask_class_logits(self.conv5_mask(x), last.weight, last.bias, labels, relu=True)


class MaskRCNNConv1x1Predictor(nn.Module):
    """A 1x1 convolution to one mask a class, at the resolution of the features."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.mask_fcn_logits = conv_kaiming_normal(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of all classes [K, classes, M, M]. Training and detection need one class a region: see below."""
        return self.mask_fcn_logits(x)

    def loss(self, x: Tensor, labels: Tensor, targets: Tensor, normaliser: Tensor) -> Tensor:
        """Binary cross entropy of the masks [K, M, M] of the classes ``labels``; a negative label is padding."""
        last = self.mask_fcn_logits
        assert last.bias is not None
        if targets.is_floating_point():
            return _loss_of_shares(x, last, labels, targets, normaliser)
        return kernels.mask_loss(x, last.weight, last.bias, labels, targets, normaliser, relu=False)

    def class_logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """The logits [K, M, M] of the classes ``labels``, at least float32. No gradient."""
        last = self.mask_fcn_logits
        assert last.bias is not None
        return kernels.mask_class_logits(x, last.weight, last.bias, labels, relu=False)


def _loss_of_shares(hidden: Tensor, last: nn.Conv2d, labels: Tensor, targets: Tensor, normaliser: Tensor) -> Tensor:
    """Binary cross entropy against targets that are shares of a pixel, of the channel of each region's class."""
    present, row = labels >= 0, labels.clamp(min=0)
    weight, bias = last.weight.flatten(1)[row], last.bias[row]  # type: ignore[index]
    logits = at_least_float32(torch.einsum("kcij,kc->kij", hidden, weight) + bias[:, None, None])
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return torch.where(present[:, None, None], loss, 0).sum() / normaliser


def _first(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The places of the first ``capacity`` that are True in ``chosen`` [n], and which of the results are real.

    Returns:
        int64 [capacity], 0 where there are no more; bool [capacity].
    """
    slot = torch.where(chosen, chosen.cumsum(0) - 1, capacity).clamp(max=capacity)  # [n]
    places = slot.new_zeros(capacity + 1).scatter_(0, slot, torch.arange(len(chosen), device=chosen.device))
    present = torch.arange(capacity, device=chosen.device) < chosen.sum()
    return torch.where(present, places[:capacity], 0), present


class MaskHead(nn.Module):
    """Features, prediction, loss and mask probabilities.

    Args:
        convention: says what the targets are.
        resolution: side of the mask targets (``MODEL.ROI_MASK_HEAD.RESOLUTION``).
        positives_only: run on the real positives, whose number is read from the device. Right on a CPU, where reading
            costs nothing and the padded slots would cost most of the head. False keeps every shape static: the head
            runs on the most positives the sample can hold, and the losses are the same.
        paste_threshold: detections have bitmaps in the image where the probability is above it
            (``MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS``); None: probabilities in the box's frame.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        predictor: MaskRCNNC4Predictor | MaskRCNNConv1x1Predictor,
        convention: Convention,
        *,
        resolution: int,
        positives_only: bool,
        paste_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.convention = convention
        self.feature_extractor = feature_extractor
        self.predictor = predictor
        self.resolution = resolution
        self.positives_only = positives_only
        self.paste_threshold = paste_threshold

    def forward_train(
        self,
        features: Sequence[Tensor],
        sampled: SampledBoxes,
        targets: Targets,
        images: ImageList,
        box_features: Tensor | None = None,
        capacity: int | None = None,
    ) -> dict[str, Tensor]:
        """``loss_mask``: binary cross entropy of the matched class's mask, mean over the pixels of the positives.

        ``box_features`` [N * S, C, M / 2, M / 2]: the box head's features of the sampled boxes, where the two heads
        share their extractor (``SHARE_BOX_FEATURE_EXTRACTOR``); else the head makes its own.
        """
        rois = sampled.positive_rois.flatten(0, 1)
        labels, instance = sampled.positive_labels.flatten(), sampled.instances.flatten()
        if box_features is not None:
            box_features = sampled.of_positives(box_features)
        if self.positives_only:
            real = (labels >= 0).nonzero().squeeze(1)
            rois, labels, instance = rois[real], labels[real], instance[real]
            box_features = box_features[real] if box_features is not None else None
        elif capacity is not None and capacity < len(rois):
            real, present = _first(labels >= 0, capacity)
            rois, labels, instance = rois[real], labels[real], instance[real]
            rois = torch.cat([torch.where(present, rois[:, 0], -1)[:, None], rois[:, 1:]], dim=1)
            labels, instance = torch.where(present, labels, -1), torch.where(present, instance, -1)
            box_features = box_features[real] if box_features is not None else None

        with torch.no_grad():
            rule = polygon_targets if self.convention.mask_target == "polygon" else bitmap_targets
            mask_targets = rule(targets, instance, rois[:, 1:], self.resolution, images)  # [K, M, M]
        x = self.feature_extractor(features, rois) if box_features is None else box_features
        normaliser = sampled.total_positive * self.resolution**2
        return {"loss_mask": self.predictor.loss(x, labels, mask_targets, normaliser)}

    def forward_test(self, features: Sequence[Tensor], detections: Sequence[BoxList]) -> list[BoxList]:
        """The detections with ``masks`` of the predicted class.

        Probabilities [n, 1, M, M] in the box's frame or, with ``paste_threshold``, bool bitmaps [n, 1, height, width].
        """
        counts = [len(detection) for detection in detections]
        boxes = torch.cat([detection.boxes for detection in detections])
        image = torch.repeat_interleave(
            torch.arange(len(counts), device=boxes.device), torch.tensor(counts, device=boxes.device)
        )
        labels = torch.cat([d.labels for d in detections if d.labels is not None])
        x = self.feature_extractor(features, torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1))
        probabilities = self.predictor.class_logits(x, labels).sigmoid()[:, None]
        return [
            replace(detection, masks=self._paste(masks, detection))
            for detection, masks in zip(detections, probabilities.split(counts), strict=True)
        ]

    def _paste(self, masks: Tensor, detection: BoxList) -> Tensor:
        if self.paste_threshold is None:
            return masks
        width, height = detection.size
        pasted = kernels.paste_masks(
            masks[:, 0],
            detection.boxes,
            (height, width),
            threshold=self.paste_threshold,
            convention=self.convention.mask_paste,
        )
        return pasted[:, None].bool()
