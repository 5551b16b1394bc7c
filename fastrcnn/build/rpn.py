"""The region proposal network."""

from __future__ import annotations

from fastrcnn.config import Config
from fastrcnn.conventions import Convention
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.models.rpn import RPN


def build_rpn(cfg: Config, in_channels: int, convention: Convention) -> RPN:
    rpn = cfg.MODEL.RPN
    # A pyramid has one size a level, a single level all of them.
    sizes = [(size,) for size in rpn.ANCHOR_SIZES] if rpn.USE_FPN else [tuple(rpn.ANCHOR_SIZES)]
    return RPN(
        in_channels,
        AnchorGenerator(
            sizes,
            rpn.ASPECT_RATIOS,
            rpn.ANCHOR_STRIDE,
            straddle_thresh=rpn.STRADDLE_THRESH,
            style=convention.anchor_style,
        ),
        convention,
        fg_iou_threshold=rpn.FG_IOU_THRESHOLD,
        bg_iou_threshold=rpn.BG_IOU_THRESHOLD,
        batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        pre_nms_top_n=(rpn.PRE_NMS_TOP_N_TRAIN, rpn.PRE_NMS_TOP_N_TEST),
        post_nms_top_n=(rpn.POST_NMS_TOP_N_TRAIN, rpn.POST_NMS_TOP_N_TEST),
        fpn_post_nms_top_n=(rpn.FPN_POST_NMS_TOP_N_TRAIN, rpn.FPN_POST_NMS_TOP_N_TEST),
        per_batch=rpn.FPN_POST_NMS_PER_BATCH,
        nms_thresh=rpn.NMS_THRESH,
        min_size=rpn.MIN_SIZE,
    )
