"""Inputs of the proposal tests, and what plain loops in Python floats make of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import cell_anchors


def make_heads(
    sizes: list[tuple[int, int]], images: int = 2, anchors: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Outputs of an RPN head for levels of (height, width), stride 4, 8, ...; logits in steps of 1/8: many tie."""
    random = torch.Generator().manual_seed(seed)
    strides = [4 * 2**level for level in range(len(sizes))]
    ratios = [0.5, 1.0, 2.0, 3.0][:anchors]
    objectness = [(torch.randn(images, anchors, h, w, generator=random) * 12).round() / 8 for h, w in sizes]
    deltas = [torch.randn(images, 4 * anchors, h, w, generator=random) * 0.4 for h, w in sizes]
    height, width = sizes[0]
    return {
        "objectness": [level.to(dtype) for level in objectness],
        "deltas": [level.to(dtype) for level in deltas],
        "cells": [cell_anchors(stride, [4 * stride], ratios) for stride in strides],
        "strides": strides,
        "image_sizes": torch.tensor(
            [[4 * height - 3 * i, 4 * width - 5 * i] for i in range(images)],
            dtype=torch.int64,
        ).reshape(-1, 2),
    }


def on(heads: dict[str, Any], device: str) -> dict[str, Any]:
    """The same on a device."""
    return {
        name: [v.to(device) if isinstance(v, Tensor) else v for v in value]
        if isinstance(value, list)
        else value.to(device)
        for name, value in heads.items()
    }


def _rank(logit: float) -> tuple[int, float]:
    return (0, 0.0) if math.isnan(logit) else (1, -logit)


def _iou(a: list[float], b: list[float], offset: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(width, 0.0) * max(height, 0.0)
    area_a, area_b = ((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    union = area_a + area_b - inter
    return inter / union if union else math.nan


def _decode(
    delta: list[float], anchor: list[float], size: list[int], weights: tuple[float, ...], offset: int, clip: float
) -> list[float]:
    width, height = anchor[2] - anchor[0] + offset, anchor[3] - anchor[1] + offset
    dx, dy, dw, dh = (d / weight for d, weight in zip(delta, weights, strict=True))
    x, y = dx * width + anchor[0] + 0.5 * width, dy * height + anchor[1] + 0.5 * height
    half_width = 0.5 * math.exp(dw if dw != dw else min(dw, clip)) * width
    half_height = 0.5 * math.exp(dh if dh != dh else min(dh, clip)) * height
    corners = [x - half_width, y - half_height, x + half_width - offset, y + half_height - offset]
    limits = [size[1] - offset, size[0] - offset] * 2
    return [c if c != c else min(max(c, 0.0), limit) for c, limit in zip(corners, limits, strict=True)]


def loop_proposals(
    heads: dict[str, Any], *, pre_nms_top_n: int, post_nms_top_n: int, top_n: int | None = None,
    per_batch: bool = False, iou_threshold: float = 0.7, min_size: float = 0.0,
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
    box_offset: int = 0, clip: float = math.log(1000.0 / 16),
) -> list[list[tuple[list[float], float]]]:  # fmt: skip
    """For each image (box, logit) of its proposals in order. Fails where an IoU is too near the threshold to decide."""
    kept = []  # (image, level, rank in the level, logit, box)
    for image in range(heads["image_sizes"].shape[0]):
        size = heads["image_sizes"][image].tolist()
        for level, (objectness, deltas) in enumerate(zip(heads["objectness"], heads["deltas"], strict=True)):
            _, count, height, width = objectness.shape
            logits, offsets = objectness[image].double().tolist(), deltas[image].double().tolist()
            cells, stride = heads["cells"][level].double().tolist(), heads["strides"][level]
            entries = []
            for y in range(height):
                for x in range(width):
                    for a in range(count):
                        entries.append((logits[a][y][x], (y, x, a)))
            entries.sort(key=lambda entry: _rank(entry[0]))  # stable: ties stay in the order of the anchors
            survivors: list[tuple[list[float], float]] = []
            for logit, (y, x, a) in entries[:pre_nms_top_n]:
                shift = [x * stride, y * stride] * 2
                anchor = [c + s for c, s in zip(cells[a], shift, strict=True)]
                box = _decode([offsets[4 * a + i][y][x] for i in range(4)], anchor, size, weights, box_offset, clip)
                sides = box[2] - box[0] + box_offset, box[3] - box[1] + box_offset
                if not (sides[0] >= min_size and sides[1] >= min_size):
                    continue
                overlaps = [_iou(box, other, box_offset) for other, _ in survivors]
                assert all(math.isnan(v) or abs(v - iou_threshold) > 1e-5 for v in overlaps), "choose another seed"
                if not any(overlap > iou_threshold for overlap in overlaps):
                    survivors.append((box, logit))
            for rank, (box, logit) in enumerate(survivors[:post_nms_top_n]):
                kept.append((image, level, rank, logit, box))
    if top_n is not None and per_batch:
        kept = sorted(sorted(kept, key=lambda k: _rank(k[3]))[:top_n], key=lambda k: k[:3])
    images = [[k for k in kept if k[0] == image] for image in range(heads["image_sizes"].shape[0])]
    if top_n is not None and not per_batch:
        images = [sorted(own, key=lambda k: _rank(k[3]))[:top_n] for own in images]
    return [[(k[4], k[3]) for k in own] for own in images]
