"""Rules between keys: settings that are each legal and make no sense together.

Each rule is a generator of problems; a problem names the keys it is about so that the loader can say where the
latest of them was set. Wrong combinations would otherwise fail deep in the model, with a
message about shapes, or train something that was not meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrcnn.config.schema import Config

Problem = tuple[tuple[str, ...], str]


class KeysDoNotFit(ValueError):
    """Two or more keys contradict each other.

    Attributes:
        keys: full names of the keys concerned.
    """

    def __init__(self, keys: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.keys = keys


def check_config(cfg: Config) -> None:
    """Raise :class:`KeysDoNotFit` for the first rule that ``cfg`` breaks."""
    families = (_backbone, _family, _rpn, _box_head, _mask_head, _keypoint_head)
    for rule in (_solver, _step, _sizes, _thresholds, *families, _augmentation):
        for keys, message in rule(cfg):
            raise KeysDoNotFit(keys, message)


def _is_pyramid(cfg: Config) -> bool:
    return cfg.MODEL.BACKBONE.CONV_BODY.endswith("-FPN")


def _level_stride(cfg: Config) -> int:
    """Stride of the only level of a body without a pyramid (the FBNet architectures have that of C4)."""
    dilated = cfg.MODEL.RESNETS.RES5_DILATION > 1
    return 32 if cfg.MODEL.BACKBONE.CONV_BODY.endswith("-C5") and not dilated else 16


def _solver(cfg: Config) -> Iterator[Problem]:
    steps = cfg.SOLVER.STEPS
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        yield ("SOLVER.STEPS",), f"SOLVER.STEPS must increase, got {steps}"


def _step(cfg: Config) -> Iterator[Problem]:
    shares = cfg.STEP.MASK_SHARES
    if any(later <= earlier for earlier, later in itertools.pairwise(shares)) or shares[0] <= 0 or shares[-1] != 1:
        yield ("STEP.MASK_SHARES",), f"STEP.MASK_SHARES must increase from more than 0 to 1, got {shares}"


def _sizes(cfg: Config) -> Iterator[Problem]:
    image = cfg.INPUT
    if max(image.MIN_SIZE_TRAIN) > image.MAX_SIZE_TRAIN:
        yield (
            ("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN"),
            f"INPUT.MIN_SIZE_TRAIN {max(image.MIN_SIZE_TRAIN)} is larger than INPUT.MAX_SIZE_TRAIN "
            f"{image.MAX_SIZE_TRAIN}; raise MAX_SIZE_TRAIN",
        )
    if image.MIN_SIZE_TEST > image.MAX_SIZE_TEST:
        yield (
            ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
            f"INPUT.MIN_SIZE_TEST {image.MIN_SIZE_TEST} is larger than INPUT.MAX_SIZE_TEST {image.MAX_SIZE_TEST}; "
            "raise MAX_SIZE_TEST",
        )
    divisibility = cfg.DATALOADER.SIZE_DIVISIBILITY
    if "FPN" in cfg.MODEL.BACKBONE.CONV_BODY and (divisibility == 0 or divisibility % 32):
        # The pyramid adds a level, enlarged twice, to the next finer one: sizes that do not halve evenly differ.
        yield (
            ("DATALOADER.SIZE_DIVISIBILITY", "MODEL.BACKBONE.CONV_BODY"),
            f"MODEL.BACKBONE.CONV_BODY {cfg.MODEL.BACKBONE.CONV_BODY} needs DATALOADER.SIZE_DIVISIBILITY to be a "
            f"multiple of 32, got {divisibility}; set DATALOADER.SIZE_DIVISIBILITY 32",
        )
    buckets = cfg.DATALOADER.SHAPE_BUCKETS
    for height, width in buckets if isinstance(buckets, tuple) else ():
        if height % max(1, divisibility) or width % max(1, divisibility):
            yield (
                ("DATALOADER.SHAPE_BUCKETS", "DATALOADER.SIZE_DIVISIBILITY"),
                f"DATALOADER.SHAPE_BUCKETS holds ({height}, {width}), which is not a multiple of "
                f"DATALOADER.SIZE_DIVISIBILITY {divisibility}",
            )


def _thresholds(cfg: Config) -> Iterator[Problem]:
    model = cfg.MODEL
    for name, section in (("RPN", model.RPN), ("ROI_HEADS", model.ROI_HEADS), ("RETINANET", model.RETINANET)):
        high, low = section.FG_IOU_THRESHOLD, section.BG_IOU_THRESHOLD
        if low > high:
            prefix = f"MODEL.{name}"
            yield (
                (f"{prefix}.BG_IOU_THRESHOLD", f"{prefix}.FG_IOU_THRESHOLD"),
                f"{prefix}.BG_IOU_THRESHOLD {low} must not be above FG_IOU_THRESHOLD {high}",
            )
    norm = model.GROUP_NORM
    if (norm.DIM_PER_GP > 0) == (norm.NUM_GROUPS > 0):
        yield (
            ("MODEL.GROUP_NORM.DIM_PER_GP", "MODEL.GROUP_NORM.NUM_GROUPS"),
            f"one of MODEL.GROUP_NORM.DIM_PER_GP ({norm.DIM_PER_GP}) and NUM_GROUPS ({norm.NUM_GROUPS}) must be "
            "positive and the other -1",
        )


def _backbone(cfg: Config) -> Iterator[Problem]:
    body, block = cfg.MODEL.BACKBONE.CONV_BODY, cfg.MODEL.RESNETS.TRANS_FUNC
    keys = ("MODEL.RESNETS.TRANS_FUNC", "MODEL.BACKBONE.CONV_BODY")
    basic_body, basic_block = body in ("R-18-FPN", "R-34-FPN"), block.startswith("BasicBlock")
    suffix = block.removeprefix("BasicBlock").removeprefix("Bottleneck")
    if basic_body and not basic_block:
        yield (
            keys,
            f"MODEL.BACKBONE.CONV_BODY {body} has basic blocks, not {block}; "
            f"set MODEL.RESNETS.TRANS_FUNC BasicBlock{suffix}",
        )
    if basic_block and not basic_body:
        yield (
            keys,
            f"MODEL.RESNETS.TRANS_FUNC {block} is for R-18-FPN and R-34-FPN, not for {body}; "
            f"set MODEL.RESNETS.TRANS_FUNC Bottleneck{suffix}",
        )
    if basic_block and cfg.MODEL.RESNETS.NUM_GROUPS != 1:
        yield (
            ("MODEL.RESNETS.NUM_GROUPS", *keys),
            f"MODEL.RESNETS.TRANS_FUNC {block} has no grouped convolutions; set MODEL.RESNETS.NUM_GROUPS 1",
        )
    if basic_block and any(cfg.MODEL.RESNETS.STAGE_WITH_DCN):
        yield (
            ("MODEL.RESNETS.STAGE_WITH_DCN", *keys),
            f"MODEL.RESNETS.TRANS_FUNC {block} has no deformable convolutions; set MODEL.RESNETS.STAGE_WITH_DCN "
            '"(False, False, False, False)"',
        )
    if "-FPN" in body and cfg.MODEL.RESNETS.RES5_DILATION > 1:
        yield (
            ("MODEL.RESNETS.RES5_DILATION", "MODEL.BACKBONE.CONV_BODY"),
            f"MODEL.BACKBONE.CONV_BODY {body} needs a last stage of stride 32, and a dilated one has 16; set "
            "MODEL.RESNETS.RES5_DILATION 1",
        )


def _rpn(cfg: Config) -> Iterator[Problem]:
    model, rpn = cfg.MODEL, cfg.MODEL.RPN
    if model.RETINANET_ON:
        sizes, strides = model.RETINANET.ANCHOR_SIZES, model.RETINANET.ANCHOR_STRIDES
        if len(sizes) != len(strides):
            yield (
                ("MODEL.RETINANET.ANCHOR_STRIDES", "MODEL.RETINANET.ANCHOR_SIZES"),
                f"MODEL.RETINANET.ANCHOR_STRIDES has {len(strides)} entries and ANCHOR_SIZES {len(sizes)}; "
                "each level needs one of both",
            )
        return
    body = model.BACKBONE.CONV_BODY
    if _is_pyramid(cfg) != rpn.USE_FPN:
        yield (
            ("MODEL.RPN.USE_FPN", "MODEL.BACKBONE.CONV_BODY"),
            f"MODEL.RPN.USE_FPN {rpn.USE_FPN} does not fit MODEL.BACKBONE.CONV_BODY {body}; "
            f"set MODEL.RPN.USE_FPN {not rpn.USE_FPN}",
        )
    keys = ("MODEL.RPN.ANCHOR_STRIDE", "MODEL.RPN.ANCHOR_SIZES", "MODEL.RPN.USE_FPN")
    if rpn.USE_FPN and (len(rpn.ANCHOR_STRIDE) != 5 or len(rpn.ANCHOR_SIZES) != 5):
        yield (
            keys,
            "with MODEL.RPN.USE_FPN, ANCHOR_STRIDE and ANCHOR_SIZES need one entry for each of the five levels, got "
            f'{len(rpn.ANCHOR_STRIDE)} and {len(rpn.ANCHOR_SIZES)}; set MODEL.RPN.ANCHOR_STRIDE "(4, 8, 16, 32, 64)"',
        )
    if not rpn.USE_FPN and len(rpn.ANCHOR_STRIDE) != 1:
        yield (
            keys,
            f"MODEL.RPN.ANCHOR_STRIDE has {len(rpn.ANCHOR_STRIDE)} entries, but without MODEL.RPN.USE_FPN there is "
            f'one level; set MODEL.RPN.ANCHOR_STRIDE "({_level_stride(cfg)},)"',
        )
    if body.endswith(("-C4", "-C5")) and rpn.ANCHOR_STRIDE != (_level_stride(cfg),):
        yield (
            ("MODEL.RPN.ANCHOR_STRIDE", "MODEL.BACKBONE.CONV_BODY"),
            f"MODEL.RPN.ANCHOR_STRIDE {rpn.ANCHOR_STRIDE} does not fit MODEL.BACKBONE.CONV_BODY {body}; set "
            f'MODEL.RPN.ANCHOR_STRIDE "({_level_stride(cfg)},)"',
        )


def _family(cfg: Config) -> Iterator[Problem]:
    model = cfg.MODEL
    body = model.BACKBONE.CONV_BODY
    if model.RETINANET_ON != body.endswith("-RETINANET"):
        wanted = "R-50-FPN-RETINANET" if model.RETINANET_ON else body.removesuffix("-RETINANET")
        yield (
            ("MODEL.BACKBONE.CONV_BODY", "MODEL.RETINANET_ON"),
            f"MODEL.BACKBONE.CONV_BODY {body} does not fit MODEL.RETINANET_ON {model.RETINANET_ON}; "
            f"set MODEL.BACKBONE.CONV_BODY {wanted}",
        )
    for other in ("MASK_ON", "KEYPOINT_ON"):
        for alone in ("RPN_ONLY", "RETINANET_ON"):
            if getattr(model, other) and getattr(model, alone):
                yield (
                    (f"MODEL.{other}", f"MODEL.{alone}"),
                    f"MODEL.{other} and MODEL.{alone} exclude each other; set one of them False",
                )


def _augmentation(cfg: Config) -> Iterator[Problem]:
    if not cfg.TEST.BBOX_AUG.ENABLED:
        return
    for other in ("RPN_ONLY", "RETINANET_ON", "KEYPOINT_ON"):
        if getattr(cfg.MODEL, other):
            yield (
                ("TEST.BBOX_AUG.ENABLED", f"MODEL.{other}"),
                f"TEST.BBOX_AUG.ENABLED merges the boxes and masks of a box head; it does not go with MODEL.{other} "
                "True: set TEST.BBOX_AUG.ENABLED False",
            )
    if cfg.MODEL.MASK_ON and cfg.MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS:
        yield (
            ("TEST.BBOX_AUG.ENABLED", "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS"),
            "TEST.BBOX_AUG.ENABLED averages mask probabilities, which are gone once they are pasted: set "
            "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS False",
        )


def _pooler(cfg: Config, head: str, scales: tuple[float, ...]) -> Iterator[Problem]:
    """The pyramid hands out P2 first, so scale i is 1 / 2**(i + 2); everything else has one level."""
    name = f"MODEL.{head}.POOLER_SCALES"
    keys = (name, "MODEL.ROI_HEADS.USE_FPN", "MODEL.BACKBONE.CONV_BODY")
    if not _is_pyramid(cfg):
        body, scale = cfg.MODEL.BACKBONE.CONV_BODY, 1 / _level_stride(cfg)
        if len(scales) != 1:
            yield (
                keys,
                f"{name} has {len(scales)} entries, but MODEL.BACKBONE.CONV_BODY {body} has one level; "
                f'set {name} "({scale},)"',
            )
        elif body.endswith("-C5") and scales[0] != scale:
            yield keys, f'{name} {scales} does not fit MODEL.BACKBONE.CONV_BODY {body}; set {name} "({scale},)"'
    elif len(scales) > 5 or any(scale != 0.25 / 2**level for level, scale in enumerate(scales)):
        yield (
            keys,
            f"{name} {scales} does not fit the levels of MODEL.BACKBONE.CONV_BODY "
            f'{cfg.MODEL.BACKBONE.CONV_BODY}; set {name} "(0.25, 0.125, 0.0625, 0.03125)"',
        )


def _box_head(cfg: Config) -> Iterator[Problem]:
    model = cfg.MODEL
    if model.RPN_ONLY or model.RETINANET_ON:
        return
    body, head = model.BACKBONE.CONV_BODY, model.ROI_BOX_HEAD
    if _is_pyramid(cfg) != model.ROI_HEADS.USE_FPN:
        yield (
            ("MODEL.ROI_HEADS.USE_FPN", "MODEL.BACKBONE.CONV_BODY"),
            f"MODEL.ROI_HEADS.USE_FPN {model.ROI_HEADS.USE_FPN} does not fit MODEL.BACKBONE.CONV_BODY {body}; "
            f"set MODEL.ROI_HEADS.USE_FPN {not model.ROI_HEADS.USE_FPN}",
        )
    if head.FEATURE_EXTRACTOR == "ResNet50Conv5ROIFeatureExtractor" and not body.endswith("-C4"):
        wanted = "FBNet.roi_head" if body == "FBNet" else "FPN2MLPFeatureExtractor"
        yield (
            ("MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "MODEL.BACKBONE.CONV_BODY"),
            f"MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR {head.FEATURE_EXTRACTOR} is the fifth stage of a ResNet and does "
            f"not fit MODEL.BACKBONE.CONV_BODY {body}; set MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR {wanted}",
        )
    yield from _pooler(cfg, "ROI_BOX_HEAD", head.POOLER_SCALES)
    fitting = "FPNPredictor" if head.FEATURE_EXTRACTOR.startswith("FPN") else "FastRCNNPredictor"
    if head.PREDICTOR != fitting:
        yield (
            ("MODEL.ROI_BOX_HEAD.PREDICTOR", "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR"),
            f"MODEL.ROI_BOX_HEAD.PREDICTOR {head.PREDICTOR} does not take the features of {head.FEATURE_EXTRACTOR}; "
            f"set MODEL.ROI_BOX_HEAD.PREDICTOR {fitting}",
        )


def _sharing(cfg: Config, head: str, switch: str) -> Iterator[Problem]:
    """A head that shares the box head's features needs maps, and the fully connected extractors give vectors."""
    if cfg.MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR.startswith("FPN"):
        key = f"MODEL.{head}.SHARE_BOX_FEATURE_EXTRACTOR"
        yield (
            (key, "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", switch),
            f"{key} needs a box head with feature maps, and {cfg.MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR} gives vectors; "
            f"set {key} False",
        )


def _mask_head(cfg: Config) -> Iterator[Problem]:
    model, head = cfg.MODEL, cfg.MODEL.ROI_MASK_HEAD
    if not model.MASK_ON:
        return
    extractor: str
    if head.SHARE_BOX_FEATURE_EXTRACTOR:
        yield from _sharing(cfg, "ROI_MASK_HEAD", "MODEL.MASK_ON")
        extractor, pooled = model.ROI_BOX_HEAD.FEATURE_EXTRACTOR, model.ROI_BOX_HEAD.POOLER_RESOLUTION
    else:
        yield from _pooler(cfg, "ROI_MASK_HEAD", head.POOLER_SCALES)
        body = model.BACKBONE.CONV_BODY
        if head.FEATURE_EXTRACTOR == "ResNet50Conv5ROIFeatureExtractor" and not body.endswith("-C4"):
            wanted = "FBNet.roi_head_mask" if body == "FBNet" else "MaskRCNNFPNFeatureExtractor"
            yield (
                ("MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", "MODEL.BACKBONE.CONV_BODY"),
                f"MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR {head.FEATURE_EXTRACTOR} is the fifth stage of a ResNet and "
                f"does not fit MODEL.BACKBONE.CONV_BODY {body}; set MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR {wanted}",
            )
        extractor, pooled = head.FEATURE_EXTRACTOR, head.POOLER_RESOLUTION
    if extractor.startswith("FBNet"):
        return  # the stride of these heads is part of the architecture
    if extractor == "ResNet50Conv5ROIFeatureExtractor" and model.RESNETS.RES5_DILATION == 1:
        pooled = (pooled + 1) // 2
    predicted = pooled * (2 if head.PREDICTOR == "MaskRCNNC4Predictor" else 1)
    if head.RESOLUTION != predicted:
        yield (
            (
                "MODEL.MASK_ON",
                *(f"MODEL.ROI_MASK_HEAD.{key}" for key in ("RESOLUTION", "POOLER_RESOLUTION", "PREDICTOR")),
            ),
            f"MODEL.ROI_MASK_HEAD.RESOLUTION is {head.RESOLUTION}, but {extractor} and {head.PREDICTOR} predict "
            f"{predicted} x {predicted}; set MODEL.ROI_MASK_HEAD.RESOLUTION {predicted}",
        )


def _keypoint_head(cfg: Config) -> Iterator[Problem]:
    model, head = cfg.MODEL, cfg.MODEL.ROI_KEYPOINT_HEAD
    if not model.KEYPOINT_ON:
        return
    key = "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION"
    extractor: str
    if head.SHARE_BOX_FEATURE_EXTRACTOR:
        yield from _sharing(cfg, "ROI_KEYPOINT_HEAD", "MODEL.KEYPOINT_ON")
        extractor, pooled = model.ROI_BOX_HEAD.FEATURE_EXTRACTOR, model.ROI_BOX_HEAD.POOLER_RESOLUTION
        keys = (key, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION")
    else:
        yield from _pooler(cfg, "ROI_KEYPOINT_HEAD", head.POOLER_SCALES)
        extractor, pooled = head.FEATURE_EXTRACTOR, head.POOLER_RESOLUTION
        keys = (key, "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION")
    if extractor.startswith("FBNet"):
        return  # the stride of these heads is part of the architecture
    if extractor == "ResNet50Conv5ROIFeatureExtractor" and model.RESNETS.RES5_DILATION == 1:
        pooled = (pooled + 1) // 2
    predicted = pooled * 4
    if head.RESOLUTION != predicted:
        yield (
            ("MODEL.KEYPOINT_ON", *keys),
            f"{key} is {head.RESOLUTION}, but the head predicts {predicted} x {predicted}; set {key} {predicted}",
        )
