"""The box head's losses, forward and backward, against torchvision's eager ``fastrcnn_loss`` with its encoding.

pytest benchmarks/bench_box_head_loss.py                        time everything
pytest benchmarks/bench_box_head_loss.py --benchmark-disable    run each once: all sides agree
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision

CASES = [(32, 11)] if SMALL else [(1024, 81), (1024, 91), (8192, 81)]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("rows", "classes"), CASES)
def bench_box_head_loss(benchmark: Any, device: torch.device, rows: int, classes: int, provider: str) -> None:
    """A quarter of the rows positive, as the sampler draws them."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=g).to(device).requires_grad_()
    regression = torch.randn(rows, 4 * classes, generator=g).to(device).requires_grad_()
    labels = torch.where(torch.arange(rows) % 4 == 0, torch.randint(1, classes, (rows,), generator=g), 0).to(device)
    corner, size = torch.rand(rows, 2, generator=g) * 800, 5 + torch.rand(rows, 2, generator=g) * 200
    proposals = torch.cat([corner, corner + size], 1).to(device)
    gt_boxes = proposals + torch.rand(rows, 4, generator=g).to(device)

    def step(losses: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(losses[0] + losses[1], (logits, regression))
        return losses[0].detach(), losses[1].detach(), *grads

    def ours() -> tuple[Tensor, ...]:
        return step(fastrcnn_kernels.box_head_loss(logits, regression, labels, proposals, gt_boxes, beta=1 / 9))

    def peer() -> tuple[Tensor, ...]:
        detection = torchvision("torchvision.models.detection")
        coder = detection._utils.BoxCoder(WEIGHTS)
        targets = coder.encode_single(gt_boxes, proposals)
        return step(detection.roi_heads.fastrcnn_loss(logits, regression, [labels], [targets]))

    call = provider_call(
        provider, ("box_head_loss", "box_head_loss_backward"), device, ours=ours, torchvision=peer,
    )  # fmt: skip
    measure(
        benchmark, call, truth=ours, equal=assert_close(1e-3, 1e-5), group=f"box-head-{rows}x{classes}",
        provider=provider, device=device, bytes=rows * classes * 4 * (3 + 4) + rows * 40, rows=rows, classes=classes,
    )  # fmt: skip
