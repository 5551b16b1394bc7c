"""IoU losses of paired boxes against scalar loops in float64, with gradients, in every back-end."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss
from fastrcnn_kernels.box_losses import _losses
from tests.kernels.helpers import Guards, Place
from tests.kernels.nosync import forbid_host_sync

LOSSES = {
    "generalized": generalized_box_iou_loss,
    "distance": distance_box_iou_loss,
    "complete": complete_box_iou_loss,
}
NAMES = list(LOSSES)
Numbers = tuple[float, float, float, float]


def overlap_and_union(a: Numbers, b: Numbers) -> tuple[float, float]:
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap


def aspect(a: Numbers, b: Numbers) -> float:
    angles = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
    return 4 / math.pi**2 * (angles[0] - angles[1]) ** 2


def scalar_loss(name: str, a: Numbers, b: Numbers, weight: float | None = None) -> float:
    """One pair, by the papers' definitions; ``weight``: of the aspect ratios, where it is held constant."""
    eps = 1e-7
    overlap, union = overlap_and_union(a, b)
    iou = overlap / (union + eps)
    outer = (max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1]))
    if name == "generalized":
        area = outer[0] * outer[1]
        return 1 - iou + (area - union) / (area + eps)
    centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b)]
    distance = sum((p - q) ** 2 for p, q in zip(*centres, strict=True))
    loss = 1 - iou + distance / (outer[0] ** 2 + outer[1] ** 2 + eps)
    if name == "complete":
        loss += (aspect_weight(a, b) if weight is None else weight) * aspect(a, b)
    return loss


def aspect_weight(a: Numbers, b: Numbers) -> float:
    overlap, union = overlap_and_union(a, b)
    v = aspect(a, b)
    return v / (1 - overlap / (union + 1e-7) + v + 1e-7)


def scalar_gradient(name: str, a: Numbers, b: Numbers) -> list[float]:
    """By central differences in the first box, the weight of the aspect ratios held constant."""
    weight, result, step = aspect_weight(a, b), [], 1e-5
    for k in range(4):
        plus, minus = ([*a[:k], a[k] + s, *a[k + 1 :]] for s in (step, -step))
        result.append((scalar_loss(name, plus, b, weight) - scalar_loss(name, minus, b, weight)) / (2 * step))
    return result


def pairs(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Boxes that overlap, contain one another, touch or lie apart, of very different shapes."""
    g = torch.Generator().manual_seed(count)
    corner = torch.rand(2, count, 2, generator=g, dtype=torch.float64) * 30
    size = 1 + torch.rand(2, count, 2, generator=g, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + size], -1)
    boxes[1, ::4] = boxes[0, ::4] + torch.tensor([1.0, 1, -0.5, -0.25]) * size[0, ::4].min(-1, True).values * 0.3
    boxes[1, 1::4] += 60
    return [boxes[0].to(dtype), boxes[1].to(dtype)]


def loops(f: Callable[..., object], name: str, a: Tensor, b: Tensor) -> Tensor:
    rows = zip(a.double().tolist(), b.double().tolist(), strict=True)
    return torch.tensor([f(name, p, q) for p, q in rows], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 7, 150])
@pytest.mark.parametrize("name", NAMES)
def test_equals_loops(place: Place, guarded: Guards, name: str, count: int, dtype: torch.dtype) -> None:
    a, b = pairs(count, dtype)
    first, second = (guarded(t.to(place.device)).requires_grad_() for t in (a, b))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    expected = loops(scalar_loss, name, a, b)
    slopes = loops(scalar_gradient, name, a, b), loops(scalar_gradient, name, b, a)
    for reduction in ("none", "sum", "mean"):
        loss = LOSSES[name](first, second, reduction)
        value = expected if reduction == "none" else expected.sum() if reduction == "sum" else expected.mean()
        torch.testing.assert_close(loss.cpu().double(), value, **tolerance)
        grads = torch.autograd.grad(loss.sum(), (first, second))
        for grad, slope in zip(grads, slopes, strict=True):
            share = 1 / count if reduction == "mean" else 1.0
            torch.testing.assert_close(grad.cpu().double(), slope * share, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_upstream_gradient_of_each_pair(place: Place, name: str) -> None:
    a, b = (t.to(place.device) for t in pairs(9))
    upstream = torch.arange(-4.0, 5, dtype=torch.float64, device=place.device)
    leaf = a.requires_grad_()
    loss = LOSSES[name](leaf, b)
    (plain,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, leaf, upstream)
    torch.testing.assert_close(scaled, plain * upstream[:, None])


def test_by_hand(place: Place) -> None:
    """Unit squares two apart in a 3 x 1 box: 2 - 2/3; centres 2 apart in a diagonal of sqrt 10: 1 + 4/10."""
    a = torch.tensor([[0.0, 0, 1, 1]], device=place.device)
    b = torch.tensor([[2.0, 0, 3, 1]], device=place.device)
    assert generalized_box_iou_loss(a, b).item() == pytest.approx(1 + 1 / 3, abs=1e-6)
    assert distance_box_iou_loss(a, b).item() == pytest.approx(1.4, abs=1e-6)
    assert complete_box_iou_loss(a, b).item() == pytest.approx(1.4, abs=1e-6)
    for loss in LOSSES.values():
        assert loss(a, a).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equals_autograd_on_ties_and_odd_boxes(place: Place, name: str) -> None:
    """Equal boxes and edges, touching, inverted, tall and flat ones: as autograd shares the gradient (reference)."""
    square = [0, 0, 4, 4]
    first = [square, square, square, square, [3, 3, 1, 1], [0, 0, 1e4, 1e-3], [1, 1, 1, 3]]
    second = [square, [0, 1, 4, 3], [4, 0, 8, 4], [0, 4, 4, 9], square, [0, 0, 1e-3, 1e4], square]
    a, b = torch.tensor(first), torch.tensor(second)
    a, b = a.to(place.device, torch.float64).requires_grad_(), b.to(place.device, torch.float64)
    loss = LOSSES[name](a, b)
    (grad,) = torch.autograd.grad(loss.sum(), a)
    leaf = a.detach().cpu().requires_grad_()
    expected = _losses(leaf, b.cpu(), NAMES.index(name), 1e-7)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad.cpu(), torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_torchvision(place: Place, name: str) -> None:
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    a, b = (t.to(place.device).requires_grad_() for t in pairs(40, torch.float32))
    theirs = getattr(ops, f"{name}_box_iou_loss")
    for reduction in ("none", "sum", "mean"):
        for eps in (1e-7, 0.5):
            losses = [f(a, b, reduction, eps) for f in (LOSSES[name], theirs)]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
            grads = [torch.autograd.grad(loss.sum(), (a, b)) for loss in losses]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_types_are_computed_in_float32(place: Place, dtype: torch.dtype) -> None:
    a, b = (t.to(place.device, dtype) for t in pairs(6))
    loss = generalized_box_iou_loss(a, b)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, generalized_box_iou_loss(a.float(), b.float()))
    assert generalized_box_iou_loss(a, b.double()).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_spoil_only_their_own(place: Place, name: str) -> None:
    a, b = (t.to(place.device) for t in pairs(8, torch.float32))
    expected = LOSSES[name](a, b)
    a[3, 2], b[5, 0] = float("nan"), float("-inf")
    loss = LOSSES[name](a.requires_grad_(), b)
    (grad,) = torch.autograd.grad(loss.sum(), a)
    others = [0, 1, 2, 4, 6, 7]
    assert loss[3].isnan()
    assert torch.equal(loss[others], expected[others])
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_memory_order(place: Place, name: str) -> None:
    a, b = (t.to(place.device) for t in pairs(12))
    expected = LOSSES[name](a, b)
    assert torch.equal(LOSSES[name](a.T.contiguous().T, b.T.contiguous().T), expected)
    assert torch.equal(LOSSES[name](a.view(3, 4, 4), b.view(3, 4, 4)), expected.view(3, 4))
    assert torch.equal(LOSSES[name](a[0], b[0]), expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_empty(place: Place, name: str) -> None:
    empty = torch.zeros(0, 4, device=place.device, requires_grad=True)
    for reduction in ("none", "sum", "mean"):
        loss = LOSSES[name](empty, torch.zeros(0, 4, device=place.device), reduction)
        assert loss.shape == ((0,) if reduction == "none" else ())
        (grad,) = torch.autograd.grad(loss.sum(), empty)
        assert loss.sum().item() == 0
        assert grad.shape == (0, 4)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(place: Place, name: str) -> None:
    slow = place.backend == "triton"  # the interpreter: numerical derivatives call the kernel for every element
    a, b = (t.to(place.device).requires_grad_() for t in pairs(3))
    if name == "complete":
        # The detached weight makes the analytical gradient another one, except where the shapes are equal.
        b = (a.detach() + torch.tensor([1.0, 2, 1, 2], dtype=torch.float64, device=place.device)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: LOSSES[name](x, y, "sum"), (a, b), fast_mode=slow)


def test_no_host_sync(place: Place) -> None:
    a, b = (t.to(place.device).requires_grad_() for t in pairs(5))
    with forbid_host_sync(allow_constants=False):
        complete_box_iou_loss(a, b, "mean").backward()


def test_opcheck(place: Place) -> None:
    a, b = (t.to(place.device) for t in pairs(3))
    for kind, reduction in ((0, 0), (2, 2)):
        forward = torch.ops.fastrcnn_kernels.box_iou_loss.default
        torch.library.opcheck(forward, (a.clone().requires_grad_(), b, kind, 1e-7, reduction))
        grad = torch.ones(() if reduction else (3,), dtype=torch.float64, device=place.device)
        backward = torch.ops.fastrcnn_kernels.box_iou_loss_backward.default
        torch.library.opcheck(backward, (grad, a, b, kind, 1e-7, reduction))


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    a, b = pairs(5)
    compiled = torch.compile(complete_box_iou_loss, fullgraph=True)
    torch.testing.assert_close(compiled(a, b, "mean"), complete_box_iou_loss(a, b, "mean"))


def test_bad_arguments() -> None:
    boxes = torch.zeros(3, 4)
    for wrong in (torch.zeros(4, 4), torch.zeros(3, 5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="must be paired boxes of one shape"):
            generalized_box_iou_loss(wrong, boxes)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        distance_box_iou_loss(boxes, boxes, "max")
