"""Matching against exact rational arithmetic and a transcription of maskrcnn-benchmark's rules."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from fastrcnn_kernels import (
    box_iou,
    cell_anchors,
    grid_anchors,
    match_boxes,
    matcher_reference,
)
from fastrcnn_kernels.matcher_reference import match_boxes_reference
from tests.kernels.helpers import ForbidSync, Guards, Place
from tests.kernels.nosync import forbid_host_sync

RPN = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality_matches": True, "box_offset": 1}
BOX_HEAD = {"high_threshold": 0.5, "low_threshold": 0.5, "allow_low_quality_matches": False, "box_offset": 1}
SETTINGS = [
    pytest.param(RPN, id="rpn"),
    pytest.param(BOX_HEAD, id="box-head"),
    pytest.param({**RPN, "box_offset": 0}, id="rpn-modern"),
    pytest.param({**RPN, "allow_low_quality_matches": False}, id="rpn-no-low-quality"),
    pytest.param({**RPN, "low_threshold": 0.0}, id="rpn-no-background"),
]


def rule(
    quality: list[list[Any]], high: Any, low: Any, low_quality: bool, last_wins: bool = False, own: bool = True
) -> list[int]:
    """maskrcnn-benchmark's Matcher on a quality matrix [G][A]. ``last_wins`` and ``own`` are mutations."""
    num_gts, num_boxes = len(quality), len(quality[0])
    result = []
    for a in range(num_boxes):
        best = 0
        for g in range(num_gts):
            if quality[g][a] > quality[best][a] or (last_wins and quality[g][a] == quality[best][a]):
                best = g
        value = quality[best][a]
        match = best if value >= high else (-1 if value < low else -2)
        if low_quality:
            for g in range(num_gts):
                if quality[g][a] == max(quality[g]):
                    match = best if own else g
        result.append(match)
    return result


def exact_iou(a: list[int], b: list[int], offset: int) -> Fraction:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    shared = width * height if width > 0 and height > 0 else 0
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    union = sum(areas) - shared
    return Fraction(shared, union) if union else Fraction(0)


def integer_boxes(count: int, generator: torch.Generator, extent: int = 12) -> torch.Tensor:
    """Boxes with few distinct coordinates: ties and IoUs exactly on a threshold occur in numbers."""
    corner = torch.randint(0, extent, (count, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(1, 8, (count, 2), generator=generator)], dim=1)


def exact_case(num_gts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ground truths and boxes; where there is more than one ground truth the last repeats the first."""
    g = torch.Generator().manual_seed(seed)
    gts, boxes = integer_boxes(num_gts, g), integer_boxes(150, g)
    gts[-1] = gts[0]
    return gts, boxes


def random_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 300
    size = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 100
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def exact_match(gts: torch.Tensor, boxes: torch.Tensor, arguments: dict[str, Any], **mutation: bool) -> list[int]:
    offset = arguments["box_offset"]
    quality = [[exact_iou(g, a, offset) for a in boxes.tolist()] for g in gts.tolist()]
    high, low = (Fraction(str(arguments[name])) for name in ("high_threshold", "low_threshold"))
    return rule(quality, high, low, arguments["allow_low_quality_matches"], **mutation)


Match = Callable[..., torch.Tensor]


@pytest.fixture
def match(device: torch.device) -> Match:
    """``match_boxes`` by each back-end: tensors go to its device and the result comes back."""

    def on_device(gts: torch.Tensor, count: torch.Tensor, boxes: torch.Tensor, **arguments: Any) -> torch.Tensor:
        matched = match_boxes(gts.to(device), count.to(device), boxes.to(device), **arguments)
        assert matched.device.type == device.type
        return matched.cpu()

    return on_device


@pytest.fixture
def match_one(match: Match) -> Match:
    """The same for one image: ground truths [G, 4], boxes [A, 4]."""
    return lambda gts, boxes, arguments: match(gts.float()[None], torch.tensor([len(gts)]), boxes.float(), **arguments)[
        0
    ]


@pytest.mark.parametrize("arguments", SETTINGS)
@pytest.mark.parametrize("num_gts", [1, 2, 9])
@pytest.mark.parametrize("seed", range(2))
def test_equals_exact_arithmetic(match_one: Match, arguments: dict[str, Any], num_gts: int, seed: int) -> None:
    gts, boxes = exact_case(num_gts, 100 * num_gts + seed)
    assert match_one(gts, boxes, arguments).tolist() == exact_match(gts, boxes, arguments)


@pytest.mark.parametrize("arguments", SETTINGS)
@pytest.mark.parametrize("num_gts", [1, 19])
def test_equals_the_rule_in_float32(match_one: Match, arguments: dict[str, Any], num_gts: int) -> None:
    gts, boxes = random_boxes(num_gts), random_boxes(200, seed=1)
    quality = box_iou(gts, boxes, box_offset=arguments["box_offset"])
    high, low = (torch.tensor(arguments[name]).item() for name in ("high_threshold", "low_threshold"))
    expected = rule(quality.tolist(), high, low, arguments["allow_low_quality_matches"])
    actual = match_one(gts, boxes, arguments)
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected
    assert num_gts == 1 or len(set(expected)) > 1, "the case would prove nothing"


def test_detectron2_golden() -> None:
    """The oracle on detectron2's own test: matches [1, 1, 2, 0] with labels [ignored, 1, background, 1]."""
    quality = [[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]]
    assert rule(quality, 0.7, 0.3, True) == [-2, 1, -1, 0]


def test_first_ground_truth_wins_a_tie(match_one: Match) -> None:
    gts = torch.tensor([[0, 0, 9, 9], [20, 20, 29, 29], [20, 20, 29, 29]])
    boxes = torch.tensor([[20, 20, 29, 29], [0, 0, 9, 9]])
    assert match_one(gts, boxes, RPN).tolist() == [1, 0]


def test_low_quality_restores_the_own_best_ground_truth(match_one: Match) -> None:
    """The one box is the best of both ground truths and goes to the one it overlaps more, below every threshold."""
    gts = torch.tensor([[0, 0, 9, 9], [0, 0, 19, 9]])
    boxes = torch.tensor([[15, 0, 40, 9], [30, 30, 40, 40]])
    quality = [[exact_iou(g, a, 1) for a in boxes.tolist()] for g in gts.tolist()]
    assert quality[0] == [0, 0], "the first ground truth overlaps nothing"
    assert 0 < quality[1][0] < Fraction(3, 10)
    # The trap: best IoU 0, so every box with IoU 0 counts as its match, and goes to its own first maximum.
    assert match_one(gts, boxes, RPN).tolist() == [1, 0]
    assert match_one(gts[1:], boxes, RPN).tolist() == [0, -1]


def test_every_tie_of_the_best_is_matched(match_one: Match) -> None:
    gts = torch.tensor([[10, 0, 19, 9]])
    boxes = torch.tensor([[5, 0, 14, 9], [15, 0, 24, 9], [4, 0, 13, 9]])
    assert match_one(gts, boxes, {**RPN, "low_threshold": 0.35}).tolist() == [0, 0, -1]


@pytest.mark.parametrize(("value", "expected"), [(7, 0), (6, -2), (3, -2), (2, -1)])
def test_thresholds(match_one: Match, value: int, expected: int) -> None:
    """IoU 0.7 exactly is matched, 0.3 exactly is between; two ground truths keep low quality out of it."""
    gts, boxes = torch.tensor([[0, 0, 9, 0]]), torch.tensor([[0, 0, value - 1, 0], [0, 0, 9, 0]])
    assert match_one(gts, boxes, RPN).tolist() == [expected, 0]


@pytest.mark.parametrize("arguments", SETTINGS)
def test_padding_never_matches_nor_counts(match_one: Match, match: Match, arguments: dict[str, Any]) -> None:
    gts, boxes = random_boxes(3, 6), random_boxes(3, 200, seed=1)
    count = torch.tensor([3, 0, 6])
    alone = [match_one(gts[n, : count[n]], boxes[n], arguments) for n in (0, 2)]
    for filling in (50.0, float("nan")):
        padded = gts.clone()
        padded[0, 3:] = padded[1] = filling
        matched = match(padded, count, boxes, **arguments)
        assert torch.equal(matched[0], alone[0])
        assert (matched[1] == -1).all()
        assert torch.equal(matched[2], alone[1])
    padded[0, 3:] = boxes[0, :3]
    assert torch.equal(match(padded, count, boxes, **arguments)[0], alone[0]), "even a perfect padded box"


def test_boxes_common_to_all_images(match: Match) -> None:
    gts, boxes, count = random_boxes(3, 5), random_boxes(100, seed=1), torch.tensor([5, 2, 1])
    common = match(gts, count, boxes, **RPN)
    assert common.shape == (3, 100)
    assert torch.equal(common, match(gts, count, boxes.expand(3, 100, 4), **RPN))


@pytest.mark.parametrize("arguments", SETTINGS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], chunk: int) -> None:
    gts, boxes, count = random_boxes(2, 5), random_boxes(100, seed=1), torch.tensor([5, 3])
    whole = match_boxes_reference(gts, count, boxes, **arguments)
    monkeypatch.setattr(matcher_reference, "CPU_CHUNK_ELEMENTS", 10 * chunk)
    monkeypatch.setattr(matcher_reference, "MIN_CHUNK", 1)
    assert torch.equal(match_boxes_reference(gts, count, boxes, **arguments), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("arguments", SETTINGS)
def test_bad_boxes_spoil_only_themselves(match_one: Match, arguments: dict[str, Any], value: float) -> None:
    gts, boxes = random_boxes(5), random_boxes(100, seed=1)
    spoiled = boxes.clone()
    spoiled[17, 2] = value
    without = [a for a in range(100) if a != 17]
    matched = match_one(gts, spoiled, arguments)
    assert matched[17] == (-2 if arguments["low_threshold"] == 0 else -1), "IoU 0 with everything"
    assert torch.equal(matched[without], match_one(gts, boxes[without], arguments))
    bad_gts = torch.cat([gts[:2], torch.full((1, 4), value), gts[2:]])
    expected = match_one(gts, boxes, arguments)
    assert torch.equal(match_one(bad_gts, boxes, arguments), expected + (expected >= 2))
    only_bad = match_one(torch.full((2, 4), value), boxes, arguments)
    assert (only_bad == -1).all()


def test_degenerate_boxes(match_one: Match) -> None:
    points = torch.tensor([[5.0, 5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0]])
    assert match_one(points, points, RPN).tolist() == [0, 1]
    assert match_one(points, points, {**BOX_HEAD, "box_offset": 0}).tolist() == [-1, -1]


@pytest.mark.parametrize(("n", "g", "a"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty(match: Match, n: int, g: int, a: int) -> None:
    count = torch.full((n,), g)
    for boxes in (torch.zeros(n, a, 4), torch.zeros(a, 4)):
        matched = match(torch.zeros(n, g, 4), count, boxes, **RPN)
        assert matched.shape == (n, a)
        assert matched.dtype == torch.int64
        assert (matched == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(match: Match, dtype: torch.dtype) -> None:
    gts, boxes, count = random_boxes(2, 5).to(dtype), random_boxes(90, seed=1).to(dtype), torch.tensor([5, 4])
    assert torch.equal(match(gts, count, boxes, **RPN), match(gts.float(), count, boxes.float(), **RPN))


def test_float64_and_non_contiguous(match: Match) -> None:
    gts, boxes, count = random_boxes(2, 5), random_boxes(2, 90, seed=1), torch.tensor([5, 4])
    expected = match(gts, count, boxes, **RPN)
    assert torch.equal(match(gts.double(), count, boxes.double(), **RPN), expected)
    strided = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(match(gts.flip(1).flip(1), count, strided, **RPN), expected)


def test_anchors_of_an_image_that_fits_no_ground_truth(match: Match) -> None:
    """A ground truth smaller than every anchor still gets its best anchors: the reason for low-quality matches."""
    anchors = grid_anchors([cell_anchors(16, [128], [0.5, 1.0, 2.0])], [(20, 30)], [16])[0]
    gts = torch.tensor([[[100.0, 100.0, 109.0, 109.0]]])
    matched = match(gts, torch.tensor([1]), anchors, **RPN)[0]
    quality = box_iou(gts[0], anchors, box_offset=1)[0]
    assert torch.equal(matched == 0, quality == quality.max())
    assert 0 < int((matched == 0).sum()) < 100


def test_no_host_sync(place: Place) -> None:
    inputs = random_boxes(2, 5), torch.tensor([5, 4]), random_boxes(90, seed=1)
    gts, count, boxes = (tensor.to(place.device) for tensor in inputs)
    with ForbidSync(), forbid_host_sync(allow_constants=False):
        match_boxes(gts, count, boxes, **RPN)
        match_boxes(gts, count, boxes, **BOX_HEAD)


@pytest.mark.parametrize(("num_gts", "num_boxes"), [(1, 1), (15, 63), (16, 64), (17, 65), (3, 300), (33, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_around_those_of_the_kernels(match: Match, num_gts: int, num_boxes: int, dtype: torch.dtype) -> None:
    gts, boxes = random_boxes(2, num_gts, dtype=dtype), random_boxes(2, num_boxes, seed=1, dtype=dtype)
    count = torch.tensor([num_gts, num_gts // 2])
    expected = match_boxes_reference(gts, count, boxes, **RPN)
    assert torch.equal(match(gts, count, boxes, **RPN), expected)


@pytest.mark.parametrize("arguments", [RPN, BOX_HEAD])
def test_everything_ties(match: Match, arguments: dict[str, Any]) -> None:
    """Equal boxes in all tiles, and a ground truth far away that makes all the boxes low-quality matches."""
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(150, 1)
    gts = torch.tensor([[[500.0, 500.0, 509.0, 509.0], [0.0, 0.0, 19.0, 19.0], [0.0, 0.0, 19.0, 19.0]]])
    assert match(gts, torch.tensor([3]), boxes, **arguments).unique().tolist() == (
        [1] if arguments["allow_low_quality_matches"] else [-1]
    )
    assert match(gts[:, 1:], torch.tensor([2]), boxes, **RPN).unique().tolist() == [0]
    assert match(gts[:, :1], torch.tensor([1]), boxes, **RPN).unique().tolist() == [0]


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e12, 1e19, 3e37])
@pytest.mark.parametrize("offset", [0, 1])
def test_tiny_and_huge_coordinates(match: Match, scale: float, offset: int) -> None:
    """Products that underflow or overflow, denormal areas, and boxes beyond the one that stands for no box."""
    gts, boxes = (random_boxes(1, n, seed=n) / 400 * scale for n in (6, 90))
    boxes[0, 3] *= 1e3
    gts[0, 2, 2:] = -gts[0, 2, 2:]
    count, arguments = torch.tensor([6]), {**RPN, "box_offset": offset}
    expected = match_boxes_reference(gts, count, boxes, **arguments)
    assert torch.equal(match(gts, count, boxes, **arguments), expected)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("column", range(4))
def test_each_coordinate_that_is_not_finite(match: Match, value: float, column: int) -> None:
    """A ground truth with one bad coordinate is as if it were not there: no box has IoU 0 to it."""
    gts, boxes = random_boxes(3), random_boxes(70, seed=1)
    alone = match_boxes_reference(gts[1:][None], torch.tensor([2]), boxes, **RPN)
    gts[0, column] = value
    boxes[65, column] = value
    matched = match(gts[None], torch.tensor([3]), boxes, **RPN)
    alone[0, 65] = -2
    matched[0, 65] -= 1
    assert torch.equal(matched, torch.where(alone >= 0, alone + 1, alone))


def test_mixed_types_compute_in_float64(match: Match) -> None:
    gts, boxes, count = random_boxes(2, 5), random_boxes(90, seed=1, dtype=torch.float64), torch.tensor([5, 4])
    expected = match_boxes_reference(gts.double(), count, boxes, **RPN)
    assert torch.equal(match(gts, count, boxes, **RPN), expected)
    assert torch.equal(match(gts.double(), count.int(), boxes.float(), **RPN), match(gts, count, boxes.float(), **RPN))


def test_inputs_are_not_written(match: Match, guarded: Guards, device: torch.device) -> None:
    inputs = random_boxes(2, 5), torch.tensor([5, 4]), random_boxes(2, 90, seed=1)
    copies = [guarded(tensor.to(device)) for tensor in inputs]
    match(*copies, **RPN)
    for copy, tensor in zip(copies, inputs, strict=True):
        assert torch.equal(copy.cpu(), tensor)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layout", ["sorted", "shuffled"])
def test_threads_and_many_tiles(threads: int, layout: str) -> None:
    """50,000 boxes on the CPU: several chunks a thread, ties of a ground truth in tiles far apart."""
    boxes, gts, count = random_boxes(25_000, seed=1).repeat(2, 1), random_boxes(2, 30), torch.tensor([30, 7])
    if layout == "sorted":
        boxes = boxes[boxes[:, 1].argsort()]
    expected = match_boxes_reference(gts, count, boxes, **RPN)
    assert (expected >= 0).any()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(match_boxes(gts, count, boxes, **RPN), expected)
    finally:
        torch.set_num_threads(before)


def test_opcheck(place: Place) -> None:
    inputs = random_boxes(2, 5), torch.tensor([5, 4]), random_boxes(2, 90, seed=1)
    gts, count, boxes = (tensor.to(place.device) for tensor in inputs)
    operator = torch.ops.fastrcnn_kernels.match_boxes.default
    torch.library.opcheck(operator, (gts, count, boxes, 0.7, 0.3, True, 1))
    torch.library.opcheck(operator, (gts, count, boxes[0], 0.5, 0.5, False, 0))


@pytest.mark.slow
def test_compile_fullgraph(place: Place) -> None:
    inputs = random_boxes(2, 5), torch.tensor([5, 4]), random_boxes(250, seed=1)
    gts, count, boxes = (tensor.to(place.device) for tensor in inputs)
    compiled = torch.compile(lambda g, c, b: match_boxes(g, c, b, **RPN), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gts, count, boxes), match_boxes(gts, count, boxes, **RPN))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: match_boxes(torch.zeros(3, 4), torch.ones(1), torch.zeros(1, 4), **RPN), r"\[N, G, 4\], got \[3, 4\]"),
        (lambda: match_boxes(torch.zeros(2, 3, 4), torch.ones(1), torch.zeros(1, 4), **RPN), r"gt_count .* got \[1\]"),
        (
            lambda: match_boxes(torch.zeros(2, 3, 4), torch.ones(2), torch.zeros(1, 5, 4), **RPN),
            r"boxes must have the shape \[A, 4\] or \[2, A, 4\], got \[1, 5, 4\]",
        ),
        (
            lambda: match_boxes(
                torch.zeros(2, 3, 4), torch.ones(2), torch.zeros(5, 4), **{**RPN, "low_threshold": 0.8}
            ),
            "0 <= low_threshold <= high_threshold is needed, got 0.8 and 0.7",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


MUTATIONS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "last ground truth wins ties": ({}, {"last_wins": True}),
    "low quality takes the ground truth whose best it is": ({}, {"own": False}),
    "no low quality": ({"allow_low_quality_matches": False}, {}),
    "modern widths": ({"box_offset": 0}, {}),
    "strictly above the high threshold": ({"high_threshold": 0.7001}, {}),
    "at most the low threshold": ({"low_threshold": 0.3001}, {}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_exact_cases_reject(name: str) -> None:
    """Each wrong rule differs from the right one on some of the cases of ``test_equals_exact_arithmetic``."""
    change, mutation = MUTATIONS[name]
    differs = False
    for seed in range(4):
        gts, boxes = exact_case(9, 900 + seed)
        wrong = exact_match(gts, boxes, {**RPN, **change}, **mutation)
        right = match_boxes_reference(gts.float()[None], torch.tensor([len(gts)]), boxes.float(), **RPN)[0]
        differs = differs or wrong != right.tolist()
    assert differs
