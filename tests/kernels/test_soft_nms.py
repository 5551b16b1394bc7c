"""soft_nms: all back-ends select the boxes that a plain loop selects, in its order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import soft_nms
from tests.kernels.helpers import Guards, Place
from tests.kernels.nms_oracle import make_boxes

KINDS = ["random", "clustered", "integer", "negative", "degenerate"]


def loop_soft_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, method: str, offset: int
) -> tuple[list[int], list[float]]:
    """The rules in Python floats. Fails where rounding could decide: scores that nearly tie, or nearly fall out."""
    b = boxes.double().tolist()
    left = {i: s for i, s in enumerate(scores.double().tolist()) if s >= min_score}
    keep, rescored = [], []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        for score in left.values():
            near = abs(score - left[best]) < 1e-6 * left[best]
            assert score == left[best] or not near, "choose another seed: scores nearly tie"
        keep.append(best)
        rescored.append(left.pop(best))
        for i in list(left):
            width = min(b[i][2], b[best][2]) - max(b[i][0], b[best][0]) + offset
            height = min(b[i][3], b[best][3]) - max(b[i][1], b[best][1]) + offset
            inter = max(width, 0.0) * max(height, 0.0)
            areas = [(b[k][2] - b[k][0] + offset) * (b[k][3] - b[k][1] + offset) for k in (i, best)]
            union = areas[0] + areas[1] - inter
            iou = inter / union if union else math.nan
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma) if iou > 0 else 1.0
            else:
                assert math.isnan(iou) or abs(iou - iou_threshold) > 1e-6 or iou == iou_threshold == 0.0
                left[i] *= 1.0 - iou if iou > iou_threshold else 1.0
            assert abs(left[i] - min_score) > 1e-7, "choose another seed: a score nearly falls out"
            if not left[i] >= min_score:
                del left[i]
    return keep, rescored


CASES = [
    (KINDS[i % 5], size, method, offset)
    for i, (size, method, offset) in enumerate(
        (size, method, offset)
        for size in (0, 1, 2, 3, 7, 15, 16, 17, 24, 33)
        for method, offset in (("linear", 0), ("gaussian", 1), ("gaussian", 0))
    )
]


def scores_of(size: int, seed: int) -> Tensor:
    """Without ties: products of ties and other numbers would tie in real numbers and not when rounded."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.05, 1, size).astype(np.float32))


@pytest.mark.parametrize(("kind", "size", "method", "offset"), CASES)
def test_against_loop(place: Place, guarded: Guards, kind: str, size: int, method: str, offset: int) -> None:
    boxes, scores = make_boxes(kind, size, size + 1)[0], scores_of(size, size)
    threshold = 0.31
    keep, rescored = soft_nms(
        guarded(boxes.to(place.device)), guarded(scores.to(place.device)), threshold, 0.37, 0.011, method,
        box_offset=offset,
    )  # fmt: skip
    wanted, values = loop_soft_nms(boxes, scores, threshold, 0.37, 0.011, method, offset)
    assert keep.dtype == torch.int64
    assert keep.tolist() == wanted
    torch.testing.assert_close(rescored.cpu(), torch.tensor(values, dtype=torch.float32), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_bits_of_the_reference(place: Place, method: str) -> None:
    """Selections and scores of the reference to the last bit, with ties, over several blocks of lanes."""
    from fastrcnn_kernels import set_backend

    boxes, scores = make_boxes("integer", 60, 4)
    with set_backend("reference"):
        expected = soft_nms(boxes, scores, 0.3, 0.5, 0.01, method)
    found = soft_nms(boxes.to(place.device), scores.to(place.device), 0.3, 0.5, 0.01, method)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1].cpu(), expected[1])
    assert (found[1].diff() <= 0).all()


def test_many_boxes_cpp() -> None:
    """Enough selections for dead entries to be squeezed out many times."""
    from fastrcnn_kernels import set_backend

    for kind in KINDS:
        boxes, scores = make_boxes(kind, 500, 4)
        results = []
        for backend in ("reference", "cpp"):
            with set_backend(backend):
                results.append([soft_nms(boxes * 3, scores, 0.3, 0.5, 0.02, m) for m in ("linear", "gaussian")])
        for ours, reference in zip(results[1], results[0], strict=True):
            assert torch.equal(ours[0], reference[0])
            assert torch.equal(ours[1], reference[1])


def test_hand_computed(place: Place) -> None:
    """Two boxes of IoU 1/3 and one apart: 0.9, then 0.8 * (1 - 1/3) or 0.8 * exp(-1/9 / 0.5)."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50]], device=place.device)
    scores = torch.tensor([0.8, 0.9, 0.6], device=place.device)
    keep, rescored = soft_nms(boxes, scores, 0.3)
    assert keep.tolist() == [1, 2, 0]
    torch.testing.assert_close(rescored.cpu(), torch.tensor([0.9, 0.6, 0.8 * 2 / 3]))
    keep, rescored = soft_nms(boxes, scores, method="gaussian")
    assert keep.tolist() == [1, 0, 2]
    torch.testing.assert_close(rescored.cpu(), torch.tensor([0.9, 0.8 * math.exp(-2 / 9), 0.6]))
    assert soft_nms(boxes, scores, 0.3, min_score=0.55)[0].tolist() == [1, 2]
    assert soft_nms(boxes, scores, 0.34)[0].tolist() == [1, 0, 2]


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_special_values(place: Place, method: str) -> None:
    """NaN scores are out; a NaN box changes nothing; equal boxes and scores go by index; all end."""
    boxes, scores = make_boxes("clustered", 20, 5)
    scores[[2, 9]] = math.nan
    scores[3] = math.inf
    scores[4] = -1.0
    boxes[5] = math.nan
    boxes[6, 2] = math.inf
    boxes[10:14], scores[10:14] = torch.tensor([300.0, 300, 310, 310]), 0.9
    on = boxes.to(place.device), scores.to(place.device)
    keep = soft_nms(*on, min_score=0.05, method=method)[0].tolist()
    assert not {2, 9, 4} & set(keep)
    assert keep[0] == 3
    assert 5 in keep
    assert len(set(keep)) == len(keep)
    same = [k for k in keep if 10 <= k < 14]
    assert same == sorted(same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(place: Place, dtype: torch.dtype) -> None:
    boxes, scores = make_boxes("clustered", 30, 3)[0].to(dtype), scores_of(30, 8).to(dtype)
    keep, rescored = soft_nms(boxes.to(place.device), scores.to(place.device), 0.31)
    assert rescored.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = soft_nms(boxes.to(wide).to(place.device), scores.to(wide).to(place.device), 0.31)
    assert torch.equal(keep, expected[0])
    assert torch.equal(rescored, expected[1])


def test_strided_inputs(place: Place) -> None:
    boxes, scores = make_boxes("clustered", 20, 1)[0], scores_of(20, 1)
    wide = torch.cat([boxes * 0 + 7, boxes], 1)[:, 4:].to(place.device)
    spread = torch.stack([scores, -scores], 1)[:, 0].to(place.device)
    assert soft_nms(wide, spread, 0.31)[0].tolist() == loop_soft_nms(boxes, scores, 0.31, 0.5, 1e-3, "linear", 0)[0]


def test_opcheck(place: Place) -> None:
    boxes, scores = (t.to(place.device) for t in make_boxes("clustered", 8, 1))
    for gaussian in (False, True):
        torch.library.opcheck(torch.ops.fastrcnn_kernels.soft_nms.default, (boxes, scores, 0.3, 0.5, 0.1, gaussian, 0))


def test_compile_fullgraph(place: Place) -> None:
    boxes, scores = (t.to(place.device) for t in make_boxes("clustered", 8, 1))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda b, s: soft_nms(b * 2, s), fullgraph=True, backend="aot_eager")
        for ours, plain in zip(compiled(boxes, scores), soft_nms(boxes * 2, scores), strict=True):
            assert torch.equal(ours, plain)


ERRORS = [
    (lambda b, s: soft_nms(b[:, :3], s), ValueError, r"boxes must be \[N, 4\] and scores \[N\], got \[5, 3\]"),
    (lambda b, s: soft_nms(b, s[:3]), ValueError, r"got \[5, 4\] and \[3\]"),
    (lambda b, s: soft_nms(b.long(), s), TypeError, "boxes must be floating point"),
    (lambda b, s: soft_nms(b, s.long()), TypeError, "scores must be floating point"),
    (lambda b, s: soft_nms(b, s.to("meta")), ValueError, "boxes are on cpu but scores on meta"),
    (lambda b, s: soft_nms(b, s, method="naive"), ValueError, "unknown method 'naive': choose one of linear, gaussian"),
    (lambda b, s: soft_nms(b, s, sigma=0.0), ValueError, "sigma must be positive"),
    (lambda b, s: soft_nms(b, s, math.nan), ValueError, "must not be NaN"),
    (lambda b, s: soft_nms(b, s, box_offset=3), ValueError, "box_offset must be 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*make_boxes("random", 5, 0))
