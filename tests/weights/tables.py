"""State dicts of every family in every system's names, from tables of names and shapes: a few channels of each layer.

The names are written out here as the systems have them, independently of the code under test.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAMILIES = ["mask_fpn", "box_fpn", "mask_c4", "keypoint", "retinanet"]
K = 3  # classes without the background
W = 4  # channels
POINTS = 5
NORM = ("weight", "bias", "running_mean", "running_var")
ANCHORS = {"mask_fpn": 3, "box_fpn": 3, "mask_c4": 15, "keypoint": 3, "retinanet": 9}

Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int, transposed: bool = False) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[1 if transposed else 0],)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (channels,) for part in NORM}


def bottleneck(conv: str, bn: str, shortcut: tuple[str, str] | None, width: int) -> Shapes:
    """One block; ``conv`` and ``bn`` have ``{}`` for the number."""
    found: Shapes = {}
    shapes = ((W, width, 1, 1), (W, W, 3, 3), (2 * W, W, 1, 1))
    for number, shape in enumerate(shapes, 1):
        found[conv.format(number) + ".weight"] = shape
        found |= norm(bn.format(number), shape[0])
    if shortcut:
        found |= {f"{shortcut[0]}.weight": (2 * W, width, 1, 1), **norm(shortcut[1], 2 * W)}
    return found


def stages(system: str, prefix: str, which: range) -> Shapes:
    found: Shapes = {}
    for stage in which:
        for block in range(2):
            if system == "detectron2":
                root = f"{prefix}res{stage}.{block}"
                parts = (f"{root}.conv{{}}", f"{root}.conv{{}}.norm", (f"{root}.shortcut", f"{root}.shortcut.norm"))
            else:
                root = f"{prefix}layer{stage - 1}.{block}"
                parts = (f"{root}.conv{{}}", f"{root}.bn{{}}", (f"{root}.downsample.0", f"{root}.downsample.1"))
            width = W if block == 0 and stage == 2 else 2 * W
            found |= bottleneck(parts[0], parts[1], parts[2] if block == 0 else None, width)
    return found


def stem(system: str, prefix: str) -> Shapes:
    conv, bn = {
        "maskrcnn_benchmark": ("stem.conv1", "stem.bn1"),
        "detectron2": ("stem.conv1", "stem.conv1.norm"),
        "torchvision": ("conv1", "bn1"),
    }[system]
    return {f"{prefix}{conv}.weight": (W, 3, 7, 7), **norm(f"{prefix}{bn}", W)}


def maskrcnn_benchmark(family: str) -> Shapes:
    a = ANCHORS[family]
    c4, retinanet = family == "mask_c4", family == "retinanet"
    found = stem("maskrcnn_benchmark", "backbone.body.")
    found |= stages("maskrcnn_benchmark", "backbone.body.", range(2, 5 if c4 else 6))
    if not c4:
        for level in range(2 if retinanet else 1, 5):
            found |= layer(f"backbone.fpn.fpn_inner{level}", W, 2 * W, 1, 1)
            found |= layer(f"backbone.fpn.fpn_layer{level}", W, W, 3, 3)
    if retinanet:
        for name in ("p6", "p7"):
            found |= layer(f"backbone.fpn.top_blocks.{name}", W, W, 3, 3)
        for tower in ("cls_tower", "bbox_tower"):
            for index in (0, 2, 4, 6):
                found |= layer(f"rpn.head.{tower}.{index}", W, W, 3, 3)
        return found | layer("rpn.head.cls_logits", a * K, W, 3, 3) | layer("rpn.head.bbox_pred", a * 4, W, 3, 3)
    found |= layer("rpn.head.conv", W, W, 3, 3)
    found |= layer("rpn.head.cls_logits", a, W, 1, 1) | layer("rpn.head.bbox_pred", a * 4, W, 1, 1)
    if c4:
        found |= stages("maskrcnn_benchmark", "roi_heads.box.feature_extractor.head.", range(5, 6))
        found |= stages("maskrcnn_benchmark", "roi_heads.mask.feature_extractor.head.", range(5, 6))
    else:
        found |= layer("roi_heads.box.feature_extractor.fc6", W, W * 49) | layer(
            "roi_heads.box.feature_extractor.fc7", W, W
        )
    classes = 2 if family == "keypoint" else K + 1
    found |= layer("roi_heads.box.predictor.cls_score", classes, W)
    found |= layer("roi_heads.box.predictor.bbox_pred", 4 * classes, W)
    if family.startswith("mask"):
        for index in range(1, 1 if c4 else 5):
            found |= layer(f"roi_heads.mask.feature_extractor.mask_fcn{index}", W, W, 3, 3)
        found |= layer("roi_heads.mask.predictor.conv5_mask", W, W, 2, 2, transposed=True)
        found |= layer("roi_heads.mask.predictor.mask_fcn_logits", classes, W, 1, 1)
    if family == "keypoint":
        for index in range(1, 9):
            found |= layer(f"roi_heads.keypoint.feature_extractor.conv_fcn{index}", W, W, 3, 3)
        found |= layer("roi_heads.keypoint.predictor.kps_score_lowres", W, POINTS, 4, 4, transposed=True)
    return found


def detectron2(family: str) -> Shapes:
    a = ANCHORS[family]
    c4, retinanet = family == "mask_c4", family == "retinanet"
    body = "backbone." if c4 else "backbone.bottom_up."
    found = stem("detectron2", body) | stages("detectron2", body, range(2, 5 if c4 else 6))
    if not c4:
        for stage in range(3 if retinanet else 2, 6):
            found |= layer(f"backbone.fpn_lateral{stage}", W, 2 * W, 1, 1)
            found |= layer(f"backbone.fpn_output{stage}", W, W, 3, 3)
    if retinanet:
        for name in ("p6", "p7"):
            found |= layer(f"backbone.top_block.{name}", W, W, 3, 3)
        for tower in ("cls_subnet", "bbox_subnet"):
            for index in (0, 2, 4, 6):
                found |= layer(f"head.{tower}.{index}", W, W, 3, 3)
        return found | layer("head.cls_score", a * K, W, 3, 3) | layer("head.bbox_pred", a * 4, W, 3, 3)
    rpn = "proposal_generator.rpn_head."
    found |= layer(f"{rpn}conv", W, W, 3, 3)
    found |= layer(f"{rpn}objectness_logits", a, W, 1, 1) | layer(f"{rpn}anchor_deltas", a * 4, W, 1, 1)
    if c4:
        found |= stages("detectron2", "roi_heads.", range(5, 6))
    else:
        found |= layer("roi_heads.box_head.fc1", W, W * 49) | layer("roi_heads.box_head.fc2", W, W)
    classes = 1 if family == "keypoint" else K
    found |= layer("roi_heads.box_predictor.cls_score", classes + 1, W)
    found |= layer("roi_heads.box_predictor.bbox_pred", 4 * classes, W)
    if family.startswith("mask"):
        for index in range(1, 1 if c4 else 5):
            found |= layer(f"roi_heads.mask_head.mask_fcn{index}", W, W, 3, 3)
        found |= layer("roi_heads.mask_head.deconv", W, W, 2, 2, transposed=True)
        found |= layer("roi_heads.mask_head.predictor", classes, W, 1, 1)
    if family == "keypoint":
        for index in range(1, 9):
            found |= layer(f"roi_heads.keypoint_head.conv_fcn{index}", W, W, 3, 3)
        found |= layer("roi_heads.keypoint_head.score_lowres", W, POINTS, 4, 4, transposed=True)
    return found


def torchvision(family: str) -> Shapes:
    a, retinanet = ANCHORS[family], family == "retinanet"
    found = stem("torchvision", "backbone.body.") | stages("torchvision", "backbone.body.", range(2, 6))
    for level in range(3 if retinanet else 4):
        found |= layer(f"backbone.fpn.inner_blocks.{level}.0", W, 2 * W, 1, 1)
        found |= layer(f"backbone.fpn.layer_blocks.{level}.0", W, W, 3, 3)
    if retinanet:
        for name in ("p6", "p7"):
            found |= layer(f"backbone.fpn.extra_blocks.{name}", W, W, 3, 3)
        for head in ("classification_head", "regression_head"):
            for index in range(4):
                found |= layer(f"head.{head}.conv.{index}.0", W, W, 3, 3)
        found |= layer("head.classification_head.cls_logits", a * (K + 1), W, 3, 3)
        return found | layer("head.regression_head.bbox_reg", a * 4, W, 3, 3)
    found |= layer("rpn.head.conv.0.0", W, W, 3, 3)
    found |= layer("rpn.head.cls_logits", a, W, 1, 1) | layer("rpn.head.bbox_pred", a * 4, W, 1, 1)
    found |= layer("roi_heads.box_head.fc6", W, W * 49) | layer("roi_heads.box_head.fc7", W, W)
    classes = 2 if family == "keypoint" else K + 1
    found |= layer("roi_heads.box_predictor.cls_score", classes, W)
    found |= layer("roi_heads.box_predictor.bbox_pred", 4 * classes, W)
    if family == "mask_fpn":
        for index in range(4):
            found |= layer(f"roi_heads.mask_head.{index}.0", W, W, 3, 3)
        found |= layer("roi_heads.mask_predictor.conv5_mask", W, W, 2, 2, transposed=True)
        found |= layer("roi_heads.mask_predictor.mask_fcn_logits", classes, W, 1, 1)
    if family == "keypoint":
        for index in range(8):
            found |= layer(f"roi_heads.keypoint_head.{2 * index}", W, W, 3, 3)
        found |= layer("roi_heads.keypoint_predictor.kps_score_lowres", W, POINTS, 4, 4, transposed=True)
    return found


SYSTEMS = {"maskrcnn_benchmark": maskrcnn_benchmark, "detectron2": detectron2, "torchvision": torchvision}


def state(system: str, family: str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; what maskrcnn-benchmark names twice is equal."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SYSTEMS[system](family).items()}
    for name in found:
        if name.startswith("roi_heads.mask.feature_extractor.head."):
            found[name] = found[name.replace("roi_heads.mask.", "roi_heads.box.")]
    return found


def has_family(system: str, family: str) -> bool:
    return system != "torchvision" or family != "mask_c4"
