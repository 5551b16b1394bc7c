"""Smooth L1 against scalar loops in float64, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastrcnn_kernels import smooth_l1_loss
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
@pytest.mark.parametrize("shape", [(1,), (7, 4), (3, 5, 4)])
def test_equals_loops(shape: tuple[int, ...], beta: float) -> None:
    input, target = values(*shape)
    differences = (input - target).flatten().tolist()
    expected = torch.tensor([scalar_loss(d, beta) for d in differences], dtype=torch.float64).view(shape)
    torch.testing.assert_close(smooth_l1_loss(input, target, beta), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(smooth_l1_loss(input, target, beta, "sum"), expected.sum())
    torch.testing.assert_close(smooth_l1_loss(input, target, beta, reduction="mean"), expected.mean())
    single = smooth_l1_loss(input.float(), target.float(), beta)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    input = torch.tensor([0.0, 0.5, -0.5, 1.0, 3.0])
    zero = torch.zeros(5)
    assert smooth_l1_loss(input, zero).tolist() == [0.0, 0.125, 0.125, 0.5, 2.5]
    assert smooth_l1_loss(input, zero, 0.5).tolist() == [0.0, 0.25, 0.25, 0.75, 2.75]
    assert smooth_l1_loss(input, zero, 0.0).tolist() == [0.0, 0.5, 0.5, 1.0, 3.0]


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_equals_loops(beta: float) -> None:
    input, target = values(9, 4)
    input.requires_grad_()
    upstream = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (actual,) = torch.autograd.grad(smooth_l1_loss(input, target, beta), input, upstream)
    slopes = [scalar_gradient(d, beta) for d in (input - target).flatten().tolist()]
    expected = torch.tensor(slopes, dtype=torch.float64).view(9, 4) * upstream
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(beta: float, reduction: str) -> None:
    input, target = values(5, 4)
    arguments = (input.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: smooth_l1_loss(a, b, beta, reduction), arguments)


def test_gradient_at_zero() -> None:
    for beta in BETAS:
        input = torch.zeros(3, requires_grad=True)
        smooth_l1_loss(input, torch.zeros(3), beta, "sum").backward()
        assert input.grad is not None
        assert input.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    input = torch.full((4000,), 30.0, dtype=dtype, requires_grad=True)
    loss = smooth_l1_loss(input, torch.zeros_like(input), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == 4000 * 29.5, "beyond float16, between the numbers of bfloat16"
    loss.backward()
    assert input.grad is not None
    assert input.grad.dtype == dtype


def test_nan_spoils_only_its_own() -> None:
    input, target = values(8, dtype=torch.float32)
    spoiled = input.clone()
    spoiled[3] = float("nan")
    loss = smooth_l1_loss(spoiled, target)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert loss[3].isnan()
    assert torch.equal(loss[others], smooth_l1_loss(input, target)[others])


def test_non_contiguous() -> None:
    input, target = values(6, 4)
    assert torch.equal(smooth_l1_loss(input.T, target.T), smooth_l1_loss(input, target).T)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty(reduction: str) -> None:
    input = torch.zeros(0, 4, requires_grad=True)
    loss = smooth_l1_loss(input, torch.zeros(0, 4), reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert input.grad is not None
    assert smooth_l1_loss(input, torch.zeros(0, 4)).shape == (0, 4)


def test_no_host_sync() -> None:
    input, target = values(6, 4)
    input.requires_grad_()
    with forbid_host_sync(allow_constants=False):
        smooth_l1_loss(input, target, 1 / 9, "sum").backward()


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
