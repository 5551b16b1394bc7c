"""The sigmoid focal loss against scalar loops in float64, with gradients, in every back-end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import sigmoid_focal_loss
from tests.kernels.helpers import Guards, Place, assert_within_twice_torch
from tests.kernels.nosync import forbid_host_sync

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Of the result's largest value; Triton's interpreter truncates a gradient where a GPU rounds.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
PARAMETERS = [(0.25, 2.0), (-1, 2.0), (0.7, 0.0), (0.25, 1.5), (0.5, 0.5)]


def scalar_loss(x: float, t: float, alpha: float, gamma: float) -> float:
    """By the definition of the paper, with the logarithms written so that they do not overflow."""
    p = 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x)
    not_p = 1 / (1 + math.exp(x)) if x < 700 else math.exp(-x)
    log_p = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
    log_not_p = log_p - x
    cross_entropy = -(t * log_p + (1 - t) * log_not_p)
    weight = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0
    return weight * (p * (1 - t) + not_p * t) ** gamma * cross_entropy


def scalar_gradient(x: float, t: float, alpha: float, gamma: float) -> float:
    """The derivative by central differences of the scalar loss: a formula of its own would only be copied."""
    step = 1e-5 * max(abs(x), 1)
    plus, minus = (scalar_loss(x + s, t, alpha, gamma) for s in (step, -step))
    return (plus - minus) / (2 * step)


def logits(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * 4


def targets(*shape: int, soft: bool = False) -> Tensor:
    t = torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return t if soft else t.round()


def expand(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Targets [K, C] and which rows count [K, 1], one element at a time."""
    t = torch.zeros(len(labels), classes, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        if 0 < label <= classes:
            t[row, label - 1] = 1
    return t, (labels >= 0)[:, None]


def apply_loops(f: Callable[..., float], x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    pairs = zip(x.flatten().tolist(), t.flatten().tolist(), strict=True)
    return torch.tensor([f(a, b, alpha, gamma) for a, b in pairs], dtype=torch.float64).view(x.shape)


def plain_torch(x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """torchvision's composition of operators."""
    p = torch.sigmoid(x)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = cross_entropy * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    return loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("alpha", "gamma"), PARAMETERS)
def test_equals_loops(
    place: Place, guarded: Guards, alpha: float, gamma: float, soft: bool, dtype: torch.dtype
) -> None:
    x, t = logits(37, 5).to(dtype), targets(37, 5, soft=soft).to(dtype)
    expected = apply_loops(scalar_loss, x.double(), t.double(), alpha, gamma)
    slopes = apply_loops(scalar_gradient, x.double(), t.double(), alpha, gamma)
    a, b = guarded(x.to(place.device).requires_grad_()), guarded(t.to(place.device))
    loss = sigmoid_focal_loss(a, b, alpha, gamma)
    (grad,) = torch.autograd.grad(loss.sum(), a)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    leaf = x.to(result).requires_grad_()
    plain = plain_torch(leaf, t.to(result), alpha, gamma)
    (plain_grad,) = torch.autograd.grad(plain.sum(), leaf)
    scale = expected.abs().max().item()
    assert_within_twice_torch(loss, expected, plain, ROUNDING[result] * scale, "loss")
    # Central differences are good to some ten digits.
    atol = max(ROUNDING[dtype], 1e-8) * slopes.abs().max().item()
    assert_within_twice_torch(grad, slopes, plain_grad.to(dtype), atol, "gradient")


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_equal_loops(place: Place, guarded: Guards, rows: int, dtype: torch.dtype) -> None:
    """Background, every class, labels beyond the last class and ignored rows."""
    classes = 5
    x = logits(rows, classes).to(dtype)
    labels = torch.randint(-2, classes + 2, (rows,), generator=torch.Generator().manual_seed(2))
    t, counts = expand(labels, classes)
    expected = torch.where(counts, apply_loops(scalar_loss, x.double(), t, 0.25, 2.0), 0)
    slopes = torch.where(counts, apply_loops(scalar_gradient, x.double(), t, 0.25, 2.0), 0)
    a, b = guarded(x.to(place.device).requires_grad_()), guarded(labels.to(place.device))
    for reduction in ("none", "sum", "mean"):
        loss = sigmoid_focal_loss(a, b, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), a)
        value = expected if reduction == "none" else expected.sum() if reduction == "sum" else expected.mean()
        share = 1 / (rows * classes) if reduction == "mean" else 1.0
        rtol = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(loss.cpu().double(), value, rtol=rtol, atol=rtol)
        atol = max(2 * ROUNDING[dtype], 1e-8) * share
        torch.testing.assert_close(grad.cpu().double(), slopes * share, rtol=2 * ROUNDING[dtype] + 1e-7, atol=atol)
    assert grad[(labels < 0).to(place.device)].abs().sum() == 0
    # Labels of a narrower type, in any memory order, mean the same.
    narrow = torch.stack([labels, labels], 1).to(torch.int32)[:, 0].to(place.device)
    assert torch.equal(sigmoid_focal_loss(a, narrow, reduction="sum"), sigmoid_focal_loss(a, b, reduction="sum"))


def test_by_hand(place: Place) -> None:
    """p = 1/2: the cross entropy is ln 2, the modulating factor 1/4."""
    x, t = torch.zeros(2, device=place.device), torch.tensor([0.0, 1.0], device=place.device)
    expected = torch.tensor([0.75 * math.log(2) / 4, 0.25 * math.log(2) / 4])
    torch.testing.assert_close(sigmoid_focal_loss(x, t).cpu(), expected)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.5, 0.0])
def test_large_logits(place: Place, gamma: float) -> None:
    """Finite and right where the sigmoid and the exponential saturate."""
    x = torch.tensor([-3e38, -1e4, -100, -90, 90, 100, 1e4, 3e38], device=place.device)
    for t in (0.0, 1.0):
        leaf = x.clone().requires_grad_()
        loss = sigmoid_focal_loss(leaf, torch.full_like(x, t), -1, gamma)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        wrong = (x > 0) if t == 0 else (x < 0)
        torch.testing.assert_close(loss, torch.where(wrong, x.abs(), 0), rtol=1e-5, atol=1e-15)
        torch.testing.assert_close(grad, torch.where(wrong, x.sign(), 0), rtol=1e-5, atol=1e-15)


def test_small_losses_keep_their_digits(place: Place) -> None:
    """log(1 + e) for a small e, which 1 + e would round away."""
    x = torch.tensor([-18.0, -12.0, -7.0], device=place.device)
    loss = sigmoid_focal_loss(x, torch.zeros_like(x), -1, 0.0)
    expected = torch.tensor([math.log1p(math.exp(v)) for v in x.tolist()])
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("gamma", "reduction"), [(2.0, "none"), (1.5, "mean"), (0.5, "sum"), (0.0, "mean")])
def test_gradcheck(place: Place, gamma: float, reduction: str) -> None:
    slow = place.backend == "triton"  # the interpreter: numerical derivatives call the kernel for every element
    x = logits(2, 3).to(place.device).requires_grad_()
    for t in (targets(2, 3, soft=True), torch.tensor([2, -1])):
        t = t.to(place.device)
        loss = partial(sigmoid_focal_loss, targets=t, alpha=0.25, gamma=gamma, reduction=reduction)
        assert torch.autograd.gradcheck(loss, (x,), fast_mode=slow)


def test_torchvision(place: Place) -> None:
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    x, t = logits(40, 6).float().to(place.device).requires_grad_(), targets(40, 6).float().to(place.device)
    for alpha, gamma in ((0.25, 2), (-1, 2), (0.5, 1.5)):
        for reduction in ("none", "sum", "mean"):
            ours, theirs = (
                f(x, t, alpha, gamma, reduction) for f in (sigmoid_focal_loss, ops.sigmoid_focal_loss)
            )  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_nan_and_infinity_spoil_only_their_own(place: Place) -> None:
    x, t = logits(8).float().to(place.device), targets(8).float().to(place.device)
    spoiled = x.clone()
    spoiled[3], spoiled[5] = float("nan"), float("inf")
    loss = sigmoid_focal_loss(spoiled.requires_grad_(), t)
    (grad,) = torch.autograd.grad(loss.sum(), spoiled)
    others = [0, 1, 2, 4, 6, 7]
    assert loss[[3, 5]].isnan().all()
    assert grad[[3, 5]].isnan().all()
    assert torch.equal(loss[others], sigmoid_focal_loss(x, t)[others])
    assert grad[others].isfinite().all()


def test_memory_order(place: Place) -> None:
    x, t = logits(2, 3, 4, 5).to(place.device), targets(2, 3, 4, 5).to(place.device)
    expected = sigmoid_focal_loss(x, t)
    upstream = logits(2, 3, 4, 5).flip(0).to(place.device)
    leaf = x.clone().requires_grad_()
    (expected_grad,) = torch.autograd.grad(sigmoid_focal_loss(leaf, t), leaf, upstream)
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = sigmoid_focal_loss(leaf, t)
    assert loss.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, leaf, upstream)[0], expected_grad)
    labels = torch.randint(-1, 6, (2, 3, 4), generator=torch.Generator().manual_seed(3)).to(place.device)
    assert torch.equal(sigmoid_focal_loss(leaf, labels), sigmoid_focal_loss(x, labels))


def test_same_bits_whatever_the_threads(place: Place) -> None:
    if place.backend != "cpp":
        pytest.skip("threads are the C++ kernels'")
    x, t = logits(60_000).float(), targets(60_000).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sigmoid_focal_loss(x, t, reduction="sum").item())
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1
    torch.testing.assert_close(results[0], sigmoid_focal_loss(x.double(), t.double()).sum().item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty(place: Place, reduction: str) -> None:
    for shape, empty in (((0, 4), (0, 4)), ((0, 4), (0,)), ((3, 0), (3,))):
        x = torch.zeros(shape, requires_grad=True, device=place.device)
        t = torch.zeros(empty, device=place.device, dtype=torch.float32 if shape == empty else torch.int64)
        loss = sigmoid_focal_loss(x, t, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        assert loss.sum() == 0
        loss.sum().backward()
        assert x.grad is not None


def test_no_host_sync(place: Place) -> None:
    x = logits(6, 4).to(place.device).requires_grad_()
    labels = torch.tensor([0, 1, -1, 4, 2, 0], device=place.device)
    with forbid_host_sync(allow_constants=False):
        sigmoid_focal_loss(x, labels, reduction="sum").backward()


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(place: Place, reduction: int) -> None:
    x = logits(3, 4).to(place.device)
    for t in (targets(3, 4).to(place.device), torch.tensor([0, 4, -1], device=place.device)):
        forward = torch.ops.fastrcnn_kernels.sigmoid_focal_loss.default
        torch.library.opcheck(forward, (x.clone().requires_grad_(), t, 0.25, 2.0, reduction))
        grad = torch.ones((3, 4) if reduction == 0 else (), dtype=torch.float64, device=place.device)
        backward = torch.ops.fastrcnn_kernels.sigmoid_focal_loss_backward.default
        torch.library.opcheck(backward, (grad, x, t, 0.25, 2.0, reduction))


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    x, labels = logits(6, 4).requires_grad_(), torch.tensor([0, 1, -1, 4, 2, 0])

    def step(a: Tensor) -> Tensor:
        return sigmoid_focal_loss(a * 2, labels, reduction="sum")

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sigmoid_focal_loss(x, x[0]), ValueError, r"shape of inputs \[3, 4\].* labels \[3\], got \[4\]"),
        (lambda x: sigmoid_focal_loss(x, x[:, 0]), TypeError, "must be integers"),
        (lambda x: sigmoid_focal_loss(x, x, alpha=2.0), ValueError, "alpha must be in"),
        (lambda x: sigmoid_focal_loss(x, x, gamma=-1.0), ValueError, "gamma must not be negative"),
        (lambda x: sigmoid_focal_loss(x, x, reduction="max"), ValueError, "unknown reduction 'max'"),
        (lambda x: sigmoid_focal_loss(x.long(), x), TypeError, "inputs must be floating point"),
        (lambda x: sigmoid_focal_loss(x, x.clone().requires_grad_()), ValueError, "not differentiable in its targets"),
    ],
)
def test_bad_arguments(call: Callable[[Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 4))
