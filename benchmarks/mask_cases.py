"""Instances to rasterise and masks to paste: of the sizes and numbers of vertices that COCO's have, or made up."""

from __future__ import annotations

import csv
import gzip
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.polygon_cases import Polygon

HEIGHT, WIDTH = 800, 1344


@lru_cache(maxsize=1)
def _coco() -> list[dict[str, str]]:
    folder = Path(os.environ.get("FASTRCNN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = folder / "gt-stats" / "coco_instances.csv.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt") as file:
        return [row for row in csv.DictReader(file) if int(row["n_vertices"]) > 2]


def coco_instances(count: int, seed: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Boxes of COCO instances in images resized to 800 x 1344, float32 [count, 4]; (polygons, vertices) of each."""
    rng = np.random.default_rng(seed)
    boxes, sizes = [], []
    rows = _coco()
    for i in rng.integers(0, len(rows), count):
        row = rows[i]
        scale = min(HEIGHT / float(row["height"]), WIDTH / float(row["width"]))
        x, y, w, h = (float(row[key]) * scale for key in ("x", "y", "w", "h"))
        boxes.append([x, y, x + max(w, 1.0), y + max(h, 1.0)])
        sizes.append((max(1, int(row["n_polygons"])), int(row["n_vertices"])))
    return torch.tensor(boxes, dtype=torch.float32), sizes


def outline(rng: np.random.Generator, vertices: int, box: np.ndarray) -> Polygon:
    """A star-shaped polygon that fills about the box."""
    angle = np.sort(rng.random(vertices)) * 2 * np.pi
    reach = 0.6 + 0.4 * rng.random(vertices)
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach[:, None]
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return (centre + unit * half).astype(np.float32)


def smooth_masks(count: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Probabilities with an outline, as a trained head gives them. float32 [count, size, size]"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)[:, 0].to(device)
