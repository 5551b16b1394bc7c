"""Mask targets against the loop over pycocotools that maskrcnn-benchmark runs, pasting against torchvision.

    pytest benchmarks/bench_rasterize.py

Every provider is checked against the others, pixel for pixel, before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import paste_masks, rasterize_polygons, set_backend
from tests.kernels.polygon_cases import Polygon, packed, target_by_pycocotools

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# regions, instances, vertices of an instance, of the largest instance, polygons of an instance
TARGET_CASES = {
    "K256-40-vertices": (256, 20, 40, 40, 1),
    "K256-3-polygons": (256, 20, 60, 60, 3),
    "K256-one-of-600-vertices": (256, 20, 40, 600, 1),
    "K1024-40-vertices": (1024, 80, 40, 40, 1),
}
PASTE_CASES = {"K100-480x640": (100, 480, 640), "K100-800x1333": (100, 800, 1333)}


def _outline(rng: np.random.Generator, vertices: int, centre: np.ndarray, radius: float) -> Polygon:
    angle = np.sort(rng.random(vertices)) * 2 * np.pi
    reach = radius * (0.6 + 0.4 * rng.random(vertices))
    return (centre + np.stack([np.cos(angle), np.sin(angle)], 1) * reach[:, None]).astype(np.float32)


@lru_cache(maxsize=1)
def _target_case(name: str) -> tuple[list[list[Polygon]], Tensor, Tensor]:
    """Instances of 40 to 340 pixels in an image of 800 x 800, and regions about them."""
    regions, count, vertices, most, parts = TARGET_CASES[name]
    rng = np.random.default_rng(0)
    instances, around = [], []
    for index in range(count):
        centre, radius = rng.random(2) * 800, rng.uniform(20, 170)
        share = (most if index == 0 else vertices) // parts
        polygons = [_outline(rng, share, centre, radius) for _ in range(parts)]
        instances.append(polygons)
        points = np.concatenate(polygons)
        around.append([*points.min(0), *points.max(0)])
    idxs = torch.arange(regions) % count
    tight = torch.from_numpy(np.array(around, np.float32))[idxs]
    extent = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
    noise = torch.from_numpy(rng.normal(size=(regions, 4)).astype(np.float32))
    return instances, idxs, (tight + 0.1 * extent * noise).clamp(min=0)


def _targets_by_loop(instances: list[list[Polygon]], idxs: Tensor, boxes: Tensor) -> Tensor:
    rows = zip(idxs.tolist(), boxes.tolist(), strict=True)
    return torch.from_numpy(np.stack([target_by_pycocotools(instances[i], box, 28) for i, box in rows]))


# The back-end and device of each provider of ours.
OURS = {"reference": ("reference", "cpu"), "cpp": ("cpp", "cpu")}
if torch.cuda.is_available():
    OURS["cuda"] = ("auto", "cuda")


@pytest.mark.parametrize("provider", ["pycocotools-loop", *OURS])
@pytest.mark.parametrize("case", TARGET_CASES)
def bench_rasterize_polygons(benchmark: Any, case: str, provider: str) -> None:
    instances, idxs, boxes = _target_case(case)
    expected = _targets_by_loop(instances, idxs, boxes)
    run: Callable[[], Tensor]
    if provider == "pycocotools-loop":

        def run() -> Tensor:
            return _targets_by_loop(instances, idxs, boxes)
    else:
        arguments = packed(instances) | {"instance_idxs": idxs, "boxes": boxes}
        backend, device = OURS[provider]
        arguments = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in arguments.items()}

        def run() -> Tensor:
            with set_backend(backend):
                found = rasterize_polygons(mask_size=28, **arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            return found

    assert torch.equal(run().cpu(), expected)
    benchmark.group = f"rasterize_polygons-{case}"
    benchmark.extra_info.update(regions=len(boxes), vertices=sum(len(p) for p in instances[0]), threads=_threads())
    benchmark(run)


@lru_cache(maxsize=1)
def _paste_case(name: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
    count, height, width = PASTE_CASES[name]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear")[:, 0]
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([0.8 * width, 0.8 * height])
    extent = 8 + torch.rand(count, 2, generator=generator) ** 2 * 300
    limit = torch.tensor([width - 1.0, height - 1.0])
    return masks, torch.cat([corner, torch.minimum(corner + extent, limit)], dim=1), (height, width)


@pytest.mark.parametrize("provider", [*DEVICES, "torchvision"])
@pytest.mark.parametrize("case", PASTE_CASES)
def bench_paste_masks(benchmark: Any, case: str, provider: str) -> None:
    masks, boxes, size = _paste_case(case)
    expected = paste_masks(masks, boxes, size)
    run: Callable[[], Tensor]
    if provider == "torchvision":
        name = "torchvision.models.detection.roi_heads"
        theirs = pytest.importorskip(name, reason="torchvision is not installed").paste_masks_in_image

        def run() -> Tensor:
            return (theirs(masks[:, None], boxes, size) > 0.5)[:, 0].byte()
    else:
        moved = (masks.to(provider), boxes.to(provider))

        def run() -> Tensor:
            found = paste_masks(*moved, size)
            if provider == "cuda":
                torch.cuda.synchronize()
            return found

    # The CUDA kernel of interpolate rounds otherwise: pixels at the threshold may fall to either side.
    assert (run().cpu() != expected).float().mean() <= (1e-5 if provider == "cuda" else 0)
    benchmark.group = f"paste_masks-{case}"
    benchmark.extra_info.update(masks=len(masks), bytes=expected.numel(), threads=_threads())
    benchmark(run)


def _threads() -> int:
    return torch.get_num_threads()
