"""Keys that the configuration allows because maskrcnn-benchmark has them, and that no code here acts on yet."""

from __future__ import annotations

from typing import Any

from fastrcnn.config import Config, ConfigError


def refuse_what_is_not_built(cfg: Config) -> None:
    """Keys that the configuration allows because maskrcnn-benchmark has them, and that no code here acts on yet."""
    model, body = cfg.MODEL, cfg.MODEL.BACKBONE.CONV_BODY
    bodies = [f"R-{depth}-{neck}" for neck in ("FPN", "C4", "C5", "FPN-RETINANET") for depth in (18, 34, 50, 101, 152)]
    extractors = ["FPN2MLPFeatureExtractor", "FPNXconv1fcFeatureExtractor", "ResNet50Conv5ROIFeatureExtractor"]
    rules: list[tuple[str, Any, list[Any]]] = [
        ("MODEL.BACKBONE.CONV_BODY", body, bodies),
        ("MODEL.RPN.RPN_HEAD", model.RPN.RPN_HEAD, ["SingleConvRPNHead"]),
        ("TEST.BBOX_AUG.ENABLED", cfg.TEST.BBOX_AUG.ENABLED, [False]),
    ]
    if not (model.RPN_ONLY or model.RETINANET_ON):
        rules.append(("MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", model.ROI_BOX_HEAD.FEATURE_EXTRACTOR, extractors))
    if model.MASK_ON:
        mask = model.ROI_MASK_HEAD
        rules += [
            ("MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", mask.POSTPROCESS_MASKS, [False]),
        ]
        if not mask.SHARE_BOX_FEATURE_EXTRACTOR:
            extractors = ["MaskRCNNFPNFeatureExtractor", "ResNet50Conv5ROIFeatureExtractor"]
            rules.append(("MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", mask.FEATURE_EXTRACTOR, extractors))
    if model.KEYPOINT_ON and not model.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR:
        extractor = model.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR
        rules.append(("MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR", extractor, ["KeypointRCNNFeatureExtractor"]))
    for key, value, built in rules:
        if value not in built:
            choices = " or ".join(str(choice) for choice in built)
            raise ConfigError(f"{key} {value!r} is not built by this version; choose {choices}")
