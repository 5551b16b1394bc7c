"""The specification of the box coder in PyTorch: forward, and the gradients that autograd would find.

The order of the operations is maskrcnn-benchmark's, so float32 results equal its BoxCoder's to the last bit. Half types
and integers are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn_kernels.boxes import _at_least_float32, clip_boxes_to_image, is_large_enough


def _centre_and_size(boxes: Tensor, box_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = _at_least_float32(boxes).unbind(-1)  # [...] each
    width, height = x2 - x1 + box_offset, y2 - y1 + box_offset  # [...]
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def _to_corners(width: Tensor, height: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of (x1, y1, x2, y2) from those of width x2 - x1, height and centre x1 + width / 2."""
    right, bottom = width + 0.5 * x, height + 0.5 * y  # [...]
    return torch.stack([x - right, y - bottom, right, bottom], dim=-1)  # [..., 4]


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int) -> Tensor:
    wx, wy, ww, wh = weights
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors, box_offset)  # [...] each
    x, y, width, height = _centre_and_size(boxes, box_offset)  # [...] each
    targets = [
        wx * (x - anchor_x) / anchor_width,
        wy * (y - anchor_y) / anchor_height,
        ww * torch.log(width / anchor_width),
        wh * torch.log(height / anchor_height),
    ]
    return torch.stack(targets, dim=-1)  # [..., 4]


def encode_backward(
    grad: Tensor, boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, for_boxes: bool,
    for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wx, wy, ww, wh = weights
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors, box_offset)  # [...] each
    x, y, width, height = _centre_and_size(boxes, box_offset)  # [...] each
    tx, ty, tw, th = grad.unbind(-1)  # [...] each
    grad_x, grad_y = wx * tx / anchor_width, wy * ty / anchor_height  # [...]
    log_x, log_y = ww * tw, wh * th  # [...]
    grad_boxes = grad_anchors = grad.new_empty(0)
    if for_boxes:
        grad_boxes = _to_corners(log_x / width, log_y / height, grad_x, grad_y)  # [..., 4]
    if for_anchors:
        grad_width = -(grad_x * (x - anchor_x) + log_x) / anchor_width  # [...]
        grad_height = -(grad_y * (y - anchor_y) + log_y) / anchor_height  # [...]
        grad_anchors = _to_corners(grad_width, grad_height, -grad_x, -grad_y)  # [..., 4]
    return grad_boxes, grad_anchors


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float) -> Tensor:
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = _at_least_float32(deltas).unflatten(-1, (-1, 4)).unbind(-1)  # [..., k] each
    anchor_x, anchor_y, width, height = _centre_and_size(anchors.unsqueeze(-2), box_offset)  # [..., 1] each
    x = dx / wx * width + anchor_x  # [..., k]
    y = dy / wy * height + anchor_y  # [..., k]
    half_width = 0.5 * (torch.exp((dw / ww).clamp(max=clip)) * width)  # [..., k]
    half_height = 0.5 * (torch.exp((dh / wh).clamp(max=clip)) * height)  # [..., k]
    corners = [x - half_width, y - half_height, x + half_width - box_offset, y + half_height - box_offset]
    return torch.stack(corners, dim=-1).flatten(-2)  # [..., 4 * k]


def decode_backward(
    grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    for_deltas: bool, for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = _at_least_float32(deltas).unflatten(-1, (-1, 4)).unbind(-1)  # [..., k] each
    _, _, width, height = _centre_and_size(anchors.unsqueeze(-2), box_offset)  # [..., 1] each
    x1, y1, x2, y2 = grad.unflatten(-1, (-1, 4)).unbind(-1)  # [..., k] each
    dw, dh = dw / ww, dh / wh  # [..., k]
    grad_x, grad_y = x1 + x2, y1 + y2  # [..., k]
    grown_x = 0.5 * (x2 - x1) * torch.exp(dw.clamp(max=clip))  # [..., k]
    grown_y = 0.5 * (y2 - y1) * torch.exp(dh.clamp(max=clip))  # [..., k]
    grad_deltas = grad_anchors = grad.new_empty(0)
    if for_deltas:
        # Where the clip is active the size does not depend on its delta; at the bound it does, as in torch.clamp.
        columns = [
            grad_x * width / wx,
            grad_y * height / wy,
            torch.where(dw <= clip, grown_x * width / ww, 0),
            torch.where(dh <= clip, grown_y * height / wh, 0),
        ]
        grad_deltas = torch.stack(columns, dim=-1).flatten(-2)  # [..., 4 * k]
    if for_anchors:
        grad_width = (grad_x * (dx / wx) + grown_x).sum(-1)  # [...]
        grad_height = (grad_y * (dy / wy) + grown_y).sum(-1)  # [...]
        grad_anchors = _to_corners(grad_width, grad_height, grad_x.sum(-1), grad_y.sum(-1))  # [..., 4]
    return grad_deltas, grad_anchors


def decode_proposals(
    deltas: Tensor, anchors: Tensor, image_sizes: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    min_size: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    boxes = decode(deltas, anchors, weights, box_offset, clip)  # [N, K, 4]
    boxes = clip_boxes_to_image(boxes, image_sizes, box_offset=box_offset)  # [N, K, 4]
    return boxes, is_large_enough(boxes, min_size, box_offset=box_offset)
