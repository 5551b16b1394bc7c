"""Frozen batch normalisation with residual and ReLU, against PyTorch's separate steps and ``torch.compile`` of them.

    pytest benchmarks/bench_norm.py
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_norm.py --benchmark-disable     the correctness gate alone

Outputs of bottlenecks of a ResNet-50 on two 800 x 1344 images. torchvision's side is its ``FrozenBatchNorm2d``, the
addition and the ReLU in place, as its bottleneck does them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import frozen_batch_norm
from fastrcnn_kernels.norm import scale_shift_reference


@dataclass(frozen=True)
class Case:
    channels: int
    height: int
    width: int
    residual: bool
    dtype: torch.dtype
    channels_last: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "nhwc" if self.channels_last else "nchw"
        return f"C{self.channels}-{self.height}x{self.width}{'-residual' if self.residual else ''}-{dtype}-{layout}"

    def inputs(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        random = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (2, self.channels, self.height, self.width)
        maps = [torch.randn(shape, generator=random).to(device, self.dtype) for _ in range(3)]
        buffers = [torch.rand(self.channels, generator=random).to(device) + 0.5 for _ in range(4)]
        return [m.contiguous(memory_format=layout) for m in maps], buffers


CASES = (
    [Case(8, 5, 7, True, torch.float32, False), Case(8, 5, 7, False, torch.bfloat16, True)]
    if SMALL
    else [
        Case(256, 200, 336, True, torch.float32, False),
        Case(256, 200, 336, True, torch.float32, True),
        Case(64, 200, 336, False, torch.float32, False),
        Case(1024, 50, 84, True, torch.float32, False),
        Case(1024, 50, 84, True, torch.bfloat16, True),
        Case(16, 8, 8, False, torch.float32, False),
    ]
)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_norm(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    (x, residual, grad), buffers = case.inputs(device)
    leaves = [t.requires_grad_(mode == "both") for t in ([x, residual] if case.residual else [x])]
    addend = residual if case.residual else None
    weight, bias, mean, variance = buffers

    def run(function: Callable[[], Tensor]) -> list[Tensor]:
        out = function()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)] if mode == "both" else [out]

    def fused() -> list[Tensor]:
        return run(lambda: frozen_batch_norm(x, *buffers, 1e-5, residual=addend, relu=True))

    compiled = torch.compile(scale_shift_reference)
    scale = weight * (variance + 1e-5).rsqrt()

    def theirs() -> Tensor:
        layer = torchvision("torchvision.ops").FrozenBatchNorm2d(case.channels).to(device, case.dtype)
        layer.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance})
        out = layer(x)
        if addend is not None:
            out += addend
        return out.relu_()

    call = provider_call(
        provider, ("scale_shift", "scale_shift_backward"), device, ours=fused,
        compiled=lambda: run(lambda: compiled(x, scale, bias - mean * scale, addend, True)),
        torchvision=lambda: run(theirs),
    )  # fmt: skip
    tolerance = 5e-2 if case.dtype == torch.bfloat16 else 1e-4

    def equal(actual: list[Tensor], expected: list[Tensor]) -> None:
        # A sum within rounding of zero may fall on either side of the ReLU, and its gradient with it.
        larger = torch.maximum(actual[0], expected[0])
        decided = (larger > tolerance) | (larger == 0)
        assert_close(tolerance, tolerance)(actual[0], expected[0])
        assert decided.float().mean() > 0.9
        assert_close(tolerance, tolerance)([g * decided for g in actual[1:]], [g * decided for g in expected[1:]])

    passes = 2 + case.residual + (mode == "both") * (3 + case.residual)
    measure(
        benchmark, call, truth=fused, equal=equal, group=f"norm-{case}-{mode}",
        provider=provider, device=device, bytes=x.numel() * case.dtype.itemsize * passes, target=("torchvision", 2),
        shape=list(x.shape),
    )  # fmt: skip
