"""deform_conv2d: against a scalar oracle, plain convolution, hand-computed samples and torchvision."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import DeformConv2d, deform_conv, deform_conv2d, set_backend
from tests.kernels.deform_conv_oracle import CASES, DTYPES, Case, oracle
from tests.kernels.helpers import ForbidSync, Guards, Place, assert_within_twice_torch

FORWARD = torch.ops.fastrcnn_kernels.deform_conv2d.default
BACKWARD = torch.ops.fastrcnn_kernels.deform_conv2d_backward.default


@cache
def expected(case: Case, dtype: torch.dtype) -> list[Tensor]:
    t: dict[str, Any] = case.inputs(dtype)
    return oracle(
        t["input"], t["offset"], t["mask"], t["weight"], t["bias"], t["grad"], case.stride, case.padding, case.dilation
    )


def run(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    t = {name: None if x is None else x.to(device).requires_grad_() for name, x in case.inputs(dtype).items()}
    out = deform_conv2d(
        t["input"], t["offset"], t["weight"], t["bias"], case.stride, case.padding, case.dilation, t["mask"]
    )
    wanted = [t[name] for name in ("input", "offset", "weight", "mask", "bias") if t[name] is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, t["grad"].detach())]


@cache
def plain(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Plain PyTorch in the same dtype: the reference, with every operation rounded to that dtype."""
    with pytest.MonkeyPatch.context() as patch, set_backend("reference"):
        patch.setattr(deform_conv.reference, "compute_dtype", lambda given: given)
        return run(case, dtype, "cpu")


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.label for case in CASES])
def test_forward_and_gradients_match_oracle(place: Place, index: int) -> None:
    case = CASES[index]
    if place == Place("triton", "cpu") and index % 2:
        pytest.skip("the interpreter is slow: it takes every other case")
    # And one dtype a case, where the others take all.
    dtypes = DTYPES[index % 4 : index % 4 + 1] if place.backend == "triton" and place.device == "cpu" else DTYPES
    for dtype in dtypes:
        results = run(case, dtype, place.device)
        for i, (actual, truth, torch_result) in enumerate(
            zip(results, expected(case, dtype), plain(case, dtype), strict=True)
        ):
            scale = truth.abs().max().item()
            if dtype in (torch.float32, torch.float64):
                # The yardstick is our own reference: were it wrong, it would excuse itself.
                error = (torch_result.double().cpu() - truth).abs().max().item()
                assert error <= scale * {torch.float64: 1e-11, torch.float32: 1e-4}[dtype], f"{dtype}, result {i}"
            atol = scale * {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps / 2)
            if dtype == torch.bfloat16 and place == Place("triton", "cpu"):
                atol = scale * 2**-6  # Triton's interpreter truncates where a GPU rounds
            assert_within_twice_torch(actual, truth, torch_result, atol, f"{dtype}, result {i}")
        layout = torch.channels_last if results[0].is_contiguous(memory_format=torch.channels_last) else None
        assert layout is not None or not case.channels_last or results[0].is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
def test_without_offsets_it_is_a_convolution(place: Place, channels_last: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 7, 9, generator=random, dtype=torch.float64).to(place.device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 3, 3, 3, generator=random, dtype=torch.float64).to(place.device)
    bias = torch.randn(4, generator=random, dtype=torch.float64).to(place.device)
    offset = x.new_zeros(2, 18, 4, 9)
    out = deform_conv2d(x, offset, weight, bias, (2, 1), 1)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias, (2, 1), 1, groups=2), rtol=1e-12, atol=1e-12)
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    halved = deform_conv2d(x, offset, weight, None, (2, 1), 1, mask=torch.full_like(offset[:, :9], 0.5))
    torch.testing.assert_close(halved, F.conv2d(x, weight / 2, None, (2, 1), 1, groups=2), rtol=1e-12, atol=1e-12)


def test_hand_computed_samples(place: Place) -> None:
    """One tap on a 2 x 3 map of 1 ... 6: inside, across each border, on it and beyond it."""
    x = torch.arange(1.0, 7, device=place.device).view(1, 1, 2, 3)
    points = {
        (0.0, 0.0): 1.0, (0.5, 0.5): 3.0, (1.0, 2.0): 6.0, (0.25, 1.75): 3.5, (-0.5, 0.0): 0.5, (-0.5, -0.5): 0.25,
        (1.5, 2.0): 3.0, (1.75, 2.75): 0.375, (0.0, 2.5): 1.5, (-1.0, 0.0): 0.0, (2.0, 1.0): 0.0, (0.0, 3.0): 0.0,
        (1e30, 0.0): 0.0, (0.0, -1e30): 0.0, (math.inf, 1.0): 0.0, (0.5, -math.inf): 0.0,
    }  # fmt: skip
    weight = torch.ones(1, 1, 1, 1, device=place.device)
    for (y, x_at), value in points.items():
        offset = torch.zeros(1, 2, 2, 3, device=place.device)
        offset[0, :, 0, 0] = torch.tensor([y, x_at])
        assert deform_conv2d(x, offset, weight)[0, 0, 0, 0].item() == value, (y, x_at)


def test_nan_offset_reaches_the_output_and_its_neighbours_do_not_see_it(place: Place) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 3, 4, generator=random).to(place.device).requires_grad_()
    weight = torch.randn(2, 2, 1, 1, generator=random).to(place.device)
    offset = torch.zeros(1, 2, 3, 4, device=place.device)
    clean = deform_conv2d(x, offset, weight)
    offset[0, 0, 1, 2] = math.nan
    out = deform_conv2d(x, offset, weight)
    assert out[0, :, 1, 2].isnan().all()
    keep = torch.ones(3, 4, dtype=torch.bool, device=place.device)
    keep[1, 2] = False
    assert torch.equal(out[:, :, keep], clean[:, :, keep])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all()
    assert torch.equal(grad[0, :, 1, 2], torch.zeros(2, device=place.device))


def test_torchvision(place: Place) -> None:
    """Same call, same numbers: forward and all gradients."""
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    for case in CASES[:6]:
        t = {
            k: None if v is None else v.to(place.device).requires_grad_() for k, v in case.inputs(torch.float32).items()
        }
        wanted = [t[name] for name in ("input", "offset", "weight", "mask", "bias") if t[name] is not None]
        results = []
        for function in (deform_conv2d, ops.deform_conv2d):
            out = function(
                t["input"], t["offset"], t["weight"], t["bias"], case.stride, case.padding, case.dilation, t["mask"]
            )
            results.append([out, *torch.autograd.grad(out, wanted, t["grad"].detach())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradcheck(place: Place) -> None:
    random = torch.Generator().manual_seed(2)

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(place.device).requires_grad_()

    arguments = double(1, 4, 4, 3), double(1, 16, 4, 3), double(2, 2, 2, 1), double(2), double(1, 8, 4, 3)
    arguments = (arguments[0], double(1, 8, 5, 3), arguments[2], arguments[3], double(1, 4, 5, 3))

    def call(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight, bias, padding=(1, 0), mask=mask)

    # Numerical derivatives call the kernel for every element: too slow in the interpreter.
    assert torch.autograd.gradcheck(call, arguments, fast_mode=place == Place("triton", "cpu"))


def test_same_bits_every_time(place: Place) -> None:
    """Many samples on the same pixels, any number of threads: bitwise the same gradients of input, offset, mask."""
    if place == Place("reference", "cuda"):
        pytest.skip("the reference adds with atomics on CUDA")
    random = torch.Generator().manual_seed(3)
    channels, side = (8, 4) if place == Place("triton", "cpu") else (80, 12)
    x = torch.randn(2, channels, side, side, generator=random).to(place.device)
    offset = torch.randn(2, 18, side, side, generator=random).to(place.device) * 3
    mask = torch.rand(2, 9, side, side, generator=random).to(place.device)
    weight = torch.randn(4, channels, 3, 3, generator=random).to(place.device)
    grad = torch.randn(2, 4, side, side, generator=random).to(place.device)
    results, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        try:
            torch.set_num_threads(number)
            results.append(BACKWARD(grad, x, offset, mask, weight, [1, 1], [1, 1], [1, 1])[:3])
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # The products are torch's, and may add in another order for another number of threads.
    again = BACKWARD(grad, x, offset, mask, weight, [1, 1], [1, 1], [1, 1])[:3]
    fixed = BACKWARD(grad, x, offset, mask, weight, [1, 1], [1, 1], [1, 1])[:3]
    assert all(torch.equal(a, b) for a, b in zip(again, fixed, strict=True))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the positions are cut, across images too, the result is the same."""
    case = CASES[32]
    whole = run(case, torch.float64, "cpu")
    monkeypatch.setattr(deform_conv, "_CHUNK_BYTES", 1)
    big = Case(3, 5, (9, 8), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True, False, "near", 7)
    with set_backend("cpp"):
        cut = run(big, torch.float64, "cpu")
        assert deform_conv._Sampler(
            torch.zeros(3, 5, 9, 8), torch.zeros(3, 18, 9, 8), None, torch.zeros(4, 5, 3, 3), [1, 1], [1, 1], [1, 1], 1
        ).chunks() == [(0, 54), (54, 54), (108, 54), (162, 54)]
        for a, b in zip(whole, run(case, torch.float64, "cpu"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(cut, expected(big, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_images_in_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("fastrcnn_kernels.triton.deform_conv_backward", reason="needs Triton")
    if Place("triton", "cpu").why_not():
        pytest.skip(Place("triton", "cpu").why_not())
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    case = Case(3, 2, (3, 4), 2, (1, 2), (1, 1), (0, 0), (1, 1), 1, 1, True, False, True, "near", 8)
    with set_backend("triton"):
        for a, b in zip(run(case, torch.float64, "cpu"), expected(case, torch.float64), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_strided_inputs_and_mixed_types(place: Place) -> None:
    """Views of larger tensors; float32 offsets beside a half input keep their precision."""
    random = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, 9, 4, generator=random).to(place.device)
    offset = torch.randn(2, 4, 9, 4, generator=random).to(place.device)
    weight = torch.randn(3, 4, 1, 1, generator=random).to(place.device)
    mask = torch.rand(2, 3, 9, 4, generator=random).to(place.device)
    views = x[:, 1:, ::2], offset[:, 1:3, ::2], weight, mask[:, :1, 4:]
    out = deform_conv2d(*views[:3], mask=views[3])
    copies = [view.contiguous() for view in views]
    assert torch.equal(out, deform_conv2d(*copies[:3], mask=copies[3]))
    mixed = deform_conv2d(copies[0].half(), copies[1], weight.half(), mask=copies[3])
    assert mixed.dtype == torch.float16
    torch.testing.assert_close(mixed.float(), out, rtol=5e-3, atol=5e-3)
    leaf = copies[1].requires_grad_()
    mixed = deform_conv2d(copies[0].half(), leaf, weight.half(), mask=copies[3])
    assert torch.autograd.grad(mixed.sum(), leaf)[0].dtype == torch.float32


def test_empty(place: Place) -> None:
    x = torch.zeros(0, 4, 5, 5, device=place.device, requires_grad=True)
    weight = torch.ones(2, 4, 3, 3, device=place.device, requires_grad=True)
    offset = torch.zeros(0, 18, 3, 3, device=place.device)
    out = deform_conv2d(x, offset, weight, torch.ones(2, device=place.device))
    assert out.shape == (0, 2, 3, 3)
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros_like(weight))


def test_guarded_buffers(place: Place, guarded: Guards) -> None:
    """Inputs between canaries, outputs poisoned and between canaries (autouse): kernels write only what is theirs."""
    for channels_last in (False, True):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(2, 18, 5, 3, device=place.device).contiguous(memory_format=layout)
        offset = torch.randn(2, 36, 5, 3, device=place.device) * 4
        mask, weight = torch.rand(2, 18, 5, 3, device=place.device), torch.randn(4, 9, 3, 3, device=place.device)
        arguments = [guarded(t) for t in (x, offset, mask, weight)]
        out = FORWARD(*arguments, None, [1, 1], [1, 1], [1, 1])
        assert out.isfinite().all()
        grads = BACKWARD(guarded(torch.randn_like(out)), *arguments, [1, 1], [1, 1], [1, 1])
        assert all(grad.isfinite().all() for grad in grads)


def test_module(place: Place) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2).to(place.device)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (6, 2, 3, 3), "bias": (6,)}
    x, offset = torch.randn(1, 4, 6, 6, device=place.device), torch.zeros(1, 18, 3, 3, device=place.device)
    expected = F.conv2d(x, layer.weight, layer.bias, 2, 1, groups=2)
    torch.testing.assert_close(layer(x, offset), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x, offset, torch.ones_like(offset[:, :9])), expected, rtol=1e-5, atol=1e-5)
    assert DeformConv2d(4, 4, (1, 3), bias=False).bias is None
    assert "kernel_size=(3, 3), stride=(2, 2)" in repr(layer)
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        DeformConv2d(4, 6, 3, groups=3)


def test_autocast() -> None:
    x, offset = torch.randn(1, 4, 5, 5), torch.randn(1, 2, 5, 5)
    weight = torch.randn(3, 4, 1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = deform_conv2d(x, offset, weight, torch.zeros(3))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


X, OFFSET, WEIGHT = torch.zeros(2, 4, 5, 6), torch.zeros(2, 18, 5, 6), torch.zeros(4, 2, 3, 3)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dimensions": ({"input": X[0]}, "input must be floating-point with 4"),
    "integers": ({"offset": OFFSET.int()}, "offset must be floating-point"),
    "dtype": ({"weight": WEIGHT.double()}, "dtype of the input"),
    "channels": ({"weight": torch.zeros(4, 3, 3, 3)}, "does not divide the 4 channels"),
    "groups": ({"weight": torch.zeros(3, 2, 3, 3)}, "3 output channels"),
    "bias": ({"bias": torch.zeros(3)}, r"bias must be \[4\]"),
    "offset": ({"offset": OFFSET[:, :9]}, "offset must be"),
    "offset groups": ({"offset": torch.zeros(2, 54, 5, 6)}, "divide 4 channels"),
    "offset size": ({"padding": 0}, "offset must be"),
    "mask": ({"mask": torch.zeros(2, 18, 5, 6)}, "mask must be"),
    "stride": ({"stride": 0}, "stride must be"),
    "padding": ({"padding": (1, -1)}, "padding must be"),
    "dilation": ({"dilation": (1, 1, 1)}, "dilation must be"),
    "too small": ({"padding": 0, "dilation": 4}, "gives an output"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**{"input": X, "offset": OFFSET, "weight": WEIGHT, "padding": 1, **changed})


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(place: Place, masked: bool) -> None:
    x = torch.randn(1, 4, 3, 4, device=place.device, requires_grad=True)
    offset = torch.randn(1, 8, 3, 3, device=place.device, requires_grad=True)
    weight = torch.randn(2, 4, 1, 2, device=place.device, requires_grad=True)
    mask = torch.rand(1, 4, 3, 3, device=place.device, requires_grad=True) if masked else None
    bias = torch.randn(2, device=place.device, requires_grad=True) if masked else None
    geometry = [1, 1], [0, 0], [1, 1]
    torch.library.opcheck(FORWARD, (x, offset, mask, weight, bias, *geometry))
    grad = torch.randn(1, 2, 3, 3, device=place.device)
    plain_inputs = [None if t is None else t.detach() for t in (x, offset, mask, weight)]
    torch.library.opcheck(BACKWARD, (grad, *plain_inputs, *geometry))


def test_fullgraph_compile(place: Place) -> None:
    layer = DeformConv2d(2, 2, 1).to(place.device)
    x, offset = torch.randn(1, 2, 3, 4, device=place.device), torch.randn(1, 2, 3, 4, device=place.device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, offset), layer(x, offset))
    compiled(x, offset).sum().backward()
    assert layer.weight.grad is not None


def test_no_host_sync() -> None:
    case = CASES[0]
    for backend in ("reference", "cpp"):
        with set_backend(backend), ForbidSync():
            run(case, torch.float32, "cpu")
