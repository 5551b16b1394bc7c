"""assign_levels, the modules, registration, bad arguments, and the mutations that the checks of RoIAlign must catch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from fastrcnn_kernels import MultiScaleRoIAlign, RoIAlign, assign_levels, multiscale_roi_align, roi_align, set_backend
from fastrcnn_kernels import roi_align_reference as reference
from tests.kernels.helpers import Place
from tests.kernels.roi_align_oracle import CASES, oracle

FORWARD = torch.ops.fastrcnn_kernels.roi_align.default
BACKWARD = torch.ops.fastrcnn_kernels.roi_align_backward.default


def level_oracle(box: list[float], box_offset: int, eps: float = 1e-6) -> int:
    area = (box[2] - box[0] + box_offset) * (box[3] - box[1] + box_offset)
    return min(max(math.floor(4 + math.log2(math.sqrt(area) / 224 + eps)), 2), 5) - 2


@pytest.mark.parametrize("box_offset", [0, 1])
def test_assign_levels_matches_oracle(box_offset: int) -> None:
    random = torch.Generator().manual_seed(0)
    side = torch.exp(torch.rand(500, 2, generator=random, dtype=torch.float64) * 6 + 1)
    corner = torch.rand(500, 2, generator=random, dtype=torch.float64) * 1000
    boxes = torch.cat([corner, corner + side], 1)
    levels = assign_levels(boxes, box_offset=box_offset)
    assert levels.dtype == torch.int64
    assert levels.tolist() == [level_oracle(box, box_offset) for box in boxes.tolist()]
    assert sorted(set(levels.tolist())) == [0, 1, 2, 3]
    # Any leading shape, and the same from float32, but for boxes that lie on a boundary.
    assert torch.equal(assign_levels(boxes.reshape(5, 100, 4), box_offset=box_offset), levels.reshape(5, 100))


def test_assign_levels_at_the_boundaries() -> None:
    """A box of exactly the canonical size; the +1 of inclusive pixels; eps inside the logarithm, not outside."""
    square = torch.tensor([[0.0, 0, s, s] for s in (111, 112, 223, 224, 447, 448, 10_000, 0)])
    assert assign_levels(square).tolist() == [0, 1, 1, 2, 2, 3, 3, 0]
    assert assign_levels(square, box_offset=1).tolist() == [1, 1, 2, 2, 3, 3, 3, 0]
    # 1e-6 in the argument lifts a side of 224 * (1 - 8e-7) over the boundary; outside it would lift 1 - 6.9e-7 at most.
    side = 224 * (1 - 8e-7)
    assert assign_levels(torch.tensor([0, 0, side, side], dtype=torch.float64)).item() == 2
    assert assign_levels(torch.tensor([0, 0, side, side], dtype=torch.float64), eps=0.0).item() == 1
    wide = torch.tensor([[0.0, 0, 224, 224]])
    assert assign_levels(wide, min_level=3, max_level=7).item() == 1
    assert assign_levels(wide, canonical_size=112.0).item() == 3
    assert assign_levels(wide, canonical_level=3).item() == 1


def test_assign_levels_of_bad_boxes() -> None:
    """Never out of range: NaN, infinite, of negative area, empty."""
    inf, nan = math.inf, math.nan
    boxes = torch.tensor([[nan] * 4, [0, 0, inf, inf], [0, 0, -5, 5], [5, 5, 5, 5], [-inf, 0, inf, 1]])
    assert assign_levels(boxes).tolist() == [0, 3, 0, 0, 3]
    assert assign_levels(torch.zeros(0, 4)).shape == (0,)


def test_levels_choose_the_map(place: Place) -> None:
    """Each region reads the map that its level names, and only that."""
    maps = [torch.full((1, 1, 8 // 2**i, 8 // 2**i), float(i + 1), device=place.device) for i in range(4)]
    rois = torch.tensor([[0.0, 0, 0, 8, 8]], device=place.device).repeat(4, 1)
    levels = torch.tensor([2, 0, 3, 1], device=place.device)
    out = multiscale_roi_align(maps, rois, levels, 1, [1.0, 0.5, 0.25, 0.125], 2)
    assert out.flatten().tolist() == [3.0, 1.0, 4.0, 2.0]


def test_roi_align_module() -> None:
    feature, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0, 1.0, 1, 6, 7]])
    module = RoIAlign((3, 4), 0.5, 2, aligned=True)
    assert torch.equal(module(feature, rois), roi_align(feature, rois, (3, 4), 0.5, 2, True))
    assert repr(module) == "RoIAlign(output_size=(3, 4), spatial_scale=0.5, sampling_ratio=2, aligned=True)"


def pyramid_call() -> tuple[dict[str, Tensor], list[Tensor], list[tuple[int, int]]]:
    random = torch.Generator().manual_seed(4)
    features = {
        name: torch.randn(2, 4, 64 >> i, 96 >> i, generator=random) for i, name in enumerate(["p2", "p3", "p4", "pool"])
    }
    boxes = []
    for count in (9, 5):
        corner = torch.rand(count, 2, generator=random) * 150
        boxes.append(torch.cat([corner, corner + torch.exp(torch.rand(count, 2, generator=random) * 4 + 1)], 1))
    return features, boxes, [(256, 384), (250, 370)]


def test_multi_scale_module_reads_named_maps_by_box_size() -> None:
    features, boxes, shapes = pyramid_call()
    module = MultiScaleRoIAlign(["p2", "p3", "p4"], 7, 2, canonical_scale=64)
    out = module(features, boxes, shapes)
    rois = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(boxes)])
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    levels = (4 + torch.log2(side / 64) + 1e-6).floor().clamp(2, 4).long() - 2
    assert set(levels.tolist()) == {0, 1, 2}
    maps = [features[name] for name in ("p2", "p3", "p4")]
    assert torch.equal(out, multiscale_roi_align(maps, rois, levels, 7, [0.25, 0.125, 0.0625], 2))
    assert repr(module) == "MultiScaleRoIAlign(featmap_names=['p2', 'p3', 'p4'], output_size=(7, 7), sampling_ratio=2)"


def test_multi_scale_module_equals_torchvision() -> None:
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    features, boxes, shapes = pyramid_call()
    for ratio in (2, 0):
        ours = MultiScaleRoIAlign(["p2", "p3", "p4"], (5, 7), ratio)(features, boxes, shapes)
        theirs = ops.MultiScaleRoIAlign(["p2", "p3", "p4"], (5, 7), ratio)(features, boxes, shapes)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def registered_inputs(device: str, layout: torch.memory_format) -> tuple[list[Tensor], Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    maps = [
        torch.randn(2, 3, h, w, generator=random).to(device).contiguous(memory_format=layout).requires_grad_()
        for h, w in ((8, 6), (4, 3))
    ]
    rois = torch.tensor([[0, 1.0, 2, 20, 20], [1, -4, 0, 10, 30], [-1, 0, 0, 0, 0]], device=device)
    return maps, rois, torch.tensor([0, 1, 0], device=device)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("ratio", [2, 0])
def test_opcheck(place: Place, layout: torch.memory_format, ratio: int) -> None:
    """Schema, autograd registration, fake tensors with the right strides, and AOT dispatch with dynamic shapes."""
    maps, rois, levels = registered_inputs(place.device, layout)
    torch.library.opcheck(FORWARD, (maps, rois, levels, [0.25, 0.125], 2, 3, ratio, False))
    grad = torch.randn(3, 3, 2, 3, device=place.device, requires_grad=True)
    sizes = [2, 3, 8, 6, 4, 3]
    last = layout == torch.channels_last
    torch.library.opcheck(BACKWARD, (grad, rois, levels, sizes, [0.25, 0.125], ratio, True, last))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(compiler: str) -> None:
    def step(a: Tensor, b: Tensor, rois: Tensor) -> Tensor:
        levels = assign_levels(rois[:, 1:], max_level=3, canonical_size=16.0, box_offset=1)
        return multiscale_roi_align([a * 2, b], rois, levels, 3, [0.25, 0.125], 2).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        (a, b), rois, _ = registered_inputs("cpu", layout)
        for count in (3, 2):
            eager, fast = step(a, b, rois[:count]), compiled(a, b, rois[:count])
            torch.testing.assert_close(fast, eager)
            for x, y in zip(torch.autograd.grad(fast, (a, b)), torch.autograd.grad(eager, (a, b)), strict=True):
                torch.testing.assert_close(x, y)
                assert x.stride() == y.stride()
    torch._dynamo.reset()


def test_backend_report() -> None:
    for name in ("roi_align", "roi_align_backward"):
        assert set(fastrcnn_kernels.backend_report("cpu")[name]) == {"reference", "cpp", "triton", "auto"}


def test_strides_that_are_no_format(place: Place) -> None:
    """A transposed map, every second pixel, an expanded gradient: as if they were copied first."""
    base = torch.randn(2, 9, 7, 4, device=place.device)
    odd = base.permute(0, 3, 2, 1)[:, :, ::2]
    rois = torch.tensor([[0, 0.0, 0, 9, 4], [1, 2, 1, 7, 3]], device=place.device)
    assert torch.equal(roi_align(odd, rois, 3, 1.0, 2), roi_align(odd.contiguous(), rois, 3, 1.0, 2))
    feature = odd.clone().requires_grad_()
    out = roi_align(feature, rois, 3, 1.0, 2)
    one = torch.ones((), device=place.device)
    expanded, dense = (
        torch.autograd.grad(out, feature, g, retain_graph=True)[0]
        for g in (one.expand(out.shape), torch.ones_like(out))
    )
    assert torch.equal(expanded, dense)


FEATURE, ROIS = torch.zeros(2, 3, 8, 8), torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((FEATURE[0],), ROIS, torch.zeros(1).long(), 7, [1.0]), r"features must be .*\[3, 8, 8\] at level 0"),
        (((FEATURE.long(),), ROIS, torch.zeros(1).long(), 7, [1.0]), "features must be floating-point"),
        (((FEATURE, FEATURE[:1]), ROIS, torch.zeros(1).long(), 7, [1.0, 0.5]), "must agree in N, C, dtype"),
        (((FEATURE, FEATURE.double()), ROIS, torch.zeros(1).long(), 7, [1.0, 0.5]), "must agree in N, C, dtype"),
        (((FEATURE[:, :, :0],), ROIS, torch.zeros(1).long(), 7, [1.0]), "at least one pixel"),
        (((), ROIS, torch.zeros(1).long(), 7, []), "0 feature maps"),
        (((FEATURE,), ROIS, torch.zeros(1).long(), 7, [1.0, 0.5]), "1 feature maps need as many spatial_scales, got 2"),
        (((FEATURE,), ROIS[:, :4], torch.zeros(1).long(), 7, [1.0]), r"rois must be .* \[K, 5\].*\[1, 4\]"),
        (((FEATURE,), ROIS.long(), torch.zeros(1).long(), 7, [1.0]), "rois must be floating-point"),
        (((FEATURE,), ROIS, torch.zeros(2).long(), 7, [1.0]), r"levels must be int64\[1\]"),
        (((FEATURE,), ROIS, torch.zeros(1), 7, [1.0]), r"levels must be int64\[1\], got torch.float32"),
        (((FEATURE,), ROIS, torch.zeros(1).long(), 0, [1.0]), "output_size must be a positive integer"),
        (((FEATURE,), ROIS, torch.zeros(1).long(), (7, 7, 7), [1.0]), "output_size must be a positive integer"),
        (((FEATURE,), ROIS, torch.zeros(1, device="meta").long(), 7, [1.0]), "levels on meta"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiscale_roi_align(*arguments)


def test_bad_boxes() -> None:
    with pytest.raises(ValueError, match=r"boxes must be Tensor\[K, 5\] or a list of Tensor\[L, 4\]"):
        roi_align(FEATURE, [torch.zeros(2, 5)], 7)
    with pytest.raises(ValueError, match="one an image; got an empty list"):
        roi_align(FEATURE, [], 7)
    with pytest.raises(ValueError, match=r"none of the feature maps \['a'\]"):
        MultiScaleRoIAlign(["a"], 7, 2)({"b": FEATURE}, [torch.zeros(1, 4)] * 2, [(8, 8)] * 2)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_missing_image_or_level_is_an_error_on_the_cpu(backend: str) -> None:
    for image, level in ((2.0, 0), (0.0, 1), (0.0, -1)):
        rois = torch.tensor([[-1.0, 0, 0, 4, 4], [image, 0, 0, 4, 4]])
        with set_backend(backend), pytest.raises(RuntimeError, match=r"roi_align: .*roi.* image"):
            multiscale_roi_align([FEATURE], rois, torch.tensor([7, level]), 2, [1.0], 2)


def test_missing_image_or_level_gives_zeros_in_triton(place: Place) -> None:
    """Where looking at the regions would stop the stream nothing is read that does not exist."""
    if place.backend != "triton":
        pytest.skip("other back-ends raise")
    feature = torch.ones(2, 3, 8, 8, device=place.device, requires_grad=True)
    rois = torch.tensor([[2.0, 0, 0, 4, 4], [0, 0, 0, 4, 4], [1, 0, 0, 4, 4]], device=place.device)
    out = multiscale_roi_align([feature], rois, torch.tensor([0, 1, -1], device=place.device), 2, [1.0], 2)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), feature)[0].any()


MUTATIONS = [
    ("(sample + 0.5) * size", "sample * size"),
    ("offset = 0.5 if aligned else 0.0", "offset = 0.0"),
    ("extent = extent.clamp(min=1.0)", "extent = extent.clamp(min=1.5)"),
    ("(y >= -1)", "(y >= 0)"),
    ("(y <= extent)", "(y <= extent - 1)"),
    ("y = torch.where(inside, y, 0.0).clamp(min=0.0)", "y = torch.where(inside, y, 0.0).abs()"),
    ("low = torch.minimum(y.floor(), extent - 1)", "low = torch.minimum(y.floor(), extent - 2)"),
    ("torch.cat([1 - fraction, fraction], dim=2)", "torch.cat([fraction, 1 - fraction], dim=2)"),
    ("start = rois[:, 1 + axis]", "start = rois[:, 2 - axis]"),
    ("size.ceil()", "size.floor()"),
    ("wy / ratio, wx / ratio", "wy / ratio, wx"),
    ("dense.scatter_add_(", "dense.scatter_("),
    ("(image * height + y) * width", "(image * width + y) * width"),
    ("present = (rois[:, 0] >= 0)", "present = (rois[:, 0] >= -9)"),
    ("total += n * h * w", "total += h * w"),
    ("grad[part][:, :, None, :, None, :]", "grad[part].transpose(1, 2)[:, :, None, :, None, :]"),
    ("window = wy.T @ (grad[k]", "window = wy.T @ (grad[0]"),
    ("maps[level][image, ys, xs] += window", "maps[level][image, ys, xs] = window"),
]


def differs(space: dict[str, Any]) -> bool:
    """Whether a reference disagrees with the oracle somewhere in the cases of test_roi_align.py."""
    for case in CASES[:37]:
        features, rois, levels, scales, grad = case.inputs(torch.float64)
        truth = oracle(features, rois, levels, case.size, scales, case.ratio, case.aligned, grad)
        sizes = [case.images, case.channels, *(extent for m in case.maps for extent in m)]
        try:
            results = [
                space["forward"](features, rois, levels, scales, *case.size, case.ratio, case.aligned),
                *space["backward"](grad, rois, levels, sizes, scales, case.ratio, case.aligned, case.channels_last),
            ]
        except (RuntimeError, IndexError):
            return True
        if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(results, truth, strict=True)):
            return True
    return False


def rebuilt(old: str = "", new: str = "") -> dict[str, Any]:
    source = inspect.getsource(reference)
    if old:
        assert source.count(old) == 1, f"{source.count(old)} places with {old!r}, expected one"
    space: dict[str, Any] = {"__name__": "mutated"}
    exec(compile(source.replace(old, new) if old else source, "<mutated>", "exec"), space)
    return space


def test_unmutated_passes() -> None:
    assert not differs(rebuilt())


@pytest.mark.parametrize(("old", "new"), MUTATIONS, ids=[old for old, _ in MUTATIONS])
def test_mutation_is_caught(old: str, new: str) -> None:
    assert differs(rebuilt(old, new))
