"""Names and shapes of maskrcnn-benchmark's state dicts, written from its naming rules and not from our modules."""

from __future__ import annotations

from collections.abc import Sequence

Shapes = dict[str, tuple[int, ...]]

BLOCKS = {"R-50": (3, 4, 6, 3), "R-101": (3, 4, 23, 3), "R-152": (3, 8, 36, 3)}


def batch_norm(name: str, channels: int) -> Shapes:
    """Frozen batch normalisation: four buffers."""
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def trained_batch_norm(name: str, channels: int) -> Shapes:
    return {**batch_norm(name, channels), f"{name}.num_batches_tracked": ()}


def affine(name: str, channels: int) -> Shapes:
    """Group normalisation."""
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def layer(name: str, *shape: int) -> Shapes:
    """Weight and bias of a convolution or a linear layer."""
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def stage(
    prefix: str,
    index: int,
    blocks: int,
    inside: int,
    *,
    groups: int = 1,
    width_per_group: int = 64,
    group_norm: bool = False,
    offsets: int = 0,
) -> Shapes:
    """``layer<index>`` with ``inside`` input channels; ``offsets``: channels that a deformable 3x3 predicts."""
    norm = affine if group_norm else batch_norm
    width, out = groups * width_per_group * 2 ** (index - 1), 256 * 2 ** (index - 1)
    found: Shapes = {}
    for block in range(blocks):
        name = f"{prefix}.layer{index}.{block}"
        if block == 0:
            found[f"{name}.downsample.0.weight"] = (out, inside, 1, 1)
            found |= norm(f"{name}.downsample.1", out)
        found[f"{name}.conv1.weight"] = (width, inside, 1, 1)
        if offsets:
            found |= layer(f"{name}.conv2.offset", offsets, width, 3, 3)
            found[f"{name}.conv2.conv.weight"] = (width, width // groups, 3, 3)
        else:
            found[f"{name}.conv2.weight"] = (width, width // groups, 3, 3)
        found[f"{name}.conv3.weight"] = (out, width, 1, 1)
        for number, channels in enumerate((width, width, out), start=1):
            found |= norm(f"{name}.bn{number}", channels)
        inside = out
    return found


def resnet(
    name: str,
    *,
    last: int = 4,
    groups: int = 1,
    width_per_group: int = 64,
    group_norm: bool = False,
    offsets: Sequence[int] = (0, 0, 0, 0),
) -> Shapes:
    """``backbone.body`` up to ``layer<last>``."""
    norm = affine if group_norm else batch_norm
    found: Shapes = {"backbone.body.stem.conv1.weight": (64, 3, 7, 7)}
    found |= norm("backbone.body.stem.bn1", 64)
    for index in range(1, last + 1):
        found |= stage(
            "backbone.body",
            index,
            BLOCKS[name][index - 1],
            64 if index == 1 else 128 * 2 ** (index - 1),
            groups=groups,
            width_per_group=width_per_group,
            group_norm=group_norm,
            offsets=offsets[index - 1],
        )
    return found


def normed(name: str, *shape: int) -> Shapes:
    """A layer without bias and its group normalisation, in a Sequential."""
    return {f"{name}.0.weight": shape, **affine(f"{name}.1", shape[0])}


def fpn(*, group_norm: bool = False) -> Shapes:
    make = normed if group_norm else layer
    found: Shapes = {}
    for level in range(1, 5):
        found |= make(f"backbone.fpn.fpn_inner{level}", 256, 128 * 2**level, 1, 1)
        found |= make(f"backbone.fpn.fpn_layer{level}", 256, 256, 3, 3)
    return found


def rpn(channels: int, *, levels: int, anchors: int) -> Shapes:
    found: Shapes = {f"rpn.anchor_generator.cell_anchors.{level}": (anchors, 4) for level in range(levels)}
    found |= layer("rpn.head.conv", channels, channels, 3, 3)
    found |= layer("rpn.head.cls_logits", anchors, channels, 1, 1)
    return found | layer("rpn.head.bbox_pred", 4 * anchors, channels, 1, 1)


def box_predictor(channels: int, classes: int = 81, box_classes: int | None = None) -> Shapes:
    return {
        **layer("roi_heads.box.predictor.cls_score", classes, channels),
        **layer("roi_heads.box.predictor.bbox_pred", 4 * (box_classes or classes), channels),
    }


def two_mlp_head(in_channels: int = 256, *, resolution: int = 7, group_norm: bool = False) -> Shapes:
    make = normed if group_norm else layer
    prefix = "roi_heads.box.feature_extractor"
    return {**make(f"{prefix}.fc6", 1024, in_channels * resolution**2), **make(f"{prefix}.fc7", 1024, 1024)}


def xconv_head(*, group_norm: bool) -> Shapes:
    """Four 3x3 convolutions with norm and ReLU between them, then one linear layer with a bias."""
    prefix, found, step = "roi_heads.box.feature_extractor", Shapes(), 3 if group_norm else 2
    for number in range(4):
        name = f"{prefix}.xconvs.{number * step}"
        found[f"{name}.weight"] = (256, 256, 3, 3)
        if group_norm:
            found |= affine(f"{prefix}.xconvs.{number * step + 1}", 256)
        else:
            found[f"{name}.bias"] = (256,)
    return found | layer(f"{prefix}.fc6", 1024, 256 * 49)


def mask_head(*, group_norm: bool = False, in_channels: int = 256) -> Shapes:
    make = normed if group_norm else layer
    found: Shapes = {}
    for number in range(1, 5):
        channels = in_channels if number == 1 else 256
        found |= make(f"roi_heads.mask.feature_extractor.mask_fcn{number}", 256, channels, 3, 3)
    return found | mask_predictor(256)


def mask_predictor(channels: int, classes: int = 81) -> Shapes:
    """A transposed convolution to 256 channels, whose weight has the input channels first, and one mask a class."""
    return {
        "roi_heads.mask.predictor.conv5_mask.weight": (channels, 256, 2, 2),
        "roi_heads.mask.predictor.conv5_mask.bias": (256,),
        **layer("roi_heads.mask.predictor.mask_fcn_logits", classes, 256, 1, 1),
    }


def conv5_head(head: str) -> Shapes:
    """The fifth stage in the ``box`` or ``mask`` head."""
    return stage(f"roi_heads.{head}.feature_extractor.head", 4, 3, 1024)
