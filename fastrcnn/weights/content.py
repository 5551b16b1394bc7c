"""Weights in the form that every reader gives and every writer takes: maskrcnn-benchmark's names and layouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrcnn.weights.pixels import PixelFormat

CLASS_LOGITS, BOX_DELTAS = "rpn.head.cls_logits.", "rpn.head.bbox_pred."
CELL_ANCHORS = "rpn.anchor_generator.cell_anchors."


@dataclass
class Weights:
    """The tensors of a file and what is known of where they come from.

    Attributes:
        kind: whose file, see :class:`fastrcnn.weights.WeightsReport`.
        tensors: by maskrcnn-benchmark's names. Those of a body alone have the end of the name only
            (``layer1.0.conv1.weight``).
        body_only: the file is of a classifier: no RPN and no heads.
        anchor_style: ``maskrcnn_benchmark``, ``detectron2`` or ``torchvision``: the order of the anchors in the RPN's
            and RetinaNet's last layers, and the scale of RetinaNet's deltas.
        retinanet_background: RetinaNet's class logits have a first column for the background (torchvision's do).
        pixels: what the stem wants to see; None if the file does not tell.
        stride_in_1x1: which convolution of a bottleneck strides; None if the file does not tell.
        norm_eps: epsilon that the batch normalisation of the body was used with; None if the file does not tell.
        background: rows of the background that this layout lacks or the other one lacks, by name. What a file format
            has no rows for is noted in it, so that the way back gives the same file.
        left_out: by the kind of a file, tensors by its names that only that kind of file has.
        unknown: names of the file that no rule knows.
        ignored: names of the file that are of no use, each with the reason.
        converted: what reading changed, one sentence each.
        training_state: entries of the file beside the weights.
    """

    kind: str
    tensors: dict[str, Tensor]
    body_only: bool = False
    anchor_style: str = "maskrcnn_benchmark"
    retinanet_background: bool = False
    pixels: PixelFormat | None = None
    stride_in_1x1: bool | None = None
    norm_eps: float | None = None
    background: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unknown: dict[str, Tensor] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    training_state: list[str] = field(default_factory=list)

    @property
    def is_retinanet(self) -> bool:
        return any(name.startswith("rpn.head.cls_tower.") for name in self.tensors)

    def own_entry(self) -> dict[str, Any]:
        """What this package writes beside the weights, where the format has room: what the names do not tell."""
        return {
            "version": 1,
            "kind": self.kind,
            "anchor_style": self.anchor_style,
            "retinanet_background": self.retinanet_background,
            "pixels": asdict(self.pixels) if self.pixels is not None else None,
            "stride_in_1x1": self.stride_in_1x1,
            "norm_eps": self.norm_eps,
        }

    def take_own_entry(self, own: dict[str, Any]) -> None:
        """Take up what :meth:`own_entry` and the writers noted in a file whose names do not tell it."""
        if "anchor_style" in own:
            self.anchor_style = str(own["anchor_style"])
            self.retinanet_background = bool(own.get("retinanet_background"))
        self.take_source(own)

    def take_source(self, own: dict[str, Any]) -> None:
        """Take up where the weights of a converted file come from, and the tensors noted in it."""
        if "norm_eps" in own:
            pixels = own.get("pixels")
            self.pixels = None
            if pixels:
                mean, std = tuple(pixels["mean"]), tuple(pixels["std"])
                self.pixels = PixelFormat(bool(pixels["to_bgr255"]), mean, std, float(pixels["scale"]))
            self.stride_in_1x1, self.norm_eps = own.get("stride_in_1x1"), own["norm_eps"]
        self.background |= _tensors_of(own.get("background"))
        for kind, tensors in (own.get("left_out") or {}).items():
            self.left_out[str(kind)] = self.left_out.get(str(kind), {}) | _tensors_of(tensors)


def _tensors_of(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        return {}
    return {str(name): torch.as_tensor(entry) for name, entry in value.items()}


def rows_before(value: Tensor, rows: Tensor | None, count: int, fill: float = 0.0) -> Tensor:
    """``value`` [R, ...] with ``count`` rows in front: ``rows`` if they fit, else ``fill``."""
    shape = (count, *value.shape[1:])
    if rows is None or rows.shape != shape:
        rows = value.new_full(shape, fill)
    return torch.cat([rows.to(value.dtype), value])
