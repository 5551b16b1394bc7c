"""Smooth L1 and the sigmoid focal loss, forward and backward, summed as in training, against torchvision and torch.

pytest benchmarks/bench_losses.py                        time everything
pytest benchmarks/bench_losses.py --benchmark-disable    run each once: all sides agree
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from benchmarks.harness import OURS, PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision

# Rows of logits: a level of RetinaNet, a whole image's half, a small one; 80 classes.
FOCAL_ROWS = [200] if SMALL else [2_000, 20_000, 100_000]
SMOOTH_ROWS = [128] if SMALL else [512, 268_569]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@lru_cache(maxsize=2)
def focal_inputs(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which one in a hundred is positive, and the same as a matrix."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, 80, generator=g) * 2 - 3).to(dtype)
    labels = torch.where(torch.rand(rows, generator=g) < 0.01, torch.randint(1, 81, (rows,), generator=g), 0)
    targets = (labels[:, None] == torch.arange(1, 81)).to(dtype)
    return logits.to(device).requires_grad_(), labels.to(device), targets.to(device)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("form", ["targets", "labels"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", FOCAL_ROWS)
def bench_focal_loss(
    benchmark: Any, device: torch.device, rows: int, dtype: str, form: str, provider: str
) -> None:  # fmt: skip
    logits, labels, targets = focal_inputs(rows, DTYPES[dtype], device)
    theirs = labels if form == "labels" else targets

    def step(loss: Any, wanted: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(logits, wanted, 0.25, 2.0, "sum")
        return value.detach(), torch.autograd.grad(value, logits)[0]

    def ours() -> tuple[Tensor, Tensor]:
        return step(fastrcnn_kernels.sigmoid_focal_loss, theirs)

    def peer() -> tuple[Tensor, Tensor]:
        return step(torchvision().ops.sigmoid_focal_loss, targets)

    if provider == "compiled":
        torchvision()
        compiled = torch.compile(torchvision().ops.sigmoid_focal_loss)
    call = provider_call(
        provider, ("sigmoid_focal_loss", "sigmoid_focal_loss_backward"), device, ours=ours, torchvision=peer,
        compiled=lambda: step(compiled, targets),
    )  # fmt: skip
    # The sum of bfloat16 losses is a bfloat16 in torchvision.
    tolerance = assert_close(1e-3, 1e-5) if dtype == "fp32" else assert_close(2e-2, 1e-3)
    size = logits.element_size()
    extra = labels.numel() * 8 if form == "labels" else targets.numel() * size
    measure(
        benchmark, call, truth=ours, equal=tolerance, group=f"focal-{rows}x80-{dtype}-{form}", provider=provider,
        device=device, bytes=3 * logits.numel() * size + 2 * extra, target=("torchvision", 3.0),
        shape=list(logits.shape), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("provider", [*OURS, "torch"])
@pytest.mark.parametrize("rows", SMOOTH_ROWS)
def bench_smooth_l1(benchmark: Any, device: torch.device, rows: int, provider: str) -> None:
    g = torch.Generator().manual_seed(0)
    input = torch.randn(rows, 4, generator=g).to(device).requires_grad_()
    target = torch.randn(rows, 4, generator=g).to(device)

    def step(loss: Any) -> tuple[Tensor, Tensor]:
        value = loss(input, target, reduction="sum", beta=1 / 9)
        return value.detach(), torch.autograd.grad(value, input)[0]

    def ours() -> tuple[Tensor, Tensor]:
        return step(fastrcnn_kernels.smooth_l1_loss)

    plain = torch.nn.functional.smooth_l1_loss
    compiled = torch.compile(plain) if provider == "compiled" else plain
    call = provider_call(
        provider, ("smooth_l1_loss", "smooth_l1_loss_backward"), device, ours=ours, torch=lambda: step(plain),
        compiled=lambda: step(compiled),
    )  # fmt: skip
    measure(
        benchmark, call, truth=ours, equal=assert_close(1e-4, 1e-5), group=f"smooth-l1-{rows}x4", provider=provider,
        device=device, bytes=5 * 4 * input.numel(), shape=list(input.shape),
    )  # fmt: skip
