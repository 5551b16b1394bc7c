"""The anchors of a pyramid (800 x 1344, five levels) against the reference, its compiled form, and torchvision.

pytest benchmarks/bench_anchors.py                          time everything
FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_anchors.py   small inputs
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import PROVIDERS, SMALL, assert_equal, measure, provider_call, torchvision
from fastrcnn_kernels import cell_anchors, grid_anchors
from fastrcnn_kernels.anchors import grid_anchors_reference

STRIDES = [4, 8, 16, 32, 64]
HEIGHT, WIDTH = (64, 96) if SMALL else (800, 1344)


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_grid_anchors(benchmark: Any, device: torch.device, provider: str) -> None:
    sizes = [(-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in STRIDES]
    ratios = (0.5, 1.0, 2.0)
    cells = [cell_anchors(stride, [8 * stride], ratios, style="torchvision").to(device) for stride in STRIDES]
    flat = [side for size in sizes for side in size]
    count = sum(3 * height * width for height, width in sizes)

    def ours() -> list[torch.Tensor]:
        return grid_anchors(cells, sizes, STRIDES)

    def peer() -> list[torch.Tensor]:
        generator = torchvision("torchvision.models.detection.anchor_utils").AnchorGenerator()
        generator.cell_anchors = cells
        return generator.grid_anchors(sizes, [[torch.tensor(stride, device=device)] * 2 for stride in STRIDES])

    compiled = torch.compile(grid_anchors_reference)
    counts = [3 * height * width for height, width in sizes]
    call = provider_call(provider, "grid_anchors", device, ours=ours, torchvision=peer,
                         compiled=lambda: list(compiled(cells, flat, STRIDES).split(counts)))  # fmt: skip
    measure(benchmark, call, truth=ours, equal=assert_equal, group=f"grid-anchors-{count}", provider=provider,
            device=device, bytes=16 * count, target=("torchvision", 3), shape=[count, 4])  # fmt: skip
