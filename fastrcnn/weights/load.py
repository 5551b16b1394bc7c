"""Load a file of weights into a model.

maskrcnn-benchmark's rule (``align_and_update_state_dicts``): a tensor ``layer1.0.conv1.weight`` of an ImageNet file
goes to ``backbone.body.layer1.0.conv1.weight`` of the model, because the model's name ends with it. Where several names
of the file fit, the longest wins. Names of whole detectors match in full.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrcnn.weights import torchvision
from fastrcnn.weights.anchors import num_ratios, reorder, style_of
from fastrcnn.weights.content import BOX_DELTAS, CELL_ANCHORS, CLASS_LOGITS, Weights
from fastrcnn.weights.download import local_path
from fastrcnn.weights.pixels import PixelFormat, convert_stem
from fastrcnn.weights.recognise import read_weights
from fastrcnn.weights.report import WeightsError, WeightsReport

BODY = re.compile(r"backbone\.body\.|roi_heads\.\w+\.feature_extractor\.head\.layer")
BLOCK = re.compile(r"layer\d+")
ADVICE = "choose the configuration that the weights were trained with, or pass --allow-partial to load what fits"


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    pixels: PixelFormat | None = None,
    stride_in_1x1: bool | None = None,
    allow_partial: bool = False,
    complete: bool = False,
) -> WeightsReport:
    """Fill ``model`` from a file of maskrcnn-benchmark, fastrcnn, detectron2, torchvision or Caffe2.

    Whose file it is shows in its names. What the systems lay out differently is converted to the model's form: names,
    position of the background, rows of its boxes and masks, order of the anchors, scale of RetinaNet's deltas, folded
    batch normalisation and its epsilon, channel order and range of the stem's input. ``docs/weights.md`` has the table.

    Args:
        model: its parameters and buffers are overwritten in place, whatever device they are on.
        source: a path, an ``http(s)://`` address or a ``catalog://`` name of maskrcnn-benchmark. Nothing in a file is
            executed.
        pixels: what the model is fed with; without, the stem is not converted.
        stride_in_1x1: where the model's bottlenecks stride; with it, a file known to differ is reported.
        allow_partial: load what fits and report the rest, which is what fine-tuning with another number of classes
            wants. Else tensors of another shape, that the file lacks or that the model has no place for are errors.
            A classifier's file need have no more than the body.
        complete: a classifier's file is not enough: the model is to be used, not trained. Cell anchors may be absent:
            they follow from the configuration.

    Raises:
        WeightsError: the file cannot be fetched or read, fits nowhere, or (without ``allow_partial``) not wholly.
    """
    weights = read_weights(local_path(source))
    report = WeightsReport(str(source), weights.kind, converted=list(weights.converted), ignored=list(weights.ignored))
    own = dict(model.state_dict())
    _fit_heads(weights, own, report)
    _fit_stem(weights, own, pixels, report)
    _fit_norms(weights, model, report)
    if weights.stride_in_1x1 is not None and stride_in_1x1 not in (None, weights.stride_in_1x1):
        report.notes.append(
            f"the weights were trained with MODEL.RESNETS.STRIDE_IN_1X1 {weights.stride_in_1x1}, the model has "
            f"{stride_in_1x1}, which gives other features"
        )
    if weights.training_state:
        report.ignored.append(f"{', '.join(weights.training_state)} (of a training, which --resume goes on with)")
    _fill(weights, own, report)
    _judge(weights, own, report, allow_partial=allow_partial, complete=complete)
    return report


def _fit_heads(weights: Weights, own: dict[str, Tensor], report: WeightsReport) -> None:
    """Anchors and columns of the RPN's and RetinaNet's last layers in the model's form."""
    model_style = style_of(own)
    deltas = own.get(f"{BOX_DELTAS}weight")
    if model_style is None or deltas is None or f"{BOX_DELTAS}weight" not in weights.tensors:
        return
    report.converted.extend(reorder(weights.tensors, weights.anchor_style, model_style, num_ratios(own)))
    anchors, rows = len(deltas) // 4, len(own[f"{CLASS_LOGITS}weight"])
    theirs = len(weights.tensors[f"{CLASS_LOGITS}weight"])
    if weights.retinanet_background and theirs == rows + anchors:
        torchvision.drop_background(weights.tensors, theirs // anchors)
        report.converted.append("RetinaNet's column of the background, dropped")
    elif weights.is_retinanet and not weights.retinanet_background and theirs == rows - anchors:
        torchvision.add_background(weights.tensors, anchors, weights.background)
        report.converted.append("a column of the background added to RetinaNet's classes")
    if weights.anchor_style != model_style:
        # Anchors of another rule belong to another convention: the model's own follow from its configuration.
        for name in [n for n in weights.tensors if n.startswith(CELL_ANCHORS)]:
            del weights.tensors[name]
            report.ignored.append(f"{name} (the configuration has other anchors)")


def _fit_stem(weights: Weights, own: dict[str, Tensor], pixels: PixelFormat | None, report: WeightsReport) -> None:
    name = next((n for n in weights.tensors if n.endswith("stem.conv1.weight")), None)
    if name is None or pixels is None or weights.pixels is None or weights.tensors[name].shape[1:2] != (3,):
        return
    weights.tensors[name], converted, note = convert_stem(weights.tensors[name], weights.pixels, pixels)
    report.converted.extend([converted] if converted else [])
    report.notes.extend([note] if note else [])


def _fit_norms(weights: Weights, model: nn.Module, report: WeightsReport) -> None:
    """Put what the epsilon was at home, beyond the model's, into the variance of frozen batch normalisations."""
    if weights.norm_eps is None:
        return
    changed: set[str] = set()  # a tensor may fill several modules and is changed once
    for name, module in model.named_modules():
        frozen = isinstance(getattr(module, "running_var", None), Tensor) and not list(module.parameters())
        more = weights.norm_eps - float(getattr(module, "eps", weights.norm_eps))
        source = _source(f"{name}.running_var", weights.tensors) if frozen and more > 1e-12 else None
        if source is not None and source not in changed:
            weights.tensors[source] = weights.tensors[source] + more
            changed.add(source)
    if changed:
        report.converted.append(f"the epsilon {weights.norm_eps:g} of {len(changed)} normalisations, into the variance")


def _fill(weights: Weights, own: dict[str, Tensor], report: WeightsReport) -> None:
    used = set()
    with torch.no_grad():
        for name, target in own.items():
            source = _source(name, weights.tensors)
            if source is None:
                report.missing.append(name)
                continue
            used.add(source)
            value = weights.tensors[source]
            if value.shape != target.shape:
                report.mismatched.append(f"{name}: {_shape(value)} in the file, {_shape(target)} in the model")
                continue
            target.copy_(value)
            report.loaded.append(name)
    stages = {match[0] for name in own for match in BLOCK.finditer(name)}
    for name in (*weights.tensors, *weights.unknown):
        stage = BLOCK.match(name)
        if name in used:
            continue
        if name.endswith("num_batches_tracked"):
            report.ignored.append(f"{name} (a counter of training)")
        elif weights.body_only and stage is not None and stage[0] not in stages:
            report.ignored.append(f"{name} (the model has no {stage[0]})")
        elif weights.body_only and name.startswith(("fc.", "classifier.", "head.")):
            report.ignored.append(f"{name} (the classifier)")
        else:
            report.unused.append(name)


def _judge(
    weights: Weights, own: dict[str, Tensor], report: WeightsReport, *, allow_partial: bool, complete: bool
) -> None:
    """Raise for what is not as it should be."""
    path = report.path
    if not report.loaded and not report.mismatched:
        raise WeightsError(
            f"{path}: none of its {len(weights.tensors) + len(weights.unknown)} tensors fits a name of the model, the "
            f"first is {next(iter((*weights.tensors, *weights.unknown)), 'nothing')}; known are files of "
            "maskrcnn-benchmark, detectron2, torchvision and Caffe2"
        )
    if not report.loaded:
        raise WeightsError(f"{path}: no tensor has the model's shape, the first is {report.mismatched[0]}")
    if allow_partial:
        return
    if report.mismatched:
        count, first = len(report.mismatched), report.mismatched[0]
        raise WeightsError(f"{path}: {count} tensors have another shape, the first is {first}; {ADVICE}")
    absent = [
        name
        for name in report.missing
        if ".cell_anchors." not in name
        and not name.endswith("num_batches_tracked")
        # a classifier has neither heads nor the offsets of deformable convolutions
        and (complete or not weights.body_only or (BODY.match(name) and ".conv2.offset." not in name))
    ]
    if absent:
        raise WeightsError(f"{path}: lacks {len(absent)} of the model's tensors, the first is {absent[0]}; {ADVICE}")
    if report.unused:
        raise WeightsError(
            f"{path}: the model has no place for {len(report.unused)} of its tensors, the first is "
            f"{report.unused[0]}; {ADVICE}"
        )


def _source(name: str, tensors: dict[str, Tensor]) -> str | None:
    """The longest end of the dotted ``name`` that is a name of the file.

    An end begins at a block (``layer1``) or before it: the stem's ``conv1.weight`` fits no block's.
    """
    for candidate in (name, name.replace(".conv2.conv.", ".conv2.")):  # a plain convolution made deformable
        parts = candidate.split(".")
        for start in range(len(parts) - 1):
            end = ".".join(parts[start:])
            if end in tensors:
                return end
            if BLOCK.fullmatch(parts[start]):
                break
    return None


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a scalar"
