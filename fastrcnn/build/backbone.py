"""ResNet bodies with or without a feature pyramid, and the normalisation of each part."""

from __future__ import annotations

from fastrcnn.config import Config
from fastrcnn.conventions import Convention
from fastrcnn.models.deformable import Deformable
from fastrcnn.models.fpn import FPN, Backbone, LastLevelP6P7
from fastrcnn.models.layers import NormFactory, frozen_batch_norm_factory, group_norm_factory
from fastrcnn.models.resnet import ResNet


def group_norm(cfg: Config) -> NormFactory:
    group_norm = cfg.MODEL.GROUP_NORM
    return group_norm_factory(group_norm.NUM_GROUPS, group_norm.DIM_PER_GP, group_norm.EPSILON)


def build_resnet_backbone(cfg: Config, convention: Convention) -> Backbone:
    """A ResNet, with the pyramid that its name asks for."""
    resnets = cfg.MODEL.RESNETS
    depth, neck = body_name(cfg)
    body = ResNet(
        depth,
        norm=_norm(cfg, resnets.TRANS_FUNC, convention),
        stem_norm=_norm(cfg, resnets.STEM_FUNC, convention),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT,
        out_stages={"FPN": (2, 3, 4, 5), "FPN-RETINANET": (3, 4, 5), "C4": (4,), "C5": (5,)}[neck],
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        # a pyramid needs the stride of the last stage (config.checks)
        res5_dilation=resnets.RES5_DILATION,
        deformable=Deformable(resnets.WITH_MODULATED_DCN, resnets.DEFORMABLE_GROUPS),
        deformable_stages=[stage for stage, deforms in enumerate(resnets.STAGE_WITH_DCN, start=2) if deforms],
    )
    if neck in ("C4", "C5"):
        return Backbone(body, None, body.out_channels[-1])
    channels, top_blocks = resnets.BACKBONE_OUT_CHANNELS, None
    if neck == "FPN-RETINANET":
        from_c5 = cfg.MODEL.RETINANET.USE_C5
        top_blocks = LastLevelP6P7(body.out_channels[-1] if from_c5 else channels, channels, from_c5=from_c5)
    fpn = FPN(
        body.out_channels,
        channels,
        norm=group_norm(cfg) if cfg.MODEL.FPN.USE_GN else None,
        relu=cfg.MODEL.FPN.USE_RELU,
        first_level=body.out_stages[0] - 1,
        top_blocks=top_blocks,
    )
    return Backbone(body, fpn, fpn.out_channels)


def body_name(cfg: Config) -> tuple[int, str]:
    """(depth, "FPN", "FPN-RETINANET", "C4" or "C5") of ``MODEL.BACKBONE.CONV_BODY``."""
    _, depth, neck = cfg.MODEL.BACKBONE.CONV_BODY.split("-", 2)
    return int(depth), neck


def body_norm(cfg: Config, convention: Convention) -> NormFactory:
    """The normalisation of the residual blocks."""
    return _norm(cfg, cfg.MODEL.RESNETS.TRANS_FUNC, convention)


def _norm(cfg: Config, function: str, convention: Convention) -> NormFactory:
    return (
        group_norm(cfg) if function.endswith("GN") else frozen_batch_norm_factory(cfg.MODEL.BACKBONE.FROZEN_BN_EPSILON)
    )
