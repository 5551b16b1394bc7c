"""The mask predictor's last layer with its loss, forward and backward, against eager PyTorch on all classes' logits.

    pytest benchmarks/bench_mask_loss.py
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_mask_loss.py --benchmark-disable     the correctness gate alone

``torch``: ReLU, 1x1 convolution to 81 classes, choice of each region's class and BCE, as torchvision's
``maskrcnn_loss`` and its predictor do it (half precision: the loss in float32, as under autocast).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import OURS, SMALL, measure, provider_call
from fastrcnn_kernels import mask_loss
from fastrcnn_kernels.mask_loss import forward_reference


@dataclass(frozen=True)
class Case:
    regions: int
    dtype: torch.dtype
    channels_last: bool
    channels: int = 256
    size: int = 28
    classes: int = 81

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"K{self.regions}-C{self.channels}-{dtype}-{'nhwc' if self.channels_last else 'nchw'}"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Features, weight, bias, labels, targets; parameters are float32 beside half precision, as in training."""
        g = torch.Generator().manual_seed(0)
        shape = (self.regions, self.channels, self.size, self.size)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        hidden = torch.randn(shape, generator=g).to(device, self.dtype).contiguous(memory_format=layout)
        weight = (torch.randn(self.classes, self.channels, generator=g) / self.channels**0.5).to(device)
        bias = torch.randn(self.classes, generator=g).to(device)
        labels = torch.randint(1, self.classes, (self.regions,), generator=g).to(device)
        targets = (torch.rand(self.regions, self.size, self.size, generator=g) < 0.5).to(device, torch.uint8)
        return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels, targets


LAYOUTS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
CASES = (
    [Case(3, dtype, nhwc, channels=16, size=6, classes=5) for dtype, nhwc in LAYOUTS]
    if SMALL
    else [Case(regions, dtype, nhwc) for regions in (128, 256) for dtype, nhwc in LAYOUTS]
)


def close_in_norm(tolerance: float) -> Callable[[Any, Any], None]:
    """Each result by its own scale: losses, logits' slopes and sums over regions differ by orders of magnitude."""

    def check(actual: list[Tensor], expected: list[Tensor]) -> None:
        for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
            error, scale = (a.double() - e.double()).norm().item(), e.double().norm().item()
            assert error <= tolerance * scale, f"result {number} differs by {error:.3g} of {scale:.3g}"

    return check


@pytest.mark.parametrize("provider", [*OURS, "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_mask_loss(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    hidden, weight, bias, labels, targets = case.inputs(device)
    index = torch.arange(case.regions, device=device)
    pixels = case.regions * case.size**2

    def step(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))]

    def ours() -> list[Tensor]:
        return step(mask_loss(hidden, weight, bias, labels, targets, relu=True))

    def eager() -> list[Tensor]:
        w, b = weight.to(case.dtype), bias.to(case.dtype)
        logits = functional.conv2d(hidden.relu(), w[:, :, None, None], b)[index, labels].float()
        return step(functional.binary_cross_entropy_with_logits(logits, targets.float()))

    compiled = torch.compile(forward_reference)
    normaliser = torch.tensor(pixels, device=device)
    call = provider_call(
        provider, ("mask_loss", "mask_loss_backward"), device, ours=ours, torch=eager,
        compiled=lambda: step(compiled(hidden, weight, bias, labels, targets, normaliser, True)[0]),
    )  # fmt: skip
    measure(
        benchmark, call, truth=ours, equal=close_in_norm(2e-2 if case.dtype == torch.bfloat16 else 1e-3),
        group=f"mask-loss-{case}", provider=provider, device=device,
        bytes=3 * hidden.numel() * hidden.element_size(), flops=6 * pixels * case.channels,
        rounds=3 if provider == "torch" else None, shape=list(hidden.shape), classes=case.classes,
    )  # fmt: skip
