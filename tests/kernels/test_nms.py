"""nms, batched_nms and nms_padded: all back-ends give exactly the integers of a plain loop."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrcnn_kernels import batched_nms, nms, nms_padded
from fastrcnn_kernels.nms import comparison_threshold
from tests.kernels.helpers import ForbidSync, Guards, Place
from tests.kernels.nms_oracle import loop_batched_nms, loop_nms, loop_nms_padded, make_boxes, make_groups

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48,
         50, 63, 64, 65, 66, 90, 96, 97, 127, 129, 200]  # fmt: skip
THRESHOLDS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
KINDS = ["random", "clustered", "integer", "negative", "degenerate"]


CASES = [
    pytest.param(
        KINDS[i % 5], size, THRESHOLDS[i % 6], i % 2, id=f"{KINDS[i % 5]}-N{size}-t{THRESHOLDS[i % 6]}-o{i % 2}"
    )
    for i, size in enumerate(SIZES)
]


@cache
def expected(function: str, kind: str, size: int, threshold: float, box_offset: int) -> object:
    boxes, scores = make_boxes(kind, size, size)
    if function == "nms":
        return loop_nms(boxes, scores, threshold, box_offset)
    return loop_batched_nms(boxes, scores, make_groups(size), threshold, box_offset)


@pytest.mark.parametrize(("kind", "size", "threshold", "box_offset"), CASES)
def test_nms(place: Place, guarded: Guards, kind: str, size: int, threshold: float, box_offset: int) -> None:
    boxes, scores = make_boxes(kind, size, size)
    keep = nms(guarded(boxes.to(place.device)), guarded(scores.to(place.device)), threshold, box_offset=box_offset)
    assert keep.dtype == torch.int64
    assert keep.tolist() == expected("nms", kind, size, threshold, box_offset)


@pytest.mark.parametrize(("kind", "size", "threshold", "box_offset"), CASES)
def test_batched_nms(place: Place, guarded: Guards, kind: str, size: int, threshold: float, box_offset: int) -> None:
    boxes, scores = make_boxes(kind, size, size)
    inputs = [guarded(t.to(place.device)) for t in (boxes, scores, make_groups(size))]
    keep = batched_nms(*inputs, threshold, box_offset=box_offset)
    assert keep.dtype == torch.int64
    assert keep.tolist() == expected("batched_nms", kind, size, threshold, box_offset)


PADDED = [
    (0, 5, 3), (3, 0, 4), (2, 5, 0), (1, 1, 1), (1, 2, 5), (2, 3, 2), (3, 5, 4), (5, 7, 7), (4, 8, 3), (2, 15, 20),
    (3, 16, 9), (1, 17, 17), (7, 20, 10), (2, 31, 31), (3, 32, 20), (2, 33, 33), (1, 40, 1), (4, 48, 48), (2, 50, 7),
    (3, 63, 40), (1, 64, 64), (2, 64, 30), (5, 65, 65), (2, 66, 2), (3, 70, 300), (1, 96, 33), (2, 97, 64),
    (1, 127, 65), (2, 128, 128), (1, 129, 70), (1, 200, 40), (9, 10, 6),
]  # fmt: skip


def padded_inputs(segments: int, size: int) -> tuple[Tensor, Tensor]:
    """Each segment of another kind, about a quarter of its entries absent."""
    boxes, scores = torch.zeros(segments, size, 4), torch.zeros(segments, size)
    random = np.random.default_rng(segments * 1000 + size)
    for s in range(segments):
        boxes[s], scores[s] = make_boxes(KINDS[(s + size) % 5], size, s * 1000 + size)
        scores[s, torch.from_numpy(random.uniform(0, 1, size) < 0.25)] = -math.inf
    if segments > 2:
        scores[1] = -math.inf
    return boxes, scores


@pytest.mark.parametrize(("segments", "size", "max_output"), PADDED)
def test_nms_padded(place: Place, guarded: Guards, segments: int, size: int, max_output: int) -> None:
    boxes, scores = padded_inputs(segments, size)
    threshold, box_offset = THRESHOLDS[size % 6], size % 2
    inputs = guarded(boxes.to(place.device)), guarded(scores.to(place.device))
    keep, count = nms_padded(*inputs, threshold, max_output, box_offset=box_offset)
    rows, counts = loop_nms_padded(boxes, scores, threshold, max_output, box_offset)
    assert keep.dtype == count.dtype == torch.int64
    assert keep.shape == (segments, max_output)
    assert count.tolist() == counts
    assert keep.tolist() == rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_other_dtypes(place: Place, dtype: torch.dtype, threshold: float) -> None:
    """Half types are computed in float32, float64 in float64; scores may have a type of their own."""
    boxes, scores = make_boxes("integer", 70, 3)
    boxes = boxes.to(dtype)
    on = place.device
    for own in (scores, scores.to(dtype), scores.double()):
        assert nms(boxes.to(on), own.to(on), threshold).tolist() == loop_nms(boxes, own, threshold)
        groups = make_groups(70).int()
        keep = batched_nms(boxes.to(on), own.to(on), groups.to(on), threshold)
        assert keep.tolist() == loop_batched_nms(boxes, own, groups, threshold)
        keep, count = nms_padded(boxes[None].to(on), own[None].to(on), threshold, 40)
        assert (keep.tolist(), count.tolist()) == loop_nms_padded(boxes[None], own[None], threshold, 40)


def test_strided_inputs(place: Place) -> None:
    boxes, scores = make_boxes("clustered", 60, 1)
    wide = torch.full((60, 9), math.nan)
    wide[:, 2:6] = boxes
    spread = torch.stack([scores, -scores], 1)[:, 0]
    keep = nms(wide.to(place.device)[:, 2:6], spread.to(place.device), 0.5)
    assert keep.tolist() == loop_nms(boxes, scores, 0.5)


GOLDEN_BOXES = [[10, 10, 50, 60], [11, 12, 48, 60], [8, 9, 40, 50], [100, 100, 150, 140], [99, 110, 155, 139]]
GOLDEN_SCORES = [0.5, 0.7, 0.6, 0.9, 0.8]
GOLDEN = [(0.1, {1, 3}), (0.3, {1, 3}), (0.5, {1, 3}), (0.8, {1, 2, 3, 4}), (0.9, {0, 1, 2, 3, 4})]


@pytest.mark.parametrize(("threshold", "kept"), GOLDEN)
def test_golden_maskrcnn_benchmark(place: Place, threshold: float, kept: set[int]) -> None:
    """The values of maskrcnn-benchmark's tests/test_nms.py, boxes of inclusive pixels."""
    boxes = torch.tensor(GOLDEN_BOXES, dtype=torch.float32, device=place.device)
    scores = torch.tensor(GOLDEN_SCORES, device=place.device)
    keep = nms(boxes, scores, threshold, box_offset=1).tolist()
    assert set(keep) == kept
    assert keep == sorted(keep, key=lambda i: -GOLDEN_SCORES[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_golden_torchvision(place: Place, dtype: torch.dtype) -> None:
    """torchvision's test_nms_float16: the three boxes are one object."""
    boxes = torch.tensor(
        [
            [285.3538, 185.5758, 1193.5110, 851.4551],
            [285.1472, 188.7374, 1192.4984, 851.0669],
            [279.2440, 197.9812, 1189.4746, 849.2019],
        ],
        dtype=dtype,
        device=place.device,
    )
    scores = torch.tensor([0.6370, 0.7569, 0.3966], dtype=dtype, device=place.device)
    assert nms(boxes, scores, 0.2).tolist() == [1]


# (height of a second box of width 10 beside one of 10 x 10, threshold, both are kept). Float32 has no 0.3 and no 0.7:
# the ratio 3 / 10 rounds to above the double 0.3, and 7 / 10 to below the double 0.7.
BOUNDARY = [(5, 0.5, True), (5, math.nextafter(0.5, 0), False), (3, 0.3, False), (7, 0.7, True), (6, 0.6, False)]


@pytest.mark.parametrize(("height", "threshold", "both"), BOUNDARY)
@pytest.mark.parametrize("box_offset", [0, 1])
@pytest.mark.parametrize("copies", [1, 40])
def test_ratio_equal_to_threshold(
    place: Place, height: int, threshold: float, both: bool, box_offset: int, copies: int
) -> None:
    """``>`` in double, as torchvision compares. ``copies`` of the pair far apart take the C++ kernel's grid."""
    pair = torch.tensor([[0.0, 0, 10 - box_offset, 10 - box_offset], [0, 0, 10 - box_offset, height - box_offset]])
    boxes = torch.cat([pair + 100.0 * k for k in range(copies)]).to(place.device)
    scores = torch.arange(2 * copies, 0, -1.0, device=place.device)
    keep = nms(boxes, scores, threshold, box_offset=box_offset)
    assert keep.tolist() == list(range(0, 2 * copies, 1 if both else 2))


@pytest.mark.parametrize("threshold", [-0.5, -0.0, 0.0, 1.0, 1.5, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_unusual_thresholds(place: Place, threshold: float, kind: str) -> None:
    boxes, scores = make_boxes(kind, 40, 9)
    keep = nms(boxes.to(place.device), scores.to(place.device), threshold)
    assert keep.tolist() == loop_nms(boxes, scores, threshold)


SPECIAL = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38, "large": 1e19, "tiny": 1e-30, "subnormal": 1e-42,
}  # fmt: skip


@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("box_offset", [0, 1])
def test_special_coordinates(place: Place, value: float, box_offset: int) -> None:
    """Nothing hangs, no index repeats, and all back-ends still agree: NaN neither drops nor is dropped."""
    boxes, scores = make_boxes("clustered", 80, 5)
    for i in range(0, 80, 7):
        boxes[i, (i // 7) % 4] = value
    boxes[3] = value
    boxes[4] = torch.tensor([-value, -value, value, value])
    boxes[5:8] = torch.tensor([0.0, 0.0, abs(value), abs(value)])
    keep = nms(boxes.to(place.device), scores.to(place.device), 0.5, box_offset=box_offset)
    assert keep.tolist() == loop_nms(boxes, scores, 0.5, box_offset)
    assert len(set(keep.tolist())) == len(keep)


def test_scales(place: Place) -> None:
    """From 1e-22 to 1e18: where squares leave the range of float32, the C++ kernel must not trust its shortcut."""
    boxes, scores = make_boxes("clustered", 40, 2)
    for exponent in (-24, -22, -20, -12, -3, 3, 12, 18, 20):
        scaled = boxes * 10.0**exponent
        keep = nms(scaled.to(place.device), scores.to(place.device), 0.5)
        assert keep.tolist() == loop_nms(scaled, scores, 0.5), f"scale 1e{exponent}"


def test_special_scores(place: Place) -> None:
    """NaN ranks first as in torch.sort, both zeros tie, -inf is an ordinary last place except in nms_padded."""
    boxes, scores = make_boxes("clustered", 64, 4)
    scores[[5, 40]] = math.nan
    scores[[6, 30]] = math.inf
    scores[[7, 20, 63]] = -math.inf
    scores[[8, 9]] = torch.tensor([-0.0, 0.0])
    scores[10:15] = 0.5
    on = place.device
    order = nms(boxes.to(on) * 0 + torch.arange(64, device=on)[:, None], scores.to(on), 0.5)
    assert order.tolist() == scores.sort(descending=True, stable=True).indices.tolist()
    assert nms(boxes.to(on), scores.to(on), 0.5).tolist() == loop_nms(boxes, scores, 0.5)
    keep, count = nms_padded(boxes[None].to(on), scores[None].to(on), 0.5, 64)
    assert (keep.tolist(), count.tolist()) == loop_nms_padded(boxes[None], scores[None], 0.5, 64)
    assert not {7, 20, 63} & set(keep[0].tolist())


def test_ties_and_duplicates(place: Place) -> None:
    """The lower index wins: of equal boxes with equal scores the first stays."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]).repeat(45, 1).to(place.device)
    scores = torch.full((90,), 0.5, device=place.device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    groups = (torch.arange(90, device=place.device) // 30) * 5 - 3
    assert batched_nms(boxes, scores, groups, 0.5).tolist() == [0, 1, 30, 31, 60, 61]
    keep, count = nms_padded(boxes[None], scores[None], 0.5, 3)
    assert keep.tolist() == [[0, 1, -1]]
    assert count.tolist() == [2]


def test_chain(place: Place) -> None:
    """Each box drops only the next: what is dropped must not drop others, along the longest chain there is."""
    start = torch.arange(100.0)[:, None] * 4
    boxes = torch.cat([start, start * 0, start + 10, start * 0 + 10], 1).to(place.device)
    scores = torch.arange(100, 0, -1.0, device=place.device)
    assert nms(boxes, scores, 0.4).tolist() == list(range(0, 100, 2))


def test_groups_far_apart(place: Place) -> None:
    """Coordinates at which an offset per group would swallow the boxes: groups are kept apart exactly."""
    boxes, scores = make_boxes("clustered", 60, 6)
    boxes = boxes + 2.0**20
    groups = torch.arange(60) % 3
    keep = batched_nms(boxes.to(place.device), scores.to(place.device), groups.to(place.device), 0.5)
    assert keep.tolist() == loop_batched_nms(boxes, scores, groups, 0.5)


@pytest.mark.parametrize("box_offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_many_boxes_cpp(kind: str, threshold: float, box_offset: int) -> None:
    """Enough boxes for many cells and chunks, for the radix sort and for several threads."""
    from fastrcnn_kernels import set_backend

    boxes, scores = make_boxes(kind, 1500, 8)
    boxes = boxes * 10 if kind != "negative" else boxes
    groups = make_groups(1500)
    with set_backend("cpp"):
        assert nms(boxes, scores, threshold, box_offset=box_offset).tolist() == loop_nms(
            boxes, scores, threshold, box_offset
        )
        keep = batched_nms(boxes, scores, groups, threshold, box_offset=box_offset)
        assert keep.tolist() == loop_batched_nms(boxes, scores, groups, threshold, box_offset)


def test_result_does_not_depend_on_threads() -> None:
    from fastrcnn_kernels import set_backend

    boxes, scores = padded_inputs(12, 600)
    before = torch.get_num_threads()
    results = []
    with set_backend("cpp"):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(nms_padded(boxes, scores, 0.5, 80))
    torch.set_num_threads(before)
    for keep, count in results[1:]:
        assert torch.equal(keep, results[0][0])
        assert torch.equal(count, results[0][1])


coordinates = st.integers(0, 12)
lists = st.lists(st.tuples(coordinates, coordinates, st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=24)
thresholds = st.sampled_from([0.0, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.75])
relaxed = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def as_boxes(rows: list[tuple[int, int, int, int]], device: str) -> tuple[Tensor, Tensor]:
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([((7 * i) % 25) / 25 for i in range(len(rows))], dtype=torch.float32)
    return boxes.to(device), scores.to(device)


@relaxed
@given(lists, thresholds)
def test_idempotent(place: Place, rows: list, threshold: float) -> None:
    """What was kept is kept again, all of it."""
    boxes, scores = as_boxes(rows, place.device)
    keep = nms(boxes, scores, threshold)
    assert nms(boxes[keep], scores[keep], threshold).tolist() == list(range(len(keep)))


@relaxed
@given(lists, thresholds, st.randoms(use_true_random=False))
def test_order_equivariant(place: Place, rows: list, threshold: float, random: object) -> None:
    """The same boxes are kept in whatever order they come (scores are distinct)."""
    boxes, scores = as_boxes(rows, place.device)
    permutation = list(range(len(rows)))
    random.shuffle(permutation)  # type: ignore[attr-defined]
    shuffled = nms(boxes[permutation], scores[permutation], threshold)
    assert [permutation[i] for i in shuffled.tolist()] == nms(boxes, scores, threshold).tolist()


@relaxed
@given(lists, thresholds)
def test_padding_changes_nothing(place: Place, rows: list, threshold: float) -> None:
    boxes, scores = as_boxes(rows, place.device)
    padded = torch.cat([boxes.new_full((3, 4), math.nan), boxes])[None]
    with_absent = torch.cat([scores.new_full((3,), -math.inf), scores])[None]
    keep, count = nms_padded(padded, with_absent, threshold, len(rows) + 3)
    kept = nms(boxes, scores, threshold).tolist()
    assert keep[0, : count[0]].tolist() == [k + 3 for k in kept]


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.9, 1.0, 0.0, -0.3, 1e-50, 1e300])
def test_comparison_threshold(threshold: float) -> None:
    """Comparing a float32 with the returned value is comparing it with the double."""
    value = comparison_threshold(threshold, torch.float32)
    if abs(threshold) < 3e38:
        assert value == float(np.float32(value)), "not a float32"
        assert value <= threshold
        assert float(np.nextafter(np.float32(value), np.float32(np.inf))) > threshold
    assert comparison_threshold(threshold, torch.float64) == threshold


def test_no_host_sync(place: Place) -> None:
    """nms_padded never lets the host look at the data."""
    boxes, scores = padded_inputs(3, 40)
    boxes, scores = boxes.to(place.device), scores.to(place.device)
    if place.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ForbidSync():
            nms_padded(boxes, scores, 0.5, 10)
    finally:
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_forbid_sync_can_fail(place: Place) -> None:
    """The guard itself: nms has a size that depends on the data, so every implementation reads its count."""
    boxes, scores = make_boxes("random", 20, 0)
    with pytest.raises(AssertionError, match="synchronises"), ForbidSync():
        nms(boxes.to(place.device), scores.to(place.device), 0.5)


ERRORS = [
    (lambda b, s: nms(b[:, :3], s, 0.5), ValueError, r"nms: boxes must be \[N, 4\], got \[6, 3\]"),
    (lambda b, s: nms(b[0], s, 0.5), ValueError, r"nms: boxes must be \[N, 4\], got \[4\]"),
    (lambda b, s: nms(b, s[:5], 0.5), ValueError, r"nms: scores must be \[N\] as boxes are, got \[5\]"),
    (lambda b, s: nms(b.long(), s, 0.5), TypeError, "nms: boxes must be floating point, got torch.int64"),
    (lambda b, s: nms(b, s.int(), 0.5), TypeError, "nms: scores must be floating point, got torch.int32"),
    (lambda b, s: nms(b, s, math.nan), ValueError, "nms: iou_threshold is NaN"),
    (lambda b, s: nms(b, s, 0.5, box_offset=2), ValueError, "nms: box_offset must be 0 .* or 1 .*, got 2"),
    (lambda b, s: nms(b, s.to("meta"), 0.5), ValueError, "nms: boxes are on cpu but scores on meta"),
    (lambda b, s: batched_nms(b, s, s, 0.5), TypeError, "batched_nms: idxs must be integers, got torch.float32"),
    (lambda b, s: batched_nms(b, s, s[:2].long(), 0.5), ValueError, r"batched_nms: idxs must be \[N\].*got \[2\]"),
    (lambda b, s: batched_nms(b, s, s.long().to("meta"), 0.5), ValueError, "boxes are on cpu but idxs on meta"),
    (lambda b, s: nms_padded(b, s, 0.5, 3), ValueError, r"nms_padded: boxes must be \[S, P, 4\], got \[6, 4\]"),
    (lambda b, s: nms_padded(b[None], s, 0.5, 3), ValueError, r"nms_padded: scores must be \[S, P\]"),
    (lambda b, s: nms_padded(b[None], s[None], 0.5, -1), ValueError, "max_output must not be negative, got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_arguments(call, error, message) -> None:
    boxes, scores = make_boxes("random", 6, 0)
    with pytest.raises(error, match=message):
        call(boxes, scores)


def test_opcheck(place: Place) -> None:
    boxes, scores = padded_inputs(2, 20)
    boxes, scores = boxes.to(place.device), scores.to(place.device)
    ops = torch.ops.fastrcnn_kernels
    torch.library.opcheck(ops.nms_padded.default, (boxes, scores, 0.5, 7, 0))
    torch.library.opcheck(ops.nms.default, (boxes[0], scores[0], 0.5, 1))
    groups = torch.arange(20, device=place.device) % 3
    torch.library.opcheck(ops.batched_nms.default, (boxes[0], scores[0], groups, 0.5, 0))


def test_compile_fullgraph(place: Place) -> None:
    """One graph, also around the functions whose result has a size that depends on the data."""

    def step(boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        keep, count = nms_padded(boxes * 2, scores, 0.5, 9)
        dynamic = nms(boxes[0] * 2, scores[0], 0.5)
        groups = torch.arange(scores.shape[1], device=scores.device) % 2
        return keep, count, boxes[0][dynamic], batched_nms(boxes[0] * 2, scores[0], groups, 0.5)

    boxes, scores = padded_inputs(2, 30)
    boxes, scores = boxes.to(place.device), scores.to(place.device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for ours, plain in zip(compiled(boxes, scores), step(boxes, scores), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.slow
def test_compile_inductor() -> None:
    def step(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        keep, count = nms_padded(boxes + 1, scores.sigmoid(), 0.5, 9)
        return keep + 1, count * 2

    boxes, scores = make_boxes("clustered", 40, 0)
    compiled = torch.compile(step, fullgraph=True)
    for ours, plain in zip(compiled(boxes[None], scores[None]), step(boxes[None], scores[None]), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_drop_in_torchvision(kind: str, threshold: float) -> None:
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    boxes, scores = make_boxes(kind, 800, 1)
    scores = torch.from_numpy(np.random.default_rng(0).permutation(800).astype(np.float32))
    groups = torch.arange(800) % 5
    assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
    theirs = ops.boxes._batched_nms_vanilla(boxes, scores, groups, threshold)
    assert torch.equal(batched_nms(boxes, scores, groups, threshold), theirs)
