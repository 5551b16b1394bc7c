"""torchvision's names: its detectors, whose layouts are maskrcnn-benchmark's, and its ImageNet classifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrcnn.weights.content import CLASS_LOGITS, Weights
from fastrcnn.weights.names import NameTable
from fastrcnn.weights.pixels import TORCHVISION
from fastrcnn.weights.report import WeightsError

KIND, CLASSIFIER_KIND = "torchvision", "imagenet"
BOX, MASK, KEYPOINT = "roi_heads.box.", "roi_heads.mask.", "roi_heads.keypoint."
TOWER = "head.classification_head.conv."
NEVER = -20.0  # logit of a class that was not there when the weights were trained


def pairs(first_level: int) -> list[tuple[str, str]]:
    """(theirs, ours), newest names first; the pyramid's inputs start at stage ``first_level`` + 1."""
    shift = f"<n-{first_level}>"
    found = [
        ("backbone.body.conv1.<p>", "backbone.body.stem.conv1.<p>"),
        ("backbone.body.bn1.<p>", "backbone.body.stem.bn1.<p>"),
        ("backbone.body.layer<rest>", "backbone.body.layer<rest>"),
        ("backbone.fpn.extra_blocks.p<n>.<p>", "backbone.fpn.top_blocks.p<n>.<p>"),
        ("rpn.head.conv.0.0.<p>", "rpn.head.conv.<p>"),
        ("roi_heads.box_head.fc<n>.<p>", f"{BOX}feature_extractor.fc<n>.<p>"),
        ("roi_heads.box_predictor.<rest>", f"{BOX}predictor.<rest>"),
        ("roi_heads.mask_head.<n-1>.0.<p>", f"{MASK}feature_extractor.mask_fcn<n>.<p>"),
        ("roi_heads.mask_predictor.<rest>", f"{MASK}predictor.<rest>"),
        ("roi_heads.keypoint_head.<2n-2>.<p>", f"{KEYPOINT}feature_extractor.conv_fcn<n>.<p>"),
        ("roi_heads.keypoint_predictor.<rest>", f"{KEYPOINT}predictor.<rest>"),
        # names before torchvision 0.13
        ("rpn.head.conv.<p>", "rpn.head.conv.<p>"),
        ("roi_heads.mask_head.mask_fcn<n>.<p>", f"{MASK}feature_extractor.mask_fcn<n>.<p>"),
    ]
    for theirs, ours in (("inner", "inner"), ("layer", "layer")):
        found.append((f"backbone.fpn.{theirs}_blocks.{shift}.0.<p>", f"backbone.fpn.fpn_{ours}<n>.<p>"))
        found.append((f"backbone.fpn.{theirs}_blocks.{shift}.<p>", f"backbone.fpn.fpn_{ours}<n>.<p>"))
    if first_level == 2:
        found += [
            ("head.classification_head.cls_logits.<p>", "rpn.head.cls_logits.<p>"),
            ("head.regression_head.bbox_reg.<p>", "rpn.head.bbox_pred.<p>"),
            (f"{TOWER}<n>.0.<p>", "rpn.head.cls_tower.<2n>.<p>"),
            ("head.regression_head.conv.<n>.0.<p>", "rpn.head.bbox_tower.<2n>.<p>"),
            (f"{TOWER}<n>.<p>", "rpn.head.cls_tower.<n>.<p>"),
            ("head.regression_head.conv.<n>.<p>", "rpn.head.bbox_tower.<n>.<p>"),
        ]
    else:
        found += [
            ("rpn.head.cls_logits.<p>", "rpn.head.cls_logits.<p>"),
            ("rpn.head.bbox_pred.<p>", "rpn.head.bbox_pred.<p>"),
        ]
    return found


TWO_STAGE, RETINANET = NameTable(pairs(1)), NameTable(pairs(2))


def is_torchvision(names: set[str]) -> bool:
    """Whether a file with these names is one of torchvision's detectors."""
    return "backbone.body.conv1.weight" in names or any(
        name.startswith(("backbone.fpn.inner_blocks.", "head.classification_head.", "roi_heads.box_predictor."))
        for name in names
    )


def is_classifier(names: set[str]) -> bool:
    """Whether a file with these names is a ResNet or ResNeXt classifier, of torchvision or with its names."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= names


def read(theirs: dict[str, Tensor]) -> Weights:
    """The weights of one of torchvision's detectors.

    The epsilon of the batch normalisation is 0 for those that torchvision offers trained (``COCO_V1``) and 1e-5 for
    others; the file does not tell.

    Raises:
        WeightsError: it is a ``_v2`` detector, which has layers that no model here has.
    """
    if any(name.startswith(("roi_heads.box_head.0.", "rpn.head.conv.1.")) for name in theirs):
        raise WeightsError(
            "a torchvision detector of the second version (_v2), with batch normalisation in pyramid and heads, which "
            "no model here has; those of the first version can be read"
        )
    retinanet = any(name.startswith("head.classification_head.") for name in theirs)
    table = RETINANET if retinanet else TWO_STAGE
    found = Weights(
        KIND,
        {},
        anchor_style=KIND,
        retinanet_background=retinanet,
        pixels=TORCHVISION,
        stride_in_1x1=False,
    )
    for name, value in theirs.items():
        ours = table.to_ours(name)
        if ours is None:
            found.unknown[name] = value
        else:
            found.tensors[ours] = value
    found.converted.append(f"{len(found.tensors)} names of torchvision")
    return found


def write(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The tensors by torchvision's names; those that it needs none of; names that it has no place for."""
    if weights.body_only:
        tensors = {name.removeprefix("stem."): value for name, value in weights.tensors.items()}
        return tensors, {}, []
    table = RETINANET if weights.is_retinanet else TWO_STAGE
    tensors, left_out, no_place = {}, {}, []
    for name, value in weights.tensors.items():
        theirs = table.to_theirs(name)
        if "cell_anchors." in name:
            left_out[name] = value
        elif theirs is None or (theirs.startswith("backbone.body.layer") and ".conv2.offset." in name):
            no_place.append(name)
        else:
            tensors[theirs] = value
    return tensors, left_out, no_place


def read_classifier(theirs: dict[str, Tensor]) -> Weights:
    """The body of an ImageNet classifier; names stay as they are, they are the ends of the model's."""
    found = Weights(CLASSIFIER_KIND, {}, body_only=True, pixels=TORCHVISION, stride_in_1x1=False, norm_eps=1e-5)
    for name, value in theirs.items():
        if name.startswith(("fc.", "classifier.")):
            found.ignored.append(f"{name} (the classifier)")
        elif name.startswith(("conv1.", "bn1.")):
            found.tensors[f"stem.{name}"] = value
        else:
            found.tensors[name] = value
    return found


def drop_background(tensors: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """RetinaNet's class logits [A * C, ...] without the first of the C columns of each anchor, in place.

    Returns:
        the dropped rows [A, ...] by name.
    """
    dropped = {}
    for name in [n for n in tensors if n.startswith(CLASS_LOGITS)]:
        split = tensors[name].unflatten(0, (-1, columns))
        dropped[name] = split[:, 0].clone()
        tensors[name] = split[:, 1:].flatten(0, 1).contiguous()
    return dropped


def add_background(tensors: dict[str, Tensor], anchors: int, rows: dict[str, Tensor]) -> None:
    """The reverse of :func:`drop_background`: ``rows`` [A, ...], or a class that is never predicted."""
    for name in [n for n in tensors if n.startswith(CLASS_LOGITS)]:
        split = tensors[name].unflatten(0, (anchors, -1))
        first = rows.get(name)
        if first is None or first.shape != split[:, 0].shape:
            first = split.new_full(split[:, 0].shape, NEVER if name.endswith("bias") else 0.0)
        tensors[name] = torch.cat([first[:, None].to(split.dtype), split], dim=1).flatten(0, 1)
