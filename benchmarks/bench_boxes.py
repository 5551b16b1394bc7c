"""IoU and its relatives of every pair against the reference, ``torch.compile`` of it, and torchvision.

pytest benchmarks/bench_boxes.py                          time everything
FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_boxes.py   small inputs
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastrcnn_kernels
from benchmarks.cases import random_boxes
from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import boxes_reference

MEASURES = ["box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"]
FLOPS = {"box_iou": 14, "generalized_box_iou": 26, "distance_box_iou": 32, "complete_box_iou": 42}
SIZES = [(60, 40), (300, 7)] if SMALL else [(100, 10), (2000, 2000), (268_569, 20), (20, 268_569)]
CASES = [(name, *size) for name in MEASURES for size in (SIZES if name == "box_iou" else SIZES[1:2])]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("name", "n", "m"), CASES)
def bench_pairs(benchmark: Any, device: torch.device, name: str, n: int, m: int, provider: str) -> None:
    boxes1 = random_boxes(n, "uniform", 1, device)[0]
    boxes2 = random_boxes(m, "uniform", 2, device)[0]
    extra = (1e-7,) if name in MEASURES[2:] else ()
    compiled = torch.compile(getattr(boxes_reference, name))

    def ours() -> torch.Tensor:
        return getattr(fastrcnn_kernels, name)(boxes1, boxes2)

    call = provider_call(
        provider, name, device, ours=ours, compiled=lambda: compiled(boxes1, boxes2, 0, *extra),
        torchvision=lambda: getattr(torchvision().ops, name)(boxes1, boxes2),
    )  # fmt: skip
    measure(benchmark, call, truth=ours, equal=assert_close(1e-4, 1e-5), group=f"{name}-{n}x{m}", provider=provider,
            device=device, bytes=16 * (n + m) + 4 * n * m, flops=FLOPS[name] * n * m, target=("torchvision", 3),
            rounds=3 if provider == "torchvision" and n * m > 10**6 else None, shape=[n, m])  # fmt: skip
