"""Caffe2's names, of Detectron's models and of the ImageNet models they start from; read only.

Batch normalisation is folded there into a scale and a shift (``bn_s``, ``bn_b``), which are a batch normalisation with
mean 0 and variance 1. Layouts are maskrcnn-benchmark's: the background is first, and has boxes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastrcnn.weights.content import Weights
from fastrcnn.weights.pixels import CAFFE2

KIND = "caffe2"
PARTS = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}
NORM = r"(?:bn|gn)_(s|b|rm|riv)"
BRANCHES = {
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2c": ("conv3", "bn3"),
}
STAGE5 = ("roi_heads.box.feature_extractor.head.", "roi_heads.mask.feature_extractor.head.")
# Names of the heads; the part after the last underscore is that of PARTS.
HEADS = [
    (r"conv_rpn(?:_fpn2)?", "rpn.head.conv"),
    (r"rpn_cls_logits(?:_fpn2)?", "rpn.head.cls_logits"),
    (r"rpn_bbox_pred(?:_fpn2)?", "rpn.head.bbox_pred"),
    (r"fc([67])", r"roi_heads.box.feature_extractor.fc\1"),
    (r"cls_score", "roi_heads.box.predictor.cls_score"),
    (r"bbox_pred", "roi_heads.box.predictor.bbox_pred"),
    (r"_\[mask\]_fcn(\d)", r"roi_heads.mask.feature_extractor.mask_fcn\1"),
    (r"conv5_mask", "roi_heads.mask.predictor.conv5_mask"),
    (r"mask_fcn_logits", "roi_heads.mask.predictor.mask_fcn_logits"),
    (r"conv_fcn(\d)", r"roi_heads.keypoint.feature_extractor.conv_fcn\1"),
    (r"kps_score_lowres", "roi_heads.keypoint.predictor.kps_score_lowres"),
]


def is_caffe2(names: set[str]) -> bool:
    """Whether a file with these names is Caffe2's."""
    return "res2_0_branch2a_w" in names or "conv1_w" in names


def read(blobs: dict[str, Tensor]) -> Weights:
    """The weights among the blobs of a Caffe2 model; momenta are left out."""
    blobs = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    detector = any(name in blobs for name in ("conv_rpn_w", "conv_rpn_fpn2_w", "cls_score_w"))
    pyramid = any(name.startswith("fpn_") for name in blobs)
    masks = "mask_fcn_logits_w" in blobs
    found = Weights(KIND, {}, body_only=not detector, pixels=CAFFE2)
    body = "backbone.body." if detector else ""
    group_norms: set[str] = set()
    for name, value in blobs.items():
        ours = _ours(name, body, with_norm=f"{name.rpartition('_')[0]}_gn_s" in blobs)
        if ours is None:
            if re.fullmatch(r"(fc1000|pred|kps_score)_[wb]", name):
                reason = "fixed upsampling" if name.startswith("kps") else "the classifier"
                found.ignored.append(f"{name} ({reason})")
            else:
                found.unknown[name] = value
            continue
        targets = [ours]
        if detector and not pyramid and ours.startswith("backbone.body.layer4."):
            # C4 models run stage 5 on the regions; the mask head shares it and names it again
            targets = [ours.replace("backbone.body.", head) for head in STAGE5[: 2 if masks else 1]]
        for target in targets:
            found.tensors[target] = value
            if name.endswith("_gn_s"):
                group_norms.add(target)
    found.converted.append(f"{len(found.tensors)} names of Caffe2")
    grouped = any(".conv2.weight" in n and v.shape[1] != v.shape[0] for n, v in found.tensors.items() if "layer1" in n)
    found.stride_in_1x1 = not grouped and "conv1_gn_s" not in blobs
    _unfold_norms(found, group_norms)
    return found


def _ours(name: str, body: str, *, with_norm: bool) -> str | None:
    """maskrcnn-benchmark's name. ``with_norm``: the layer has a group normalisation after it."""
    if inside := re.fullmatch(rf"(?:res_)?conv1_(?:(w|b)|{NORM})", name):
        return f"{body}stem.conv1.{PARTS[inside[1]]}" if inside[1] else f"{body}stem.bn1.{PARTS[inside[2]]}"
    if inside := re.fullmatch(rf"res(\d)_(\d+)_branch(1|2a|2b|2c)_(?:(w|b)|{NORM})", name):
        conv, norm = BRANCHES[inside[3]]
        part = f"{conv}.{PARTS[inside[4]]}" if inside[4] else f"{norm}.{PARTS[inside[5]]}"
        return f"{body}layer{int(inside[1]) - 1}.{inside[2]}.{part}"
    if inside := re.fullmatch(rf"fpn_(inner_)?res(\d)_\d+_sum(?:_lateral)?_(?:(w|b)|{NORM})", name):
        layer = f"backbone.fpn.fpn_{'inner' if inside[1] else 'layer'}{int(inside[2]) - 1}"
        return _in_sequence(layer, inside[3], inside[4], with_norm)
    if inside := re.fullmatch(rf"head_conv(\d)_(?:(w|b)|{NORM})", name):
        # Detectron's convolutions of this head always come with a normalisation: conv, norm, ReLU
        first = 3 * (int(inside[1]) - 1)
        layer = "roi_heads.box.feature_extractor.xconvs"
        return f"{layer}.{first}.{PARTS[inside[2]]}" if inside[2] else f"{layer}.{first + 1}.{PARTS[inside[3]]}"
    for pattern, layer in HEADS:
        if inside := re.fullmatch(rf"{pattern}_(?:(w|b)|{NORM})", name):
            *_, plain, norm = inside.groups()
            target = re.sub(r"\\1", inside[1] or "", layer)
            return _in_sequence(target, plain, norm, with_norm)
    return None


def _in_sequence(layer: str, plain: str | None, norm: str | None, with_norm: bool) -> str:
    if norm:
        return f"{layer}.1.{PARTS[norm]}"
    return f"{layer}.{'0.' if with_norm else ''}{PARTS[str(plain)]}"


def _unfold_norms(found: Weights, group_norms: set[str]) -> None:
    """Mean 0 and variance 1 for folded batch normalisations; biases of convolutions go into the shift after them."""
    tensors = found.tensors
    folded = moved = 0
    in_body = re.compile(r".*(layer\d\.\d+\.(conv\d|downsample\.0)|stem\.conv1)\.bias")
    for name in [n for n in tensors if in_body.fullmatch(n)]:
        norm = re.sub(r"conv(\d)\.bias$", r"bn\1.", name).replace("downsample.0.bias", "downsample.1.")
        bias = tensors.pop(name)
        if bool(bias.any()):
            tensors[f"{norm}bias"] = tensors[f"{norm}bias"] + tensors[f"{norm}weight"] * bias
            moved += 1
    for name in [n for n in tensors if re.search(r"(\bbn\d|downsample\.1)\.weight$", n)]:
        norm = name.removesuffix("weight")
        if f"{norm}running_mean" not in tensors and name not in group_norms:
            tensors[f"{norm}running_mean"] = torch.zeros_like(tensors[name])
            tensors[f"{norm}running_var"] = torch.ones_like(tensors[name])
            folded += 1
    if folded:
        found.converted.append(f"{folded} folded batch normalisations, to mean 0 and variance 1")
    if moved:
        found.converted.append(f"{moved} biases of convolutions, into the shift of the normalisation after them")
