"""Boxes as regression targets relative to an anchor, and back (R-CNN's parametrisation).

``t = (wx (gx - ax) / aw, wy (gy - ay) / ah, ww log(gw / aw), wh log(gh / ah))`` with (x, y) the centre, (w, h) the
size of the ground truth g and of the anchor a. With ``box_offset=1`` sizes are x2 - x1 + 1, centres x1 + w / 2, and
decoding ends with x2 = x + w / 2 - 1: maskrcnn-benchmark's BoxCoder, to the last bit in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn_kernels.boxes import _at_least_float32, _check_boxes, _check_offset

# Bounds dw and dh from above: a box grows at most from 16 to 1000 pixels, and exp() does not overflow.
BBOX_XFORM_CLIP = math.log(1000.0 / 16)


def _check_weights(weights: Sequence[float]) -> None:
    if len(weights) != 4 or any(weight <= 0 for weight in weights):
        raise ValueError(f"weights must be four positive numbers (wx, wy, ww, wh), got {tuple(weights)}")


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), *, box_offset: int = 0
) -> Tensor:
    """Regression targets that take each anchor to its box.

    Args:
        boxes: [..., 4], the ground truths, (x1, y1, x2, y2) in pixels.
        anchors: [..., 4], anchors or proposals; broadcasts against ``boxes``.
        weights: (wx, wy, ww, wh); maskrcnn-benchmark uses (1, 1, 1, 1) in the RPN, (10, 10, 5, 5) in the box head.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        [..., 4] (tx, ty, tw, th), float32 (float64 if an input is float64), finite for every valid box where
        ``box_offset`` is 1, in particular for the zero boxes of padding. With ``box_offset=0`` a box of zero width
        gives tw = -inf, and an anchor of zero width an infinite or NaN tx and tw, as in torchvision and detectron2:
        replace padding (``torch.where``) before or after, never multiply it away.
    """
    _check_boxes(boxes)
    _check_boxes(anchors, "anchors")
    _check_offset(box_offset)
    _check_weights(weights)
    wx, wy, ww, wh = weights
    gx1, gy1, gx2, gy2 = _at_least_float32(boxes).unbind(-1)  # [...] each
    ax1, ay1, ax2, ay2 = _at_least_float32(anchors).unbind(-1)  # [...] each
    anchor_width, anchor_height = ax2 - ax1 + box_offset, ay2 - ay1 + box_offset  # [...]
    width, height = gx2 - gx1 + box_offset, gy2 - gy1 + box_offset  # [...]
    centre_x, centre_y = gx1 + 0.5 * width, gy1 + 0.5 * height  # [...]
    anchor_x, anchor_y = ax1 + 0.5 * anchor_width, ay1 + 0.5 * anchor_height  # [...]
    targets = [
        wx * (centre_x - anchor_x) / anchor_width,
        wy * (centre_y - anchor_y) / anchor_height,
        ww * torch.log(width / anchor_width),
        wh * torch.log(height / anchor_height),
    ]
    return torch.stack(targets, dim=-1)  # [..., 4]


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    *,
    box_offset: int = 0,
    clip: float = BBOX_XFORM_CLIP,
) -> Tensor:
    """Apply predicted deltas to anchors: the inverse of ``encode_boxes``.

    Args:
        deltas: [..., 4 * k], k boxes for each anchor (k classes, or 1).
        anchors: [..., 4]; leading dimensions broadcast against those of ``deltas``.
        weights: those of ``encode_boxes``.
        box_offset: 0, or 1 for inclusive pixels.
        clip: upper bound of dw / ww and dh / wh; nothing bounds them from below.

    Returns:
        [..., 4 * k] boxes in pixels, not clipped to any image; float32 (float64 if an input is float64), also for
        half-precision deltas: their 8 to 11 bits cannot hold a coordinate.
    """
    if deltas.dim() == 0 or deltas.shape[-1] % 4:
        raise ValueError(f"deltas must have the shape [..., 4 * k], got {list(deltas.shape)}")
    _check_boxes(anchors, "anchors")
    _check_offset(box_offset)
    _check_weights(weights)
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = _at_least_float32(deltas).unflatten(-1, (-1, 4)).unbind(-1)  # [..., k] each
    x1, y1, x2, y2 = _at_least_float32(anchors).unsqueeze(-2).unbind(-1)  # [..., 1] each
    anchor_width, anchor_height = x2 - x1 + box_offset, y2 - y1 + box_offset  # [..., 1]
    anchor_x, anchor_y = x1 + 0.5 * anchor_width, y1 + 0.5 * anchor_height  # [..., 1]
    x = dx / wx * anchor_width + anchor_x  # [..., k]
    y = dy / wy * anchor_height + anchor_y  # [..., k]
    half_width = 0.5 * (torch.exp((dw / ww).clamp(max=clip)) * anchor_width)  # [..., k]
    half_height = 0.5 * (torch.exp((dh / wh).clamp(max=clip)) * anchor_height)  # [..., k]
    corners = [x - half_width, y - half_height, x + half_width - box_offset, y + half_height - box_offset]
    return torch.stack(corners, dim=-1).flatten(-2)  # [..., 4 * k]
