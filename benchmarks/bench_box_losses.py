"""IoU losses of paired boxes, forward and backward, against torchvision.

pytest benchmarks/bench_box_losses.py                        time everything
pytest benchmarks/bench_box_losses.py --benchmark-disable    run each once: all sides agree
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision

COUNTS = [64] if SMALL else [512, 100_000]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["generalized", "distance", "complete"])
@pytest.mark.parametrize("count", COUNTS)
def bench_box_iou_loss(benchmark: Any, device: torch.device, count: int, name: str, provider: str) -> None:
    g = torch.Generator().manual_seed(0)
    corner, size = torch.rand(count, 2, generator=g) * 800, 5 + torch.rand(count, 2, generator=g) * 200
    target = torch.cat([corner, corner + size], 1).to(device)
    boxes = (target + torch.randn(count, 4, generator=g).to(device) * 2).requires_grad_()

    def step(loss: Any) -> tuple[Tensor, Tensor]:
        value = loss(boxes, target, reduction="sum")
        return value.detach(), torch.autograd.grad(value, boxes)[0]

    function = f"{name}_box_iou_loss"

    def ours() -> tuple[Tensor, Tensor]:
        return step(getattr(fastrcnn_kernels, function))

    def peer() -> tuple[Tensor, Tensor]:
        return step(getattr(torchvision().ops, function))

    compiled = torch.compile(getattr(torchvision().ops, function)) if provider == "compiled" else None
    call = provider_call(
        provider, ("box_iou_loss", "box_iou_loss_backward"), device, ours=ours, torchvision=peer,
        compiled=lambda: step(compiled),
    )  # fmt: skip
    measure(
        benchmark, call, truth=ours, equal=assert_close(1e-3, 1e-4), group=f"{name}-iou-{count}", provider=provider,
        device=device, bytes=5 * 16 * count, shape=[count, 4],
    )  # fmt: skip
