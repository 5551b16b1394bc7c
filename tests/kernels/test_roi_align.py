"""roi_align and multiscale_roi_align: against a scalar oracle, golden vectors, grid_sample and torchvision."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import multiscale_roi_align, roi_align, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place, assert_within_twice_torch
from tests.kernels.roi_align_oracle import CASES, DTYPES, Case, oracle

FORWARD = torch.ops.fastrcnn_kernels.roi_align.default
BACKWARD = torch.ops.fastrcnn_kernels.roi_align_backward.default

# Feature values that round in no dtype, and detectron2's golden vectors.
ARANGE = torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5)
GOLDEN = {
    False: [[7.5, 8, 8.5, 9], [10, 10.5, 11, 11.5], [12.5, 13, 13.5, 14], [15, 15.5, 16, 16.5]],
    True: [[4.5, 5, 5.5, 6], [7, 7.5, 8, 8.5], [9.5, 10, 10.5, 11], [12, 12.5, 13, 13.5]],
}


@cache
def expected(case: Case, dtype: torch.dtype) -> list[Tensor]:
    features, rois, levels, scales, grad = case.inputs(dtype)
    return oracle(features, rois, levels, case.size, scales, case.ratio, case.aligned, grad)


@cache
def plain(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Plain PyTorch in the same dtype: the reference."""
    with set_backend("reference"):
        return run(case, dtype, "cpu")


def run(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    features, rois, levels, scales, grad = case.inputs(dtype)
    features = [f.to(device).requires_grad_() for f in features]
    out = multiscale_roi_align(
        features, rois.to(device), levels.to(device), case.size, scales, case.ratio, case.aligned
    )
    return [out.detach(), *torch.autograd.grad(out, features, grad.to(device))]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.label for case in CASES])
def test_forward_and_gradient_match_oracle(place: Place, index: int) -> None:
    case = CASES[index]
    # The interpreter is slow: it takes one dtype a case, the others take all.
    dtypes = DTYPES[index % 4 : index % 4 + 1] if place.backend == "triton" and place.device == "cpu" else DTYPES
    for dtype in dtypes:
        results = run(case, dtype, place.device)
        for i, (actual, truth, torch_result) in enumerate(
            zip(results, expected(case, dtype), plain(case, dtype), strict=True)
        ):
            scale = truth.abs().max().item() if truth.numel() else 0.0
            # Float32 coordinates are off by their own rounding, which plain PyTorch may happen to share.
            atol = scale * {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-4)
            if dtype == torch.bfloat16 and place == Place("triton", "cpu"):
                atol = scale * 2**-8  # Triton's interpreter truncates where a GPU rounds
            assert_within_twice_torch(actual, truth, torch_result, atol, f"{dtype}, result {i}")
            layout = torch.channels_last if case.output_is_channels_last else torch.contiguous_format
            assert actual.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("aligned", [False, True])
def test_golden_vectors(place: Place, aligned: bool) -> None:
    rois = torch.tensor([[0, 1, 1, 3, 3]], dtype=torch.float64, device=place.device)
    for dtype in DTYPES:
        for ratio in (0, 1, 2):
            out = roi_align(ARANGE.to(place.device, dtype), rois.to(dtype), 4, 1.0, ratio, aligned)
            assert out[0, 0].tolist() == GOLDEN[aligned]


def test_hand_computed_borders(place: Place) -> None:
    # Bins of two pixels, one sample each, at y = x = -1, 1, 3, 5 on a 5 x 5 map: -1 clamps to 0, 5 (= H) to 4.
    rois = torch.tensor([[0, -2.0, -2.0, 6.0, 6.0]], device=place.device)
    out = roi_align(ARANGE.float().to(place.device), rois, 4, 1.0, 1)
    assert out[0, 0].tolist() == [[5.0 * y + x for x in (0, 1, 3, 4)] for y in (0, 1, 3, 4)]
    # Half a pixel further out the first sample is outside: zero, not clamped.
    out = roi_align(
        ARANGE.float().to(place.device), rois + torch.tensor([0, -0.5, -0.5, -0.5, -0.5]).to(rois), 4, 1.0, 1
    )
    assert out[0, 0, 0].tolist() == [0.0] * 4
    assert out[0, 0, :, 0].tolist() == [0.0] * 4
    assert out[0, 0, 1].tolist() == [0.0, 3.0, 5.0, 6.5]


def test_equals_grid_sample(place: Place) -> None:
    """Inside the map and with one sample a bin, RoIAlign is grid_sample at the centres of the bins."""
    random = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 4, 12, 15, generator=random, dtype=torch.float64).to(place.device)
    x1, y1, x2, y2 = 2.25, 1.5, 12.75, 9.5
    out = roi_align(
        feature, torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float64, device=place.device), (4, 6), 1.0, 1
    )
    xs = x1 + (torch.arange(6, dtype=torch.float64) + 0.5) * (x2 - x1) / 6
    ys = y1 + (torch.arange(4, dtype=torch.float64) + 0.5) * (y2 - y1) / 4
    grid = torch.stack(torch.meshgrid(2 * xs / 14 - 1, 2 * ys / 11 - 1, indexing="xy"), -1)[None]
    sampled = F.grid_sample(feature, grid.to(place.device), align_corners=True)
    torch.testing.assert_close(out, sampled, rtol=1e-12, atol=1e-12)


def test_torchvision(place: Place) -> None:
    """Same call, same numbers: forward and gradient."""
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    random = torch.Generator().manual_seed(1)
    for aligned in (False, True):
        for ratio in (2, 0, -1):
            features = torch.randn(2, 3, 14, 18, generator=random).to(place.device).requires_grad_()
            corner = torch.rand(4, 2, generator=random) * 50 - 5
            boxes = torch.cat([corner, corner + torch.rand(4, 2, generator=random) * 40], 1)
            rois = torch.cat([torch.tensor([[0.0], [1], [1], [0]]), boxes], 1).to(place.device)
            ours, theirs = (f(features, rois, (3, 5), 0.25, ratio, aligned) for f in (roi_align, ops.roi_align))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            grad = torch.randn(ours.shape, generator=random).to(place.device)
            torch.testing.assert_close(
                *(torch.autograd.grad(out, features, grad)[0] for out in (ours, theirs)), rtol=1e-5, atol=1e-6
            )


def test_list_of_boxes_equals_rois(place: Place) -> None:
    feature = torch.randn(2, 2, 8, 8, device=place.device)
    boxes = [torch.tensor([[0.0, 0, 4, 4], [1, 2, 7, 6]]), torch.zeros(0, 4), torch.tensor([[3.0, 3, 8, 8]])]
    feature = torch.cat([feature, feature[:1]])
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [0, 1, 2, 7, 6], [2, 3, 3, 8, 8]])
    lists = roi_align(feature, [b.to(place.device) for b in boxes], (2, 3), 1.0, 2)
    assert torch.equal(lists, roi_align(feature, rois.to(place.device), (2, 3), 1.0, 2))


def test_gradcheck(place: Place) -> None:
    """First and second derivative in float64, several levels, every border."""
    random = torch.Generator().manual_seed(2)
    a = torch.randn(2, 2, 6, 5, generator=random, dtype=torch.float64).to(place.device).requires_grad_()
    b = torch.randn(2, 2, 3, 3, generator=random, dtype=torch.float64).to(place.device).requires_grad_()
    rois = torch.tensor([[0, -3, 1, 9, 30], [1, 2, 3, 20, 11], [-1, 0, 0, 5, 5], [0, 4, 4, 5, 5.0]]).double()
    levels = torch.tensor([0, 1, 0, 1])
    for ratio, aligned in ((2, False), (0, True)):

        def pooled(x: Tensor, y: Tensor, ratio: int = ratio, aligned: bool = aligned) -> Tensor:
            return multiscale_roi_align(
                [x, y], rois.to(place.device), levels.to(place.device), (2, 3), [0.5, 0.25], ratio, aligned
            )

        # Numerical derivatives call the kernel for every element: too slow in the interpreter.
        fast = place.backend == "triton" and place.device == "cpu"
        assert torch.autograd.gradcheck(pooled, (a, b), fast_mode=fast)
        assert torch.autograd.gradgradcheck(pooled, (a, b), fast_mode=fast)


def test_gradient_is_zero_where_nothing_was_read(place: Place) -> None:
    feature = torch.randn(2, 3, 16, 20, device=place.device, requires_grad=True)
    rois = torch.tensor([[1, 16.0, 8, 32, 24], [-1, 0, 0, 80, 64]], device=place.device)
    out = roi_align(feature, rois, 4, 0.25, 2)
    (grad,) = torch.autograd.grad(out, feature, torch.ones_like(out))
    touched = torch.zeros(16, 20, dtype=torch.bool, device=place.device)
    touched[2:7, 4:9] = True  # samples lie in [2.25, 5.75] x [4.25, 7.75]
    touched[6, :] = touched[:, 8] = False
    touched[2:7, 4:9] |= grad[1, 0, 2:7, 4:9] != 0
    assert not grad[0].any()
    assert torch.equal(grad[1] != 0, touched.expand(3, -1, -1))
    assert not touched[7:].any()
    assert not touched[:2].any()
    # Each bin hands out its whole gradient: nothing is lost and nothing invented.
    torch.testing.assert_close(grad.sum(), torch.tensor(3.0 * 16, device=place.device))


def test_padding_has_no_gradient(place: Place) -> None:
    feature = torch.randn(1, 2, 6, 6, device=place.device, requires_grad=True)
    rois = torch.tensor([[-1.0, 0, 0, 6, 6], [-3, 1, 1, 4, 4], [0, math.nan, 0, 3, 3], [0, 0, 0, math.inf, 3]])
    out = roi_align(feature, rois.to(place.device), 2, 1.0, 2)
    assert not out.any()
    (grad,) = torch.autograd.grad(out, feature, torch.full_like(out, math.nan))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("ratio", [0, 2])
def test_same_bits_every_time(place: Place, ratio: int) -> None:
    """Many regions on the same pixels, any number of threads: bitwise the same gradient."""
    if place == Place("reference", "cuda"):
        pytest.skip("the reference adds with atomics on CUDA")
    random = torch.Generator().manual_seed(3)
    small = place == Place("triton", "cpu")
    feature = torch.randn(1, 8, 16, 8 if small else 16, generator=random).to(place.device).requires_grad_()
    count = 3 if small else 40
    corner = torch.rand(count, 2, generator=random) * 20
    rois = torch.cat([torch.zeros(count, 1), corner, corner + 40], 1).to(place.device)
    grad = torch.randn(count, 8, 3, 4, generator=random).to(place.device)
    results, threads = [], torch.get_num_threads()
    for number in (1, 2, 2):
        try:
            torch.set_num_threads(number)
            for layout in (torch.contiguous_format, torch.channels_last):
                out = roi_align(feature.contiguous(memory_format=layout), rois, (3, 4), 0.25, ratio)
                results.append((out.detach(), torch.autograd.grad(out, feature, grad)[0]))
        finally:
            torch.set_num_threads(threads)
    for i in (2, 3, 4, 5):
        assert torch.equal(results[i][0], results[i % 2][0])
        assert torch.equal(results[i][1], results[i % 2][1])


def test_huge_regions_are_bounded(place: Place) -> None:
    """An adaptive grid of a region of any size visits each pixel a few times at most; far samples count as zeros."""
    feature = torch.ones(1, 1, 8, 8, device=place.device, requires_grad=True)
    side = 1e5
    rois = torch.tensor([[0, -side, -side, side, side], [0, -3e38, -3e38, 3e38, 3e38], [0, 1e30, 0, 2e30, 1]])
    out = roi_align(feature, rois.to(place.device), 1, 1.0, 0)
    assert out.isfinite().all()
    # 9 samples of 1 along each axis lie in [-1, 8], of 65536 of spacing 2e5 / 65536: 3 do.
    torch.testing.assert_close(out[0].item(), (3 / 65536) ** 2, rtol=1e-4, atol=0)
    assert out[1:].abs().max() < 1e-6
    (grad,) = torch.autograd.grad(out.sum(), feature)
    assert grad.isfinite().all()


def test_a_nan_pixel_stays_where_it_is(place: Place) -> None:
    """A region that does not read a NaN pixel is not spoilt by it."""
    feature = torch.randn(1, 2, 12, 24, device=place.device)
    rois = torch.tensor([[0, 1.0, 1, 5, 5], [0, 9, 5, 13, 9]], device=place.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        spoilt = feature.clone(memory_format=layout)
        spoilt[0, :, 7, 11] = math.nan
        clean, out = (roi_align(f, rois, 3, 1.0, 2) for f in (feature.contiguous(memory_format=layout), spoilt))
        assert torch.equal(out[0], clean[0])
        assert out[1].isnan().any()


def test_a_nan_gradient_stays_near(place: Place) -> None:
    """One NaN spoils at most the 8 x 8 tiles that its bin touches; in C++, whose sums are dense, its region."""
    feature = torch.randn(1, 2, 8, 32, device=place.device, requires_grad=True)
    region = 16.0 if place.backend == "cpp" else 32.0
    rois = torch.tensor([[0, 0.0, 0, region, 8], [0, 16, 0, 32, 8]], device=place.device)
    out = roi_align(feature, rois, (1, 4), 1.0, 2)
    upstream = torch.ones_like(out)
    upstream[0, :, 0, 0] = math.nan
    (grad,) = torch.autograd.grad(out, feature, upstream)
    assert grad[..., 17:].isfinite().all()
    assert grad[..., :4].isnan().any()


def test_guarded_buffers(place: Place, guarded: Guards) -> None:
    """Inputs between canaries, outputs poisoned and between canaries (autouse): kernels write only what is theirs."""
    for ratio, layout in ((2, torch.contiguous_format), (0, torch.channels_last)):
        maps = [
            torch.randn(2, 5, h, w, device=place.device).contiguous(memory_format=layout) for h, w in ((9, 17), (3, 16))
        ]
        rois = torch.tensor([[0, -9.0, -9, 80, 50], [1, 30, 10, 36, 19], [1, 60, 30, 70, 40]], device=place.device)
        levels = torch.tensor([0, 1, 0], device=place.device)
        arguments = ([0.25, 0.25], 2, 3, ratio, False)
        out = FORWARD([guarded(m) for m in maps], guarded(rois), guarded(levels), *arguments)
        assert out.isfinite().all()
        grads = BACKWARD(
            guarded(torch.randn_like(out)), guarded(rois), guarded(levels), [2, 5, 9, 17, 3, 16], [0.25, 0.25], ratio,
            False, layout == torch.channels_last,
        )  # fmt: skip
        assert all(g.isfinite().all() for g in grads)


def test_no_host_sync() -> None:
    """With a fixed grid nothing but the kernel's own checks reads the regions on the host."""
    feature = torch.randn(2, 3, 8, 8, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 1, 20, 20], [-1, 0, 0, 0, 0]])
    for backend in ("reference", "cpp"):
        with set_backend(backend), ForbidSync():
            out = multiscale_roi_align([feature], rois, torch.zeros(2, dtype=torch.int64), 7, [0.25], 2)
            torch.autograd.grad(out.sum(), feature)


@pytest.mark.parametrize(
    ("count", "images", "levels"), [(0, 2, 3), (1, 1, 1), (31, 2, 4), (200, 3, 4)], ids=["none", "one", "some", "many"]
)
def test_the_triton_backward_takes_regions_in_order(count: int, images: int, levels: int) -> None:
    """What a stable sort by level and image gives, and where each begins; regions that are absent come last."""
    launcher = pytest.importorskip("fastrcnn_kernels.triton.roi_align_backward")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(count)
    rois = torch.rand(count, 5, generator=random)
    rois[:, 0] = torch.randint(-1, images + 1, (count,), generator=random)
    level = torch.randint(-1, levels + 1, (count,), generator=random)
    for row, column in enumerate((2, 1, 4)):
        rois[row * 7 : row * 7 + 1, column] = (math.nan, math.inf, -math.inf)[row]
    group = [
        int(lv) * images + int(r[0])
        if 0 <= r[0] < images and 0 <= lv < levels and r.isfinite().all()
        else levels * images
        for r, lv in zip(rois, level, strict=True)
    ]
    order, begin = launcher._in_order(rois.to(device), level.to(device), images, levels)
    assert order.tolist() == sorted(range(count), key=lambda i: group[i])
    assert begin.tolist() == [sum(g < first for g in group) for first in range(levels * images + 1)]
