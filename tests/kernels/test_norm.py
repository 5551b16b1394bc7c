"""frozen_batch_norm: against batch_norm in evaluation, hand-computed values, and plain PyTorch in each dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import frozen_batch_norm, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place, assert_within_twice_torch

FORWARD = torch.ops.fastrcnn_kernels.scale_shift.default
BACKWARD = torch.ops.fastrcnn_kernels.scale_shift_backward.default
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 33, 2, 3), (1, 64, 1, 9), (2, 16, 8, 8)]
CASES = [(s, r, relu, last) for s in SHAPES for r in (False, True) for relu in (False, True) for last in (False, True)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """x, residual, upstream gradient; weight, bias, mean, variance."""
    random = torch.Generator().manual_seed(sum(shape))
    layout = torch.channels_last if last else torch.contiguous_format
    maps = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3)]
    buffers = [torch.randn(shape[1], generator=random) for _ in range(3)] + [
        torch.rand(shape[1], generator=random) + 0.3
    ]
    return [m.to(device, dtype).contiguous(memory_format=layout) for m in maps], [b.to(device) for b in buffers]


def plain(
    x: Tensor, buffers: list[Tensor], residual: Tensor | None, relu: bool, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """batch_norm in evaluation, in ``dtype`` throughout: the output, and the gradients of x and of the residual."""
    x = x.detach().to(dtype).requires_grad_()
    residual = None if residual is None else residual.detach().to(dtype).requires_grad_()
    weight, bias, mean, var = (b.to(dtype) for b in buffers)
    out = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5)
    if residual is not None:
        out = out + residual
    if relu:
        out = out.relu()
    leaves = [x] if residual is None else [x, residual]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_forward_and_gradients(place: Place, index: int) -> None:
    shape, with_residual, relu, last = CASES[index]
    dtypes = DTYPES[index % 4 : index % 4 + 1] if place == Place("triton", "cpu") else DTYPES
    for dtype in dtypes:
        (x, residual, grad), buffers = inputs(shape, dtype, last, place.device)
        x.requires_grad_()
        addend = residual.requires_grad_() if with_residual else None
        out = frozen_batch_norm(x, *buffers, 1e-5, residual=addend, relu=relu)
        assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        results = [out.detach(), *torch.autograd.grad(out, [x, addend] if addend is not None else [x], grad)]
        truth = plain(x, buffers, addend, relu, grad, torch.float64)
        same = plain(x, buffers, addend, relu, grad, dtype)
        if relu:
            # Where the rounded output is zero and the exact one is not, the two gradients rightly differ.
            agree = (truth[0] > 0) == (results[0].double() > 0)
            assert agree.double().mean() > 0.9
            results[1:] = [torch.where(agree, r, 0.0) for r in results[1:]]
            truth[1:] = [torch.where(agree, t, 0.0) for t in truth[1:]]
            same[1:] = [torch.where(agree, s, 0.0) for s in same[1:]]
        for i, (ours, exact, torchs) in enumerate(zip(results, truth, same, strict=True)):
            # Summands larger than the result; the interpreter truncates bfloat16 where a GPU rounds.
            ulps = 16 if dtype in (torch.float32, torch.float64) else 2 if place == Place("triton", "cpu") else 1
            atol = ulps * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
            assert_within_twice_torch(ours, exact, torchs, atol, f"{dtype}, result {i}")


def test_hand_computed(place: Place) -> None:
    # scale = 6 / sqrt(4) = 3, shift = 1 - 2 * 3 = -5
    x = torch.tensor([-1.0, 1, 2, 4], device=place.device).view(1, 1, 2, 2)
    buffers = [torch.tensor([value], device=place.device) for value in (6.0, 1.0, 2.0, 4.0)]
    residual = torch.tensor([10.0, 1, -1, -9], device=place.device).view(1, 1, 2, 2).requires_grad_()
    x.requires_grad_()
    assert frozen_batch_norm(x, *buffers).flatten().tolist() == [-8, -2, 1, 7]
    assert frozen_batch_norm(x, *buffers, relu=True).flatten().tolist() == [0, 0, 1, 7]
    assert frozen_batch_norm(x, *buffers, residual=residual).flatten().tolist() == [2, -1, 0, -2]
    out = frozen_batch_norm(x, *buffers, residual=residual, relu=True)
    assert out.flatten().tolist() == [2, 0, 0, 0]
    grads = torch.autograd.grad(out, (x, residual), torch.full_like(out, 5.0))
    assert [g.flatten().tolist() for g in grads] == [[15, 0, 0, 0], [5, 0, 0, 0]]
    assert frozen_batch_norm(x, *buffers[:3], buffers[3] - 1, 1.0).flatten().tolist() == [-8, -2, 1, 7]


def test_nan_and_infinity(place: Place) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, -1.0], device=place.device).view(1, 1, 1, 4).requires_grad_()
    one, zero = torch.ones(1, device=place.device), torch.zeros(1, device=place.device)
    out = frozen_batch_norm(values, one, zero, zero, one, relu=True)
    assert out[..., 0].isnan().all()
    assert out.flatten().tolist()[1:] == [math.inf, 0, 0]
    (grad,) = torch.autograd.grad(out, values, torch.ones_like(out))
    assert grad.flatten().tolist() == [0, 1, 0, 0]


def test_mixed_layouts_and_strides(place: Place) -> None:
    """A residual and a gradient in another memory format than x; views."""
    (x, residual, grad), buffers = inputs((2, 6, 5, 4), torch.float32, False, place.device)
    expected = plain(x, buffers, residual, True, grad, torch.float32)
    other = [t.contiguous(memory_format=torch.channels_last) for t in (residual, grad)]
    x.requires_grad_()
    other[0].requires_grad_()
    out = frozen_batch_norm(x, *buffers, 1e-5, residual=other[0], relu=True)
    assert out.is_contiguous()
    for a, b in zip([out, *torch.autograd.grad(out, (x, other[0]), other[1])], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    view = torch.cat([x.detach(), x.detach()], 3)[..., ::2]
    wide = [torch.stack([b, b], 1)[:, 0] for b in buffers]
    assert torch.equal(frozen_batch_norm(view, *wide), frozen_batch_norm(view.contiguous(), *buffers))


def test_larger_than_a_strip(place: Place) -> None:
    """More than one task in each layout, with more threads than one."""
    shape = (1, 5, 40, 50) if place == Place("triton", "cpu") else (2, 20, 60, 50)
    for last in (False, True):
        (x, residual, grad), buffers = inputs(shape, torch.float32, last, place.device)
        expected = plain(x, buffers, residual, False, grad, torch.float32)
        x.requires_grad_()
        residual.requires_grad_()
        out = frozen_batch_norm(x, *buffers, 1e-5, residual=residual)
        for a, b in zip([out, *torch.autograd.grad(out, (x, residual), grad)], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradcheck(place: Place) -> None:
    (x, residual, _), buffers = inputs((2, 3, 2, 2), torch.float64, True, place.device)
    leaves = x.requires_grad_(), residual.requires_grad_()
    for relu in (False, True):

        def call(a: Tensor, b: Tensor, relu: bool = relu) -> Tensor:
            return frozen_batch_norm(a, *buffers, 1e-5, residual=b, relu=relu)

        assert torch.autograd.gradcheck(call, leaves, fast_mode=place == Place("triton", "cpu"))


def test_only_the_residual_wants_a_gradient(place: Place) -> None:
    (x, residual, grad), buffers = inputs((1, 2, 2, 3), torch.float32, False, place.device)
    for relu in (False, True):
        residual = residual.detach().requires_grad_()
        out = frozen_batch_norm(x, *buffers, residual=residual, relu=relu)
        (back,) = torch.autograd.grad(out, residual, grad)
        assert torch.equal(back, torch.where(out > 0, grad, 0.0) if relu else grad)


def test_empty(place: Place) -> None:
    x = torch.zeros(0, 4, 3, 3, device=place.device, requires_grad=True)
    ones = torch.ones(4, device=place.device)
    out = frozen_batch_norm(x, ones, ones, ones, ones, residual=x, relu=True)
    assert out.shape == x.shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_guarded_buffers(place: Place, guarded: Guards) -> None:
    for last in (False, True):
        (x, residual, grad), buffers = inputs((2, 19, 3, 5), torch.float32, last, place.device)
        out = FORWARD(guarded(x), guarded(buffers[0]), guarded(buffers[1]), guarded(residual), True)
        assert out.isfinite().all()
        grads = BACKWARD(guarded(grad), guarded(out), guarded(buffers[0]), True)
        assert all(g.isfinite().all() for g in grads)


X, C = torch.zeros(2, 3, 4, 4), torch.ones(3)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dimensions": ({"x": X[0]}, "x must be"),
    "integers": ({"x": X.int()}, "x must be"),
    "weight": ({"weight": C[:2]}, "weight must be"),
    "variance": ({"running_var": C[:, None]}, "running_var must be"),
    "residual": ({"residual": X[:1]}, "residual must be"),
    "residual type": ({"residual": X.half()}, "residual must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, message = BAD[name]
    good = {"x": X, "weight": C, "bias": C, "running_mean": C, "running_var": C}
    with pytest.raises(ValueError, match=message):
        frozen_batch_norm(**{**good, **changed})


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(place: Place, with_residual: bool) -> None:
    for last in (False, True):
        (x, residual, grad), buffers = inputs((2, 3, 2, 4), torch.float32, last, place.device)
        addend = residual.requires_grad_() if with_residual else None
        torch.library.opcheck(FORWARD, (x.requires_grad_(), buffers[0], buffers[1], addend, with_residual))
        out = None if with_residual else x.detach()
        torch.library.opcheck(BACKWARD, (grad, out, buffers[0], with_residual))


def test_fullgraph_compile(place: Place) -> None:
    (x, residual, grad), buffers = inputs((1, 2, 3, 4), torch.float32, False, place.device)

    def call(a: Tensor, b: Tensor) -> Tensor:
        return frozen_batch_norm(a, *buffers, residual=b, relu=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    torch.testing.assert_close(compiled(x, residual), call(x, residual))
    (back,) = torch.autograd.grad(compiled(x, residual), x, grad)
    torch.testing.assert_close(back, torch.autograd.grad(call(x, residual), x, grad)[0])


def test_no_host_sync() -> None:
    (x, residual, grad), buffers = inputs((1, 2, 3, 4), torch.float32, False, "cpu")
    for backend in ("reference", "cpp"):
        with set_backend(backend), ForbidSync():
            out = frozen_batch_norm(x.requires_grad_(), *buffers, residual=residual, relu=True)
            torch.autograd.grad(out, x, grad)
