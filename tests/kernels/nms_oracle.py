"""Inputs of the nms tests, and what a plain loop over them gives."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def make_boxes(kind: str, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes and scores with what goes wrong: overlaps, ties, exact ratios, no area, other signs."""
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (size, 2))
    sides = random.uniform(1, 40, (size, 2))
    scores = random.uniform(0, 1, size)
    if kind == "clustered":
        corner = corner[random.integers(0, max(1, size // 6), size)] + random.normal(0, 1.5, (size, 2))
    elif kind == "integer":  # ratios that equal a threshold, boxes that occur twice, scores that tie
        corner, sides = np.floor(corner / 8) * 5, np.floor(sides / 5) * 5
        scores = np.floor(scores * 5) / 5
    elif kind == "negative":
        corner = corner * 1000 - 40_000
        sides = sides * 1000
    elif kind == "degenerate":
        sides = np.where(random.uniform(0, 1, (size, 2)) < 0.3, random.choice([0.0, -1.0, -5.0], (size, 2)), sides)
    boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
    return torch.from_numpy(boxes), torch.from_numpy(scores.astype(np.float32))


def loop_nms(boxes: Tensor, scores: Tensor, threshold: float, box_offset: int = 0) -> list[int]:
    """The oracle: one box after the other in numpy float32 (float64 for float64), compared in double."""
    kind = np.float64 if boxes.dtype == torch.float64 else np.float32
    b = boxes.double().numpy().astype(kind)
    s = scores.double().numpy()
    order = sorted(range(len(s)), key=lambda i: (0, 0.0) if math.isnan(s[i]) else (1, -s[i]))
    offset, zero = kind(box_offset), kind(0)
    with np.errstate(all="ignore"):
        area = (b[:, 2] - b[:, 0] + offset) * (b[:, 3] - b[:, 1] + offset)
        keep: list[int] = []
        gone = np.zeros(len(s), bool)
        for i in order:
            if gone[i]:
                continue
            keep.append(i)
            width = np.maximum(np.minimum(b[i, 2], b[:, 2]) - np.maximum(b[i, 0], b[:, 0]) + offset, zero)
            height = np.maximum(np.minimum(b[i, 3], b[:, 3]) - np.maximum(b[i, 1], b[:, 1]) + offset, zero)
            inter = width * height
            gone |= (inter / (area[i] + area - inter)).astype(np.float64) > threshold
    return keep


def loop_batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float, box_offset: int = 0) -> list[int]:
    keep: list[int] = []
    for group in sorted(set(idxs.tolist())):
        members = [i for i, g in enumerate(idxs.tolist()) if g == group]
        keep += [members[k] for k in loop_nms(boxes[members], scores[members], threshold, box_offset)]
    values = scores.double().tolist()
    return sorted(keep, key=lambda i: (0, 0.0, i) if math.isnan(values[i]) else (1, -values[i], i))


def loop_nms_padded(
    boxes: Tensor, scores: Tensor, threshold: float, max_output: int, box_offset: int = 0
) -> tuple[list[list[int]], list[int]]:
    rows, counts = [], []
    for b, s in zip(boxes, scores, strict=True):
        present = [i for i, value in enumerate(s.tolist()) if value != -math.inf]
        keep = [present[k] for k in loop_nms(b[present], s[present], threshold, box_offset)][:max_output]
        rows.append(keep + [-1] * (max_output - len(keep)))
        counts.append(len(keep))
    return rows, counts


def make_groups(size: int) -> Tensor:
    """Few groups, negative and far apart."""
    random = np.random.default_rng(size)
    return torch.from_numpy(random.choice(np.array([-7, 0, 3, 10**12]), size))
