"""Every numeric choice in which detection systems differ, by name.

A :class:`Convention` says how wide a box is, where anchors lie, how a region finds its pyramid level, and so on.
Weights trained under one convention give the detections they gave at home only under the same one. ``MODEL.CONVENTION``
selects it; ``docs/conventions.md`` explains each choice.

There are two kinds of choices. The first have no key in the configuration: the code reads them here. The second are
keys of maskrcnn-benchmark whose usual value differs (:data:`KEYS`): the convention gives their default, and a file or
the command line that sets them wins.
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

    Boxes:
        box_offset: 1 where boxes are inclusive pixels (width = x2 - x1 + 1), 0 where they are edges.
        delta_clip: upper bound of the width and height deltas before exp.
        min_size_inclusive: whether a proposal may be exactly ``MODEL.RPN.MIN_SIZE`` wide or must be wider.

    Anchors:
        anchor_style: rule of :func:`fastrcnn_kernels.cell_anchors`: centre of the cell, roundings, order.
        anchor_scales: ``exact``, or ``truncated`` to whole pixels, of the octaves of RetinaNet.
        stride_from_image: whether the stride of a level is the padded image's side divided by the map's, rounded down
            (61 and 64 on P6 of an 800 x 1344 image), and not the nominal one.

    Losses:
        rpn_normaliser: what the losses of the RPN are divided by: the anchors ``sampled`` in the batch, or the number
            that was ``wanted``, BATCH_SIZE_PER_IMAGE times images.
        rpn_box_beta, box_beta: beta of the smooth-L1 box loss of the RPN and of the box head; 0 is L1.
        mask_target: the target of a region's mask: its ``polygon`` drawn at the mask's resolution, or ``roi_align`` of
            the instance's bitmap, whose values are between 0 and 1.
        keypoint_filter: a region learns keypoints only if it has a visible one inside this box: ``ground_truth``,
            ``proposal``, or ``none`` for all positive regions.
        retinanet_normaliser: what RetinaNet's losses are divided by. ``batch``: the positives of the batch plus the
            number of images (classes), four times the positives (boxes). ``image``: the positives of each image, the
            mean over the images. ``moving_average``: of the positives of a batch, from 100, momentum 0.9.
        retinanet_box_weights: weights of RetinaNet's box encoding.
        retinanet_background_column: whether RetinaNet predicts a column for the background, which is never right.

    Regions:
        canonical_size, canonical_level: a region of this side (pixels) pools from this pyramid level.
        level_eps: added to the argument of the logarithm of the level rule.
        level_eps_outside: added to the logarithm.
        roi_align_aligned: whether RoIAlign shifts regions by half a pixel (``aligned=True``).

    Detections:
        detection_min_size: shortest side (pixels) of a candidate that enters NMS; None: any.
        detection_ties: whether all that tie with the last detection are kept, or the number is exact.
        drop_empty_detections: whether detections without an area are left out at the end.
        retinanet_clips_before_nms: whether RetinaNet clips boxes to the image before NMS; else after it, and drops
            what is left without an extent.
        mask_paste: rule of :func:`fastrcnn_kernels.paste_masks`.
        keypoint_score: rule of :func:`fastrcnn_kernels.keypoints_from_heatmaps`.

    Images:
        resize_rounding: the size of a resized image. ``maskrcnn_benchmark``: the short side rounded, the long one
            truncated; ``nearest``: one scale, both rounded to the nearest; ``truncate``: one scale, both truncated.

    Keys, see :data:`KEYS`:
        pixel_mean, pixel_std, to_bgr255: of the input.
        stride_in_1x1: which convolution of a bottleneck halves the map.
        frozen_bn_epsilon: added to the variance by frozen batch normalisation.
        straddle_threshold: anchors that leave the image by more are not trained; negative: all are.
        rpn_min_size: shortest side of a proposal.
        post_nms_per_batch, post_nms_top_n_train, post_nms_top_n_test: the choice of proposals over all levels.
        sampling_ratio: samples of RoIAlign along each side of a bin; 0: as many as it has cells.
        retinanet_use_c5, retinanet_nms, retinanet_detections: of RetinaNet.
        retinanet_box_beta, retinanet_box_divisor: its box loss; the second also divides it.
        bias_lr_factor, weight_decay, weight_decay_bias, warmup_iters, warmup_factor: of the solver.
    """

    name: str
    # boxes
    box_offset: int
    delta_clip: float
    min_size_inclusive: bool
    # anchors
    anchor_style: str
    anchor_scales: Literal["exact", "truncated"]
    stride_from_image: bool
    # losses
    rpn_normaliser: Literal["sampled", "wanted"]
    rpn_box_beta: float
    box_beta: float
    mask_target: Literal["polygon", "roi_align"]
    keypoint_filter: Literal["ground_truth", "proposal", "none"]
    retinanet_normaliser: Literal["batch", "image", "moving_average"]
    retinanet_box_weights: tuple[float, float, float, float]
    retinanet_background_column: bool
    # regions
    canonical_size: float
    canonical_level: int
    level_eps: float
    level_eps_outside: float
    roi_align_aligned: bool
    # detections
    detection_min_size: float | None
    detection_ties: bool
    drop_empty_detections: bool
    retinanet_clips_before_nms: bool
    mask_paste: str
    keypoint_score: Literal["logit", "probability"]
    # images
    resize_rounding: Literal["maskrcnn_benchmark", "nearest", "truncate"]
    # keys
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    to_bgr255: bool
    stride_in_1x1: bool
    frozen_bn_epsilon: float
    straddle_threshold: float
    rpn_min_size: float
    post_nms_per_batch: bool
    post_nms_top_n_train: int
    post_nms_top_n_test: int
    sampling_ratio: int
    retinanet_use_c5: bool
    retinanet_box_beta: float
    retinanet_box_divisor: float
    retinanet_nms: float
    retinanet_detections: int
    bias_lr_factor: float
    weight_decay: float
    weight_decay_bias: float
    warmup_iters: int
    warmup_factor: float


MASKRCNN_BENCHMARK = Convention(
    name="maskrcnn_benchmark",
    box_offset=1,
    delta_clip=math.log(1000.0 / 16),
    min_size_inclusive=True,
    anchor_style="maskrcnn_benchmark",
    anchor_scales="exact",
    stride_from_image=False,
    rpn_normaliser="sampled",
    rpn_box_beta=1.0 / 9,
    box_beta=1.0,
    mask_target="polygon",
    keypoint_filter="ground_truth",
    retinanet_normaliser="batch",
    retinanet_box_weights=(10.0, 10.0, 5.0, 5.0),
    retinanet_background_column=False,
    canonical_size=224.0,
    canonical_level=4,
    level_eps=1e-6,
    level_eps_outside=0.0,
    roi_align_aligned=False,
    detection_min_size=None,
    detection_ties=True,
    drop_empty_detections=False,
    retinanet_clips_before_nms=True,
    mask_paste="maskrcnn_benchmark",
    keypoint_score="logit",
    resize_rounding="maskrcnn_benchmark",
    pixel_mean=(102.9801, 115.9465, 122.7717),
    pixel_std=(1.0, 1.0, 1.0),
    to_bgr255=True,
    stride_in_1x1=True,
    frozen_bn_epsilon=0.0,
    straddle_threshold=0,
    rpn_min_size=0,
    post_nms_per_batch=True,
    post_nms_top_n_train=2000,
    post_nms_top_n_test=2000,
    sampling_ratio=0,
    retinanet_use_c5=True,
    retinanet_box_beta=0.11,
    retinanet_box_divisor=4.0,
    retinanet_nms=0.4,
    retinanet_detections=100,
    bias_lr_factor=2,
    weight_decay=0.0005,
    weight_decay_bias=0,
    warmup_iters=500,
    warmup_factor=1.0 / 3,
)

DETECTRON2 = Convention(
    name="detectron2",
    box_offset=0,
    delta_clip=math.log(1000.0 / 16),
    min_size_inclusive=False,
    anchor_style="detectron2",
    anchor_scales="exact",
    stride_from_image=False,
    rpn_normaliser="wanted",
    rpn_box_beta=0.0,
    box_beta=0.0,
    mask_target="polygon",
    keypoint_filter="proposal",
    retinanet_normaliser="moving_average",
    retinanet_box_weights=(1.0, 1.0, 1.0, 1.0),
    retinanet_background_column=False,
    canonical_size=224.0,
    canonical_level=4,
    level_eps=1e-8,
    level_eps_outside=0.0,
    roi_align_aligned=True,
    detection_min_size=None,
    detection_ties=False,
    drop_empty_detections=True,
    retinanet_clips_before_nms=False,
    mask_paste="detectron2",
    keypoint_score="probability",
    resize_rounding="nearest",
    pixel_mean=(103.53, 116.28, 123.675),
    pixel_std=(1.0, 1.0, 1.0),
    to_bgr255=True,
    stride_in_1x1=True,
    frozen_bn_epsilon=1e-5,
    straddle_threshold=-1,
    rpn_min_size=0,
    post_nms_per_batch=False,
    post_nms_top_n_train=1000,
    post_nms_top_n_test=1000,
    sampling_ratio=0,
    retinanet_use_c5=True,
    retinanet_box_beta=0.0,
    retinanet_box_divisor=1.0,
    retinanet_nms=0.5,
    retinanet_detections=100,
    bias_lr_factor=1,
    weight_decay=0.0001,
    weight_decay_bias=0.0001,
    warmup_iters=1000,
    warmup_factor=1.0 / 1000,
)

TORCHVISION = Convention(
    name="torchvision",
    box_offset=0,
    delta_clip=math.log(1000.0 / 16),
    min_size_inclusive=True,
    anchor_style="torchvision",
    anchor_scales="truncated",
    stride_from_image=True,
    rpn_normaliser="sampled",
    rpn_box_beta=1.0 / 9,
    box_beta=1.0 / 9,
    mask_target="roi_align",
    keypoint_filter="none",
    retinanet_normaliser="image",
    retinanet_box_weights=(1.0, 1.0, 1.0, 1.0),
    retinanet_background_column=True,
    canonical_size=224.0,
    canonical_level=4,
    level_eps=0.0,
    level_eps_outside=1e-6,
    roi_align_aligned=False,
    detection_min_size=1e-2,
    detection_ties=False,
    drop_empty_detections=False,
    retinanet_clips_before_nms=True,
    mask_paste="torchvision",
    keypoint_score="logit",
    resize_rounding="truncate",
    pixel_mean=(0.485, 0.456, 0.406),
    pixel_std=(0.229, 0.224, 0.225),
    to_bgr255=False,
    stride_in_1x1=False,
    frozen_bn_epsilon=1e-5,
    straddle_threshold=-1,
    rpn_min_size=1e-3,
    post_nms_per_batch=False,
    post_nms_top_n_train=2000,
    post_nms_top_n_test=1000,
    sampling_ratio=2,
    retinanet_use_c5=False,
    retinanet_box_beta=0.0,
    retinanet_box_divisor=1.0,
    retinanet_nms=0.5,
    retinanet_detections=300,
    bias_lr_factor=1,
    weight_decay=0.0001,
    weight_decay_bias=0.0001,
    warmup_iters=1000,
    warmup_factor=1.0 / 1000,
)

CONVENTIONS = {convention.name: convention for convention in (MASKRCNN_BENCHMARK, DETECTRON2, TORCHVISION)}

# Configuration keys whose default the convention gives, and the attribute that holds it.
KEYS = {
    "INPUT.PIXEL_MEAN": "pixel_mean",
    "INPUT.PIXEL_STD": "pixel_std",
    "INPUT.TO_BGR255": "to_bgr255",
    "MODEL.RESNETS.STRIDE_IN_1X1": "stride_in_1x1",
    "MODEL.BACKBONE.FROZEN_BN_EPSILON": "frozen_bn_epsilon",
    "MODEL.RPN.STRADDLE_THRESH": "straddle_threshold",
    "MODEL.RPN.MIN_SIZE": "rpn_min_size",
    "MODEL.RPN.FPN_POST_NMS_PER_BATCH": "post_nms_per_batch",
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": "post_nms_top_n_train",
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST": "post_nms_top_n_test",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "sampling_ratio",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": "sampling_ratio",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": "sampling_ratio",
    "MODEL.RETINANET.STRADDLE_THRESH": "straddle_threshold",
    "MODEL.RETINANET.USE_C5": "retinanet_use_c5",
    "MODEL.RETINANET.BBOX_REG_BETA": "retinanet_box_beta",
    "MODEL.RETINANET.BBOX_REG_WEIGHT": "retinanet_box_divisor",
    "MODEL.RETINANET.NMS_TH": "retinanet_nms",
    "TEST.DETECTIONS_PER_IMG": "retinanet_detections",
    "SOLVER.BIAS_LR_FACTOR": "bias_lr_factor",
    "SOLVER.WEIGHT_DECAY": "weight_decay",
    "SOLVER.WEIGHT_DECAY_BIAS": "weight_decay_bias",
    "SOLVER.WARMUP_ITERS": "warmup_iters",
    "SOLVER.WARMUP_FACTOR": "warmup_factor",
}
