"""detectron2's names and layouts: ``backbone.bottom_up``, background last and without boxes."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastrcnn.weights.content import Weights, rows_before
from fastrcnn.weights.names import NameTable
from fastrcnn.weights.pixels import DETECTRON2, PixelFormat

KIND = "detectron2"
BOX = "roi_heads.box.feature_extractor."
MASK = "roi_heads.mask.feature_extractor."
C4_HEAD, C4_MASK_HEAD = f"{BOX}head.", f"{MASK}head."
CLASS_SCORE, BOX_PRED = "roi_heads.box.predictor.cls_score.", "roi_heads.box.predictor.bbox_pred."
MASK_LOGITS = "roi_heads.mask.predictor.mask_fcn_logits."

# Modules of detectron2 that hold a convolution and, where there is one, its normalisation; maskrcnn-benchmark puts the
# two into a Sequential.
WITH_NORM = re.compile(
    r"(backbone\.fpn_(?:lateral|output)\d+|roi_heads\.(?:mask_head\.mask_fcn|box_head\.conv)\d+)\.(.+)"
)


def blocks(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Pairs for the blocks of residual stages under two prefixes."""
    t, o = f"{theirs}res<n+1>.<i>.", f"{ours}layer<n>.<i>."
    return [
        (f"{t}conv<j>.norm.<p>", f"{o}bn<j>.<p>"),
        (f"{t}shortcut.norm.<p>", f"{o}downsample.1.<p>"),
        (f"{t}shortcut.<p>", f"{o}downsample.0.<p>"),
        (f"{t}conv2_offset.<p>", f"{o}conv2.offset.<p>"),
        (f"{t}conv2.conv.<p>", f"{o}conv2.conv.<p>"),
        (f"{t}conv<j>.<p>", f"{o}conv<j>.<p>"),
    ]


def body(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Pairs for a ResNet under two prefixes."""
    return [
        (f"{theirs}stem.conv1.norm.<p>", f"{ours}stem.bn1.<p>"),
        (f"{theirs}stem.conv1.<p>", f"{ours}stem.conv1.<p>"),
        *blocks(theirs, ours),
    ]


HEADS = [
    ("backbone.fpn_lateral<n+1>.<rest>", "backbone.fpn.fpn_inner<n>.<rest>"),
    ("backbone.fpn_output<n+1>.<rest>", "backbone.fpn.fpn_layer<n>.<rest>"),
    ("backbone.top_block.p<n>.<p>", "backbone.fpn.top_blocks.p<n>.<p>"),
    ("proposal_generator.rpn_head.conv.<p>", "rpn.head.conv.<p>"),
    ("proposal_generator.rpn_head.objectness_logits.<p>", "rpn.head.cls_logits.<p>"),
    ("proposal_generator.rpn_head.anchor_deltas.<p>", "rpn.head.bbox_pred.<p>"),
    ("head.cls_subnet.<n>.<p>", "rpn.head.cls_tower.<n>.<p>"),
    ("head.bbox_subnet.<n>.<p>", "rpn.head.bbox_tower.<n>.<p>"),
    ("head.cls_score.<p>", "rpn.head.cls_logits.<p>"),
    ("head.bbox_pred.<p>", "rpn.head.bbox_pred.<p>"),
    *blocks("roi_heads.", C4_HEAD),
    ("roi_heads.box_head.fc<n-5>.<rest>", f"{BOX}fc<n>.<rest>"),
    ("roi_heads.box_head.conv<n>.<rest>", f"{BOX}xconvs.conv<n>.<rest>"),
    ("roi_heads.box_predictor.cls_score.<p>", f"{CLASS_SCORE}<p>"),
    ("roi_heads.box_predictor.bbox_pred.<p>", f"{BOX_PRED}<p>"),
    ("roi_heads.mask_head.mask_fcn<n>.<rest>", f"{MASK}mask_fcn<n>.<rest>"),
    ("roi_heads.mask_head.deconv.<p>", "roi_heads.mask.predictor.conv5_mask.<p>"),
    ("roi_heads.mask_head.predictor.<p>", f"{MASK_LOGITS}<p>"),
    ("roi_heads.keypoint_head.conv_fcn<n>.<p>", "roi_heads.keypoint.feature_extractor.conv_fcn<n>.<p>"),
    ("roi_heads.keypoint_head.score_lowres.<p>", "roi_heads.keypoint.predictor.kps_score_lowres.<p>"),
]
RETINANET_ONLY = ("head.cls_score.", "head.bbox_pred.")
TABLES = {
    "pyramid": NameTable([*body("backbone.bottom_up.", "backbone.body."), *HEADS]),
    "c4": NameTable([*body("backbone.", "backbone.body."), *HEADS]),
    "body": NameTable(body("", "")),
}


def is_detectron2(names: set[str]) -> bool:
    """Whether a file with these names is detectron2's, of a detector or of a classifier."""
    return (
        any(name.startswith(("proposal_generator.", "backbone.bottom_up.", "head.cls_subnet.")) for name in names)
        or "backbone.res2.0.conv1.weight" in names
        or {"stem.conv1.weight", "res2.0.conv1.weight"} <= names
    )


def read(theirs: dict[str, Tensor], own_background: dict[str, Tensor]) -> Weights:
    """The weights of a file with detectron2's names.

    Args:
        own_background: rows of the background that this package noted when it wrote the file.
    """
    tensors = _spread(theirs)
    layout = "pyramid" if any(name.startswith("backbone.bottom_up.") for name in theirs) else "c4"
    if not any(name.startswith("backbone.") for name in theirs):
        layout = "body"
    found = Weights(KIND, {}, body_only=layout == "body", anchor_style=KIND, norm_eps=1e-5)
    extra: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in ("pixel_mean", "pixel_std") or "anchor_generator.cell_anchors." in name:
            extra[name] = value
        elif layout == "body" and name.startswith(("stem.fc.", "linear.", "fc.")):
            found.ignored.append(f"{name} (the classifier)")
        elif (ours := TABLES[layout].to_ours(name)) is not None:
            found.tensors[ours] = value
        else:
            found.unknown[name] = value
    found.tensors = _xconvs_to_ours(found.tensors)
    if extra:
        found.left_out[KIND] = extra
        found.ignored += [f"{name} (follows from the configuration)" for name in extra]
    found.pixels = _pixels(extra)
    found.converted.append(f"{len(found.tensors)} names of detectron2")
    _layouts_to_ours(found, own_background)
    if f"{MASK_LOGITS}weight" in found.tensors:  # maskrcnn-benchmark's heads share stage 5 and name it twice
        shared = {n: v for n, v in found.tensors.items() if n.startswith(C4_HEAD)}
        found.tensors |= {n.replace(C4_HEAD, C4_MASK_HEAD): v for n, v in shared.items()}
    return found


def write(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The tensors by detectron2's names.

    Returns:
        tensors; rows of the background that it has no place for; tensors of maskrcnn-benchmark that it has no place
        for and needs none; names that it has no place for.
    """
    ours = _xconvs_to_theirs(dict(weights.tensors))
    pyramid = any(name.startswith("backbone.fpn.") for name in ours)
    table = TABLES["body" if weights.body_only else "pyramid" if pyramid else "c4"]
    background: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, Tensor] = {}
    no_place: list[str] = []
    for name, value in ours.items():
        if "cell_anchors." in name:
            left_out[name] = value
            continue
        if name.startswith(C4_MASK_HEAD) and torch.equal(value, ours.get(name.replace(C4_MASK_HEAD, C4_HEAD), value)):
            continue
        theirs = table.to_theirs(name)
        if weights.is_retinanet and theirs is not None and theirs.startswith("proposal_generator.rpn_head."):
            theirs = theirs.replace("proposal_generator.rpn_head.objectness_logits", "head.cls_score")
            theirs = theirs.replace("proposal_generator.rpn_head.anchor_deltas", "head.bbox_pred")
        if theirs is None:
            no_place.append(name)
            continue
        tensors[theirs], row = _layout_to_theirs(name, value)
        if row is not None:
            background[name] = row
    return _gather(tensors), background, left_out, no_place


def _layouts_to_ours(found: Weights, background: dict[str, Tensor]) -> None:
    for name, value in list(found.tensors.items()):
        if name.startswith(CLASS_SCORE):
            found.tensors[name] = value.roll(1, 0)
        elif name.startswith((BOX_PRED, MASK_LOGITS)):
            count = 4 if name.startswith(BOX_PRED) else 1
            found.tensors[name] = rows_before(value, background.get(name), count)
    if f"{CLASS_SCORE}weight" in found.tensors:
        found.converted.append("the background, from the last column to the first; its boxes and masks added")


def _layout_to_theirs(name: str, value: Tensor) -> tuple[Tensor, Tensor | None]:
    if name.startswith(CLASS_SCORE):
        return value.roll(-1, 0), None
    if name.startswith((BOX_PRED, MASK_LOGITS)):
        count = 4 if name.startswith(BOX_PRED) else 1
        return value[count:].clone(), value[:count].clone()
    return value, None


def _pixels(extra: dict[str, Tensor]) -> PixelFormat:
    """The format that ``pixel_mean`` and ``pixel_std`` tell: blue has the lowest mean, red the highest."""
    if "pixel_mean" not in extra or extra["pixel_mean"].numel() != 3:
        return DETECTRON2
    mean = tuple(extra["pixel_mean"].flatten().tolist())
    std = tuple(extra["pixel_std"].flatten().tolist()) if "pixel_std" in extra else (1.0, 1.0, 1.0)
    return PixelFormat(mean[0] <= mean[2], mean, std, scale=255.0)


def _spread(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``x.weight`` and ``x.norm.weight`` as ``x.0.weight`` and ``x.1.weight``; ``conv2`` of deformable blocks."""
    found = {}
    for name, value in theirs.items():
        inside = WITH_NORM.fullmatch(name)
        if inside is not None and f"{inside[1]}.norm.weight" in theirs:
            part = f"1.{inside[2].removeprefix('norm.')}" if inside[2].startswith("norm.") else f"0.{inside[2]}"
            name = f"{inside[1]}.{part}"
        if name.endswith(".conv2.weight") and name.replace(".conv2.weight", ".conv2_offset.weight") in theirs:
            name = name.replace(".conv2.weight", ".conv2.conv.weight")
        found[name] = value
    return found


def _gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`_spread`."""
    found = {}
    for name, value in tensors.items():
        inside = WITH_NORM.fullmatch(name)
        if inside is not None and inside[2].startswith(("0.", "1.")):
            name = f"{inside[1]}.{'norm.' if inside[2][0] == '1' else ''}{inside[2][2:]}"
        found[name.replace(".conv2.conv.", ".conv2.")] = value
    return found


def _xconvs_to_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``xconvs.conv2.0.weight`` as maskrcnn-benchmark's index into a Sequential of convolution, norm and ReLU."""
    table = NameTable(
        [
            (f"{BOX}xconvs.conv<n>.0.<p>", f"{BOX}xconvs.<3n-3>.<p>"),
            (f"{BOX}xconvs.conv<n>.1.<p>", f"{BOX}xconvs.<3n-2>.<p>"),
            (f"{BOX}xconvs.conv<n>.<p>", f"{BOX}xconvs.<2n-2>.<p>"),
        ]
    )
    return {table.to_ours(name) or name: value for name, value in tensors.items()}


def _xconvs_to_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if f"{BOX}xconvs.1.weight" in tensors:  # the second layer is a norm
        pairs = [
            (f"{BOX}xconvs.conv<n>.0.<p>", f"{BOX}xconvs.<3n-3>.<p>"),
            (f"{BOX}xconvs.conv<n>.1.<p>", f"{BOX}xconvs.<3n-2>.<p>"),
        ]
    else:
        pairs = [(f"{BOX}xconvs.conv<n>.<p>", f"{BOX}xconvs.<2n-2>.<p>")]
    table = NameTable(pairs)
    return {table.to_theirs(name) or name: value for name, value in tensors.items()}
