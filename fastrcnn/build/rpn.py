"""The region proposal network, and RetinaNet in its place."""

from __future__ import annotations

from torch import nn

from fastrcnn.build.fbnet import build_fbnet_rpn_head
from fastrcnn.config import Config
from fastrcnn.conventions import Convention
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.rpn import RPN, RPNHead


def build_rpn(cfg: Config, in_channels: int, convention: Convention) -> RPN:
    rpn = cfg.MODEL.RPN
    # A pyramid has one size a level, a single level all of them.
    sizes = [(size,) for size in rpn.ANCHOR_SIZES] if rpn.USE_FPN else [tuple(rpn.ANCHOR_SIZES)]
    anchors = AnchorGenerator(
        sizes,
        rpn.ASPECT_RATIOS,
        rpn.ANCHOR_STRIDE,
        straddle_thresh=rpn.STRADDLE_THRESH,
        style=convention.anchor_style,
        stride_from_image=convention.stride_from_image,
    )
    head: nn.Module
    if rpn.RPN_HEAD == "FBNet.rpn_head":
        head = build_fbnet_rpn_head(cfg, in_channels, anchors.num_anchors_per_cell, convention)
    else:
        head = RPNHead(in_channels, anchors.num_anchors_per_cell)
    return RPN(
        head,
        anchors,
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
        sparse_backward=rpn.SPARSE_BACKWARD,
    )


def build_retinanet(cfg: Config, in_channels: int, convention: Convention) -> RetinaNet:
    retinanet = cfg.MODEL.RETINANET
    octaves = [retinanet.OCTAVE ** (i / retinanet.SCALES_PER_OCTAVE) for i in range(retinanet.SCALES_PER_OCTAVE)]
    sizes = [tuple(size * octave for octave in octaves) for size in retinanet.ANCHOR_SIZES]
    if convention.anchor_scales == "truncated":
        sizes = [tuple(int(size) for size in level) for level in sizes]
    # RETINANET.STRADDLE_THRESH changes nothing: maskrcnn-benchmark marks the anchors that leave the image, and its
    # loss does not look at the mark.
    anchors = AnchorGenerator(
        sizes,
        retinanet.ASPECT_RATIOS,
        retinanet.ANCHOR_STRIDES,
        straddle_thresh=-1,
        style=convention.anchor_style,
        stride_from_image=convention.stride_from_image,
    )
    return RetinaNet(
        in_channels,
        anchors,
        convention,
        num_classes=retinanet.NUM_CLASSES,
        num_convs=retinanet.NUM_CONVS,
        prior_prob=retinanet.PRIOR_PROB,
        fg_iou_threshold=retinanet.FG_IOU_THRESHOLD,
        bg_iou_threshold=retinanet.BG_IOU_THRESHOLD,
        loss_alpha=retinanet.LOSS_ALPHA,
        loss_gamma=retinanet.LOSS_GAMMA,
        bbox_reg_beta=retinanet.BBOX_REG_BETA,
        bbox_reg_weight=retinanet.BBOX_REG_WEIGHT,
        score_thresh=retinanet.INFERENCE_TH,
        pre_nms_top_n=retinanet.PRE_NMS_TOP_N,
        nms_thresh=retinanet.NMS_TH,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMG,
    )
