"""The specification of the pairwise measures of ``boxes.py`` in PyTorch, differentiable by autograd.

Each operation is rounded once, in this order, in every implementation, so that all of them give the same bits. (The
arc tangents of CIoU are computed by PyTorch for all of them.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def positive_area(boxes: Tensor, box_offset: int) -> Tensor:
    """Area, at least the smallest normal number: keeps the IoU of two empty boxes from being 0 / 0."""
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    area = (x2 - x1 + box_offset) * (y2 - y1 + box_offset)  # [...]
    return area.clamp(min=torch.finfo(area.dtype).tiny)


def diagonal_angle(boxes: Tensor, box_offset: int) -> Tensor:
    """Arc tangent of width / height, [...]; the height at least the smallest normal number."""
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    height = (y2 - y1 + box_offset).clamp(min=torch.finfo(boxes.dtype).tiny)  # [...]
    return torch.atan((x2 - x1 + box_offset) / height)


def _pairs(boxes1: Tensor, boxes2: Tensor, box_offset: int) -> tuple[Tensor, Tensor]:
    """Intersection and union [..., N, M]."""
    area1 = positive_area(boxes1, box_offset).unsqueeze(-1)  # [..., N, 1]
    area2 = positive_area(boxes2, box_offset).unsqueeze(-2)  # [..., 1, M]
    left1, top1, right1, bottom1 = boxes1.unsqueeze(-2).unbind(-1)  # [..., N, 1] each
    left2, top2, right2, bottom2 = boxes2.unsqueeze(-3).unbind(-1)  # [..., 1, M] each
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2) + box_offset).clamp(min=0)  # [..., N, M]
    height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2) + box_offset).clamp(min=0)  # [..., N, M]
    intersection = width * height  # [..., N, M]
    return intersection, area1 + area2 - intersection


def _spans(boxes1: Tensor, boxes2: Tensor, box_offset: int) -> tuple[Tensor, Tensor]:
    """Width and height [..., N, M] of the smallest box around both."""
    left1, top1, right1, bottom1 = boxes1.unsqueeze(-2).unbind(-1)  # [..., N, 1] each
    left2, top2, right2, bottom2 = boxes2.unsqueeze(-3).unbind(-1)  # [..., 1, M] each
    width = (torch.maximum(right1, right2) - torch.minimum(left1, left2) + box_offset).clamp(min=0)  # [..., N, M]
    height = (torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2) + box_offset).clamp(min=0)  # [..., N, M]
    return width, height


def box_iou(boxes1: Tensor, boxes2: Tensor, box_offset: int) -> Tensor:
    intersection, union = _pairs(boxes1, boxes2, box_offset)  # [..., N, M] each
    return intersection / union


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, box_offset: int) -> Tensor:
    intersection, union = _pairs(boxes1, boxes2, box_offset)  # [..., N, M] each
    width, height = _spans(boxes1, boxes2, box_offset)  # [..., N, M] each
    # Two empty boxes have a union of twice the smallest number: with a hull of that size they are 0, not 1.
    hull = (width * height).clamp(min=2 * torch.finfo(boxes1.dtype).tiny)  # [..., N, M]
    return intersection / union - (hull - union) / hull


def _distance_and_iou(boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float) -> tuple[Tensor, Tensor]:
    iou = box_iou(boxes1, boxes2, box_offset)  # [..., N, M]
    width, height = _spans(boxes1, boxes2, box_offset)  # [..., N, M] each
    x1, y1 = ((boxes1[..., :2] + boxes1[..., 2:]) / 2).unsqueeze(-2).unbind(-1)  # [..., N, 1] each
    x2, y2 = ((boxes2[..., :2] + boxes2[..., 2:]) / 2).unsqueeze(-3).unbind(-1)  # [..., 1, M] each
    dx, dy = x1 - x2, y1 - y2  # [..., N, M]
    return iou - (dx * dx + dy * dy) / (width * width + height * height + eps), iou


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float) -> Tensor:
    return _distance_and_iou(boxes1, boxes2, box_offset, eps)[0]


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float) -> Tensor:
    distance_iou, iou = _distance_and_iou(boxes1, boxes2, box_offset, eps)  # [..., N, M] each
    angle1 = diagonal_angle(boxes1, box_offset).unsqueeze(-1)  # [..., N, 1]
    angle2 = diagonal_angle(boxes2, box_offset).unsqueeze(-2)  # [..., 1, M]
    turn = angle1 - angle2  # [..., N, M]
    v = (4 / math.pi**2) * (turn * turn)  # [..., N, M]
    with torch.no_grad():  # the trade-off is a constant of the gradient, as in torchvision
        alpha = v / (1 - iou + v + eps)  # [..., N, M]
    return distance_iou - alpha * v
