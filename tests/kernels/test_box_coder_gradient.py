"""Gradients of encoding and decoding: gradcheck, and those of the reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastrcnn_kernels import (
    box_coder_reference,
    decode_boxes,
    encode_boxes,
)
from tests.kernels.helpers import Place
from tests.kernels.test_box_coder import WEIGHTS, random_boxes, random_deltas


@pytest.mark.parametrize("offset", [0, 1])
def test_gradcheck(place: Place, offset: int) -> None:
    device, fast = torch.device(place.device), place.backend == "triton"
    boxes = random_boxes(3, dtype=torch.float64).to(device).requires_grad_()
    anchors = random_boxes(3, seed=1, dtype=torch.float64).to(device).requires_grad_()
    deltas = random_deltas(3, 8).double().to(device).requires_grad_()
    weights = WEIGHTS[2]

    def encode(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return encode_boxes(b, a, weights, box_offset=offset)

    def decode(d: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return decode_boxes(d, a, weights, box_offset=offset)

    assert torch.autograd.gradcheck(encode, (boxes, anchors), fast_mode=fast)
    assert torch.autograd.gradcheck(decode, (deltas, anchors), fast_mode=fast)
    assert torch.autograd.gradgradcheck(decode, (deltas, anchors), fast_mode=True)


@pytest.mark.parametrize("only", ["first", "anchors", "both"])
def test_gradient_is_that_of_the_reference(device: torch.device, only: str) -> None:
    """Also at and beyond the clip, at NaN and infinity, for one input alone."""
    clip = 1.0
    deltas = random_deltas(40, 12, scale=2).to(device)
    deltas[0, 2], deltas[0, 3], deltas[1, 2], deltas[2, 6] = clip, math.inf, math.nan, -math.inf
    inputs = {
        "decode": (deltas, random_boxes(40).to(device)),
        "encode": [random_boxes(40, seed=i).to(device) for i in (0, 1)],
    }
    for name, (first, anchors) in inputs.items():
        grads = []
        for ours in (True, False):
            a = first.clone().requires_grad_(only != "anchors")
            b = anchors.clone().requires_grad_(only != "first")
            if name == "decode":
                out = (
                    decode_boxes(a, b, box_offset=1, clip=clip)
                    if ours
                    else box_coder_reference.decode(a, b, WEIGHTS[0], 1, clip)
                )
            else:
                out = encode_boxes(a, b, WEIGHTS[1]) if ours else box_coder_reference.encode(a, b, WEIGHTS[1], 0)
            (out * random_deltas(*out.shape, seed=5).to(device)).sum().backward()
            grads.append((a.grad, b.grad))
        for mine, truth in zip(*grads, strict=True):
            assert (mine is None) == (truth is None)
            if truth is not None:
                torch.testing.assert_close(mine, truth, rtol=2e-5, atol=2e-4, equal_nan=True)
    leaf = deltas[:3, :4].clone().requires_grad_()
    decode_boxes(leaf, random_boxes(3).to(device), clip=clip).sum().backward()
    decode_boxes(leaf, random_boxes(3).to(device), clip=clip)[:, 2:].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[0, 2] > 0, "at the bound the gradient passes, as in torch.clamp"
    assert leaf.grad[0, 3] == 0, "beyond it there is none"
