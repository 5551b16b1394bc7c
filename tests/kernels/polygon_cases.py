"""Polygons, instances and boxes to test the mask targets with, and the answer of pycocotools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import _mask as coco_polygons
from pycocotools import mask as coco_mask
from torch import Tensor

Polygon = NDArray[np.float32]
Instance = Sequence[Polygon]


def packed(instances: Sequence[Instance]) -> dict[str, Any]:
    """``instances`` as the arguments of ``rasterize_polygons``."""
    flat = [polygon for instance in instances for polygon in instance]
    vertices = np.concatenate(flat) if flat else np.zeros((0, 2), np.float32)
    return {
        "vertices": torch.from_numpy(vertices),
        "polygon_offsets": torch.tensor(np.cumsum([0, *map(len, flat)])),
        "instance_offsets": torch.tensor(np.cumsum([0, *map(len, instances)])),
        "max_vertices": max((sum(map(len, instance)) for instance in instances), default=0),
        "max_polygons": max(map(len, instances), default=0),
    }


def target_by_pycocotools(
    instance: Instance, box: Sequence[float], size: int, clip: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """maskrcnn-benchmark's ``masks.crop(box).resize((size, size)).get_mask_tensor()``, statement by statement.

    Its scalars are Python floats and its polygons float32 tensors. A box without an extent, where it divides by zero,
    gives zeros.
    """
    coordinates = torch.tensor(box, dtype=torch.float32)
    width, height = (coordinates[2:] - coordinates[:2]).tolist()
    if not (width > 0 and height > 0):
        return np.zeros((size, size), np.uint8)
    xmin, ymin = max(float(coordinates[0]), 0), max(float(coordinates[1]), 0)
    if clip is not None:
        xmin, ymin = min(xmin, clip[0] - 1), min(ymin, clip[1] - 1)
    ratio_w, ratio_h = float(size) / width, float(size) / height
    polygons = []
    for polygon in instance:
        p = torch.tensor(polygon).flatten()
        p[0::2] = p[0::2] - xmin
        p[1::2] = p[1::2] - ymin
        p[0::2] *= ratio_w
        p[1::2] *= ratio_h
        polygons.append(p.numpy())
    if not polygons:
        return np.zeros((size, size), np.uint8)
    # frPoly is what frPyObjects calls, without its guess by length that four numbers are a box.
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_polygons.frPoly(polygons, size, size))))


def _cloud(rng: np.random.Generator, most: int = 30, scale: float = 60.0) -> Polygon:
    """Random points in random order: crosses itself everywhere."""
    return (rng.random((rng.integers(3, most), 2)) * scale + rng.normal(size=2) * 10).astype(np.float32)


def _star(rng: np.random.Generator) -> Polygon:
    count = int(rng.integers(5, 60))
    angle = np.sort(rng.random(count)) * 2 * np.pi
    radius = (0.3 + 0.7 * rng.random(count)) * rng.uniform(2, 40)
    return (30 + np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]).astype(np.float32)


def _rectilinear(rng: np.random.Generator) -> Polygon:
    points = np.repeat(rng.integers(0, 60, (int(rng.integers(2, 12)), 2)), 2, axis=0)
    points[:, 0] = np.roll(points[:, 0], 1)
    return points.astype(np.float32)


def _degenerate(rng: np.random.Generator) -> Polygon:
    points = _cloud(rng, most=12)
    kind = rng.integers(3)
    if kind == 0:
        points[:, 1] = points[0, 1] + (points[:, 0] - points[0, 0]) * np.float32(rng.choice([0.0, 0.5, 1.0, 2.0]))
    elif kind == 1:
        points = np.repeat(points, 2, axis=0)
    else:
        points = np.concatenate([points, points[::-1]])
    return points


def _few(rng: np.random.Generator) -> Polygon:
    return (rng.random((int(rng.integers(1, 3)), 2)) * 60).astype(np.float32)


# Grid units are a fifth of a mask pixel: such coordinates land on ties of the rounding.
FAMILIES: dict[str, Callable[[np.random.Generator], Polygon]] = {
    "self-intersecting": _cloud,
    "star": _star,
    "integers": lambda rng: np.round(_cloud(rng)),
    "tenths": lambda rng: np.round(_cloud(rng) * 10) / np.float32(10),
    "rectilinear": _rectilinear,
    "degenerate": _degenerate,
    "one or two vertices": _few,
    "outside": lambda rng: _cloud(rng) + np.float32(rng.choice([-200, 200])),
    "huge": lambda rng: (_cloud(rng) - 30) * np.float32(100),
    "tiny": lambda rng: _cloud(rng, scale=1.0) + 25,
}


def _boxes(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Boxes about where the polygons are: of any size, of whole pixels, of one pixel, of no pixel, sticking out."""
    corner = rng.uniform(-15, 50, (count, 2))
    extent = rng.uniform(0.5, 60, (count, 2))
    extent[::5] = rng.choice([1.0, 7.0, 14.0, 28.0, 56.0, 140.0, 280.0], (len(extent[::5]), 2))
    boxes = np.concatenate([corner, corner + extent], axis=1)
    boxes[::3] = np.round(boxes[::3])
    boxes[1::40, 2:] = boxes[1::40, :2]
    return boxes.astype(np.float32)


def random_instances(family: str, count: int, seed: int) -> tuple[list[list[Polygon]], Tensor]:
    """``count`` instances of one to three polygons of a family, and a box for each, float32 [count, 4]."""
    rng = np.random.default_rng(seed)
    instances = [[FAMILIES[family](rng) for _ in range(rng.integers(1, 4))] for _ in range(count)]
    return instances, torch.from_numpy(_boxes(rng, count))
