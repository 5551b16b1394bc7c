"""Every numeric choice in which detection systems differ, by name.

A :class:`Convention` says how wide a box is, where anchors lie, how a region finds its pyramid level, and so on.
Weights trained under one convention give the detections they gave at home only under the same one. ``MODEL.CONVENTION``
selects it; ``docs/conventions.md`` explains each choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Convention:
    """Numeric choices of one system.

    Attributes:
        name: the system.
        box_offset: 1 where boxes are inclusive pixels (width = x2 - x1 + 1), 0 where they are edges.
        anchor_style: rule of :func:`fastrcnn_kernels.cell_anchors`.
        delta_clip: upper bound of the width and height deltas before exp.
        rpn_box_beta: beta of the RPN's smooth-L1 box loss.
        box_beta: beta of the box head's smooth-L1 box loss.
        canonical_size, canonical_level: a region of this side (pixels) pools from this pyramid level.
        level_eps: added inside the logarithm of the level rule.
        roi_align_aligned: whether RoIAlign shifts regions by half a pixel (``aligned=True``).
        frozen_bn_eps: epsilon of frozen batch normalisation.
        retinanet_box_weights: scale of RetinaNet's four deltas.
        retinanet_normaliser: what divides RetinaNet's losses: ``batch``: the positives of the batch plus its images
            (the box loss: ``BBOX_REG_WEIGHT`` times the positives, at least 1); ``image``: each image's loss by its own
            positives, at least 1, then the mean over images; ``moving_average``: an average over the steps of the
            positives of a batch, which starts at 100 and takes a tenth of each new value.
        retinanet_background_column: whether RetinaNet predicts a column for the background, which is never right.
        anchor_scales: ``exact``, or ``truncated`` to whole pixels, of the octaves of RetinaNet.
        retinanet_clips_before_nms: whether RetinaNet clips boxes to the image before NMS; else after it, and drops
            what is left without an extent.
        keypoint_filter: a region learns keypoints only if it has a visible one inside this box: ``ground_truth``,
            ``proposal``, or ``none`` for all positive regions.
        keypoint_score: rule of :func:`fastrcnn_kernels.keypoints_from_heatmaps`.
        detection_ties: whether all that tie with the last detection are kept, or the number is exact.
    """

    name: str
    box_offset: int
    anchor_style: str
    delta_clip: float
    rpn_box_beta: float
    box_beta: float
    canonical_size: float
    canonical_level: int
    level_eps: float
    roi_align_aligned: bool
    frozen_bn_eps: float
    retinanet_box_weights: tuple[float, float, float, float]
    retinanet_normaliser: Literal["batch", "image", "moving_average"]
    retinanet_background_column: bool
    anchor_scales: Literal["exact", "truncated"]
    retinanet_clips_before_nms: bool
    keypoint_filter: Literal["ground_truth", "proposal", "none"]
    keypoint_score: Literal["logit", "probability"]
    detection_ties: bool


MASKRCNN_BENCHMARK = Convention(
    name="maskrcnn_benchmark",
    box_offset=1,
    anchor_style="maskrcnn_benchmark",
    delta_clip=math.log(1000.0 / 16),
    rpn_box_beta=1.0 / 9,
    box_beta=1.0,
    canonical_size=224.0,
    canonical_level=4,
    level_eps=1e-6,
    roi_align_aligned=False,
    frozen_bn_eps=0.0,
    retinanet_box_weights=(10.0, 10.0, 5.0, 5.0),
    retinanet_normaliser="batch",
    retinanet_background_column=False,
    anchor_scales="exact",
    retinanet_clips_before_nms=True,
    keypoint_filter="ground_truth",
    keypoint_score="logit",
    detection_ties=True,
)

CONVENTIONS = {convention.name: convention for convention in (MASKRCNN_BENCHMARK,)}
