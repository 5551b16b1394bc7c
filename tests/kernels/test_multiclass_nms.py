"""multiclass_nms and multiclass_nms_padded: the detections that one loop a class gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import multiclass_nms, multiclass_nms_padded
from tests.kernels.helpers import ForbidSync, Guards, Place
from tests.kernels.nms_oracle import loop_nms

Found = list[tuple[int, int]]  # (row, class)


def make(rows: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Boxes [P, C, 4] around a few objects, some outside a 60 x 50 image, and scores in steps of 1/16: many tie."""
    random = np.random.default_rng(seed)
    objects = random.uniform(-8, 50, (max(1, rows // 5), 2))
    corner = objects[random.integers(0, len(objects), (rows, classes))] + random.normal(0, 2, (rows, classes, 2))
    sides = random.uniform(4, 25, (rows, classes, 2))
    boxes = np.concatenate([corner, corner + sides], -1)
    scores = np.round(random.uniform(0, 1, (rows, classes)) ** 2 * 16) / 16
    return torch.from_numpy(boxes).to(dtype), torch.from_numpy(scores).to(dtype)


def loop_multiclass(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, limit: int = 0, *, size: Any = None,
    min_size: float | None = None, background: int = -1, keep_ties: bool = False, box_offset: int = 0,
) -> Found:  # fmt: skip
    """One class after the other, then all sorted."""
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    if size is not None:
        limits = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype) - box_offset
        boxes = torch.minimum(boxes.clamp(min=0), limits)
    found: Found = []
    for label in range(scores.shape[1]):
        if label == background:
            continue
        rows = []
        for row, score in enumerate(scores[:, label].double().tolist()):
            own = boxes[row, label].double().tolist()
            sides = own[2] - own[0] + box_offset, own[3] - own[1] + box_offset
            if score > score_threshold and (min_size is None or min(sides) >= min_size):
                rows.append(row)
        found += [
            (rows[k], label) for k in loop_nms(boxes[rows, label], scores[rows, label], iou_threshold, box_offset)
        ]
    found.sort(key=lambda f: (-float(scores[f]), f))
    if 0 < limit < len(found):
        last = float(scores[found[limit - 1]])
        found = [f for i, f in enumerate(found) if i < limit or (keep_ties and float(scores[f]) == last)]
    return found


def assert_found(
    found: tuple[Tensor, ...], wanted: Found, boxes: Tensor, scores: Tensor, size: Any, offset: int
) -> None:
    assert list(zip(found[3].tolist(), found[2].tolist(), strict=True)) == wanted
    chosen = torch.stack([boxes[f] for f in wanted]) if wanted else boxes.reshape(-1, 4)[:0]
    if size is not None:
        chosen = torch.minimum(chosen.clamp(min=0), torch.tensor([size[1], size[0]] * 2) - offset)
    assert torch.equal(found[0].cpu(), chosen.to(found[0].dtype))
    assert found[1].tolist() == [float(scores[f]) for f in wanted]


SIZE = (50, 60)
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    (0, 4, 10, {}), (1, 1, 0, {}), (1, 3, 5, {}), (5, 0, 4, {}), (2, 2, 1, {}), (7, 3, 4, {}), (16, 2, 0, {}),
    (17, 5, 10, {"background": 0}), (31, 4, 20, {"background": 3}), (33, 3, 1000, {}), (20, 7, 15, {"clip": True}),
    (20, 7, 15, {"clip": True, "min_size": 6.0}), (20, 7, 15, {"min_size": 100.0}), (24, 4, 9, {"keep_ties": True}),
    (24, 4, 1, {"keep_ties": True}), (24, 4, 50, {"keep_ties": True, "background": 0}), (30, 2, 10, {"box_offset": 1}),
    (30, 3, 12, {"box_offset": 1, "clip": True, "background": 0, "keep_ties": True, "min_size": 1.0}),
    (40, 3, 0, {"clip": True}), (65, 2, 30, {"iou": 0.0}), (40, 2, 30, {"iou": 0.9}), (20, 3, 9, {"score": 0.5}),
    (20, 3, 9, {"score": 2.0}), (20, 3, 9, {"score": -math.inf}), (20, 3, 60, {"score": 0.25, "keep_ties": True}),
    (19, 3, 11, {"agnostic": True}), (19, 3, 11, {"agnostic": True, "clip": True}), (12, 9, 40, {"flat": True}),
    (66, 1, 20, {}), (3, 20, 10, {"background": 19}), (130, 2, 25, {"score": 0.7}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_against_loops(place: Place, guarded: Guards, case: int) -> None:
    rows, classes, limit, options = CASES[case]
    options = dict(options)
    boxes, scores = make(rows, classes, case)
    size = SIZE if options.pop("clip", False) else None
    score, iou = options.pop("score", 0.1), options.pop("iou", 0.4)
    given = boxes
    if options.pop("agnostic", False):
        given = boxes[:, 0]
        boxes = boxes[:, :1].expand(-1, classes, -1)
    elif options.pop("flat", False):
        given = boxes.flatten(1)
    wanted = loop_multiclass(boxes, scores, score, iou, limit, size=size, **options)
    sizes = None if size is None else torch.tensor(size, device=place.device)
    on = guarded(given.to(place.device)), guarded(scores.to(place.device))
    found = multiclass_nms(*on, score, iou, limit, image_size=sizes, **options)
    offset = options.get("box_offset", 0)
    assert_found(found, wanted, boxes, scores, size, offset)

    options.pop("keep_ties", None)
    wanted = loop_multiclass(boxes, scores, score, iou, limit, size=size, **options)
    sizes = None if sizes is None else sizes[None]
    *padded, count = multiclass_nms_padded(*(t[None] for t in on), score, iou, limit, image_sizes=sizes, **options)
    if limit:
        n = int(count)
        assert_found(tuple(t[0, :n] for t in padded), wanted, boxes, scores, size, offset)
        assert tuple(padded[0].shape) == (1, limit, 4)
        assert (padded[0][0, n:] == 0).all()
        assert (padded[1][0, n:] == -math.inf).all()
        assert (padded[2][0, n:] == -1).all()
        assert (padded[3][0, n:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(place: Place, dtype: torch.dtype) -> None:
    boxes, scores = make(25, 3, 1, dtype)
    found = multiclass_nms(boxes.to(place.device), scores.to(place.device), 0.1, 0.4, 12)
    assert found[0].dtype == found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_found(found, loop_multiclass(boxes, scores, 0.1, 0.4, 12), boxes, scores, None, 0)


def test_batch_with_counts(place: Place) -> None:
    """Rows behind the count of an image are not there, whatever they hold."""
    batch = [make(20, 3, seed) for seed in range(4)]
    boxes, scores = (torch.stack(t) for t in zip(*batch, strict=True))
    count = torch.tensor([20, 0, 7, 13])
    for n, rows in enumerate(count.tolist()):
        boxes[n, rows:], scores[n, rows:] = math.nan, 9.0
    sizes = torch.tensor([[50, 60], [10, 10], [30, 20], [50, 40]])
    *found, kept = multiclass_nms_padded(
        *(t.to(place.device) for t in (boxes, scores)), 0.1, 0.4, 15,
        count=count.to(place.device), image_sizes=sizes.to(place.device), background=0,
    )  # fmt: skip
    for n, rows in enumerate(count.tolist()):
        own = boxes[n, :rows], scores[n, :rows]
        wanted = loop_multiclass(*own, 0.1, 0.4, 15, size=sizes[n].tolist(), background=0)
        assert int(kept[n]) == len(wanted)
        assert_found(tuple(t[n, : len(wanted)] for t in found), wanted, *own, sizes[n].tolist(), 0)


def test_special_values(place: Place) -> None:
    """NaN scores are no candidates; a NaN box drops nothing and is not dropped, and is left out by a least size."""
    boxes, scores = make(24, 3, 5)
    scores[3, 1], scores[4, 2], scores[5, 0] = math.nan, math.inf, -math.inf
    boxes[6], boxes[7, 1, 2], boxes[8, :, 0] = math.nan, math.inf, -math.inf
    scores[6] = 0.9
    for min_size in (None, 0.0):
        wanted = loop_multiclass(boxes, scores, 0.1, 0.4, 0, min_size=min_size)
        on = boxes.to(place.device), scores.to(place.device)
        found = multiclass_nms(*on, 0.1, 0.4, min_size=min_size)
        assert list(zip(found[3].tolist(), found[2].tolist(), strict=True)) == wanted
        assert ((6, 0) in wanted) == (min_size is None)


def test_many_cpp() -> None:
    """Enough for the radix sort and threads: the same as without."""
    from fastrcnn_kernels import set_backend

    batch = [make(300, 8, seed) for seed in range(3)]
    boxes, scores = (torch.stack(t) for t in zip(*batch, strict=True))
    with set_backend("cpp"):
        *found, count = multiclass_nms_padded(boxes, scores, 0.05, 0.5, 100)
        for n in range(3):
            wanted = loop_multiclass(boxes[n], scores[n], 0.05, 0.5, 100)
            assert_found(tuple(t[n, : int(count[n])] for t in found), wanted, boxes[n], scores[n], None, 0)


def test_against_torchvision() -> None:
    """postprocess_detections on the same boxes: clip, threshold, small boxes, batched_nms, top-k."""
    heads = pytest.importorskip("torchvision.models.detection.roi_heads", reason="torchvision is not installed")
    boxes, _ = make(200, 6, 3)
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * 2

    class Coder:
        def decode(self, deltas: Tensor, proposals: list[Tensor]) -> Tensor:
            return boxes

    head = heads.RoIHeads.__new__(heads.RoIHeads)
    torch.nn.Module.__init__(head)
    head.box_coder, head.score_thresh, head.nms_thresh, head.detections_per_img = Coder(), 0.05, 0.5, 40
    theirs = head.postprocess_detections(logits, boxes, [boxes[:, 0]], [SIZE])
    found = multiclass_nms(
        boxes, logits.softmax(-1), 0.05, 0.5, 40, image_size=torch.tensor(SIZE), min_size=1e-2, background=0
    )
    for ours, their in zip(found, (theirs[0][0], theirs[1][0], theirs[2][0]), strict=False):
        assert torch.equal(ours, their)


def test_no_host_sync(place: Place) -> None:
    boxes, scores = (t.to(place.device)[None] for t in make(20, 3, 1))
    if place.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ForbidSync():
            multiclass_nms_padded(boxes, scores, 0.1, 0.5, 10)
    finally:
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_opcheck(place: Place) -> None:
    boxes, scores = (t.to(place.device) for t in make(12, 3, 1))
    ops = torch.ops.fastrcnn_kernels
    size = torch.tensor(SIZE, device=place.device)
    torch.library.opcheck(ops.multiclass_nms.default, (boxes, scores, size, 0.1, 0.5, 9, True, 0.0, 0, 0))
    count = torch.tensor([9], device=place.device)
    arguments = (boxes[None], scores[None], count, size[None], 0.1, 0.5, 9, math.nan, -1, 1)
    torch.library.opcheck(ops.multiclass_nms_padded.default, arguments)


def test_compile_fullgraph(place: Place) -> None:
    boxes, scores = (t.to(place.device) for t in make(12, 3, 1))

    def step(boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return (
            *multiclass_nms_padded(boxes[None] * 2, scores[None], 0.1, 0.5, 7),
            *multiclass_nms(boxes, scores, 0.1, 0.5),
        )

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for ours, plain in zip(compiled(boxes, scores), step(boxes, scores), strict=True):
            assert torch.equal(ours, plain)


ERRORS = [
    (lambda b, s: multiclass_nms(b, s[0], 0.1, 0.5), ValueError, r"scores must be \[P, C\], got \[3\]"),
    (lambda b, s: multiclass_nms(b[:4], s, 0.1, 0.5), ValueError, "boxes must be"),
    (lambda b, s: multiclass_nms(b[:, :2], s, 0.1, 0.5), ValueError, "boxes must be"),
    (lambda b, s: multiclass_nms(b.long(), s, 0.1, 0.5), TypeError, "boxes must be floating point"),
    (lambda b, s: multiclass_nms(b, s.long(), 0.1, 0.5), TypeError, "scores must be floating point"),
    (lambda b, s: multiclass_nms(b, s.to("meta"), 0.1, 0.5), ValueError, "boxes are on cpu but scores on meta"),
    (lambda b, s: multiclass_nms(b, s, 0.1, math.nan), ValueError, "iou_threshold is NaN"),
    (lambda b, s: multiclass_nms(b, s, 0.1, 0.5, -1), ValueError, "max_detections must not be negative, got -1"),
    (lambda b, s: multiclass_nms(b, s, 0.1, 0.5, box_offset=2), ValueError, "box_offset must be 0"),
    (lambda b, s: multiclass_nms_padded(b, s, 0.1, 0.5, 9), ValueError, r"scores must be \[N, P, C\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*make(5, 3))
