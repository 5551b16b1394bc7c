"""Deformable convolution against the reference, ``torch.compile`` of it, and torchvision where installed.

    pytest benchmarks/bench_deform_conv.py
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_deform_conv.py --benchmark-disable     the correctness gate alone

The 3x3 convolutions of res4 and res5 of a ResNet-50 on two 800 x 1344 images, v1 and v2 (with a mask).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import deform_conv2d
from fastrcnn_kernels import deform_conv_reference as reference


@dataclass(frozen=True)
class Case:
    images: int
    channels: int
    height: int
    width: int
    masked: bool
    dtype: torch.dtype
    channels_last: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "nhwc" if self.channels_last else "nchw"
        maps = f"N{self.images}-C{self.channels}-{self.height}x{self.width}"
        return f"{maps}-{'v2' if self.masked else 'v1'}-{dtype}-{layout}"

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Offsets of about two pixels, as a trained layer has them."""
        random = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(device, self.dtype)

        size = (self.height, self.width)
        tensors = {
            "input": normal(self.images, self.channels, *size).contiguous(memory_format=layout),
            "offset": normal(self.images, 18, *size) * 2,
            "weight": normal(self.channels, self.channels, 3, 3) / (9 * self.channels) ** 0.5,
            "grad": normal(self.images, self.channels, *size).contiguous(memory_format=layout),
        }
        if self.masked:
            tensors["mask"] = torch.rand(self.images, 9, *size, generator=random).to(device, self.dtype)
        return tensors


CASES = (
    [Case(1, 8, 7, 9, True, torch.float32, False), Case(1, 8, 7, 9, False, torch.float32, True)]
    if SMALL
    else [
        Case(2, 256, 50, 84, True, torch.float32, False),
        Case(2, 256, 50, 84, False, torch.float32, True),
        Case(2, 512, 25, 42, True, torch.float32, False),
        Case(2, 512, 25, 42, False, torch.float32, True),
        Case(2, 256, 50, 84, True, torch.bfloat16, True),
        Case(1, 16, 8, 8, True, torch.float32, False),
    ]
)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_deform_conv(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    if provider == "torchvision" and case.dtype == torch.bfloat16:
        pytest.skip("torchvision has no bfloat16 kernel")
    t = case.inputs(device)
    grad, mask = t.pop("grad"), t.get("mask")
    leaves = [tensor.requires_grad_(mode == "both") for tensor in t.values()]

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(t["input"], t["offset"], t["weight"], padding=1, mask=mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)] if mode == "both" else [out]

    compiled = torch.compile(reference.forward)

    def compiled_call(x: Tensor, offset: Tensor, weight: Tensor, padding: int, mask: Tensor | None) -> Tensor:
        return compiled(x, offset, mask, weight, None, [1, 1], [padding] * 2, [1, 1])

    def ours() -> list[Tensor]:
        return run(deform_conv2d)

    operators = ("deform_conv2d", "deform_conv2d_backward") if mode == "both" else "deform_conv2d"
    call = provider_call(
        provider, operators, device, ours=ours, compiled=lambda: run(compiled_call),
        torchvision=lambda: run(torchvision("torchvision.ops").deform_conv2d),
    )  # fmt: skip
    tolerance = 5e-2 if case.dtype == torch.bfloat16 else 1e-3
    outputs = case.images * case.height * case.width * case.channels
    products = 2 * outputs * case.channels * 9
    moved = sum(tensor.numel() for tensor in leaves) + outputs
    measure(
        benchmark, call, truth=ours, equal=assert_close(tolerance, 5 * tolerance), group=f"deform_conv-{case}-{mode}",
        provider=provider, device=device, bytes=case.dtype.itemsize * moved * (2 if mode == "both" else 1),
        flops=products * (3 if mode == "both" else 1), target=("torchvision", 1.5),
        rounds=3 if provider in ("reference", "compiled", "torchvision") else None, shape=list(t["input"].shape),
    )  # fmt: skip
