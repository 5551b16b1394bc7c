"""Keypoint targets, and keypoints from heat maps, against torchvision's functions where it is installed.

pytest benchmarks/bench_keypoints.py                        time everything
pytest benchmarks/bench_keypoints.py --benchmark-disable    run each once: the correctness gate alone
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import OURS, SMALL, assert_close, assert_equal, measure, provider_call, torchvision
from fastrcnn_kernels import keypoint_targets, keypoints_from_heatmaps

HEADS = "torchvision.models.detection.roi_heads"
PROVIDERS = [*(name for name in OURS if name != "compiled"), "torchvision"]
PEAKS = [(2, "peaked")] if SMALL else [(20, "peaked"), (20, "noise"), (100, "peaked"), (1, "peaked")]
TARGETS = [8] if SMALL else [128, 1024]


def make_boxes(rows: int) -> Tensor:
    """Boxes of 50 to 400 pixels a side."""
    rng = np.random.default_rng(0)
    corner, extent = rng.uniform(0, 600, (rows, 2)), rng.uniform(50, 400, (rows, 2))
    return torch.from_numpy(np.concatenate([corner, corner + extent], 1)).float()


def make_maps(rows: int, kind: str) -> Tensor:
    """17 maps of 56 x 56 a box: with a peak, as a trained head predicts them, or noise, as an untrained one."""
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(rows, 17, 56, 56))
    if kind == "peaked":
        y, x = np.mgrid[:56, :56]
        cy, cx = (rng.uniform(0, 56, (rows, 17, 1, 1)) for _ in range(2))
        maps = 0.3 * maps + 9 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 8)
    return torch.from_numpy(maps.astype(np.float32))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("rows", "kind"), PEAKS)
def bench_keypoints_from_heatmaps(benchmark: Any, device: torch.device, rows: int, kind: str, provider: str) -> None:
    maps, boxes = make_maps(rows, kind).to(device), make_boxes(rows).to(device)

    def ours() -> Tensor:
        return keypoints_from_heatmaps(maps, boxes)

    def peer() -> Tensor:
        points, scores = torchvision(HEADS).heatmaps_to_keypoints(maps, boxes)
        return torch.cat([points[..., :2], scores[..., None]], 2)

    call = provider_call(provider, "keypoints_from_heatmaps", device, ours=ours, torchvision=peer)
    measure(
        benchmark,
        call,
        truth=ours,
        equal=assert_close(1e-5, 1e-3),
        group=f"keypoints_from_heatmaps-{rows}-{kind}",
        provider=provider,
        device=device,
        bytes=4 * maps.numel(),
        target=("torchvision", 10),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("rows", TARGETS)
def bench_keypoint_targets(benchmark: Any, device: torch.device, rows: int, provider: str) -> None:
    boxes = make_boxes(rows)
    share = torch.rand(rows, 17, 2, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.1
    at = boxes[:, None, :2] + share * (boxes[:, None, 2:] - boxes[:, None, :2])
    keypoints = torch.cat([at, (share[..., :1] > 0.2).float()], 2).to(device)
    boxes = boxes.to(device)

    def ours() -> tuple[Tensor, Tensor]:
        return keypoint_targets(keypoints, boxes, 56)

    def peer() -> tuple[Tensor, Tensor]:
        index, valid = torchvision(HEADS).keypoints_to_heatmap(keypoints, boxes, 56)
        return index, valid.bool()

    call = provider_call(provider, "keypoint_targets", device, ours=ours, torchvision=peer)
    measure(
        benchmark,
        call,
        truth=ours,
        equal=assert_equal,
        group=f"keypoint_targets-{rows}",
        provider=provider,
        device=device,
        bytes=rows * (17 * (12 + 9) + 16),
        target=("torchvision", 1),
    )
