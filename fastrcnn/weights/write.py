"""Weights as files of other systems.

Where a format has room beside the tensors (all but torchvision's state dict) an entry ``fastrcnn`` notes what it has no
place for: the rows of the background, tensors of the other system. With it the way back gives the same file.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastrcnn.files import write_atomically
from fastrcnn.weights import detectron2, torchvision
from fastrcnn.weights.anchors import num_ratios, reorder
from fastrcnn.weights.content import BOX_DELTAS, CELL_ANCHORS, CLASS_LOGITS, Weights
from fastrcnn.weights.pixels import PixelFormat, convert_stem
from fastrcnn.weights.read import OWN_ENTRY, OWN_PREFIX
from fastrcnn.weights.recognise import KIND
from fastrcnn.weights.report import WeightsError
from fastrcnn.weights.safetensors import write_safetensors

FORMATS = ("maskrcnn_benchmark", "detectron2", "torchvision", "fastrcnn", "safetensors")


def write_weights(weights: Weights, path: Path, to: str, *, allow_partial: bool = False) -> list[str]:
    """Write ``weights`` to ``path`` in the form of ``to``, one of :data:`FORMATS`.

    ``fastrcnn`` and ``safetensors`` change names alone and note where the weights come from, so that
    :func:`fastrcnn.load_weights` converts the rest to what the model wants. detectron2's file is a pickle of arrays, as
    in its model zoo, where ``path`` ends with ``.pkl``.

    Args:
        allow_partial: leave out tensors that the format has no place for.

    Returns:
        what was changed, and what was left out, one sentence each.

    Raises:
        WeightsError: the format has no place for a tensor, or ``path`` cannot be written.
    """
    weights = replace(weights, tensors=dict(weights.tensors), background=dict(weights.background))
    weights.left_out = {kind: dict(tensors) for kind, tensors in weights.left_out.items()}
    style = {"detectron2": "detectron2", "torchvision": "torchvision", KIND: KIND}.get(to, weights.anchor_style)
    done: list[str] = []
    no_place = list(weights.unknown)
    background: dict[str, Tensor] = {}
    _restyle(weights, style, done)
    if to == "detectron2":
        tensors, background, left_out, more = detectron2.write(weights)
    elif to == "torchvision":
        tensors, left_out, more = torchvision.write(weights)
    else:
        tensors, left_out, more = weights.tensors, {}, []
    no_place += more
    if no_place and not allow_partial:
        raise WeightsError(
            f"{path}: {to} has no place for {len(no_place)} tensors, the first is {no_place[0]}; pass --allow-partial "
            "to leave them out"
        )
    done += [f"left out: {name} ({to} has no place for it)" for name in no_place]
    configured = sorted(n for n in left_out | weights.left_out.get(KIND, {}) if n.startswith(CELL_ANCHORS))
    if configured and to == "torchvision":
        done.append(f"left out: {', '.join(configured)} (the configuration has them)")
    own = weights.own_entry() | {"background": weights.background | background, "left_out": weights.left_out}
    tensors = tensors | own["left_out"].pop(to, {})
    if left_out:
        own["left_out"][KIND] = left_out | own["left_out"].get(KIND, {})
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _writer(tensors, own, to, as_pickle=path.suffix == ".pkl"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error})") from None
    return done


def convert_pixels(weights: Weights, target: PixelFormat) -> list[str]:
    """Make the stem one for pixels in ``target``'s format, in place; what was changed and what to know.

    Raises:
        WeightsError: the file does not tell what its stem wants to see.
    """
    name = next((n for n in weights.tensors if n.endswith("stem.conv1.weight")), None)
    if name is None:
        raise WeightsError("the file has no stem (stem.conv1.weight) whose input could be converted")
    if weights.pixels is None:
        raise WeightsError("the file does not tell what pixels its stem was trained with: pass --from-pixels")
    weights.tensors[name], converted, note = convert_stem(weights.tensors[name], weights.pixels, target)
    weights.pixels = target
    return [sentence for sentence in (converted, note) if sentence]


def _restyle(weights: Weights, style: str, done: list[str]) -> None:
    """The last layers of RPN and RetinaNet in the order, scale and columns of ``style``."""
    exact = {n: v for n, v in weights.tensors.items() if n.startswith((BOX_DELTAS, CLASS_LOGITS))}
    known = weights.tensors | weights.left_out.get(KIND, {})
    changes = weights.is_retinanet and style != weights.anchor_style
    anchors = len(weights.tensors.get(f"{BOX_DELTAS}weight", ())) // 4
    # The rows of the background are noted in the order that torchvision has.
    if changes and weights.retinanet_background:
        columns = len(weights.tensors[f"{CLASS_LOGITS}weight"]) // anchors
        weights.background |= torchvision.drop_background(weights.tensors, columns)
        done.append("RetinaNet's column of the background, dropped")
    done += reorder(weights.tensors, weights.anchor_style, style, num_ratios(known))
    if changes:
        if style == torchvision.KIND:
            torchvision.add_background(weights.tensors, anchors, weights.background)
            done.append("a column of the background added to RetinaNet's classes")
        weights.retinanet_background = style == torchvision.KIND
        _keep_exact(weights, exact)
    if style != weights.anchor_style:
        # Anchors of one rule are wrong in a file of another.
        anchors_of_file = {n: weights.tensors.pop(n) for n in list(weights.tensors) if n.startswith(CELL_ANCHORS)}
        if anchors_of_file and weights.anchor_style == KIND:
            weights.left_out[KIND] = weights.left_out.get(KIND, {}) | anchors_of_file
    weights.anchor_style = style


def _keep_exact(weights: Weights, exact: dict[str, Tensor]) -> None:
    """Note the deltas as they were: a product with 10 and its quotient by 10 may differ in the last bit."""
    layers = {torchvision.KIND: "head.regression_head.bbox_reg.", detectron2.KIND: "head.bbox_pred.", KIND: BOX_DELTAS}
    if weights.anchor_style == weights.kind and weights.kind in layers:
        theirs = {n.replace(BOX_DELTAS, layers[weights.kind]): v for n, v in exact.items() if n.startswith(BOX_DELTAS)}
        weights.left_out[weights.kind] = weights.left_out.get(weights.kind, {}) | theirs


def _writer(tensors: dict[str, Tensor], own: dict[str, Any], to: str, *, as_pickle: bool) -> Callable[[IO[bytes]], Any]:
    if to == "torchvision":
        return lambda file: torch.save(tensors, file)
    if to == "safetensors":
        background, left_out = own.pop("background"), own.pop("left_out")
        more = {f"{OWN_PREFIX}background:{n}": v for n, v in background.items()}
        more |= {f"{OWN_PREFIX}left_out:{k}:{n}": v for k, group in left_out.items() for n, v in group.items()}
        metadata = {"format": "pt", OWN_ENTRY: json.dumps(own)}
        return lambda file: write_safetensors(file, tensors | more, metadata)
    content: dict[str, Any] = {"model": tensors, OWN_ENTRY: own}
    if to == "detectron2":
        content["__author__"] = "fastrcnn"
        if as_pickle:
            return lambda file: pickle.dump(_arrays(content), file, protocol=2)
    return lambda file: torch.save(content, file)


def _arrays(value: Any) -> Any:
    """``value`` with numpy arrays instead of tensors."""
    if isinstance(value, Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, dict):
        return {key: _arrays(entry) for key, entry in value.items()}
    return value
