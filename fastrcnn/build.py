"""From a Config to objects: the only module, beside the entry points, that reads one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastrcnn.config import Config, ConfigError
from fastrcnn.conventions import CONVENTIONS, Convention
from fastrcnn.data.catalog import load_dataset
from fastrcnn.data.collate import Batch, Normalization, TestBatch
from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.loader import Loader, make_test_loader, make_train_loader
from fastrcnn.data.transforms import TestTransform, TrainTransform
from fastrcnn.models.anchors import AnchorGenerator
from fastrcnn.models.box_head import BoxHead, BoxPredictor, FPN2MLPFeatureExtractor, ResNetConv5FeatureExtractor
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.models.fpn import FPN, Backbone
from fastrcnn.models.layers import NormFactory, frozen_batch_norm_factory, group_norm_factory
from fastrcnn.models.mask_head import MaskHead, MaskRCNNC4Predictor, MaskRCNNFPNFeatureExtractor
from fastrcnn.models.pooler import Pooler
from fastrcnn.models.resnet import ResNet, make_stage
from fastrcnn.models.rpn import RPN


def build_model(cfg: Config) -> GeneralizedRCNN:
    """The detector that the configuration describes, with initial weights, on ``MODEL.DEVICE``.

    Raises:
        ConfigError: the configuration names a part that does not exist or does not fit.
    """
    _refuse_what_is_not_built(cfg)
    try:
        model = _assemble(cfg, CONVENTIONS[cfg.MODEL.CONVENTION])
    except ValueError as error:  # sizes that do not fit each other, found by the part that they belong to
        raise ConfigError(str(error)) from error
    return model.to(cfg.MODEL.DEVICE)


def _assemble(cfg: Config, convention: Convention) -> GeneralizedRCNN:
    backbone = _build_backbone(cfg, convention)
    box = mask = None
    if not cfg.MODEL.RPN_ONLY:
        box = _build_box_head(cfg, backbone.out_channels, convention)
        if cfg.MODEL.MASK_ON:
            mask = _build_mask_head(cfg, backbone.out_channels, convention, box)
    rpn = _build_rpn(cfg, backbone.out_channels, convention)
    return GeneralizedRCNN(backbone, rpn, box, mask, channels_last=cfg.MODEL.CHANNELS_LAST)


def _refuse_what_is_not_built(cfg: Config) -> None:
    """Keys that the configuration allows because maskrcnn-benchmark has them, and that no code here acts on yet."""
    model, body = cfg.MODEL, cfg.MODEL.BACKBONE.CONV_BODY
    bodies = [f"R-{depth}-{neck}" for neck in ("FPN", "C4") for depth in (18, 34, 50, 101, 152)]
    extractors = ["FPN2MLPFeatureExtractor", "ResNet50Conv5ROIFeatureExtractor"]
    rules: list[tuple[str, Any, list[Any]]] = [
        ("MODEL.BACKBONE.CONV_BODY", body, bodies),
        ("MODEL.RETINANET_ON", model.RETINANET_ON, [False]),
        ("MODEL.KEYPOINT_ON", model.KEYPOINT_ON, [False]),
        ("MODEL.RESNETS.STAGE_WITH_DCN", any(model.RESNETS.STAGE_WITH_DCN), [False]),
        ("MODEL.RPN.RPN_HEAD", model.RPN.RPN_HEAD, ["SingleConvRPNHead"]),
        ("TEST.BBOX_AUG.ENABLED", cfg.TEST.BBOX_AUG.ENABLED, [False]),
    ]
    if not model.RPN_ONLY:
        rules.append(("MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", model.ROI_BOX_HEAD.FEATURE_EXTRACTOR, extractors))
    if model.MASK_ON:
        mask = model.ROI_MASK_HEAD
        rules += [
            ("MODEL.ROI_MASK_HEAD.PREDICTOR", mask.PREDICTOR, ["MaskRCNNC4Predictor"]),
            ("MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", mask.POSTPROCESS_MASKS, [False]),
        ]
        if not mask.SHARE_BOX_FEATURE_EXTRACTOR:
            extractors = ["MaskRCNNFPNFeatureExtractor", "ResNet50Conv5ROIFeatureExtractor"]
            rules.append(("MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", mask.FEATURE_EXTRACTOR, extractors))
    for key, value, built in rules:
        if value not in built:
            choices = " or ".join(str(choice) for choice in built)
            raise ConfigError(f"{key} {value!r} is not built by this version; choose {choices}")
    if model.RESNETS.TRANS_FUNC.endswith("GN") != model.RESNETS.STEM_FUNC.endswith("GN"):
        raise ConfigError(
            f"MODEL.RESNETS.STEM_FUNC {model.RESNETS.STEM_FUNC!r} and TRANS_FUNC {model.RESNETS.TRANS_FUNC!r} differ "
            "in their normalisation; choose both with GN or both with FixedBatchNorm"
        )


def _group_norm(cfg: Config) -> NormFactory:
    group_norm = cfg.MODEL.GROUP_NORM
    return group_norm_factory(group_norm.NUM_GROUPS, group_norm.DIM_PER_GP, group_norm.EPSILON)


def _build_backbone(cfg: Config, convention: Convention) -> Backbone:
    resnets = cfg.MODEL.RESNETS
    depth, neck = _body_name(cfg)
    body = ResNet(
        depth,
        norm=_body_norm(cfg, convention),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT,
        out_stages=(2, 3, 4, 5) if neck == "FPN" else (4,),
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        res5_dilation=resnets.RES5_DILATION,
    )
    if neck == "C4":
        return Backbone(body, None, body.out_channels[-1])
    fpn = FPN(
        body.out_channels,
        resnets.BACKBONE_OUT_CHANNELS,
        norm=_group_norm(cfg) if cfg.MODEL.FPN.USE_GN else None,
        relu=cfg.MODEL.FPN.USE_RELU,
    )
    return Backbone(body, fpn, fpn.out_channels)


def _body_name(cfg: Config) -> tuple[int, str]:
    """(depth, "FPN" or "C4") of ``MODEL.BACKBONE.CONV_BODY``."""
    _, depth, neck = cfg.MODEL.BACKBONE.CONV_BODY.split("-")
    return int(depth), neck


def _body_norm(cfg: Config, convention: Convention) -> NormFactory:
    if cfg.MODEL.RESNETS.TRANS_FUNC.endswith("GN"):
        return _group_norm(cfg)
    return frozen_batch_norm_factory(convention.frozen_bn_eps)


def _build_rpn(cfg: Config, in_channels: int, convention: Convention) -> RPN:
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


def _conv5_extractor(cfg: Config, in_channels: int, pooler: Pooler, convention: Convention) -> nn.Module:
    resnets = cfg.MODEL.RESNETS
    stage5, out_channels = make_stage(
        _body_name(cfg)[0],
        5,
        in_channels,
        norm=_body_norm(cfg, convention),
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        first_stride=2,
        dilation=resnets.RES5_DILATION,
    )
    return ResNetConv5FeatureExtractor(pooler, stage5, out_channels)


def _build_box_head(cfg: Config, in_channels: int, convention: Convention) -> BoxHead:
    heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    pooler = Pooler(box.POOLER_RESOLUTION, box.POOLER_SCALES, box.POOLER_SAMPLING_RATIO, convention)
    extractor: nn.Module
    if box.FEATURE_EXTRACTOR == "FPN2MLPFeatureExtractor":
        extractor = FPN2MLPFeatureExtractor(
            in_channels, pooler, box.MLP_HEAD_DIM, _group_norm(cfg) if box.USE_GN else None
        )
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


def _build_mask_head(cfg: Config, in_channels: int, convention: Convention, box: BoxHead) -> MaskHead:
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
                norm=_group_norm(cfg) if mask.USE_GN else None,
            )
        else:
            extractor = _conv5_extractor(cfg, in_channels, pooler, convention)
    features: int = extractor.out_channels  # type: ignore[assignment]
    positives_only = mask.POSITIVES_ONLY
    if positives_only == "auto":
        positives_only = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    return MaskHead(
        extractor,
        MaskRCNNC4Predictor(features, mask.CONV_LAYERS[-1], cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES),
        resolution=mask.RESOLUTION,
        positives_only=bool(positives_only),
    )


def build_dataset(cfg: Config, names: Sequence[str], *, is_train: bool) -> DetectionDataset:
    """The data sets called ``names``, joined. Training drops images without annotations (``DATASETS.FILTER_EMPTY``).

    Raises:
        DataError: an unknown name, or faulty files.
    """
    return load_dataset(names, remove_images_without_annotations=is_train and cfg.DATASETS.FILTER_EMPTY)


def _normalization(cfg: Config) -> Normalization:
    return Normalization(
        cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, cfg.INPUT.TO_BGR255, cfg.DATALOADER.SIZE_DIVISIBILITY
    )


def build_train_loader(
    cfg: Config, dataset: DetectionDataset, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Loader[Batch]:
    """The batches of the steps ``start_step`` to ``SOLVER.MAX_ITER - 1``, this rank's share of each."""
    image = cfg.INPUT
    return make_train_loader(
        dataset,
        ims_per_batch=cfg.SOLVER.IMS_PER_BATCH,
        num_steps=cfg.SOLVER.MAX_ITER,
        start_step=start_step,
        transform=TrainTransform(
            min_sizes=image.MIN_SIZE_TRAIN,
            max_size=image.MAX_SIZE_TRAIN,
            horizontal_flip_prob=image.HORIZONTAL_FLIP_PROB_TRAIN,
            vertical_flip_prob=image.VERTICAL_FLIP_PROB_TRAIN,
            brightness=image.BRIGHTNESS,
            contrast=image.CONTRAST,
            saturation=image.SATURATION,
            hue=image.HUE,
        ),
        normalization=_normalization(cfg),
        seed=cfg.SOLVER.SEED,
        rank=rank,
        world_size=world_size,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


def build_test_transform(cfg: Config) -> TestTransform:
    return TestTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def build_test_loader(cfg: Config, dataset: DetectionDataset, rank: int = 0, world_size: int = 1) -> Loader[TestBatch]:
    """Every image of this rank's shard once, in order."""
    return make_test_loader(
        dataset,
        ims_per_batch=cfg.TEST.IMS_PER_BATCH,
        transform=build_test_transform(cfg),
        normalization=_normalization(cfg),
        rank=rank,
        world_size=world_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those that are trained)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
