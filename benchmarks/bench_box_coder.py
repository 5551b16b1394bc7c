"""The box coder against the reference, ``torch.compile`` of it, and torchvision's BoxCoder.

    pytest benchmarks/bench_box_coder.py                          time everything
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_box_coder.py   small inputs

Anchors of an 800 x 1344 image, the proposals that enter NMS in two images, and class-specific boxes of the box head.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.cases import random_boxes
from benchmarks.harness import PROVIDERS, SMALL, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import box_coder_reference, decode_boxes, decode_proposals, encode_boxes

RPN, HEAD = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
CLIP = math.log(1000 / 16)
# Anchors, boxes for each, weights.
DECODE = (
    [(300, 1, RPN), (30, 5, HEAD)]
    if SMALL
    else [(268_569, 1, RPN), (17_638, 1, RPN), (1000, 1, HEAD), (1000, 81, HEAD)]
)
ENCODE = [(300, RPN)] if SMALL else [(268_569, RPN), (17_638, RPN), (1000, HEAD)]
PER_IMAGE = 100 if SMALL else 8819
IMAGES = ((800, 1333), (750, 1200))


def boxes_of(count: int, seed: int, device: torch.device) -> torch.Tensor:
    return random_boxes(count, "uniform", seed, device)[0]


def deltas_of(*shape: int, device: torch.device) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.3).to(device)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("count", "k", "weights"), DECODE)
def bench_decode(benchmark: Any, device: torch.device, count: int, k: int, weights: Any, provider: str) -> None:
    anchors, deltas = boxes_of(count, 1, device), deltas_of(count, 4 * k, device=device)
    compiled = torch.compile(box_coder_reference.decode)

    def ours() -> torch.Tensor:
        return decode_boxes(deltas, anchors, weights)

    def peer() -> torch.Tensor:
        return torchvision("torchvision.models.detection._utils").BoxCoder(weights).decode_single(deltas, anchors)

    call = provider_call(provider, "decode_boxes", device, ours=ours, torchvision=peer,
                         compiled=lambda: compiled(deltas, anchors, weights, 0, CLIP))  # fmt: skip
    measure(benchmark, call, truth=ours, equal=assert_close(1e-5, 1e-2), group=f"decode-{count}x{k}",
            provider=provider, device=device, bytes=16 * count * (2 * k + 1), flops=60 * count * k,
            target=("torchvision", 3), shape=[count, 4 * k])  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("count", "weights"), ENCODE)
def bench_encode(benchmark: Any, device: torch.device, count: int, weights: Any, provider: str) -> None:
    anchors, boxes = boxes_of(count, 1, device), boxes_of(count, 2, device)
    compiled = torch.compile(box_coder_reference.encode)

    def ours() -> torch.Tensor:
        return encode_boxes(boxes, anchors, weights)

    def peer() -> torch.Tensor:
        return torchvision("torchvision.models.detection._utils").BoxCoder(weights).encode_single(boxes, anchors)

    call = provider_call(provider, "encode_boxes", device, ours=ours, torchvision=peer,
                         compiled=lambda: compiled(boxes, anchors, weights, 0))  # fmt: skip
    measure(benchmark, call, truth=ours, equal=assert_close(1e-4, 1e-4), group=f"encode-{count}", provider=provider,
            device=device, bytes=48 * count, flops=70 * count, target=("torchvision", 3), shape=[count, 4])  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_decode_proposals(benchmark: Any, device: torch.device, provider: str) -> None:
    """Decoded, clipped and tested for size, for two images; torchvision in its own steps, an image at a time."""
    count = len(IMAGES) * PER_IMAGE
    anchors, deltas = boxes_of(count, 1, device).view(2, -1, 4), deltas_of(2, PER_IMAGE, 4, device=device)
    sizes = torch.tensor(IMAGES, device=device)
    compiled = torch.compile(box_coder_reference.decode_proposals)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return decode_proposals(deltas, anchors, sizes, min_size=1.0)

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        coder = torchvision("torchvision.models.detection._utils").BoxCoder(RPN)
        decoded = coder.decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1)).view(2, -1, 4)
        boxes, valid = torch.empty_like(decoded), torch.zeros(2, PER_IMAGE, dtype=torch.bool, device=device)
        for i, size in enumerate(IMAGES):
            boxes[i] = torchvision().ops.clip_boxes_to_image(decoded[i], size)
            valid[i, torchvision().ops.remove_small_boxes(boxes[i], 1.0)] = True
        return boxes, valid

    call = provider_call(provider, "decode_proposals", device, ours=ours, torchvision=peer,
                         compiled=lambda: compiled(deltas, anchors, sizes, RPN, 0, CLIP, 1.0))  # fmt: skip
    measure(benchmark, call, truth=ours, equal=assert_close(1e-5, 1e-2), group="decode-proposals", provider=provider,
            device=device, bytes=49 * count, flops=70 * count, target=("torchvision", 3),
            shape=[2, PER_IMAGE, 4])  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_decode_gradient(benchmark: Any, device: torch.device, provider: str) -> None:
    """Forward and backward with respect to the deltas, as a loss on decoded boxes needs it."""
    count = 300 if SMALL else 17_638
    anchors, deltas = boxes_of(count, 1, device), deltas_of(count, 4, device=device).requires_grad_()
    weight = deltas_of(count, 4, device=device)

    def gradient(function: Any) -> torch.Tensor:
        return torch.autograd.grad(function(), deltas, weight)[0]

    def ours() -> torch.Tensor:
        return gradient(lambda: decode_boxes(deltas, anchors))

    def peer() -> torch.Tensor:
        coder = torchvision("torchvision.models.detection._utils").BoxCoder(RPN)
        return gradient(lambda: coder.decode_single(deltas, anchors))

    compiled = torch.compile(box_coder_reference.decode)
    call = provider_call(provider, ("decode_boxes", "decode_boxes_backward"), device, ours=ours, torchvision=peer,
                         compiled=lambda: gradient(lambda: compiled(deltas, anchors, RPN, 0, CLIP)))  # fmt: skip
    measure(benchmark, call, truth=ours, equal=assert_close(1e-4, 1e-3), group="decode-gradient", provider=provider,
            device=device, bytes=112 * count, flops=120 * count, target=("torchvision", 3),
            shape=[count, 4])  # fmt: skip
