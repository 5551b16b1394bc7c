"""RoIPool against the reference and torchvision, where installed.

    pytest benchmarks/bench_roi_pool.py
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_roi_pool.py --benchmark-disable     the correctness gate alone

The map of stride 16 of two 800 x 1344 images, as Fast and Faster R-CNN pool it; values equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import roi_pool


@dataclass(frozen=True)
class Case:
    channels: int
    height: int
    width: int
    rois: int
    dtype: torch.dtype
    channels_last: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "nhwc" if self.channels_last else "nchw"
        return f"C{self.channels}-{self.height}x{self.width}-K{self.rois}-{dtype}-{layout}"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Features, rois with log-normal sides about 80 pixels, as in COCO, and an upstream gradient."""
        random = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.randn(2, self.channels, self.height, self.width, generator=random).to(device, self.dtype)
        extent = torch.tensor([self.width, self.height]) * 16.0
        centre = torch.rand(self.rois, 2, generator=random) * extent
        half = torch.exp(torch.randn(self.rois, 2, generator=random) + 4.4).clamp(8, 900) / 2
        image = torch.arange(self.rois) * 2 // max(1, self.rois)
        corners = [(centre - half).clamp(min=0), torch.minimum(centre + half, extent - 1)]
        rois = torch.cat([image[:, None].float(), *corners], 1).to(device)
        grad = torch.randn(self.rois, self.channels, 7, 7, generator=random).to(device, self.dtype)
        return x.contiguous(memory_format=layout), rois, grad.contiguous(memory_format=layout)


CASES = (
    [Case(8, 9, 12, 10, torch.float32, False), Case(8, 9, 12, 10, torch.float32, True)]
    if SMALL
    else [
        Case(512, 50, 84, 1024, torch.float32, False),
        Case(512, 50, 84, 1024, torch.float32, True),
        Case(512, 50, 84, 128, torch.float32, False),
        Case(512, 50, 84, 1024, torch.bfloat16, True),
    ]
)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_roi_pool(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    if provider == "compiled":
        pytest.skip("the reference walks the regions in Python")
    if provider == "reference" and case.rois > 128:
        pytest.skip("the reference walks the regions in Python: minutes for a call")
    if provider == "torchvision" and case.dtype == torch.bfloat16:
        pytest.skip("torchvision has no bfloat16 kernel")
    x, rois, grad = case.inputs(device)
    x.requires_grad_(mode == "both")

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(x, rois, 7, 1 / 16)
        return [out.detach(), *torch.autograd.grad(out, x, grad)] if mode == "both" else [out]

    def ours() -> list[Tensor]:
        return run(roi_pool)

    call = provider_call(
        provider, ("roi_pool", "roi_pool_backward"), device, ours=ours,
        torchvision=lambda: run(torchvision("torchvision.ops").roi_pool),
    )  # fmt: skip
    # Values and their winners in 4 bytes out; backward, gradient and winners in and the map's gradient out.
    pooled = grad.numel() * (case.dtype.itemsize + 4)
    moved = (x.numel() * case.dtype.itemsize + pooled) * (2 if mode == "both" else 1)
    measure(
        benchmark, call, truth=ours, equal=assert_close(1e-4, 1e-4), group=f"roi_pool-{case}-{mode}",
        provider=provider, device=device, bytes=moved, target=("torchvision", 3),
        rounds=2 if provider == "reference" else None, shape=list(x.shape), rois=case.rois,
    )  # fmt: skip
