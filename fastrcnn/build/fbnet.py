"""FBNet: the architecture that the configuration names, and the parts of the detector that are made of it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fastrcnn.build.backbone import group_norm
from fastrcnn.config import Config, ConfigError
from fastrcnn.conventions import Convention
from fastrcnn.models.batch_norm import BatchNorm2d
from fastrcnn.models.fbnet import FBNetBody, FBNetFeatureExtractor, FBNetRPNFeatures, RPNRegressor
from fastrcnn.models.fbnet_archs import ARCHITECTURES, Architecture, Block, architecture_from_json
from fastrcnn.models.fbnet_blocks import BlockStyle, side_behind
from fastrcnn.models.fpn import Backbone
from fastrcnn.models.layers import NormFactory, frozen_batch_norm_factory
from fastrcnn.models.pooler import Pooler

# name of the part in an architecture: prefix of its keys in MODEL.FBNET
HEADS = {"bbox": "DET_HEAD", "mask": "MASK_HEAD", "kpts": "KPTS_HEAD"}


def architecture(cfg: Config) -> Architecture:
    """What ``MODEL.FBNET.ARCH`` names or ``ARCH_DEF`` defines.

    Raises:
        ConfigError: an unknown name, a wrong definition, or one that contradicts the name.
    """
    fbnet = cfg.MODEL.FBNET
    known = ARCHITECTURES.get(fbnet.ARCH)
    if not fbnet.ARCH_DEF:
        if known is None:
            raise ConfigError(
                f"MODEL.FBNET.ARCH {fbnet.ARCH!r} is unknown; choose {', '.join(ARCHITECTURES)}, or define it in "
                "MODEL.FBNET.ARCH_DEF"
            )
        return known
    try:
        defined = architecture_from_json(fbnet.ARCH_DEF)
    except ValueError as error:
        raise ConfigError(f"MODEL.FBNET.ARCH_DEF: {error}") from error
    if known is not None and defined != known:
        raise ConfigError(
            f"MODEL.FBNET.ARCH_DEF defines another architecture than {fbnet.ARCH!r}; set MODEL.FBNET.ARCH to a new name"
        )
    return defined


def build_fbnet_backbone(cfg: Config, convention: Convention) -> Backbone:
    """The body. ``BACKBONE.FREEZE_CONV_BODY_AT`` does not concern it, as in maskrcnn-benchmark."""
    arch = architecture(cfg)
    blocks = arch.part("backbone")
    _check_strides(cfg, arch, blocks)
    body = FBNetBody(arch.first, blocks, _style(cfg, convention, cfg.MODEL.FBNET.BN_TYPE))
    return Backbone(body, None, body.out_channels)


def build_fbnet_rpn_head(cfg: Config, in_channels: int, num_anchors: int, convention: Convention) -> nn.Sequential:
    fbnet = cfg.MODEL.FBNET
    blocks = architecture(cfg).part("rpn")
    if fbnet.RPN_HEAD_BLOCKS > len(blocks):
        raise ConfigError(
            f"MODEL.FBNET.RPN_HEAD_BLOCKS {fbnet.RPN_HEAD_BLOCKS}: MODEL.FBNET.ARCH {fbnet.ARCH} has {len(blocks)}"
        )
    if fbnet.RPN_HEAD_BLOCKS:
        # by their index in the stage, as in maskrcnn-benchmark: where the part is one stage, the last ones
        blocks = [entry for entry in blocks if len(blocks) - fbnet.RPN_HEAD_BLOCKS <= entry[1] < len(blocks)]
    if not blocks or any(block.stride != 1 for _, _, block in blocks):
        raise ConfigError(
            f"MODEL.RPN.RPN_HEAD FBNet.rpn_head: MODEL.FBNET.ARCH {fbnet.ARCH} has no blocks of its own for it, or "
            "blocks that change the size of the map; set MODEL.RPN.RPN_HEAD SingleConvRPNHead"
        )
    style = _style(cfg, convention, fbnet.RPN_BN_TYPE or fbnet.BN_TYPE)
    features = FBNetRPNFeatures(blocks, in_channels, style)
    return nn.Sequential(features, RPNRegressor(features.out_channels, num_anchors))


def build_fbnet_extractor(
    cfg: Config, part: str, in_channels: int, pooler: Pooler, convention: Convention
) -> FBNetFeatureExtractor:
    """The feature extractor of the ``bbox``, ``mask`` or ``kpts`` head."""
    fbnet, prefix = cfg.MODEL.FBNET, HEADS[part]
    arch = architecture(cfg)
    chosen, stride = getattr(fbnet, f"{prefix}_BLOCKS"), getattr(fbnet, f"{prefix}_STRIDE")
    blocks = [entry for entry in arch.part(part) if not chosen or entry[1] in chosen]
    if not blocks:
        raise ConfigError(f"MODEL.FBNET.{prefix}_BLOCKS {chosen} leaves no block of MODEL.FBNET.ARCH {fbnet.ARCH}")
    if stride > 2:
        raise ConfigError(f"MODEL.FBNET.{prefix}_STRIDE must be 0, 1 or 2, got {stride}")
    if stride:
        stage, index, block = blocks[0]
        blocks[0] = (stage, index, replace(block, stride=stride))
    return FBNetFeatureExtractor(
        blocks,
        in_channels,
        pooler,
        _style(cfg, convention, fbnet.BN_TYPE),
        last=arch.last,
        last_scale=getattr(fbnet, f"{prefix}_LAST_SCALE"),
    )


def _style(cfg: Config, convention: Convention, norm: str) -> BlockStyle:
    fbnet = cfg.MODEL.FBNET
    norms: dict[str, NormFactory] = {
        "bn": BatchNorm2d,
        "gn": group_norm(cfg),
        "af": frozen_batch_norm_factory(cfg.MODEL.BACKBONE.FROZEN_BN_EPSILON),
    }
    if norm not in norms:
        raise ConfigError(f"MODEL.FBNET.BN_TYPE and RPN_BN_TYPE must be bn, gn or af (frozen), got {norm!r}")
    return BlockStyle(
        norm=norms[norm],
        scale=fbnet.SCALE_FACTOR,
        width_divisor=fbnet.WIDTH_DIVISOR,
        depthwise_norm=not fbnet.DW_CONV_SKIP_BN,
        depthwise_relu=not fbnet.DW_CONV_SKIP_RELU,
    )


def _check_strides(cfg: Config, arch: Architecture, blocks: list[tuple[int, int, Block]]) -> None:
    """Anchors and pooling must know the stride of the body: a wrong one trains, and to nothing good."""
    model, side = cfg.MODEL, 1 << 12
    stride = side // side_behind(blocks, side // arch.first[1])
    if model.RPN.ANCHOR_STRIDE != (stride,):
        raise ConfigError(
            f"MODEL.RPN.ANCHOR_STRIDE {model.RPN.ANCHOR_STRIDE} does not fit MODEL.FBNET.ARCH {model.FBNET.ARCH}: it "
            f'has a stride of {stride}; set MODEL.RPN.ANCHOR_STRIDE "({stride},)"'
        )
    heads = {"ROI_BOX_HEAD": not model.RPN_ONLY, "ROI_MASK_HEAD": model.MASK_ON, "ROI_KEYPOINT_HEAD": model.KEYPOINT_ON}
    for head, is_built in heads.items():
        scales = getattr(model, head).POOLER_SCALES
        if is_built and scales != (1 / stride,):
            raise ConfigError(
                f"MODEL.{head}.POOLER_SCALES {scales} does not fit MODEL.FBNET.ARCH {model.FBNET.ARCH}, whose stride "
                f'is {stride}; set MODEL.{head}.POOLER_SCALES "({1 / stride},)"'
            )
