"""The heads of the second stage."""

from __future__ import annotations

import torch
from torch import nn

from fastrcnn.build.backbone import body_name, body_norm, group_norm
from fastrcnn.build.fbnet import build_fbnet_extractor
from fastrcnn.config import Config, ConfigError
from fastrcnn.conventions import Convention
from fastrcnn.models.box_head import (
    BoxHead,
    BoxPredictor,
    FPN2MLPFeatureExtractor,
    FPNXconv1fcFeatureExtractor,
    ResNetConv5FeatureExtractor,
)
from fastrcnn.models.fbnet import FBNetFeatureExtractor
from fastrcnn.models.keypoint_head import KeypointHead, KeypointRCNNFeatureExtractor, KeypointRCNNPredictor
from fastrcnn.models.mask_head import (
    MaskHead,
    MaskRCNNC4Predictor,
    MaskRCNNConv1x1Predictor,
    MaskRCNNFPNFeatureExtractor,
)
from fastrcnn.models.pooler import Pooler
from fastrcnn.models.resnet import make_stage


def _conv5_extractor(cfg: Config, in_channels: int, pooler: Pooler, convention: Convention) -> nn.Module:
    resnets = cfg.MODEL.RESNETS
    stage5, out_channels = make_stage(
        body_name(cfg)[0],
        5,
        in_channels,
        norm=body_norm(cfg, convention),
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        dilation=resnets.RES5_DILATION,
    )
    return ResNetConv5FeatureExtractor(pooler, stage5, out_channels)


def build_box_head(cfg: Config, in_channels: int, convention: Convention) -> BoxHead:
    heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    pooler = Pooler(box.POOLER_RESOLUTION, box.POOLER_SCALES, box.POOLER_SAMPLING_RATIO, convention)
    extractor: nn.Module
    if box.FEATURE_EXTRACTOR == "FPN2MLPFeatureExtractor":
        extractor = FPN2MLPFeatureExtractor(
            in_channels, pooler, box.MLP_HEAD_DIM, group_norm(cfg) if box.USE_GN else None
        )
    elif box.FEATURE_EXTRACTOR == "FPNXconv1fcFeatureExtractor":
        extractor = FPNXconv1fcFeatureExtractor(
            in_channels,
            pooler,
            box.MLP_HEAD_DIM,
            conv_channels=box.CONV_HEAD_DIM,
            num_convs=box.NUM_STACKED_CONVS,
            dilation=box.DILATION,
            norm=group_norm(cfg) if box.USE_GN else None,
        )
    elif box.FEATURE_EXTRACTOR == "FBNet.roi_head":
        extractor = build_fbnet_extractor(cfg, "bbox", in_channels, pooler, convention)
    else:
        extractor = _conv5_extractor(cfg, in_channels, pooler, convention)
    features: int = extractor.out_channels  # type: ignore[assignment]
    agnostic = cfg.MODEL.CLS_AGNOSTIC_BBOX_REG
    return BoxHead(
        extractor,
        BoxPredictor(features, box.NUM_CLASSES, 2 if agnostic else box.NUM_CLASSES),
        convention,
        fg_iou_threshold=heads.FG_IOU_THRESHOLD,
        bg_iou_threshold=heads.BG_IOU_THRESHOLD,
        batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        bbox_reg_weights=tuple(heads.BBOX_REG_WEIGHTS),  # type: ignore[arg-type]
        class_agnostic=agnostic,
        score_thresh=heads.SCORE_THRESH,
        nms_thresh=heads.NMS,
        detections_per_image=heads.DETECTIONS_PER_IMG,
    )


def build_mask_head(cfg: Config, in_channels: int, convention: Convention, box: BoxHead) -> MaskHead:
    mask = cfg.MODEL.ROI_MASK_HEAD
    extractor: nn.Module
    if mask.SHARE_BOX_FEATURE_EXTRACTOR:
        extractor = box.feature_extractor
    else:
        pooler = Pooler(mask.POOLER_RESOLUTION, mask.POOLER_SCALES, mask.POOLER_SAMPLING_RATIO, convention)
        if mask.FEATURE_EXTRACTOR == "MaskRCNNFPNFeatureExtractor":
            extractor = MaskRCNNFPNFeatureExtractor(
                in_channels,
                pooler,
                mask.CONV_LAYERS,
                dilation=mask.DILATION,
                norm=group_norm(cfg) if mask.USE_GN else None,
            )
        elif mask.FEATURE_EXTRACTOR == "FBNet.roi_head_mask":
            extractor = build_fbnet_extractor(cfg, "mask", in_channels, pooler, convention)
        else:
            extractor = _conv5_extractor(cfg, in_channels, pooler, convention)
    if isinstance(extractor, FBNetFeatureExtractor):
        factor = 2 if mask.PREDICTOR == "MaskRCNNC4Predictor" else 1
        _check_fbnet_resolution(cfg, "ROI_MASK_HEAD", factor * extractor.out_resolution)
    features: int = extractor.out_channels  # type: ignore[assignment]
    classes = cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
    predictor: MaskRCNNC4Predictor | MaskRCNNConv1x1Predictor
    if mask.PREDICTOR == "MaskRCNNC4Predictor":
        predictor = MaskRCNNC4Predictor(features, mask.CONV_LAYERS[-1], classes)
    else:
        predictor = MaskRCNNConv1x1Predictor(features, classes)
    return MaskHead(
        extractor,
        predictor,
        convention,
        resolution=mask.RESOLUTION,
        positives_only=_positives_only(cfg, mask.POSITIVES_ONLY),
        paste_threshold=mask.POSTPROCESS_MASKS_THRESHOLD if mask.POSTPROCESS_MASKS else None,
    )


def build_keypoint_head(cfg: Config, in_channels: int, convention: Convention, box: BoxHead) -> KeypointHead:
    keypoint = cfg.MODEL.ROI_KEYPOINT_HEAD
    extractor: nn.Module
    if keypoint.SHARE_BOX_FEATURE_EXTRACTOR:
        extractor = box.feature_extractor
    else:
        pooler = Pooler(keypoint.POOLER_RESOLUTION, keypoint.POOLER_SCALES, keypoint.POOLER_SAMPLING_RATIO, convention)
        if keypoint.FEATURE_EXTRACTOR == "FBNet.roi_head_keypoints":
            extractor = build_fbnet_extractor(cfg, "kpts", in_channels, pooler, convention)
        else:
            extractor = KeypointRCNNFeatureExtractor(in_channels, pooler, keypoint.CONV_LAYERS)
    if isinstance(extractor, FBNetFeatureExtractor):
        _check_fbnet_resolution(cfg, "ROI_KEYPOINT_HEAD", 4 * extractor.out_resolution)
    features: int = extractor.out_channels  # type: ignore[assignment]
    return KeypointHead(
        extractor,
        KeypointRCNNPredictor(features, keypoint.NUM_CLASSES),
        convention,
        num_keypoints=keypoint.NUM_CLASSES,
        resolution=keypoint.RESOLUTION,
        positives_only=_positives_only(cfg, keypoint.POSITIVES_ONLY),
    )


def _check_fbnet_resolution(cfg: Config, head: str, predicted: int) -> None:
    """The rule of the other extractors is in config.checks; here it depends on the architecture."""
    given = getattr(cfg.MODEL, head).RESOLUTION
    if given != predicted:
        raise ConfigError(
            f"MODEL.{head}.RESOLUTION is {given}, but with MODEL.FBNET.ARCH {cfg.MODEL.FBNET.ARCH} the head predicts "
            f"{predicted} x {predicted}; set MODEL.{head}.RESOLUTION {predicted}"
        )


def _positives_only(cfg: Config, value: str | bool) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cpu" if value == "auto" else bool(value)
