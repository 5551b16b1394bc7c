"""One step of SGD over the parameters of a ResNet-50-FPN detector, against ``torch.optim.SGD`` in its two fast forms.

pytest benchmarks/bench_optim.py                        time everything
pytest benchmarks/bench_optim.py --benchmark-disable    run each once: the correctness gate alone
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import SMALL, assert_close, measure, provider_call
from fastrcnn_kernels import FusedSGD


def shapes() -> list[tuple[int, ...]]:
    """Weights and biases of ResNet-50 with frozen batch norm, a pyramid of 256 channels and both heads: 44 million."""
    if SMALL:
        return [(8, 3, 7, 7), (8,), (33, 65)]
    found: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                found.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    for channels in (256, 512, 1024, 2048):
        found += [(256, channels, 1, 1), (256,), (256, 256, 3, 3), (256,)]
    found += [(256, 256, 3, 3), (256,), (3, 256, 1, 1), (3,), (12, 256, 1, 1), (12,)]
    found += [(1024, 256 * 49), (1024,), (1024, 1024), (1024,), (81, 1024), (81,), (324, 1024), (324,)]
    found += [shape for _ in range(4) for shape in ((256, 256, 3, 3), (256,))]
    return [*found, (256, 256, 2, 2), (256,), (81, 256, 1, 1), (81,)]


def make_optimizer(kind: str, device: torch.device) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(device)) for shape in shapes()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 1e-4},
        {"params": [p for p in parameters if p.dim() == 1], "lr": 0.04},
    ]
    optimizer = (
        FusedSGD(groups, 0.02, momentum=0.9)
        if kind == "ours"
        else torch.optim.SGD(groups, 0.02, momentum=0.9, foreach=kind == "foreach", fused=kind == "fused")
    )
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator).mul_(1e-3).to(device)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
    return optimizer


def after_two_steps(kind: str, device: torch.device) -> list[Tensor]:
    optimizer = make_optimizer(kind, device)
    optimizer.step()
    optimizer.step()
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("provider", ["reference", "cpp", "triton", "foreach", "fused"])
def bench_sgd_step(benchmark: Any, device: torch.device, provider: str) -> None:
    optimizer = make_optimizer(provider if provider in ("foreach", "fused") else "ours", device)
    step = optimizer.step
    call = provider_call(provider, "fused_sgd", device, ours=step, foreach=step, fused=step)
    kind = provider if provider in ("foreach", "fused") else "ours"
    assert_close(1e-5, 1e-7)(after_two_steps(kind, device), after_two_steps("foreach", device))
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    measure(
        benchmark,
        call,
        truth=lambda: None,
        equal=lambda actual, expected: None,  # compared above: a step changes its parameters
        group="sgd-44M",
        provider=provider,
        device=device,
        bytes=20 * count,
        flops=6 * count,
        target=("foreach", 1),
        parameters=count,
    )
