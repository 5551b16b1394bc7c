"""The keypoint head of Keypoint R-CNN (He et al., 2017), after maskrcnn-benchmark's numbers, on padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention
from fastrcnn.models.box_head import IGNORED, SampledBoxes
from fastrcnn.models.layers import at_least_float32, conv_kaiming_normal
from fastrcnn.models.pooler import Pooler
from fastrcnn.structures import PERSON, BoxList, Keypoints, Targets


class KeypointRCNNFeatureExtractor(nn.Module):
    """Pooled features through 3x3 convolutions with ReLU: ``conv_fcn1`` ... in the state dict."""

    def __init__(self, in_channels: int, pooler: Pooler, layers: Sequence[int] = (512,) * 8) -> None:
        super().__init__()
        self.pooler = pooler
        self.names = [f"conv_fcn{index}" for index in range(1, len(layers) + 1)]
        channels = in_channels
        for name, out_channels in zip(self.names, layers, strict=True):
            self.add_module(name, conv_kaiming_normal(channels, out_channels, 3, padding=1))
            channels = out_channels
        self.out_channels = channels

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, C, P, P] for rois [K, 5]."""
        x = self.pooler(features, rois)
        for name in self.names:
            x = F.relu(self.get_submodule(name)(x))
        return x


class KeypointRCNNPredictor(nn.Module):
    """A transposed convolution to one heat map a keypoint and a bilinear resize, which each double the side."""

    def __init__(self, in_channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.kps_score_lowres = nn.ConvTranspose2d(in_channels, num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.kps_score_lowres.weight, mode="fan_out", nonlinearity="relu")
        assert self.kps_score_lowres.bias is not None
        nn.init.zeros_(self.kps_score_lowres.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [K, keypoints, 4 P, 4 P] for features [K, C, P, P]."""
        return F.interpolate(self.kps_score_lowres(x), scale_factor=2, mode="bilinear", align_corners=False)


class KeypointHead(nn.Module):
    """Features, heat maps, loss and keypoints.

    Args:
        num_keypoints: of an instance (``MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES``).
        resolution: M, side of the heat maps (``MODEL.ROI_KEYPOINT_HEAD.RESOLUTION``).
        positives_only: run on the regions that have a target, whose number is read from the device. Right on a CPU,
            where reading costs nothing and the padded slots would cost most of the head. False keeps every shape
            static: the head runs on the most positives the sample can hold, and the loss is the same.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        predictor: nn.Module,
        convention: Convention,
        *,
        num_keypoints: int,
        resolution: int,
        positives_only: bool,
    ) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.predictor = predictor
        self.convention = convention
        self.skeleton = PERSON if num_keypoints == len(PERSON.names) else None
        self.num_keypoints = num_keypoints
        self.resolution = resolution
        self.positives_only = positives_only

    def forward_train(
        self,
        features: Sequence[Tensor],
        sampled: SampledBoxes,
        targets: Targets,
        box_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``loss_kp``: cross entropy over the M * M cells, mean over the keypoints that lie in their region.

        The regions are the positives of the box head's sample; which of them count, says
        ``Convention.keypoint_filter``. ``box_features`` [N * S, C, P, P]: the box head's features of the sampled boxes,
        where the two heads share their extractor (``SHARE_BOX_FEATURE_EXTRACTOR``); else the head makes its own.

        Raises:
            ValueError: the targets have no keypoints, or another number of them.
        """
        if targets.keypoints is None or targets.keypoints.shape[2] != self.num_keypoints:
            has = "no" if targets.keypoints is None else targets.keypoints.shape[2]
            raise ValueError(f"the keypoint head needs {self.num_keypoints} keypoints an instance, targets have {has}")
        rois = sampled.positive_rois.flatten(0, 1)
        if box_features is not None:
            box_features = sampled.of_positives(box_features)
        with torch.no_grad():
            wanted = self._targets(sampled, targets)  # [N * slots, K]
        if self.positives_only:
            real = (wanted != IGNORED).any(1).nonzero().squeeze(1)
            rois, wanted = rois[real], wanted[real]
            box_features = box_features[real] if box_features is not None else None
        x = self.feature_extractor(features, rois) if box_features is None else box_features
        logits = at_least_float32(self.predictor(x)).flatten(0, 1).flatten(1)  # [regions * K, M * M]
        total = F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        return {"loss_kp": total / (wanted != IGNORED).sum().clamp(min=1)}

    def _targets(self, sampled: SampledBoxes, targets: Targets) -> Tensor:
        """int64 [N * slots, K]: the heat map's cell of each keypoint of each positive region, else IGNORED."""
        assert targets.keypoints is not None
        slots = slice(0, sampled.positive_labels.shape[1])
        boxes, matched = sampled.boxes[:, slots], sampled.matched_idxs[:, slots]
        points = targets.keypoints.gather(1, matched[..., None, None].expand(-1, -1, self.num_keypoints, 3))
        within: Tensor | None = None
        if self.convention.keypoint_filter == "ground_truth":
            within = sampled.gt_boxes[:, slots]
        elif self.convention.keypoint_filter == "proposal":
            within = boxes
        cell, valid = kernels.keypoint_targets(
            points.flatten(0, 1).to(boxes.dtype),
            boxes.flatten(0, 1),
            self.resolution,
            visible_within=None if within is None else within.flatten(0, 1),
        )  # [N * slots, K] each
        return torch.where(valid & (sampled.positive_labels.flatten() >= 0)[:, None], cell, IGNORED)

    def forward_test(self, features: Sequence[Tensor], detections: Sequence[BoxList]) -> list[BoxList]:
        """The detections with ``keypoints``: place and score of the best cell of each heat map; all labelled 1."""
        counts = [len(detection) for detection in detections]
        boxes = torch.cat([detection.boxes for detection in detections])
        image = torch.repeat_interleave(
            torch.arange(len(counts), device=boxes.device), torch.tensor(counts, device=boxes.device)
        )
        x = self.feature_extractor(features, torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1))
        maps = at_least_float32(self.predictor(x))
        found = kernels.keypoints_from_heatmaps(maps, boxes, score=self.convention.keypoint_score)  # [n, K, 3]
        points = torch.cat([found[..., :2], torch.ones_like(found[..., 2:])], dim=2)
        return [
            replace(detection, keypoints=Keypoints(xy, detection.size, self.skeleton, scores=score))
            for detection, xy, score in zip(detections, points.split(counts), found[..., 2].split(counts), strict=True)
        ]
