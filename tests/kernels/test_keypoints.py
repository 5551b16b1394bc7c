"""Keypoint targets and keypoints from heat maps against scalar loops of the same rounding, and torchvision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import _library, keypoint_targets, keypoints_from_heatmaps
from tests.kernels.helpers import ForbidSync, Guards, Place

F = np.float32


def loop_targets(
    keypoints: Tensor, boxes: Tensor, size: int, within: Tensor | None
) -> tuple[list[list[int]], list[list[bool]]]:
    """One keypoint at a time, each operation rounded to float32."""
    index, valid = [], []
    with np.errstate(all="ignore"):
        for k, row in enumerate(keypoints.float().numpy()):
            x1, y1, x2, y2 = boxes[k].float().numpy()
            seen = within is None
            if within is not None:
                left, top, right, bottom = within[k].float().tolist()
                seen = any(left <= x <= right and top <= y <= bottom and v > 0 for x, y, v in row.tolist())
            index.append([])
            valid.append([])
            for x, y, v in row:
                column = F(size - 1) if x == x2 else np.floor((x - x1) * (F(size) / (x2 - x1)))
                line = F(size - 1) if y == y2 else np.floor((y - y1) * (F(size) / (y2 - y1)))
                ok = bool(seen and 0 <= column < size and 0 <= line < size and v > 0)
                index[-1].append(int(line) * size + int(column) if ok else 0)
                valid[-1].append(ok)
    return index, valid


def make_keypoints(rows: int, points: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints about boxes: some outside, some on the border, a third unlabelled."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 100, (rows, 1, 2)).astype(np.float32)
    extent = rng.uniform(1, 80, (rows, 1, 2)).astype(np.float32)
    at = corner + extent * rng.uniform(-0.2, 1.2, (rows, points, 2)).astype(np.float32)
    at[:, ::4] = (corner + extent * rng.integers(0, 2, (rows, points, 2)))[:, ::4]
    visibility = rng.integers(0, 3, (rows, points, 1))
    boxes = torch.from_numpy(np.concatenate([corner, corner + extent], 2)[:, 0]).float()
    within = boxes + torch.from_numpy(rng.uniform(-60, 60, (rows, 4)).astype(np.float32))
    return torch.from_numpy(np.concatenate([at, visibility], 2)).float(), boxes, within


TARGET_CASES = [
    (rows, points, size, within)
    for within in (False, True)
    for rows, points, size in (
        (0, 17, 56), (3, 0, 56), (1, 1, 1), (1, 17, 56), (2, 3, 7), (5, 17, 56), (9, 16, 28), (11, 5, 33), (33, 17, 56),
    )
]  # fmt: skip


@pytest.mark.parametrize(("rows", "points", "size", "with_within"), TARGET_CASES)
def test_keypoint_targets(place: Place, guarded: Guards, rows: int, points: int, size: int, with_within: bool) -> None:
    keypoints, boxes, within = make_keypoints(rows, points, rows * 31 + size)
    inside = within if with_within else None
    index, valid = keypoint_targets(
        guarded(keypoints.to(place.device)),
        guarded(boxes.to(place.device)),
        size,
        visible_within=None if inside is None else guarded(inside.to(place.device)),
    )
    assert (index.dtype, valid.dtype) == (torch.int64, torch.bool)
    assert index.shape == valid.shape == (rows, points)
    wanted_index, wanted_valid = loop_targets(keypoints, boxes, size, inside)
    assert index.tolist() == wanted_index
    assert valid.tolist() == wanted_valid


def test_keypoint_targets_by_hand(place: Place) -> None:
    """A box of 10 x 20 with a map of 5: cells of 2 x 4. The right and lower borders belong to the last cells."""
    points = [[100.0, 200, 1], [101.9, 200, 2], [102, 204, 1], [110, 220, 1], [109.9, 219.9, 1], [110.1, 210, 1],
              [99.9, 210, 1], [105, 210, 0], [105, 210, -1]]  # fmt: skip
    boxes = torch.tensor([[100.0, 200, 110, 220]], device=place.device)
    index, valid = keypoint_targets(torch.tensor([points], device=place.device), boxes, 5)
    assert index.tolist() == [[0, 0, 6, 24, 24, 0, 0, 0, 0]]
    assert valid.tolist() == [[True, True, True, True, True, False, False, False, False]]


def test_keypoint_targets_within(place: Place) -> None:
    """The border counts as within; an unlabelled point within does not; a row without any counts for nothing."""
    points = torch.tensor([[[5.0, 5, 2], [8, 8, 0]]] * 4, device=place.device)
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 4, device=place.device)
    within = torch.tensor([[5.0, 5, 6, 6], [5.1, 5, 9, 9], [0, 0, 5, 5], [7, 7, 9, 9]], device=place.device)
    _, valid = keypoint_targets(points, boxes, 10, visible_within=within)
    assert valid[:, 0].tolist() == [True, False, True, False]
    assert not valid[:, 1].any()


SPECIAL = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-42]


@pytest.mark.parametrize("value", SPECIAL)
def test_keypoint_targets_of_unusual_values(place: Place, value: float) -> None:
    keypoints, boxes, within = make_keypoints(15, 3, 5)
    for row in range(3):
        keypoints[row, 0, row] = value
    for row in range(4):
        boxes[3 + row, row] = within[7 + row, row] = value
    boxes[12, 2:] = boxes[12, :2]  # no extent: only its own corner is in it
    keypoints[12, 0, :2] = boxes[12, :2]
    boxes[13] = boxes[13, [2, 3, 0, 1]]
    on = place.device
    index, valid = keypoint_targets(keypoints.to(on), boxes.to(on), 8, visible_within=within.to(on))
    assert (index.tolist(), valid.tolist()) == loop_targets(keypoints, boxes, 8, within)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keypoint_targets_types_and_strides(place: Place, dtype: torch.dtype) -> None:
    keypoints, boxes, _ = make_keypoints(6, 4, 7)
    keypoints, boxes = keypoints.to(dtype), boxes.to(dtype)
    wide = torch.zeros(6, 4, 5, dtype=dtype, device=place.device)
    wide[..., 1:4] = keypoints
    index, valid = keypoint_targets(wide[..., 1:4], boxes.T.contiguous().T.to(place.device), 14)
    if dtype != torch.float64:
        assert (index.tolist(), valid.tolist()) == loop_targets(keypoints, boxes, 14, None)
    else:
        wanted = keypoint_targets(keypoints.float(), boxes.float(), 14)
        assert (valid.cpu() == wanted[1].cpu()).float().mean() > 0.9


def loop_peak(heat: Any, box: list[float], largest: int = 1 << 14) -> tuple[float, float, float]:
    """The resized map pixel by pixel, each operation rounded to the type of ``heat`` (NumPy)."""
    kind = heat.dtype.type
    x1, y1, x2, y2 = (kind(c) for c in box)
    width, height = max(x2 - x1, kind(1)), max(y2 - y1, kind(1))
    columns, rows = (int(min(np.ceil(side), largest)) for side in (width, height))

    def taps(i: int, size: int, count: int) -> tuple[list[int], list[Any]]:
        real = (kind(i) + kind(0.5)) * (kind(size) / kind(count)) - kind(0.5)
        below = np.floor(real)
        weights = []
        for distance in (real - below + kind(1), real - below, kind(1) - (real - below)):
            weights.append(distance)
        weights.append(weights[2] + kind(1))
        a = kind(-0.75)
        far = [((a * x - kind(5) * a) * x + kind(8) * a) * x - kind(4) * a for x in (weights[0], weights[3])]
        near = [((a + kind(2)) * x - (a + kind(3))) * x * x + kind(1) for x in (weights[1], weights[2])]
        return [min(max(int(below) + t, 0), size - 1) for t in range(-1, 3)], [far[0], *near, far[1]]

    best = None
    across = [taps(i, heat.shape[1], columns) for i in range(columns)]
    for y in range(rows):
        at_y, by_y = taps(y, heat.shape[0], rows)
        for x, (at_x, by_x) in enumerate(across):
            value = None
            for r, v in zip(at_y, by_y, strict=True):
                line = heat[r, at_x[0]] * by_x[0]
                for c, w in zip(at_x[1:], by_x[1:], strict=True):
                    line = line + heat[r, c] * w
                value = line * v if value is None else value + line * v
            if best is None or value > best[0] or (np.isnan(value) and not np.isnan(best[0])):
                best = (value, x, y)
    assert best is not None
    value, x, y = best
    return (
        float((kind(x) + kind(0.5)) * (width / kind(columns)) + x1),
        float((kind(y) + kind(0.5)) * (height / kind(rows)) + y1),
        float(value),
    )


def make_maps(kind: str, rows: int, points: int, height: int, width: int) -> Tensor:
    rng = np.random.default_rng(rows * 100 + height)
    maps = rng.normal(size=(rows, points, height, width))
    if kind == "peaked":
        y, x = np.mgrid[:height, :width]
        cy, cx = (rng.uniform(0, side, (rows, points, 1, 1)) for side in (height, width))
        maps = maps * 0.3 + 9 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 4)
    elif kind == "integer":
        maps = np.round(maps)
    elif kind == "constant":
        maps = np.zeros_like(maps) + 2.5
    elif kind == "negative":
        maps = maps - 50
    return torch.from_numpy(maps.astype(np.float32))


PEAK_CASES = [
    (kind, *shape, box)
    for kind in ("noise", "peaked", "integer", "constant", "negative")
    for shape, box in (
        ((2, 2, 5, 5), (3.5, 4.25, 15.5, 11.0)),
        ((1, 3, 7, 7), (10.0, 0.0, 14.5, 22.25)),
        ((1, 1, 1, 1), (0.0, 0.0, 3.0, 2.0)),
        ((1, 2, 8, 3), (5.5, 5.5, 6.0, 5.0)),
        ((1, 2, 4, 9), (-8.0, -3.0, 1.0, 9.5)),
        ((1, 1, 2, 2), (0.1, 0.2, 30.7, 4.9)),
    )
]


@pytest.mark.parametrize(("kind", "rows", "points", "height", "width", "box"), PEAK_CASES)
def test_keypoints_from_heatmaps(
    place: Place, guarded: Guards, kind: str, rows: int, points: int, height: int, width: int, box: tuple[float, ...]
) -> None:
    """To the bit, ties included: the peak is the first of the highest pixels."""
    maps = make_maps(kind, rows, points, height, width)
    boxes = torch.tensor([[c + 2.25 * k for c in box] for k in range(rows)])
    found = keypoints_from_heatmaps(guarded(maps.to(place.device)), guarded(boxes.to(place.device)))
    assert found.dtype == torch.float32
    wanted = [[loop_peak(maps[k, j].numpy(), boxes[k].tolist()) for j in range(points)] for k in range(rows)]
    assert found.cpu().tolist() == [[list(point) for point in row] for row in wanted]


@pytest.mark.parametrize("kind", ["noise", "peaked", "integer"])
@pytest.mark.parametrize("side", [(56, 56), (14, 30)])
def test_large_maps_equal_the_reference(kind: str, side: tuple[int, int]) -> None:
    """The C++ kernel, which looks at a few cells only, against the whole resized map."""
    maps = make_maps(kind, 6, 17, *side)
    rng = np.random.default_rng(1)
    corner, extent = rng.uniform(0, 50, (6, 2)), np.exp(rng.uniform(0, 6, (6, 2)))
    boxes = torch.from_numpy(np.concatenate([corner, corner + extent], 1)).float()
    results = [
        _library._resolve(_library._OPERATORS["keypoints_from_heatmaps"], name)(maps, boxes)
        for name in ("reference", "cpp")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_maps_that_are_not_finite(place: Place, value: float) -> None:
    """No hang and no wrong place: NaN is the highest, as in torch.argmax."""
    maps = make_maps("noise", 1, 3, 4, 4)
    maps[0, 0, 2, 1] = value
    maps[0, 1] = value
    boxes = torch.tensor([[0.0, 0, 9, 6]])
    with np.errstate(all="ignore"):
        wanted = torch.tensor([[loop_peak(maps[0, j].numpy(), boxes[0].tolist()) for j in range(3)]])
    found = keypoints_from_heatmaps(maps.to(place.device), boxes.to(place.device)).cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("coordinate", range(4))
def test_boxes_that_are_not_finite(place: Place, value: float, coordinate: int) -> None:
    maps = make_maps("noise", 2, 2, 4, 4)
    boxes = torch.tensor([[0.0, 0, 9, 6]] * 2)
    boxes[0, coordinate] = value
    found = keypoints_from_heatmaps(maps.to(place.device), boxes.to(place.device))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_box_inside_out(place: Place) -> None:
    """Sides below 1 count as 1: the one pixel is the middle of the map."""
    maps = make_maps("noise", 1, 1, 4, 4)
    found = keypoints_from_heatmaps(maps.to(place.device), torch.tensor([[9.0, 6.0, 0.0, 0.0]], device=place.device))
    assert found[0, 0, :2].tolist() == [9.5, 6.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keypoints_from_heatmaps_types_and_strides(place: Place, dtype: torch.dtype) -> None:
    maps = make_maps("noise", 2, 3, 5, 6).to(dtype)
    boxes = torch.tensor([[0.0, 0, 9, 6], [3, 3, 12, 14]])
    found = keypoints_from_heatmaps(
        maps.to(place.device).to(memory_format=torch.channels_last), boxes.T.contiguous().T.to(place.device)
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = maps if dtype == torch.float64 else maps.float()
    wanted = [[loop_peak(exact[k, j].numpy(), boxes[k].tolist()) for j in range(3)] for k in range(2)]
    torch.testing.assert_close(found.cpu(), torch.tensor(wanted, dtype=found.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "points"), [(0, 17), (3, 0)])
def test_nothing(place: Place, rows: int, points: int) -> None:
    maps = torch.zeros(rows, points, 4, 4, device=place.device)
    boxes = torch.zeros(rows, 4, device=place.device)
    for score in ("logit", "probability"):
        assert keypoints_from_heatmaps(maps, boxes, score=score).shape == (rows, points, 3)


def test_probability_is_detectron2s(place: Place) -> None:
    """exp(peak - max) / sum(exp(map - max)), the sum over the cells of the map that was predicted."""
    maps, boxes = make_maps("peaked", 1, 2, 6, 6), torch.tensor([[0.0, 0, 11, 9]])
    found = keypoints_from_heatmaps(maps.to(place.device), boxes.to(place.device), score="probability").cpu()
    plain = keypoints_from_heatmaps(maps, boxes)
    assert torch.equal(found[..., :2], plain[..., :2])
    share = 1 / (maps.double() - plain[..., 2].double()[..., None, None]).exp().sum((2, 3))
    torch.testing.assert_close(found[..., 2].double(), share, rtol=1e-5, atol=0)


def test_equal_to_torchvision(place: Place) -> None:
    heads = pytest.importorskip("torchvision.models.detection.roi_heads", reason="torchvision is not installed")
    maps = make_maps("peaked", 2, 3, 14, 14)
    boxes = torch.tensor([[3.5, 4.25, 25.5, 21.0], [10.0, 0.0, 24.5, 22.25]])
    points, scores = heads.heatmaps_to_keypoints(maps, boxes)
    found = keypoints_from_heatmaps(maps.to(place.device), boxes.to(place.device)).cpu()
    torch.testing.assert_close(found[..., :2], points[..., :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[..., 2], scores, rtol=1e-5, atol=1e-5)
    keypoints, boxes, _ = make_keypoints(9, 17, 3)
    index, valid = heads.keypoints_to_heatmap(keypoints, boxes, 56)
    ours = keypoint_targets(keypoints.to(place.device), boxes.to(place.device), 56)
    assert torch.equal(ours[0].cpu(), index)
    assert torch.equal(ours[1].cpu(), valid.bool())


def test_keypoint_targets_never_wait_for_the_device(place: Place) -> None:
    keypoints, boxes, within = (t.to(place.device) for t in make_keypoints(4, 5, 1))
    with ForbidSync():
        keypoint_targets(keypoints, boxes, 56, visible_within=within)


def test_opcheck_and_compile(place: Place) -> None:
    keypoints, boxes, within = (t.to(place.device) for t in make_keypoints(3, 2, 1))
    maps = make_maps("noise", 3, 2, 3, 3).to(place.device)
    small = torch.tensor([[0.0, 0, 3, 4]] * 3, device=place.device)
    operators = torch.ops.fastrcnn_kernels
    torch.library.opcheck(operators.keypoint_targets.default, (keypoints, boxes, 7, within))
    torch.library.opcheck(operators.keypoints_from_heatmaps.default, (maps, small))

    def run(m: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        found = keypoints_from_heatmaps(m, small, score="probability")
        return (found * 2, *keypoint_targets(k, boxes, 7))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(maps, keypoints)
    for a, b in zip(compiled, run(maps, keypoints), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keypoint_targets(torch.zeros(2, 3), torch.zeros(2, 4), 5), "keypoints must be floating"),
        (lambda: keypoint_targets(torch.zeros(2, 3, 3).long(), torch.zeros(2, 4), 5), "keypoints must be floating"),
        (lambda: keypoint_targets(torch.zeros(2, 3, 3), torch.zeros(3, 4), 5), "boxes must be"),
        (
            lambda: keypoint_targets(torch.zeros(2, 3, 3), torch.zeros(2, 4), 5, visible_within=torch.zeros(4)),
            "visible_within must be",
        ),
        (lambda: keypoint_targets(torch.zeros(2, 3, 3), torch.zeros(2, 4), 0), "heatmap_size must be"),
        (lambda: keypoints_from_heatmaps(torch.zeros(2, 3, 4), torch.zeros(2, 4)), "maps must be floating"),
        (lambda: keypoints_from_heatmaps(torch.zeros(2, 3, 0, 4), torch.zeros(2, 4)), "maps must be floating"),
        (lambda: keypoints_from_heatmaps(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)), "boxes must be"),
        (lambda: keypoints_from_heatmaps(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4), score="odds"), "score must be"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
