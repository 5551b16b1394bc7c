"""Smooth L1 against scalar loops in float64, with gradients, in every back-end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastrcnn_kernels import smooth_l1_loss
from tests.kernels.helpers import Guards, Place, assert_within_twice_torch
from tests.kernels.nosync import forbid_host_sync

BETAS = (0.0, 1 / 9, 0.11, 1.0, 2.5)


def scalar_loss(difference: float, beta: float) -> float:
    distance = abs(difference)
    return distance - beta / 2 if distance >= beta else distance * distance / (2 * beta)


def scalar_gradient(difference: float, beta: float) -> float:
    if beta > 0 and abs(difference) < beta:
        return difference / beta
    return float((difference > 0) - (difference < 0))


def values(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    target = torch.randn(*shape, generator=g, dtype=torch.float64)
    scale = torch.logspace(-3, 1, max(target.numel(), 1), dtype=torch.float64)[: target.numel()].view(shape)
    return (target + torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype), target.to(dtype)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(1,), (7, 4), (3, 5, 4), (1500,)])
def test_equals_loops(place: Place, guarded: Guards, shape: tuple[int, ...], beta: float) -> None:
    input, target = values(*shape)
    differences = (input - target).flatten().tolist()
    expected = torch.tensor([scalar_loss(d, beta) for d in differences], dtype=torch.float64).view(shape)
    input, target = guarded(input.to(place.device)), guarded(target.to(place.device))
    torch.testing.assert_close(smooth_l1_loss(input, target, beta).cpu(), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(smooth_l1_loss(input, target, beta, "sum").cpu(), expected.sum())
    torch.testing.assert_close(smooth_l1_loss(input, target, beta, reduction="mean").cpu(), expected.mean())
    single = smooth_l1_loss(input.float(), target.float(), beta)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double().cpu(), expected, rtol=1e-5, atol=1e-6)


def test_by_hand(place: Place) -> None:
    input = torch.tensor([0.0, 0.5, -0.5, 1.0, 3.0], device=place.device)
    zero = torch.zeros(5, device=place.device)
    assert smooth_l1_loss(input, zero).tolist() == [0.0, 0.125, 0.125, 0.5, 2.5]
    assert smooth_l1_loss(input, zero, 0.5).tolist() == [0.0, 0.25, 0.25, 0.75, 2.75]
    assert smooth_l1_loss(input, zero, 0.0).tolist() == [0.0, 0.5, 0.5, 1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_gradient_equals_loops(place: Place, beta: float, dtype: torch.dtype) -> None:
    input, target = values(9, 4, dtype=dtype)
    upstream = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = [scalar_gradient(d, beta) for d in (input.double() - target.double()).flatten().tolist()]
    expected = torch.tensor(slopes, dtype=torch.float64).view(9, 4)
    plain = (expected.float() * upstream.float()).to(dtype)
    input = input.to(place.device).requires_grad_()
    loss = smooth_l1_loss(input, target.to(place.device), beta)
    (actual,) = torch.autograd.grad(loss, input, upstream.to(loss))
    # Triton's interpreter truncates where a GPU rounds.
    atol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_within_twice_torch(actual, expected * upstream, plain, atol)


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(place: Place, beta: float, reduction: str) -> None:
    slow = place.backend == "triton"  # the interpreter: numerical derivatives call the kernel for every element
    input, target = (x.to(place.device).requires_grad_() for x in values(2, 3))
    assert torch.autograd.gradcheck(lambda a, b: smooth_l1_loss(a, b, beta, reduction), (input, target), fast_mode=slow)


def test_gradient_at_zero(place: Place) -> None:
    for beta in BETAS:
        input = torch.zeros(3, requires_grad=True, device=place.device)
        smooth_l1_loss(input, torch.zeros(3, device=place.device), beta, "sum").backward()
        assert input.grad is not None
        assert input.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(place: Place, dtype: torch.dtype) -> None:
    input = torch.full((4000,), 30.0, dtype=dtype, requires_grad=True, device=place.device)
    loss = smooth_l1_loss(input, torch.zeros_like(input), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == 4000 * 29.5, "beyond float16, between the numbers of bfloat16"
    loss.backward()
    assert input.grad is not None
    assert input.grad.dtype == dtype
    assert input.grad.unique().tolist() == [1.0]


def test_nan_and_infinity_spoil_only_their_own(place: Place) -> None:
    input, target = (x.to(place.device) for x in values(9, dtype=torch.float32))
    spoiled = input.clone()
    spoiled[3], spoiled[8] = float("nan"), float("inf")
    for beta in (0.0, 1.0):
        loss = smooth_l1_loss(spoiled.requires_grad_(), target, beta)
        (grad,) = torch.autograd.grad(loss.sum(), spoiled)
        others = [0, 1, 2, 4, 5, 6, 7]
        assert loss[3].isnan()
        assert grad[3].isnan()
        assert loss[8].item() == float("inf")
        assert grad[8].item() == 1.0
        assert torch.equal(loss[others], smooth_l1_loss(input, target, beta)[others])
        assert grad[others].isfinite().all()


def test_memory_order(place: Place) -> None:
    """Losses and gradients have the order of the input, whatever that of the target and of the upstream gradient."""
    input, target = (x.to(place.device) for x in values(2, 3, 4, 5))
    upstream = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(place.device)
    plain = input.clone().requires_grad_()
    expected = smooth_l1_loss(plain, target)
    (expected_grad,) = torch.autograd.grad(expected, plain, upstream)
    last = input.contiguous(memory_format=torch.channels_last)
    gaps = torch.stack([input, input], -1)[..., 0]
    for view in (last, input.transpose(0, 3).contiguous().transpose(0, 3), gaps):
        leaf = view.detach().requires_grad_()
        loss = smooth_l1_loss(leaf, target)
        assert loss.stride() == torch.empty_like(view).stride()
        assert torch.equal(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, leaf, upstream)[0], expected_grad)
        assert torch.equal(smooth_l1_loss(target, leaf), smooth_l1_loss(target, input))


def test_types_are_promoted(place: Place) -> None:
    input, target = (x.to(place.device) for x in values(6, 4))
    half = input.to(torch.bfloat16).requires_grad_()
    loss = smooth_l1_loss(half, target.float())
    assert torch.equal(loss, smooth_l1_loss(half.float(), target.float()))
    loss.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert smooth_l1_loss(target.float(), input).dtype == torch.float64
    whole = torch.ones(3, dtype=torch.int64, device=place.device)
    assert smooth_l1_loss(whole, torch.zeros(3, device=place.device)).tolist() == [0.5] * 3


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty(place: Place, reduction: str) -> None:
    input = torch.zeros(0, 4, requires_grad=True, device=place.device)
    loss = smooth_l1_loss(input, torch.zeros(0, 4, device=place.device), reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert input.grad is not None
    assert smooth_l1_loss(input, torch.zeros(0, 4, device=place.device)).shape == (0, 4)


def test_no_host_sync(place: Place) -> None:
    input, target = (x.to(place.device) for x in values(6, 4))
    input.requires_grad_()
    with forbid_host_sync(allow_constants=False):
        smooth_l1_loss(input, target, 1 / 9, "sum").backward()


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(place: Place, reduction: int) -> None:
    input, target = (x.to(place.device) for x in values(3, 4))
    forward = torch.ops.fastrcnn_kernels.smooth_l1_loss.default
    torch.library.opcheck(forward, (input.requires_grad_(), target, 0.5, reduction))
    grad = torch.ones((3, 4) if reduction == 0 else (), dtype=torch.float64, device=place.device)
    backward = torch.ops.fastrcnn_kernels.smooth_l1_loss_backward.default
    torch.library.opcheck(backward, (grad, input.detach(), target, 0.5, reduction))


def test_no_second_derivative(place: Place) -> None:
    input, target = (x.to(place.device) for x in values(3))
    loss = smooth_l1_loss(input.requires_grad_(), target, 1.0, "sum")
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    input, target = values(6, 4)
    compiled = torch.compile(smooth_l1_loss, fullgraph=True)
    torch.testing.assert_close(compiled(input, target, 1 / 9, "sum"), smooth_l1_loss(input, target, 1 / 9, "sum"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smooth_l1_loss(torch.zeros(3), torch.zeros(3, 1)), r"input \[3\] and target \[3, 1\]"),
        (lambda: smooth_l1_loss(torch.zeros(3), torch.zeros(3), -1.0), "beta must not be negative, got -1.0"),
        (lambda: smooth_l1_loss(torch.zeros(3), torch.zeros(3), reduction="max"), "unknown reduction 'max'"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda a, b, beta: torch.nn.functional.huber_loss(a, b, "none", beta), id="not divided by beta"),
        pytest.param(lambda a, b, beta: smooth_l1_loss(a, b, 2 * beta), id="twice the beta"),
        pytest.param(lambda a, b, beta: (a - b).abs(), id="L1"),
        pytest.param(
            lambda a, b, beta: torch.where((a - b).abs() < beta, (a - b) ** 2 / beta, (a - b).abs()), id="no half"
        ),
    ],
)
def test_the_oracle_rejects(wrong: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> None:
    input, target = values(40)
    expected = torch.tensor([scalar_loss(d, 1 / 9) for d in (input - target).tolist()], dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong(input, target, 1 / 9), expected, rtol=1e-5, atol=1e-6)
