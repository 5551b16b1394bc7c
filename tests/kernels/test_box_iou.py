"""IoU, GIoU, DIoU and CIoU of every pair against scalar float64 code, on every back-end, with the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import fastrcnn_kernels
from fastrcnn_kernels import (
    box_area,
    box_iou,
    boxes_reference,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
    set_backend,
)
from tests.kernels.helpers import ForbidSync, Guards, Place
from tests.kernels.test_boxes import NAN, OFFSETS, Box, box_lists, random_boxes

MEASURES = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
EPS = 1e-7


def measure(name: str, boxes1: Tensor, boxes2: Tensor, offset: int = 0) -> Tensor:
    return getattr(fastrcnn_kernels, name)(boxes1, boxes2, box_offset=offset)


def specification(name: str, boxes1: Tensor, boxes2: Tensor, offset: int = 0) -> Tensor:
    extra = (EPS,) if name in MEASURES[2:] else ()
    return getattr(boxes_reference, name)(boxes1, boxes2, offset, *extra)


def scalar(name: str, a: Box, b: Box, offset: int) -> float:
    """One pair by cases, without any clamp: what the two intervals share, or nothing."""
    shared = 1.0
    for low, high in ((0, 2), (1, 3)):
        left, right = max(a[low], b[low]), min(a[high], b[high]) + offset
        shared *= right - left if right > left else 0.0
    sides = [(max(box[2] - box[0] + offset, 0.0), max(box[3] - box[1] + offset, 0.0)) for box in (a, b)]
    total = sum(width * height for width, height in sides)
    iou = shared / (total - shared) if shared > 0 else 0.0
    if name == "box_iou":
        return iou
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) + offset for i in (0, 1)]
    if name == "generalized_box_iou":
        return iou - (hull[0] * hull[1] - (total - shared)) / (hull[0] * hull[1])
    away = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    diou = iou - away / (hull[0] ** 2 + hull[1] ** 2 + EPS)
    if name == "distance_box_iou":
        return diou
    first, second = (math.atan2(width, height) for width, height in sides)
    v = 4 / math.pi**2 * (first - second) ** 2
    return diou - v * v / (1 - iou + v + EPS)


def loop(name: str, boxes1: Tensor, boxes2: Tensor, offset: int) -> Tensor:
    rows = [[scalar(name, a, b, offset) for b in boxes2.tolist()] for a in boxes1.tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(boxes1), len(boxes2))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 13), (65, 3), (0, 4), (4, 0)])
def test_equals_loops(device: torch.device, name: str, n: int, m: int, offset: int) -> None:
    boxes1, boxes2 = random_boxes(n).to(device), random_boxes(m, seed=1).to(device)
    expected = loop(name, boxes1, boxes2, offset)
    actual = measure(name, boxes1, boxes2, offset)
    assert actual.shape == (n, m)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=2e-6)
    exact = measure(name, boxes1.double(), boxes2.double(), offset)
    expected = loop(name, boxes1.double(), boxes2.double(), offset)
    torch.testing.assert_close(exact.cpu(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("n", "m"), [(70, 20), (33, 16), (4, 1100), (300, 5)])
def test_same_bits_as_the_reference(device: torch.device, name: str, n: int, m: int, offset: int) -> None:
    """Widths around whole vectors and tiles, several tiles, and boxes in all positions: disjoint, nested, equal."""
    boxes1, boxes2 = random_boxes(n), random_boxes(m, seed=1)
    shared = min(n, m) // 3
    boxes2[:shared] = boxes1[:shared]
    boxes1[-1], boxes2[-1] = torch.tensor([30.0, 30.0, 20.0, 20.0]), torch.tensor([5.0, 5.0, 5.0, 5.0])
    boxes1, boxes2 = boxes1.to(device), boxes2.to(device)
    for dtype in (torch.float32, torch.float64):
        a, b = boxes1.to(dtype), boxes2.to(dtype)
        assert torch.equal(measure(name, a, b, offset), specification(name, a, b, offset))


def test_by_hand(device: torch.device) -> None:
    a = torch.tensor([[0.0, 0.0, 9.0, 9.0]], device=device)
    b = torch.tensor([[5.0, 0.0, 14.0, 9.0], [9.0, 9.0, 20.0, 20.0], [10.0, 0.0, 19.0, 9.0]], device=device)
    assert box_iou(a, b).tolist() == [[pytest.approx(36 / 126), 0.0, 0.0]]
    assert box_iou(a, b, box_offset=1).tolist() == [[pytest.approx(50 / 150), pytest.approx(1 / 243), 0.0]]
    # Hulls 14 x 9, 20 x 20 and 19 x 9; centres 5, 10 sqrt(2) and 10 apart.
    generalized = [36 / 126, -(400 - 81 - 121) / 400, -(171 - 162) / 171]
    assert generalized_box_iou(a, b).tolist() == [pytest.approx(generalized)]
    distance = [36 / 126 - 25 / (14**2 + 9**2), -(10**2 + 10**2) / 800, -100 / (19**2 + 9**2)]
    assert distance_box_iou(a, b).tolist() == [pytest.approx(distance)]
    assert complete_box_iou(a, b).tolist() == [pytest.approx(distance)], "squares have one aspect ratio"
    flat = torch.tensor([[0.0, 0.0, 9.0, 4.0]], device=device)
    v = 4 / math.pi**2 * (math.pi / 4 - math.atan2(9, 4)) ** 2
    expected = 4 / 9 - 2.5**2 / (9**2 + 9**2) - v * v / (1 - 4 / 9 + v)
    assert complete_box_iou(a, flat).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    ("first", "second"),
    [((3,), (3,)), ((3,), ()), ((), (3,)), ((2, 1), (3,)), ((1,), (1,)), ((0,), ()), ((2, 3), (1, 3))],
)
def test_batch_dimensions(device: torch.device, name: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    boxes1, boxes2 = random_boxes(*first, 5).to(device), random_boxes(*second, 4, seed=2).to(device)
    batched = measure(name, boxes1, boxes2, 1)
    assert torch.equal(batched, specification(name, boxes1, boxes2, 1))


@pytest.mark.parametrize("offset", OFFSETS)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(boxes1=box_lists(), boxes2=box_lists())
def test_properties(device: torch.device, boxes1: Tensor, boxes2: Tensor, offset: int) -> None:
    boxes1, boxes2 = boxes1.to(device), boxes2.to(device)
    iou = box_iou(boxes1, boxes2, box_offset=offset)
    assert torch.equal(iou, box_iou(boxes2, boxes1, box_offset=offset).T), "symmetric"
    assert bool(((iou >= 0) & (iou <= 1)).all()), "in [0, 1]"
    with_itself = box_iou(boxes1, boxes1, box_offset=offset).diagonal()
    area = box_area(boxes1, box_offset=offset)
    assert bool((with_itself[area >= torch.finfo(area.dtype).tiny] == 1).all()), "1 with itself"
    assert bool((with_itself[area == 0] == 0).all()), "0 if empty"
    for name in MEASURES[1:]:
        value = measure(name, boxes1, boxes2, offset)
        assert bool((value <= iou + 1e-5).all()), "penalties are not negative"
        assert bool((value >= -2).all())


@pytest.mark.parametrize("offset", OFFSETS)
def test_degenerate(device: torch.device, offset: int) -> None:
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]], device=device)
    inverted = torch.tensor([[9.0, 9.0, 2.0, 2.0]], device=device)
    zeros = torch.zeros(2, 4, device=device)
    assert box_iou(point, point, box_offset=offset).item() == offset
    assert box_iou(inverted, inverted, box_offset=offset).item() == 0
    assert box_iou(inverted, point, box_offset=offset).item() == 0
    for name in MEASURES:
        assert measure(name, zeros, zeros, offset).eq(offset).all(), "padding: 0, or one pixel each"
        assert measure(name, torch.cat([point, inverted]), random_boxes(4).to(device), offset).isfinite().all()


@pytest.mark.parametrize("name", MEASURES)
def test_nan_and_infinity_spoil_only_their_own(device: torch.device, name: str) -> None:
    boxes = random_boxes(20).to(device)
    spoiled = boxes.clone()
    spoiled[2, 1], spoiled[3, 2], spoiled[4, :2] = NAN, math.inf, -math.inf
    others = [0, 1, *range(5, 20)]
    rows, columns = measure(name, spoiled, boxes), measure(name, boxes, spoiled)
    clean = measure(name, boxes, boxes)
    assert rows[2].isnan().all()
    assert columns[:, 2].isnan().all()
    assert torch.equal(rows[others], clean[others])
    assert torch.equal(columns[:, others], clean[:, others])
    expected = specification(name, spoiled, boxes)
    assert torch.equal(rows.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_types_compute_in_float32(device: torch.device, name: str, dtype: torch.dtype) -> None:
    boxes = (random_boxes(9) * 10).to(device, dtype)
    assert torch.equal(measure(name, boxes, boxes), measure(name, boxes.float(), boxes.float()))
    mixed = measure(name, boxes, boxes.double())
    assert mixed.dtype == torch.float64
    assert torch.equal(mixed, measure(name, boxes.double(), boxes.double()))


def test_non_contiguous(device: torch.device, guarded: Guards) -> None:
    boxes = random_boxes(8).to(device)
    strided = torch.empty(4, 16, device=device).T[::2, :].copy_(boxes)
    assert not strided.is_contiguous()
    for name in MEASURES:
        assert torch.equal(measure(name, guarded(strided), guarded(strided)), measure(name, boxes, boxes))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", MEASURES)
def test_gradcheck(name: str, offset: int) -> None:
    """Of all but CIoU, whose weight is a constant of the gradient (tested against torchvision)."""
    boxes1 = random_boxes(3, dtype=torch.float64).requires_grad_()
    boxes2 = random_boxes(4, seed=3, dtype=torch.float64).requires_grad_()
    if name != "complete_box_iou":
        assert torch.autograd.gradcheck(lambda a, b: measure(name, a, b, offset), (boxes1, boxes2))
    measure(name, boxes1, boxes2, offset).sum().backward()
    assert boxes1.grad is not None
    assert boxes1.grad.isfinite().all()


def test_no_host_sync(device: torch.device) -> None:
    boxes = random_boxes(2, 5).to(device)
    with ForbidSync():
        for name in MEASURES:
            measure(name, boxes, boxes, 1)


def test_opcheck(device: torch.device) -> None:
    ops = torch.ops.fastrcnn_kernels
    boxes1, boxes2 = random_boxes(2, 5).to(device), random_boxes(7).to(device)
    torch.library.opcheck(ops.box_iou.default, (boxes1, boxes2, 1))
    torch.library.opcheck(ops.generalized_box_iou.default, (boxes1, boxes2, 1))
    torch.library.opcheck(ops.distance_box_iou.default, (boxes1, boxes2, 1, EPS))
    torch.library.opcheck(ops.complete_box_iou.default, (boxes1, boxes2, 1, EPS))


def test_compile_fullgraph(device: torch.device) -> None:
    def everything(boxes: Tensor) -> list[Tensor]:
        return [measure(name, boxes * 2, boxes, 1) for name in MEASURES]

    boxes = random_boxes(2, 5).to(device)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for leaf in (boxes, boxes.clone().requires_grad_()):
        for actual, expected in zip(compiled(leaf), everything(leaf), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", MEASURES)
def test_equals_torchvision(name: str) -> None:
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    boxes1, boxes2 = random_boxes(50) + 0.1, random_boxes(60, seed=1) + 0.1
    weight = random_boxes(50, 15).view(50, 60)
    results = []
    for function in (getattr(fastrcnn_kernels, name), getattr(ops, name)):
        leaves = boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()
        (function(*leaves) * weight).sum().backward()
        results.append((function(boxes1, boxes2), leaves[0].grad, leaves[1].grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_backends_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient the operator runs, with one the specification."""
    called: list[str] = []
    for name in MEASURES:
        inner: Callable[..., Any] = getattr(boxes_reference, name)

        def spy(*arguments: Any, name: str = name, inner: Callable[..., Any] = inner) -> Any:
            called.append(name)
            return inner(*arguments)

        monkeypatch.setattr(boxes_reference, name, spy)
    if Place("cpp", "cpu").why_not():
        pytest.skip("needs the C++ kernels")
    boxes = random_boxes(3)
    with set_backend("cpp"):
        for name in MEASURES:
            measure(name, boxes, boxes)
        assert not called
        for name in MEASURES:
            measure(name, boxes.requires_grad_(), boxes)
    assert set(called) == set(MEASURES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_iou(torch.zeros(1, 4), torch.zeros(1, 5)), r"boxes2 must .* got \[1, 5\]"),
        (lambda: generalized_box_iou(torch.zeros(4), torch.zeros(1, 4)), r"boxes1 must .* got \[4\]"),
        (lambda: complete_box_iou(torch.zeros(1, 4), torch.zeros(1, 4), box_offset=2), "box_offset must be .* got 2"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _iou_without_offset_in_intersection(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (box_area(a, box_offset=1)[:, None] + box_area(b, box_offset=1) - shared)


MUTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no offset at all": lambda a, b: box_iou(a, b),
    "offset only in the areas": _iou_without_offset_in_intersection,
    "x and y swapped in one": lambda a, b: box_iou(a[:, [1, 0, 3, 2]], b, box_offset=1),
    "transposed": lambda a, b: box_iou(b, a, box_offset=1),
    "union counts the intersection twice": lambda a, b: (iou := box_iou(a, b, box_offset=1)) / (1 + iou),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_rejects(name: str) -> None:
    boxes1, boxes2 = random_boxes(9), random_boxes(9, seed=1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            MUTATIONS[name](boxes1, boxes2).double(), loop("box_iou", boxes1, boxes2, 1), rtol=1e-5, atol=1e-6
        )
