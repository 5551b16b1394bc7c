"""roi_pool: against a scalar oracle, hand-computed bins and torchvision; equal to the bit in every back-end."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import RoIPool, roi_pool, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place

FORWARD = torch.ops.fastrcnn_kernels.roi_pool.default
BACKWARD = torch.ops.fastrcnn_kernels.roi_pool_backward.default
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def away(value: np.floating) -> int:
    """Rounded half away from zero."""
    return int(math.copysign(math.floor(abs(float(value)) + 0.5), float(value)))


def oracle(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, pixels and the gradient of the map: torchvision's kernels, one bin after the other."""
    real = np.float64 if features.dtype == torch.float64 else np.float32
    maps, upstream = features.double().numpy(), grad.double().numpy()
    lowest = torch.finfo(features.dtype).min
    _, channels, height, width = maps.shape
    out = np.zeros((len(rois), channels, *size))
    argmax = np.full(out.shape, -1)
    back = np.zeros(maps.shape)
    for k, roi in enumerate(rois.double().numpy().astype(real)):
        if roi[0] < 0 or not np.isfinite(roi).all():
            continue
        x1, y1, x2, y2 = (away(real(value) * real(scale)) for value in roi[1:])
        bin_h = real(max(y2 - y1 + 1, 1)) / real(size[0])
        bin_w = real(max(x2 - x1 + 1, 1)) / real(size[1])
        for i in range(size[0]):
            top = min(max(math.floor(real(i) * bin_h) + y1, 0), height)
            bottom = min(max(math.ceil(real(i + 1) * bin_h) + y1, 0), height)
            for j in range(size[1]):
                left = min(max(math.floor(real(j) * bin_w) + x1, 0), width)
                right = min(max(math.ceil(real(j + 1) * bin_w) + x1, 0), width)
                if bottom <= top or right <= left:
                    continue
                for c in range(channels):
                    best, where = lowest, -1
                    for y in range(top, bottom):
                        for x in range(left, right):
                            if maps[int(roi[0]), c, y, x] > best:
                                best, where = maps[int(roi[0]), c, y, x], y * width + x
                    out[k, c, i, j], argmax[k, c, i, j] = best, where
                    if where >= 0:
                        back[int(roi[0]), c, where // width, where % width] += upstream[k, c, i, j]
    return torch.from_numpy(out), torch.from_numpy(argmax), torch.from_numpy(back)


KINDS = ["random", "outside", "large", "tiny", "negative", "halves", "padding", "not-finite"]
SHAPES = [(2, 3, 12, 10), (1, 17, 6, 21), (2, 1, 1, 1), (1, 5, 9, 9), (3, 4, 2, 13)]
SIZES = [(7, 7), (3, 2), (1, 1), (2, 5)]


def inputs(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int], float, Tensor]:
    """Features with ties, NaN, infinities and -0; rois about the map."""
    random = torch.Generator().manual_seed(index)
    shape, size, kind, scale = SHAPES[index % 5], SIZES[index % 4], KINDS[index % 8], (0.5, 1 / 16, 0.3)[index % 3]
    features = (torch.randn(shape, generator=random, dtype=torch.float64) * 4).round() / 2
    if index % 3 == 2:
        spoilt = torch.rand(shape, generator=random)
        features[spoilt < 0.3] = math.nan
        features[spoilt > 0.9] = -math.inf
        features[(spoilt > 0.85) & (spoilt < 0.9)] = math.inf
    layout = torch.channels_last if index % 4 >= 2 else torch.contiguous_format
    features = features.to(dtype).contiguous(memory_format=layout)
    count = min(6, 60 // size[0])
    extent = torch.tensor([shape[3], shape[2]], dtype=torch.float64) / scale
    centre = torch.rand(count, 2, generator=random, dtype=torch.float64) * extent
    side = torch.exp(torch.randn(count, 2, generator=random, dtype=torch.float64) * 0.6 - 1) * extent
    if kind == "outside":
        centre = centre * 3 - extent
    elif kind == "large":
        side = side * 4 + extent
    elif kind == "tiny":
        side = side * 0.01
    elif kind == "negative":
        side = -side
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
    if kind == "halves":
        boxes = ((boxes * scale).floor() + 0.5) / scale
    image = (torch.arange(count) % shape[0]).double()
    if kind == "padding":
        image[::2] = -1
    rois = torch.cat([image[:, None], boxes], 1).float()
    if kind == "not-finite":
        rois[0, 1], rois[count // 2, 4] = math.nan, math.inf
    grad = torch.randint(-8, 9, (count, shape[1], *size), generator=random).to(dtype) / 4
    return features, rois.to(torch.float64 if dtype == torch.float64 else torch.float32), size, scale, grad


@cache
def expected(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    features, rois, size, scale, grad = inputs(index, dtype)
    return oracle(features, rois, size, scale, grad)


@pytest.mark.parametrize("index", range(32))
def test_forward_and_gradient_equal_oracle(place: Place, index: int) -> None:
    """Values, winners and sums of quarters are exact: equal, not close."""
    dtypes = DTYPES[index % 4 : index % 4 + 1] if place == Place("triton", "cpu") else DTYPES
    for dtype in dtypes:
        features, rois, size, scale, grad = inputs(index, dtype)
        leaf = features.to(place.device).requires_grad_()
        rois = rois.to(place.device)
        out = roi_pool(leaf, rois, size, scale)
        _, argmax = FORWARD(leaf.detach(), rois, scale, *size)
        (back,) = torch.autograd.grad(out, leaf, grad.to(place.device))
        values, where, truth = expected(index, dtype)
        assert torch.equal(out.detach().double().cpu(), values), dtype
        assert torch.equal(argmax.long().cpu(), where), dtype
        assert argmax.dtype == torch.int32
        assert torch.equal(back.double().cpu(), truth), dtype
        assert out.stride() == argmax.stride()


def test_hand_computed_bins(place: Place) -> None:
    x = torch.arange(30.0, device=place.device).view(1, 1, 5, 6)
    # 2 * 0.5 = 1, 1 -> rows 1..3, columns 1..4 of the map, both ends included.
    rois = torch.tensor([[0.0, 2, 2, 8, 6]], device=place.device)
    assert roi_pool(x, rois, 1, 0.5).item() == 22
    # 3 rows in 2 bins of 1.5: rows 1..2 and 2..3; 4 columns in 2 bins of 2.
    assert roi_pool(x, rois, 2, 0.5)[0, 0].tolist() == [[14, 16], [20, 22]]
    # Halves are rounded away from zero: 0.5 -> 1, 2.5 -> 3, -0.5 -> -1.
    rois = torch.tensor([[0.0, 0.5, 2.5, 0.5, 2.5], [0, -0.5, -0.5, 0.4, 0.4]], device=place.device)
    assert roi_pool(x, rois, 1).flatten().tolist() == [19, 0]


def test_what_is_nan_or_minus_infinity(place: Place) -> None:
    """torchvision's numbers: NaN never wins, and where nothing does the result is the lowest number."""
    x = torch.tensor([[[[math.nan, 2.0], [math.nan, -math.inf]]]], device=place.device, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1], [0, 5, 5, 6, 6]], device=place.device)
    out = roi_pool(x, rois, 1)
    lowest = torch.finfo(torch.float32).min
    assert out.flatten().tolist() == [2.0, lowest, lowest, 0.0]
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_torchvision(place: Place) -> None:
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    for index in (0, 1, 2, 3, 4, 5):
        features, rois, size, scale, grad = inputs(index, torch.float32)
        leaf, rois = features.to(place.device).requires_grad_(), rois.to(place.device)
        ours, theirs = (f(leaf, rois, size, scale) for f in (roi_pool, ops.roi_pool))
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad(out, leaf, grad.to(place.device))[0] for out in (ours, theirs)]
        torch.testing.assert_close(*grads)


def test_gradcheck(place: Place) -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randperm(60, generator=random).double().view(1, 3, 4, 5).to(place.device).requires_grad_()
    rois = torch.tensor([[0, 0, 0, 3, 3], [0, 1, 1, 4, 2], [-1, 0, 0, 1, 1]], dtype=torch.float64, device=place.device)
    fast = place == Place("triton", "cpu")
    assert torch.autograd.gradcheck(lambda t: roi_pool(t, rois, 2), x, fast_mode=fast)


def test_same_bits_every_time(place: Place) -> None:
    if place == Place("reference", "cuda"):
        pytest.skip("the reference adds with atomics on CUDA")
    random = torch.Generator().manual_seed(3)
    count, channels = (4, 3) if place == Place("triton", "cpu") else (60, 40)
    x = torch.randn(1, channels, 8, 8, generator=random).to(place.device).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, 7, 7]]).repeat(count, 1).to(place.device)
    grad = torch.randn(count, channels, 3, 3, generator=random).to(place.device)
    results, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        try:
            torch.set_num_threads(number)
            results.append(torch.autograd.grad(roi_pool(x, rois, 3), x, grad)[0])
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_huge_regions(place: Place) -> None:
    x = torch.arange(12.0, device=place.device).view(1, 1, 3, 4)
    rois = torch.tensor([[0.0, -1e30, -1e30, 1e30, 1e30], [0, 1e30, 0, 2e30, 3]], device=place.device)
    assert roi_pool(x, rois, 1).flatten().tolist() == [11.0, 0.0]


def test_lists_of_boxes_and_the_module(place: Place) -> None:
    x = torch.randn(2, 2, 6, 6, device=place.device)
    boxes = [torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[1.0, 1, 5, 3], [2, 2, 3, 3]])]
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [1, 1, 1, 5, 3], [1, 2, 2, 3, 3]], device=place.device)
    out = roi_pool(x, [b.to(place.device) for b in boxes], (2, 3))
    assert torch.equal(out, roi_pool(x, rois, (2, 3)))
    assert torch.equal(out, RoIPool((2, 3), 1.0)(x, rois))
    assert "spatial_scale=1.0" in repr(RoIPool((2, 3), 1.0))


def test_strided(place: Place) -> None:
    x = torch.randn(2, 5, 6, 9, device=place.device)
    rois = torch.tensor([[0.0, 0, 0, 4, 4, 9], [1, 1, 1, 3, 3, 9]], device=place.device)[:, :5]
    view = x[:, 1:4, :, ::2]
    assert torch.equal(roi_pool(view, rois, 2), roi_pool(view.contiguous(), rois.contiguous(), 2))


def test_empty(place: Place) -> None:
    x = torch.randn(2, 3, 4, 4, device=place.device, requires_grad=True)
    out = roi_pool(x, torch.zeros(0, 5, device=place.device), 2)
    assert out.shape == (0, 3, 2, 2)
    assert not torch.autograd.grad(out.sum(), x)[0].any()
    none = roi_pool(x.detach()[:0], torch.tensor([[-1.0, 0, 0, 1, 1]], device=place.device), 2)
    assert torch.equal(none, torch.zeros(1, 3, 2, 2, device=place.device))


def test_guarded_buffers(place: Place, guarded: Guards) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 18, 5, 7, device=place.device).contiguous(memory_format=layout)
        rois = torch.tensor([[0.0, -3, -3, 9, 9], [1, 2, 1, 5, 3], [-1, 0, 0, 1, 1]], device=place.device)
        out, argmax = FORWARD(guarded(x), guarded(rois), 1.0, 2, 3)
        assert out.isfinite().all()
        grad = BACKWARD(guarded(torch.randn_like(out)), guarded(rois), guarded(argmax), 2, 5, 7)
        assert grad.isfinite().all()


def test_bad_arguments() -> None:
    x, rois = torch.zeros(1, 2, 3, 3), torch.zeros(1, 5)
    for arguments, message in (
        ((x[0], rois, 1), "input must be"),
        ((x.int(), rois, 1), "input must be"),
        ((x, rois[:, :4], 1), "boxes must be"),
        ((x, rois.int(), 1), "boxes must be"),
        ((x, rois, 0), "output_size"),
    ):
        with pytest.raises(ValueError, match=message):
            roi_pool(*arguments)
    for backend in ("cpp", "reference"):
        with set_backend(backend), pytest.raises(RuntimeError, match="image"):
            roi_pool(x, torch.tensor([[1.0, 0, 0, 1, 1]]), 1)


def test_opcheck(place: Place) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5, device=place.device).contiguous(memory_format=layout).requires_grad_()
        rois = torch.tensor([[0.0, 0, 0, 3, 3], [1, 1, 1, 4, 2]], device=place.device)
        torch.library.opcheck(FORWARD, (x, rois, 0.5, 2, 3))
        out, argmax = FORWARD(x.detach(), rois, 0.5, 2, 3)
        torch.library.opcheck(BACKWARD, (torch.randn_like(out), rois, argmax, 2, 4, 5))


def test_fullgraph_compile(place: Place) -> None:
    x = torch.randn(1, 2, 4, 4, device=place.device, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 3, 3]], device=place.device)
    compiled = torch.compile(RoIPool(2, 1.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, rois), roi_pool(x, rois, 2))
    assert torch.autograd.grad(compiled(x, rois).sum(), x)[0].any()


def test_no_host_sync() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    for backend in ("reference", "cpp"):
        with set_backend(backend), ForbidSync():
            torch.autograd.grad(roi_pool(x, torch.tensor([[0.0, 0, 0, 3, 3]]), 2).sum(), x)
