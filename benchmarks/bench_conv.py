"""A convolution with frozen norm, residual and ReLU in one operator, against PyTorch's separate steps.

    pytest benchmarks/bench_conv.py
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_conv.py --benchmark-disable     the correctness gate alone

Convolutions of a Mask R-CNN on 800 x 1344 images. The side named ``torchvision`` is what torchvision's bottleneck and
pyramid run: convolution, norm, addition and ReLU in place, in NCHW, which is the layout it trains in. All ~60 distinct
convolutions, forward and both gradients apart: ``python -m benchmarks.convs``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call
from fastrcnn_kernels import conv2d


@dataclass(frozen=True)
class Case:
    images: int
    inputs: int
    outputs: int
    kernel: int
    height: int
    width: int
    residual: bool = False

    def __str__(self) -> str:
        kind = f"{self.inputs}to{self.outputs}-{self.kernel}x{self.kernel}"
        return f"N{self.images}-{kind}-{self.height}x{self.width}{'-residual' if self.residual else ''}"

    @property
    def flops(self) -> int:
        return 2 * self.images * self.inputs * self.outputs * self.kernel**2 * self.height * self.width

    def tensors(self, device: torch.device) -> list[Tensor]:
        """x, weight, scale, bias, residual, upstream gradient; maps in NHWC."""
        random = torch.Generator().manual_seed(0)
        size = (self.height, self.width)
        x = torch.randn(self.images, self.inputs, *size, generator=random)
        weight = torch.randn(self.outputs, self.inputs, self.kernel, self.kernel, generator=random)
        weight /= (self.inputs * self.kernel**2) ** 0.5
        scale, bias = (torch.rand(self.outputs, generator=random) + 0.5 for _ in range(2))
        maps = [torch.randn(self.images, self.outputs, *size, generator=random) for _ in range(2)]
        last = torch.channels_last
        return [t.to(device, memory_format=last) if t.dim() == 4 else t.to(device)
                for t in (x, weight, scale, bias, *maps)]  # fmt: skip


CASES = (
    [Case(1, 32, 33, 3, 30, 34), Case(1, 6, 8, 1, 5, 7, True)]
    if SMALL
    else [
        Case(1, 256, 256, 3, 200, 336),
        Case(1, 64, 256, 1, 200, 336, True),
        Case(1, 128, 128, 3, 100, 168),
        Case(1, 256, 1024, 1, 50, 84, True),
        Case(1, 512, 512, 3, 25, 42),
        Case(64, 256, 256, 3, 14, 14),
    ]
)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_conv(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    x, weight, scale, bias, residual, grad = case.tensors(device)
    addend = residual if case.residual else None
    padding = case.kernel // 2

    def run(function: Callable[..., Tensor], x: Tensor, addend: Tensor | None, grad: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(mode == "both") for t in (x, weight)]
        out = function(*leaves, addend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)] if mode == "both" else [out]

    def fused(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
        return conv2d(x, weight, bias, 1, padding, scale=scale, residual=addend, relu=True)

    def separate(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
        out = F.conv2d(x, weight, padding=padding) * scale[:, None, None] + bias[:, None, None]
        if addend is not None:
            out += addend
        return out.relu_()

    def ours() -> list[Tensor]:
        return run(fused, x, addend, grad)

    compiled = torch.compile(separate)
    nchw = x.contiguous(), None if addend is None else addend.contiguous(), grad.contiguous()
    operators = ("conv2d", "conv2d_backward") if mode == "both" else "conv2d"
    call = provider_call(
        provider, operators, device, ours=ours, compiled=lambda: run(compiled, x, addend, grad),
        torchvision=lambda: run(separate, *nchw),
    )  # fmt: skip
    passes = 3 if mode == "both" else 1
    measure(
        benchmark, call, truth=ours, equal=assert_close(1e-3, 2e-2), group=f"conv-{case}-{mode}", provider=provider,
        device=device, bytes=passes * 4 * (x.numel() + grad.numel() + weight.numel()), flops=passes * case.flops,
        case=str(case), target=("torchvision", 1.5) if case.kernel == 3 else None,
    )  # fmt: skip
