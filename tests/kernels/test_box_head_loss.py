"""The box head's losses against scalar loops in float64, with gradients, in every back-end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import box_head_loss, encode_boxes
from tests.kernels.helpers import Guards, Place, assert_within_twice_torch
from tests.kernels.nosync import forbid_host_sync

IGNORED = -100
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Of the largest value: float32 deltas carry the rounding of coordinates; the interpreter truncates where a GPU rounds.
ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def inputs(rows: int, classes: int, columns: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Logits, regression, labels, proposals and ground truth; a third padding, a third background."""
    g = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, classes, generator=g, dtype=torch.float64) * 3
    regression = torch.randn(rows, columns or 4 * classes, generator=g, dtype=torch.float64)
    labels = torch.randint(1, max(classes, 2), (rows,), generator=g).clamp(max=classes - 1)
    labels[1::3], labels[2::3] = 0, IGNORED
    corner = torch.rand(rows, 2, generator=g, dtype=torch.float64) * 100
    proposals = torch.cat([corner, corner + 5 + torch.rand(rows, 2, generator=g, dtype=torch.float64) * 50], 1)
    gt_boxes = proposals + torch.rand(rows, 4, generator=g, dtype=torch.float64) * 4
    return [logits.to(dtype), regression.to(dtype), labels, proposals.float(), gt_boxes.float()]


def scalar_losses(
    logits: Tensor, regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor,
    normaliser: float | None, beta: float, box_offset: int,
) -> tuple[float, float]:  # fmt: skip
    """Row by row, number by number."""
    classifier = box = 0.0
    counted = 0
    for row, label in enumerate(labels.tolist()):
        if label == IGNORED:
            continue
        counted += 1
        x = logits[row].double().tolist()
        classifier += math.log(sum(math.exp(v - max(x)) for v in x)) + max(x) - x[label]
        if label == 0:
            continue
        (ax1, ay1, ax2, ay2), (gx1, gy1, gx2, gy2) = proposals[row].tolist(), gt_boxes[row].tolist()
        aw, ah, gw, gh = (b - a + box_offset for a, b in ((ax1, ax2), (ay1, ay2), (gx1, gx2), (gy1, gy2)))
        wanted = (
            WEIGHTS[0] * (gx1 + gw / 2 - ax1 - aw / 2) / aw, WEIGHTS[1] * (gy1 + gh / 2 - ay1 - ah / 2) / ah,
            WEIGHTS[2] * math.log(gw / aw), WEIGHTS[3] * math.log(gh / ah),
        )  # fmt: skip
        columns = regression.shape[1]
        first = 4 * label if columns == 4 * logits.shape[1] else columns - 4
        for predicted, target in zip(regression[row, first : first + 4].double().tolist(), wanted, strict=True):
            d = abs(predicted - target)
            box += d - beta / 2 if d >= beta else d * d / (2 * beta)
    share = max(counted, 1) if normaliser is None else normaliser
    return classifier / share, box / share


def eager(
    logits: Tensor, regression: Tensor, labels: Tensor, proposals: Tensor, gt_boxes: Tensor,
    normaliser: float | None, beta: float, box_offset: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch with dynamic shapes, as torchvision writes it."""
    share = max(int((labels != IGNORED).sum()), 1) if normaliser is None else normaliser
    classifier = F.cross_entropy(logits.to(dtype), labels, ignore_index=IGNORED, reduction="sum")
    rows = (labels > 0).nonzero()[:, 0]
    columns = regression.shape[1]
    is_specific = columns == 4 * logits.shape[1]
    first = 4 * labels[rows] if is_specific else torch.full_like(rows, columns - 4)
    predicted = regression[rows[:, None], first[:, None] + torch.arange(4, device=rows.device)].to(dtype)
    targets = encode_boxes(gt_boxes[rows].to(dtype), proposals[rows].to(dtype), WEIGHTS, box_offset=box_offset)
    return classifier / share, F.smooth_l1_loss(predicted, targets, beta=beta, reduction="sum") / share


def to_place(tensors: list[Tensor], place: Place) -> list[Any]:
    moved = [t.to(place.device) for t in tensors]
    return [moved[0].requires_grad_(), moved[1].requires_grad_(), *moved[2:]]


CASES = [
    # rows, classes, columns, normaliser, beta, box_offset
    pytest.param(37, 11, None, None, 1.0, 1, id="class-specific"),
    pytest.param(37, 11, 8, None, 1 / 9, 0, id="agnostic-8"),
    pytest.param(37, 11, 4, None, 0.0, 0, id="agnostic-4"),
    pytest.param(1, 3, None, 512.0, 1.0, 0, id="one-row"),
    pytest.param(3, 2, None, None, 1.0, 1, id="two-classes"),
    pytest.param(20, 81, None, 7.5, 1.0, 1, id="coco"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes", "columns", "normaliser", "beta", "box_offset"), CASES)
def test_equals_loops(
    place: Place, guarded: Guards, rows: int, classes: int, columns: int | None, normaliser: float | None, beta: float,
    box_offset: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    case = inputs(rows, classes, columns, dtype)
    here = [guarded(t) for t in to_place(case, place)]
    divisor = None if normaliser is None else torch.tensor(normaliser, device=place.device)
    losses = box_head_loss(*here, divisor, beta=beta, box_offset=box_offset)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    for loss, expected in zip(losses, scalar_losses(*case, normaliser, beta, box_offset), strict=True):
        assert loss.dtype == result
        torch.testing.assert_close(loss.item(), expected, rtol=ROUNDING[result], atol=1e-9)

    grads = torch.autograd.grad(2 * losses[0] + 3 * losses[1], here[:2])
    truth, plain = [], []
    for kept, inside in ((truth, torch.float64), (plain, result)):
        leaves = [t.to(inside).requires_grad_() for t in case[:2]]
        one, two = eager(*leaves, *case[2:], normaliser, beta, box_offset, inside)
        kept.extend(torch.autograd.grad(2 * one + 3 * two, leaves))
    for name, grad, exact, same in zip(("logits", "regression"), grads, truth, plain, strict=True):
        atol = ROUNDING[dtype] * exact.abs().max().item()
        assert_within_twice_torch(grad, exact, same.to(dtype), atol, name)
        assert torch.equal(grad.cpu() == 0, exact == 0) or dtype == torch.float16, "zeros elsewhere"


def test_by_hand(place: Place) -> None:
    """Equal logits of two classes cost ln 2; a box moved by half its width, weight 10, smooth L1 of 5."""
    logits = torch.zeros(2, 2, device=place.device)
    regression = torch.zeros(2, 8, device=place.device)
    proposals = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]], device=place.device)
    gt_boxes = torch.tensor([[5.0, 0, 15, 10], [0, 0, 1, 1]], device=place.device)
    labels = torch.tensor([1, 0], device=place.device)
    classifier, box = box_head_loss(logits, regression, labels, proposals, gt_boxes)
    torch.testing.assert_close(classifier.item(), math.log(2))
    torch.testing.assert_close(box.item(), 4.5 / 2)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_learn_is_zero_with_a_gradient(place: Place, rows: int) -> None:
    logits, regression, labels, proposals, gt_boxes = to_place(inputs(rows, 4), place)
    losses = box_head_loss(logits, regression, torch.full_like(labels, IGNORED), proposals, gt_boxes)
    assert [loss.item() for loss in losses] == [0, 0]
    for grad in torch.autograd.grad(sum(losses), (logits, regression)):
        assert grad.abs().sum() == 0


def test_rows_that_do_not_count_may_hold_anything(place: Place) -> None:
    case = to_place(inputs(12, 5), place)
    expected = box_head_loss(*case)
    labels, not_positive = case[2], case[2] <= 0
    spoiled = [t.detach().clone() for t in case]
    spoiled[0][labels == IGNORED] = float("nan")
    for t in (spoiled[1], spoiled[3], spoiled[4]):
        t[not_positive] = float("nan")
    leaves = [spoiled[0].requires_grad_(), spoiled[1].requires_grad_()]
    losses = box_head_loss(*leaves, *spoiled[2:])
    assert losses == expected
    for grad in torch.autograd.grad(sum(losses), leaves):
        assert grad.isfinite().all()


def test_nan_reaches_the_loss(place: Place) -> None:
    for argument, which in ((0, 0), (1, 1)):
        case = inputs(6, 4, dtype=torch.float32)
        case[argument][0] = float("nan")
        losses = box_head_loss(*to_place(case, place))
        assert losses[which].isnan()
        assert losses[1 - which].isfinite()


def test_large_logits(place: Place) -> None:
    case = inputs(3, 4, dtype=torch.float32)
    case[0] = torch.tensor([[3e4, -3e4, 0, 0], [-3e38, 3e38, 0, 0], [0.0] * 4])
    case[2] = torch.tensor([1, 1, IGNORED])
    classifier, _ = box_head_loss(*to_place(case, place))
    assert classifier.item() == 6e4 / 2


@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_label_that_is_no_class(place: Place, label: int) -> None:
    """An error where the host may look, a loss that ends the training where it may not."""
    case = to_place(inputs(6, 4), place)
    case[2][3] = label
    if place.backend == "cpp":
        with pytest.raises(IndexError, match=f"label {label} of row 3 is neither a class of 4 nor ignore_index, -100"):
            box_head_loss(*case)
    else:
        assert box_head_loss(*case)[0].isnan()


def test_a_scaled_half_loss_does_not_underflow(place: Place) -> None:
    """A gradient below float16's range before the upstream gradient is known."""
    case = inputs(2, 3, dtype=torch.float16)
    case[0] = torch.tensor([[0.0, 9, 0], [0, 0, 0]], dtype=torch.float16)
    case[2] = torch.tensor([1, IGNORED])
    leaves = to_place(case, place)
    classifier, _ = box_head_loss(*leaves, torch.tensor(4096.0, device=place.device))
    (grad,) = torch.autograd.grad(classifier * 65536, leaves[0])
    p = 1 / (math.exp(9) + 2)
    torch.testing.assert_close(grad[0].cpu().float(), torch.tensor([16 * p, -32 * p, 16 * p]), rtol=2e-3, atol=0)


def test_memory_order(place: Place) -> None:
    case = to_place(inputs(9, 5), place)
    strided = [torch.stack([t.detach(), t.detach()], -1)[..., 0] for t in case]
    leaves = [strided[0].requires_grad_(), strided[1].requires_grad_()]
    losses, expected = box_head_loss(*leaves, *strided[2:]), box_head_loss(*case)
    assert losses == expected
    for a, b in zip(
        torch.autograd.grad(sum(losses), leaves), torch.autograd.grad(sum(expected), case[:2]), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [None, 8])
def test_gradcheck(place: Place, columns: int | None) -> None:
    slow = place.backend == "triton"  # the interpreter: numerical derivatives call the kernel for every element
    logits, regression, *rest = to_place(inputs(3, 3, columns), place)
    leaves = (logits, regression)
    assert torch.autograd.gradcheck(lambda a, b: box_head_loss(a, b, *rest, beta=0.7), leaves, fast_mode=slow)


def test_torchvision(place: Place) -> None:
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads", reason="torchvision is not installed")
    logits, regression, labels, proposals, gt_boxes = to_place(inputs(30, 6, dtype=torch.float32), place)
    labels = labels.clamp(min=0)
    targets = encode_boxes(gt_boxes, proposals, WEIGHTS)
    theirs = roi_heads.fastrcnn_loss(logits, regression, [labels], [targets])
    ours = box_head_loss(logits, regression, labels, proposals, gt_boxes, beta=1 / 9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(sum(losses), (logits, regression)) for losses in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_no_host_sync(place: Place) -> None:
    case = to_place(inputs(6, 4), place)
    with forbid_host_sync(allow_constants=False):
        sum(box_head_loss(*case)).backward()


def test_opcheck(place: Place) -> None:
    case = to_place(inputs(5, 4, dtype=torch.float32), place)
    ops = torch.ops.fastrcnn_kernels
    constants = ([10.0, 10.0, 5.0, 5.0], 1.0, 0, IGNORED)
    torch.library.opcheck(ops.box_head_loss.default, (*case, None, *constants))
    case = [t.detach() for t in case]
    one, two, lse, share = ops.box_head_loss.default(*case, torch.tensor(3, device=place.device), *constants)
    torch.library.opcheck(ops.box_head_loss_backward.default, (one, two, *case, lse, share, *constants))


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    logits, regression, *rest = inputs(6, 4)
    leaves = (logits.requires_grad_(), regression.requires_grad_())

    def step(a: Tensor, b: Tensor) -> Tensor:
        return sum(box_head_loss(a * 2, b, *rest))

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), step(*leaves))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: [c[0][0], *c[1:]], ValueError, "class_logits must be floating point"),
        (lambda c: [c[0], c[1][:, :7], *c[2:]], ValueError, r"box_regression must be \[6, 16\]"),
        (lambda c: [c[0], c[1].float(), *c[2:]], TypeError, "box_regression is torch.float32"),
        (lambda c: [*c[:2], c[2].int(), *c[3:]], ValueError, "labels must be int64"),
        (lambda c: [*c[:3], c[3][:5], c[4]], ValueError, r"proposals must be floating point \[6, 4\]"),
        (lambda c: [*c, torch.zeros(2)], ValueError, "normaliser must hold one number"),
    ],
)
def test_bad_arguments(change: Callable[[list[Tensor]], list[Tensor]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        box_head_loss(*change(inputs(6, 4)))
