"""append_boxes, gather_regions and assign_levels against scalar loops, on every back-end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import append_boxes, assign_levels, gather_regions
from fastrcnn_kernels.regions import assign_levels_reference, level_areas
from tests.kernels.helpers import ForbidSync, Guards
from tests.kernels.nosync import forbid_host_sync

OPERATORS = torch.ops.fastrcnn_kernels
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64]
# maskrcnn-benchmark, detectron2, torchvision: eps inside and outside the logarithm, and the offset.
RULES: dict[str, dict[str, Any]] = {
    "maskrcnn_benchmark": {"eps": 1e-6, "eps_outside": 0.0, "box_offset": 1},
    "detectron2": {"eps": 1e-8, "eps_outside": 0.0, "box_offset": 0},
    "torchvision": {"eps": 0.0, "eps_outside": 1e-6, "box_offset": 0},
    "one-level": {"min_level": 4, "max_level": 4},
    "five-levels": {"min_level": 2, "max_level": 6, "canonical_size": 112.0, "canonical_level": 3},
    "six-levels": {"min_level": 1, "max_level": 6},
}


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 500
    side = torch.exp(torch.rand(*shape, 2, generator=generator) * 7)
    return torch.cat([corner, corner + side], dim=-1).to(dtype)


def scalar_append(
    boxes: Tensor, scores: Tensor, count: Tensor, added: Tensor, added_count: Tensor
) -> tuple[list[Any], ...]:
    capacity = boxes.shape[1] + added.shape[1]
    out_boxes, out_scores, out_count = [], [], []
    for n, (c, g) in enumerate(zip(count.tolist(), added_count.tolist(), strict=True)):
        rows = boxes[n, :c].tolist() + added[n, :g].to(boxes.dtype).tolist()
        out_boxes.append(rows + [[0.0] * 4] * (capacity - c - g))
        out_scores.append(scores[n, :c].tolist() + [1.0] * g + [-INF] * (capacity - c - g))
        out_count.append(c + g)
    return out_boxes, out_scores, out_count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "added_count", "room", "more"),
    [
        pytest.param([3, 0, 5], [2, 4, 0], 5, 4, id="some"),
        pytest.param([0, 0], [0, 0], 3, 2, id="nothing-real"),
        pytest.param([5, 5], [3, 3], 5, 3, id="all-real"),
        pytest.param([200, 3], [7, 100], 200, 100, id="several-blocks"),
        pytest.param([0, 0], [2, 0], 0, 2, id="no-room-for-proposals"),
        pytest.param([2, 1], [0, 0], 2, 0, id="no-ground-truth"),
        pytest.param([0], [0], 0, 0, id="no-slot"),
        pytest.param([], [], 3, 2, id="no-image"),
    ],
)
def test_append_equals_loops(
    device: torch.device, guarded: Guards, dtype: torch.dtype, count: list[int], added_count: list[int], room: int,
    more: int,
) -> None:  # fmt: skip
    n = len(count)
    boxes, added = random_boxes(n, room, dtype=dtype), random_boxes(n, more, seed=1)
    scores = torch.rand(n, room, generator=torch.Generator().manual_seed(2)).to(dtype)
    # What is padding must not show, whatever it is.
    for image, (c, g) in enumerate(zip(count, added_count, strict=True)):
        boxes[image, c:], scores[image, c:], added[image, g:] = NAN, NAN, NAN
    counts = torch.tensor(count, dtype=torch.int64), torch.tensor(added_count, dtype=torch.int64)
    arguments = [guarded(t.to(device)) for t in (boxes, scores, counts[0], added, counts[1])]
    found = append_boxes(*arguments)
    expected = scalar_append(boxes, scores, counts[0], added, counts[1])
    assert [t.dtype for t in found] == [dtype, dtype, torch.int64]
    assert found[0].shape == (n, room + more, 4)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual.cpu(), torch.tensor(wanted, dtype=actual.dtype).reshape(actual.shape))


def sample(n: int, room: int, gt: int, slots: int, most: int, seed: int = 0) -> dict[str, Tensor]:
    """A sample as ``sample_balanced`` gives it: the first image of no positive, the last of nothing but positives."""
    generator = torch.Generator().manual_seed(seed)
    num_positive = torch.randint(0, most + 1, (n,), generator=generator)
    num_sampled = num_positive + torch.randint(0, slots - most + 1, (n,), generator=generator)
    if n:
        num_positive[0], num_positive[-1] = 0, most if room * gt else 0
        num_sampled[-1] = slots if room else 0
        num_sampled = torch.maximum(num_sampled, num_positive)
    if room * gt == 0:
        num_positive.zero_()
    if room == 0:
        num_sampled.zero_()
    indices = torch.randint(0, max(room, 1), (n, slots), generator=generator)
    indices = torch.where(torch.arange(slots) < num_sampled[:, None], indices, -1)
    return {
        "gt_labels": torch.randint(1, 81, (n, gt), generator=generator),
        # Of what is not positive it may be -1, or -2.
        "matched": torch.randint(0, max(gt, 1), (n, room), generator=generator),
        "indices": indices,
        "num_positive": num_positive,
        "num_sampled": num_sampled,
    }


def scalar_gather(boxes: Tensor, gt_boxes: Tensor, given: dict[str, Tensor], most: int) -> dict[str, dict[Any, Any]]:
    """What is specified of the outputs, by place."""
    found: dict[str, dict[Any, Any]] = {name: {} for name in NAMES[:-1]}
    gt_capacity = gt_boxes.shape[1]
    for n, row in enumerate(given["indices"].tolist()):
        for slot, index in enumerate(row):
            at = (n, slot)
            positive, valid = slot < given["num_positive"][n], slot < given["num_sampled"][n]
            box = boxes[n, index].tolist() if valid else None
            gt = int(given["matched"][n, index]) if positive else 0
            label = int(given["gt_labels"][n, gt]) if positive else 0
            found["labels"][at] = label if valid else -100
            found["matched_idxs"][at] = gt
            if valid:
                found["boxes"][at] = box
                found["rois"][at] = [float(n), *box]
            else:
                found["rois"][(*at, 0)] = -1.0
            if positive:
                found["wanted"][at] = gt_boxes[n, gt].to(boxes.dtype).tolist()
            if slot < most:
                found["positive_labels"][at] = label if positive else -1
                found["instances"][at] = n * gt_capacity + gt if positive else -1
                if positive:
                    found["positive_rois"][at] = [float(n), *box]
                else:
                    found["positive_rois"][(*at, 0)] = -1.0
    return found


NAMES = (
    "boxes", "rois", "labels", "matched_idxs", "wanted", "positive_rois", "positive_labels", "instances", "total",
)  # fmt: skip
SHAPES = {
    "some": (3, 20, 4, 12, 5),
    "one-slot": (1, 1, 1, 1, 1),
    "several-blocks": (2, 300, 9, 200, 150),
    "no-positive-slots": (2, 6, 3, 4, 0),
    "all-slots-positive": (2, 6, 3, 4, 4),
    "no-ground-truth": (2, 6, 0, 4, 2),
    "no-proposals": (2, 0, 3, 4, 2),
    "no-slots": (2, 5, 3, 0, 0),
    "no-image": (0, 5, 3, 4, 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_equals_loops(device: torch.device, guarded: Guards, dtype: torch.dtype, shape: str) -> None:
    n, room, gt, slots, most = SHAPES[shape]
    boxes, gt_boxes = random_boxes(n, room, dtype=dtype), random_boxes(n, gt, seed=1)
    given = sample(n, room, gt, slots, most)
    places = {name: guarded(t.to(device)) for name, t in given.items()}
    out = gather_regions(guarded(boxes.to(device)), guarded(gt_boxes.to(device)), **places, most_positives=most)
    found = {name: tensor.cpu() for name, tensor in zip(NAMES, out, strict=True)}
    for name, places_of in scalar_gather(boxes, gt_boxes, given, most).items():
        for place, wanted in places_of.items():
            assert found[name][place].tolist() == wanted, (name, place)
    assert found["total"] == max(int(given["num_positive"].sum()), 1)
    assert found["rois"].shape == (n, slots, 5)
    assert found["positive_rois"].shape == (n, most, 5)
    # What is not specified is finite all the same: it is pooled and multiplied by nothing.
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_levels_equal_the_formula(device: torch.device, dtype: torch.dtype, rule: str) -> None:
    """Bit for bit what a CPU's logarithm gives, also for the numbers beside each boundary and for rows with a gap."""
    rules = {"min_level": 2, "max_level": 5, "canonical_size": 224.0, "canonical_level": 4, "eps": 1e-6,
             "eps_outside": 0.0, "box_offset": 0, **RULES[rule]}  # fmt: skip
    boxes = random_boxes(300, dtype=dtype)
    bad = torch.tensor([[NAN] * 4, [0, 0, INF, INF], [0, 0, -5, 5], [5, 5, 5, 5], [-INF, 0, INF, 1]], dtype=dtype)
    sides = torch.cat([torch.nextafter(s, e) for e in (torch.zeros(1), torch.full((1,), INF)) for s in [SIDES]])
    squares = torch.cat([SIDES, sides]).to(dtype)[:, None] * torch.tensor([0, 0, 1, 1], dtype=dtype)
    every = torch.cat([boxes, bad, squares, squares - torch.tensor([0, 0, 1, 1], dtype=dtype)])
    expected = assign_levels_reference(every, *rules.values())
    assert torch.equal(assign_levels(every.to(device), **rules).cpu(), expected)
    rois = torch.cat([torch.zeros(len(every), 1, dtype=dtype), every], dim=1).to(device)
    assert torch.equal(assign_levels(rois[:, 1:], **rules).cpu(), expected)
    assert torch.equal(assign_levels(every.to(device)[None, :, None], **rules)[0, :, 0].cpu(), expected)
    assert assign_levels(every.to(device)[3], **rules).item() == expected[3]
    assert assign_levels(every.to(device)[:0], **rules).shape == (0,)


SIDES = torch.tensor([7.0, 14, 28, 56, 112, 224, 448, 896, 1792])


@pytest.mark.parametrize("dtype", DTYPES)
def test_areas_are_where_the_level_changes(dtype: torch.dtype) -> None:
    areas = level_areas(dtype, 2, 5, 224.0, 4, 1e-6, 0.0)
    assert areas == pytest.approx([112.0**2, 224.0**2, 448.0**2], rel=1e-5)
    for level, area in enumerate(areas, start=1):
        inside = torch.tensor(area, dtype=dtype)
        outside = torch.nextafter(inside, torch.zeros((), dtype=dtype))
        boxes = torch.stack([torch.stack([t * 0, t * 0, t, t * 0 + 1]) for t in (outside, inside)])
        assert assign_levels(boxes).tolist() == [level - 1, level]


def case(n: int = 2) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    boxes, gt_boxes = random_boxes(n, 7), random_boxes(n, 3, seed=1)
    count, added_count = torch.tensor([4, 7]), torch.tensor([3, 0])
    given = sample(n, 7, 3, 6, 3)
    return (
        (boxes, torch.rand(n, 7), count, gt_boxes, added_count),
        (boxes, gt_boxes, *given.values(), 3, -100),
        (boxes[0], 2, 5, 224.0, 4, 1e-6, 0.0, 1),
    )


@pytest.mark.parametrize("index", range(3), ids=["append_boxes", "gather_regions", "assign_levels"])
def test_opcheck(index: int) -> None:
    operator = (OPERATORS.append_boxes, OPERATORS.gather_regions, OPERATORS.assign_levels)[index].default
    torch.library.opcheck(operator, case()[index])


def test_compiles_and_never_waits(device: torch.device) -> None:
    append, gather, levels = (tuple(a.to(device) if isinstance(a, Tensor) else a for a in c) for c in case())

    def all_of_it(append: Any, gather: Any, levels: Any) -> Any:
        *tensors, most, ignore = gather
        return (
            *append_boxes(*append),
            *gather_regions(*tensors, most_positives=most, ignore_label=ignore),
            assign_levels(levels[0], box_offset=1),
        )

    expected = all_of_it(append, gather, levels)  # the areas of the levels are found once
    with forbid_host_sync(allow_constants=False), ForbidSync():
        found = all_of_it(append, gather, levels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = torch.compile(all_of_it, fullgraph=True, backend="aot_eager")(append, gather, levels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bad_arguments() -> None:
    append, gather, _ = case()
    boxes, scores, count, added, added_count = append
    for wrong, message in (
        ((boxes[0], scores, count, added, added_count), r"boxes must be float32 or float64 \[N, P, 4\]"),
        ((boxes.half(), scores, count, added, added_count), "boxes must be float32"),
        ((boxes, scores[:1], count, added, added_count), "scores must be floating"),
        ((boxes, scores, count.int(), added, added_count), "count must be int64"),
        ((boxes, scores, count, added[:1], added_count), "added must be floating"),
        ((boxes, scores, count, added, added_count[:1]), "added_count must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            append_boxes(*wrong)
    tensors = list(gather[:7])
    names = ("boxes", "gt_boxes", "gt_labels", "matched", "indices", "num_positive", "num_sampled")
    for place, name in enumerate(names):
        wrong = [t[0] if i == place else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=f"{name} must be"):
            gather_regions(*wrong, most_positives=3)
    with pytest.raises(ValueError, match="most_positives must be from 0 to 6, got 7"):
        gather_regions(*tensors, most_positives=7)
