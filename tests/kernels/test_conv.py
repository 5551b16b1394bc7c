"""conv2d with bias, residual and ReLU: against torch's convolution in float64, on every back-end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import conv2d, set_backend, winograd
from tests.kernels.helpers import Place, assert_within_twice_torch

OPERATOR = torch.ops.fastrcnn_kernels.conv2d.default
# (N, I, H, W), O, kernel, stride, padding, dilation, groups
CASES = [
    ((1, 33, 32, 29), 40, 3, 1, 1, 1, 1),  # Winograd, channels that are no multiple of a vector, clipped tiles
    ((2, 32, 24, 22), 34, 3, 1, 1, 1, 1),  # Winograd, two images
    ((2, 5, 6, 7), 4, 3, 1, 1, 1, 1),  # too small for it
    ((1, 8, 9, 7), 6, 3, 2, 1, 1, 1),
    ((1, 8, 9, 7), 6, 3, 1, 2, 2, 1),
    ((1, 8, 9, 8), 6, 3, 1, 1, 1, 2),
    ((2, 6, 5, 4), 7, 1, 1, 0, 1, 1),
    ((2, 6, 5, 7), 7, 1, 2, 0, 1, 1),
    ((1, 3, 20, 17), 8, 7, 2, 3, 1, 1),  # the stem
]
# bias, residual, ReLU, scale
FOLLOWED = [
    (False, False, False, False),
    (True, False, True, True),
    (True, True, True, False),
    (True, True, False, True),
    (False, True, True, True),
    (False, False, False, True),
    (True, False, True, False),
]


def inputs(case: tuple[Any, ...], dtype: torch.dtype, last: bool, device: str) -> list[Tensor]:
    """x, weight, bias, residual, upstream gradient."""
    shape, outputs, kernel, stride, padding, dilation, groups = case
    random = torch.Generator().manual_seed(sum(shape) + outputs)
    fan_in = shape[1] // groups * kernel * kernel
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    weight = torch.randn((outputs, shape[1] // groups, kernel, kernel), generator=random, dtype=torch.float64)
    weight /= math.sqrt(fan_in)
    bias = torch.randn(outputs, generator=random, dtype=torch.float64)
    size = [(side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in shape[2:]]
    maps = [torch.randn((shape[0], outputs, *size), generator=random, dtype=torch.float64) for _ in range(2)]
    layout = torch.channels_last if last else torch.contiguous_format
    return [t.to(device, dtype).contiguous(memory_format=layout) if t.dim() == 4 else t.to(device, dtype)
            for t in (x, weight, bias, *maps)]  # fmt: skip


def scale_of(weight: Tensor) -> Tensor:
    return torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)


def geometry(case: tuple[Any, ...]) -> tuple[int, int, int, int]:
    return case[3:]


def plain(case: tuple[Any, ...], tensors: list[Tensor], follows: tuple[bool, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients by torch's operators, in ``dtype``."""
    x, weight, bias, residual, grad = (t.detach().to(dtype) for t in tensors)
    leaves = [
        t.requires_grad_() for t, used in zip((x, weight, bias, residual), (True, True, *follows), strict=False) if used
    ]
    scaled = weight * scale_of(weight)[:, None, None, None] if follows[3] else weight
    out = F.conv2d(x, scaled, bias if follows[0] else None, *geometry(case))
    out = out + residual if follows[1] else out
    out = out.relu() if follows[2] else out
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def ours(case: tuple[Any, ...], tensors: list[Tensor], follows: tuple[bool, ...]) -> list[Tensor]:
    x, weight, bias, residual, grad = tensors
    x, weight, bias, residual = (t.detach().requires_grad_() for t in (x, weight, bias, residual))
    leaves = [t for t, used in zip((x, weight, bias, residual), (True, True, *follows), strict=False) if used]
    out = conv2d(
        x, weight, bias if follows[0] else None, *geometry(case), residual=residual if follows[1] else None,
        relu=follows[2], scale=scale_of(weight) if follows[3] else None,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_forward_and_gradients_in_float64(place: Place, index: int, last: bool) -> None:
    case = CASES[index]
    tensors = inputs(case, torch.float64, last, place.device)
    for follows in FOLLOWED if place.backend != "triton" else FOLLOWED[index % 7 :][:1]:
        results, truth = ours(case, tensors, follows), plain(case, tensors, follows, torch.float64)
        layout = torch.channels_last if last else torch.contiguous_format
        assert results[0].is_contiguous(memory_format=layout)
        for result, exact in zip(results, truth, strict=True):
            torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_float32(place: Place, index: int) -> None:
    """Winograd's sums have larger summands: its error is a few 1e-6 of the largest result, torch's a few 1e-7."""
    case = CASES[index]
    for last in (False, True):
        tensors = inputs(case, torch.float32, last, place.device)
        follows = FOLLOWED[(3 * index + last) % 7]
        results, truth = ours(case, tensors, follows), plain(case, tensors, follows, torch.float64)
        if follows[2]:  # where the sign of a sum near 0 is open, its gradient is too
            agree = (results[0] > 0) == (truth[0] > 0)
            assert agree.double().mean() > 0.999
            results[1:], truth[1:] = [], []
        for result, exact in zip(results, truth, strict=True):
            limit = 2e-5 if place.backend == "cpp" and index < 2 and last else 2e-6
            assert (result.double() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(place: Place, dtype: torch.dtype) -> None:
    """What follows the convolution is rounded once: never worse than twice torch's error."""
    case = CASES[2]
    for last in (False, True):
        tensors = inputs(case, dtype, last, place.device)
        ours_, exact = (
            ours(case, tensors, (True, True, False, False)),
            plain(case, tensors, (True, True, False, False), torch.float64),
        )
        torchs = plain(case, tensors, (True, True, False, False), dtype)
        for i, (a, e, t) in enumerate(zip(ours_, exact, torchs, strict=True)):
            atol = 2 * torch.finfo(dtype).eps * max(1.0, e.abs().max().item())
            assert_within_twice_torch(a, e, t.to(a.dtype), atol, f"{dtype}, result {i}")


def test_the_winograd_cases_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("forward", "weight_gradient"):
        original = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    with set_backend("cpp"):
        for index, expected in ((0, ["forward", "forward", "weight_gradient"]), (2, [])):
            calls.clear()
            ours(CASES[index], inputs(CASES[index], torch.float32, True, "cpu"), FOLLOWED[2])
            assert calls == expected


def test_several_runs_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than fit in one run, also of the weights' gradient."""
    monkeypatch.setattr(winograd, "_RUN_BYTES", 20 * 36 * 73 * 8)
    case = ((2, 33, 32, 29), 40, 3, 1, 1, 1, 1)
    tensors = inputs(case, torch.float64, True, "cpu")
    assert winograd._runs(tensors[0], 73) == (128, 20)  # the last run is shorter; 80 at a time for the gradient
    with set_backend("cpp"):
        truth = plain(case, tensors, FOLLOWED[2], torch.float64)
        for a, b in zip(ours(case, tensors, FOLLOWED[2]), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_not_a_number(place: Place) -> None:
    x = torch.zeros(1, 1, 4, 4, device=place.device)
    x[0, 0, 0, 0] = math.nan
    out = conv2d(x, torch.ones(1, 1, 1, 1, device=place.device), relu=True)
    assert out[0, 0, 0, 0].isnan()
    assert out.flatten()[1:].tolist() == [0.0] * 15


def test_no_images(place: Place) -> None:
    x = torch.zeros(0, 40, 8, 8, device=place.device, requires_grad=True)
    weight = torch.ones(33, 40, 3, 3, device=place.device, requires_grad=True)
    out = conv2d(x, weight, torch.ones(33, device=place.device), padding=1, relu=True)
    assert out.shape == (0, 33, 8, 8)
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert grads[0].shape == x.shape
    assert not grads[1].any()


def test_only_what_needs_a_gradient_gets_one(place: Place) -> None:
    case = CASES[2]
    x, weight, bias, residual, _ = inputs(case, torch.float64, True, place.device)
    for leaf in (x, weight, bias, residual):
        leaf.requires_grad_()
        out = conv2d(x, weight, bias, *geometry(case), residual=residual, relu=True)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad.shape == leaf.shape
        assert grad.any()
        leaf.requires_grad_(False)


def test_gradcheck(place: Place) -> None:
    tensors = inputs(((1, 2, 3, 4), 3, 3, 1, 1, 1, 1), torch.float64, True, place.device)[:4]
    leaves = [t.requires_grad_() for t in tensors]

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return conv2d(x, weight, bias, 1, 1, scale=scale_of(weight), residual=residual, relu=True)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=place == Place("triton", "cpu"))


def test_autocast() -> None:
    """In mixed precision the weights stay float32 and the gradients reach them."""
    x, weight, bias, residual, grad = inputs(CASES[2], torch.float32, True, "cpu")
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv2d(x, weight, bias, 1, 1, residual=residual, relu=True)
        expected = (F.conv2d(x, weight, bias, padding=1).float() + residual).relu()
    assert out.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    assert torch.autograd.grad(out, weight, grad.bfloat16())[0].dtype == torch.float32


def test_opcheck(place: Place) -> None:
    for case in (CASES[2], CASES[7]):
        for last in (False, True):
            x, weight, bias, residual, _ = inputs(case, torch.float32, last, place.device)
            args = (x.requires_grad_(), weight.requires_grad_(), scale_of(weight).detach(), bias, residual, True)
            steps = [[v, v] for v in geometry(case)[:3]]
            torch.library.opcheck(OPERATOR, (*args, *steps, case[6]))


def test_compiles_as_one_graph() -> None:
    x, weight, bias, _, _ = inputs(CASES[0], torch.float32, True, "cpu")
    compiled = torch.compile(lambda *a: conv2d(*a, padding=1, relu=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), conv2d(x, weight, bias, padding=1, relu=True))


def test_wrong_arguments() -> None:
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 3, 3)
    for arguments, options, message in (
        ((x[0], weight), {}, "must be floating-point"),
        ((x.long(), weight), {}, "must be floating-point"),
        ((x, weight[:, :3]), {}, "weight must be"),
        ((x, weight.double()), {}, "weight must be"),
        ((x, weight, torch.zeros(3)), {}, "bias must be"),
        ((x, weight), {"residual": torch.zeros(1, 2, 5, 5)}, "residual must be"),
        ((x, weight), {"residual": torch.zeros(1, 2, 3, 3, dtype=torch.float64)}, "residual must be"),
    ):
        with pytest.raises(ValueError, match=message):
            conv2d(*arguments, **options)
