"""Random weights that behave, for the clock, like trained ones: finite activations, proposals near the ground truth.

The time of a step depends on how many proposals survive NMS and how many of them are positive. Random weights propose
noise: hardly anything but the ground truth itself is positive. Late in training tens of proposals an image are. Three
changes, the same on both sides, bring that about without a change to any layer's work:

1. The last frozen batch normalisation of each bottleneck is scaled by 1/4: activations stay near 1 through the
   network, where random weights let them grow with each block.
2. The RPN's two predictors are scaled so that objectness has a standard deviation of 1, deltas of 1/100.
3. A constant is added to what the RPN's head gives (ten additions a step, of its output's size): at chosen anchors it
   raises the objectness above all others and moves the anchor to a box that overlaps a ground truth by more than
   half and its neighbours by less than the threshold of NMS, so that each of them survives. Gradients flow through
   unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn_kernels import box_iou, nms

BLOCK_SCALE = 0.25
OBJECTNESS_STD, DELTA_STD = 1.0, 0.01
CLASS_STD = 2.0
RAISE = 30.0
# Of a proposal with its ground truth; of two proposals. The rules are 0.5 and 0.7: room for the noise of the deltas.
LEAST_OVERLAP, MOST_OVERLAP = 0.55, 0.65

Levels = list[tuple[Tensor, Tensor]]  # objectness [N, A, H, W] and deltas [N, 4 A, H, W] of each level
Encode = Callable[[Tensor, Tensor], Tensor]  # boxes [n, 4], anchors [n, 4] -> deltas [n, 4]


def scale_blocks(model: nn.Module) -> None:
    """Multiply the weight of the last batch normalisation of each bottleneck by :data:`BLOCK_SCALE`."""
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("bn3.weight"):
            state[name] = value * BLOCK_SCALE
    model.load_state_dict(state)


@torch.no_grad()
def scale_predictors(head: nn.Module, outputs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
    """Scale ``cls_logits`` and ``bbox_pred`` of an RPN's head, given what it returned: (objectness, deltas)."""
    for layer, maps, wanted in zip(
        (head.cls_logits, head.bbox_pred), outputs, (OBJECTNESS_STD, DELTA_STD), strict=True
    ):
        std = torch.cat([level.detach().float().flatten() for level in maps]).std()
        for parameter in layer.parameters():  # type: ignore[union-attr]
            parameter.mul_((wanted / std.clamp(min=1e-12)).to(parameter.dtype))


@torch.no_grad()
def scale_classes(predictor: nn.Module, logits: Tensor) -> None:
    """Scale ``cls_score`` of a box predictor, which gave ``logits``, so that they have :data:`CLASS_STD`."""
    scale = CLASS_STD / logits.float().std().clamp(min=1e-12)
    for parameter in predictor.cls_score.parameters():  # type: ignore[union-attr]
        parameter.mul_(scale.to(parameter.dtype))


@lru_cache(maxsize=1)
def jitters() -> Tensor:
    """Boxes around the unit square that overlap it and not each other too much: float [K, 4], best overlaps mixed."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(20000, 4, generator=generator) * 2 - 1
    centre, side = noise[:, :2] * 0.3, torch.exp(noise[:, 2:] * 0.45)
    boxes = 0.5 + torch.cat([centre - side / 2, centre + side / 2], dim=1)
    overlap = box_iou(boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))[:, 0]
    boxes = boxes[(overlap > LEAST_OVERLAP) & (overlap < 0.95)]
    return boxes[nms(boxes, torch.rand(len(boxes), generator=generator), MOST_OVERLAP)]


def proposals_near(boxes: Tensor, wanted: int) -> Tensor:
    """``wanted`` boxes around ``boxes`` [G, 4], in turns, as many as there is room for: float [n, 4]."""
    if len(boxes) == 0:
        return boxes.new_zeros((0, 4))
    table = jitters().to(boxes.device)
    each = min(-(-wanted // len(boxes)), len(table))
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # [G, 4]
    near = boxes[:, :2].repeat(1, 2) + table[:each, None] * side  # [each, G, 4]
    return near.flatten(0, 1)[:wanted]


def place(near: Tensor, anchors: Tensor) -> list[int]:
    """For each of ``near`` [n, 4] an anchor of ``anchors`` [A, 4], the best that no other has taken."""
    if len(near) == 0:
        return []
    candidates = box_iou(near, anchors).topk(min(64, len(anchors)), dim=1).indices.tolist()
    taken: set[int] = set()
    chosen = []
    for row in candidates:
        free = next((index for index in row if index not in taken), row[0])
        taken.add(free)
        chosen.append(free)
    return chosen


def head_bias(
    outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    anchors: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    positives: int,
    encode: Encode,
) -> Levels:
    """What to add to the head's ``outputs`` so that about ``positives`` proposals an image are positive.

    Args:
        outputs: (objectness [N, A, H, W], deltas [N, 4 A, H, W]) of each level.
        anchors: [H W A, 4] of each level, in the order y, x, anchor.
        boxes: ground truth [G, 4] of each image, which is itself among the proposals: ``positives - G`` are added.
        encode: the model's own encoding of boxes.
    """
    objectness, deltas = outputs
    every = torch.cat(list(anchors))
    starts = [0]
    for level in anchors:
        starts.append(starts[-1] + len(level))
    raised = [torch.zeros_like(level) for level in objectness]
    moved = [torch.zeros_like(level) for level in deltas]
    for image, truth in enumerate(boxes):
        near = proposals_near(truth.to(every), max(0, positives - len(truth)))
        chosen = place(near, every)
        codes = encode(near, every[chosen])
        for index, code in zip(chosen, codes, strict=True):
            level = next(i for i in range(len(anchors)) if index < starts[i + 1])
            num_anchors, _, width = objectness[level].shape[1:]
            cell, anchor = divmod(index - starts[level], num_anchors)
            y, x = divmod(cell, width)
            raised[level][image, anchor, y, x] = RAISE
            moved[level][image, 4 * anchor : 4 * anchor + 4, y, x] = code.to(moved[level].dtype)
    return list(zip(raised, moved, strict=True))


class HeadBias:
    """A forward hook that adds a constant to the outputs of an RPN's head, by their shape.

    ``biases[shapes]`` belongs to the batch whose finest level is [N, A, H, W] = ``shapes``; outputs of another shape
    are left as they are. Constants are kept in each type that was asked for.
    """

    def __init__(self) -> None:
        self.biases: dict[tuple[int, ...], Levels] = {}
        self._cast: dict[tuple[Any, ...], Levels] = {}
        self.used = 0

    def add(self, levels: Levels) -> None:
        self.biases[tuple(levels[0][0].shape)] = levels

    def __call__(self, head: nn.Module, inputs: Any, outputs: Any) -> Any:
        objectness, deltas = outputs
        levels = self.biases.get(tuple(objectness[0].shape))
        if levels is None:
            return outputs
        key = (tuple(objectness[0].shape), objectness[0].dtype)
        if key not in self._cast:
            self._cast[key] = [
                (a.to(o.dtype), b.to(d.dtype)) for (a, b), o, d in zip(levels, objectness, deltas, strict=True)
            ]
        self.used += 1
        pairs = self._cast[key]
        return (
            [o + a for o, (a, _) in zip(objectness, pairs, strict=True)],
            [d + b for d, (_, b) in zip(deltas, pairs, strict=True)],
        )
