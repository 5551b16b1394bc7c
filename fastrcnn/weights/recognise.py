"""Whose file it is, by its names, and its weights in maskrcnn-benchmark's form."""

from __future__ import annotations

from pathlib import Path

from fastrcnn.weights import caffe2, detectron2, torchvision
from fastrcnn.weights.anchors import style_of
from fastrcnn.weights.content import Weights
from fastrcnn.weights.read import FileContent, read_file
from fastrcnn.weights.report import WeightsError

KIND = "maskrcnn_benchmark"


def read_weights(path: Path) -> Weights:
    """Read a file of any kind that this package knows.

    Raises:
        WeightsError: as :func:`fastrcnn.weights.read.read_file`; or a kind of model that has no place here.
    """
    content = read_file(path)
    try:
        weights = _convert(content)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    weights.training_state = content.training_state
    return weights


def kind_of(names: set[str]) -> str:
    """The kind of a file with these names; ``maskrcnn_benchmark`` for its own and for unknown ones."""
    if caffe2.is_caffe2(names):
        return caffe2.KIND
    if detectron2.is_detectron2(names):
        return detectron2.KIND
    if torchvision.is_torchvision(names):
        return torchvision.KIND
    if torchvision.is_classifier(names):
        return torchvision.CLASSIFIER_KIND
    return KIND


def _convert(content: FileContent) -> Weights:
    tensors, own = content.tensors, content.own
    kind = kind_of(set(tensors))
    if kind == caffe2.KIND:
        weights = caffe2.read(tensors)
    elif kind == detectron2.KIND:
        rows = Weights(kind, {})
        rows.take_source(own)
        weights = detectron2.read(tensors, rows.background)
    elif kind == torchvision.KIND:
        weights = torchvision.read(tensors)
    elif kind == torchvision.CLASSIFIER_KIND:
        weights = torchvision.read_classifier(tensors)
    else:
        body_only = not any(name.startswith(("rpn.", "roi_heads.", "backbone.fpn.")) for name in tensors)
        style = style_of(tensors) or KIND
        weights = Weights(KIND, tensors, body_only=body_only, anchor_style=style)
        weights.retinanet_background = weights.is_retinanet and style == torchvision.KIND
        weights.take_own_entry(own)
        return weights
    weights.take_source(own)
    return weights
