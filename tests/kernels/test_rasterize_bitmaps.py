"""Mask targets from bitmaps: maskrcnn-benchmark's crop and resize, detectron2's RoIAlign, pixel for pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import rasterize_bitmaps
from tests.kernels.exact_fma import exact_fma  # noqa: F401  a fixture
from tests.kernels.helpers import Guards, Place

HEIGHT, WIDTH = 45, 61
CONVENTIONS = ("maskrcnn_benchmark", "detectron2")


def blobs(count: int, seed: int) -> Tensor:
    """Bitmaps of a few smooth shapes, one of noise, one empty and one full. uint8 [count, HEIGHT, WIDTH]"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 8, generator=generator)
    maps = F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[:, 0] > 0.5
    maps[0] = torch.rand(HEIGHT, WIDTH, generator=generator) > 0.5
    maps[1], maps[2] = False, True
    return maps.to(torch.uint8)


def random_boxes(count: int, seed: int) -> Tensor:
    """Of all sizes, fractional and whole, sticking out on every side and outside the image."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH + 10.0, HEIGHT + 10.0]) - 10
    extent = torch.rand(count, 2, generator=generator) ** 2 * 60 + 0.2
    boxes = torch.cat([corner, corner + extent], dim=1)
    boxes[::3] = boxes[::3].round() + torch.tensor([0.0, 0, 1, 1])
    boxes[1::8] = (boxes[1::8] * 2).round() / 2 + torch.tensor([0.0, 0, 1, 1])
    boxes[3::20] += 200
    boxes[4] = torch.tensor([3.0, 2, 31, 30])  # 28 pixels: nothing to resize
    return boxes


def some(place: Place, count: int) -> int:
    return min(count, 5) if place == Place("triton", "cpu") else count


def found(place: Place, maps: Tensor, idxs: Tensor, boxes: Tensor, size: int, **others: Any) -> np.ndarray:
    moved = (t.to(place.device) for t in (maps, idxs, boxes))
    return rasterize_bitmaps(*moved, size, **others).cpu().numpy()


def crop_by_maskrcnn_benchmark(bitmap: Tensor, box: list[float], size: int) -> np.ndarray:
    """``BinaryMaskList.crop`` and ``resize``, statement by statement."""
    current_height, current_width = bitmap.shape
    xmin, ymin, xmax, ymax = (round(float(b)) for b in box)
    xmin = min(max(xmin, 0), current_width - 1)
    ymin = min(max(ymin, 0), current_height - 1)
    xmax = min(max(xmax, 0), current_width)
    ymax = min(max(ymax, 0), current_height)
    xmax = max(xmax, xmin + 1)
    ymax = max(ymax, ymin + 1)
    masks = bitmap[None, ymin:ymax, xmin:xmax]
    resized = F.interpolate(masks[None].float(), size=(size, size), mode="bilinear", align_corners=False)
    return resized[0].type_as(masks)[0].numpy()


def align_by_loops(bitmap: Tensor, box: list[float], size: int) -> np.ndarray:
    """RoIAlign (aligned, adaptive) in float32, sample by sample, as torchvision's CPU kernel sums."""
    f = np.float32
    height, width = bitmap.shape
    pixels = bitmap.numpy().astype(np.float32)
    x1, y1, x2, y2 = (f(f(v) - f(0.5)) for v in box)
    bin_w, bin_h = f(f(x2 - x1) / f(size)), f(f(y2 - y1) / f(size))
    grid_h, grid_w = int(np.ceil(bin_h)), int(np.ceil(bin_w))

    def taps(start: Any, bin_size: Any, i: int, k: int, grid: int, extent: int) -> Any:
        at = f(f(start + f(f(i) * bin_size)) + f(f(f(k + 0.5) * bin_size) / f(grid)))
        if at < -1 or at > extent:
            return None
        at = max(at, f(0))
        low = int(at)
        if low >= extent - 1:
            return extent - 1, extent - 1, f(0), f(1)
        part = f(at - f(low))
        return low, low + 1, part, f(f(1) - part)

    out = np.zeros((size, size), np.uint8)
    for i in range(size):
        for j in range(size):
            total = f(0)
            for a in range(grid_h):
                y = taps(y1, bin_h, i, a, grid_h, height)
                for b in range(grid_w):
                    x = taps(x1, bin_w, j, b, grid_w, width)
                    if y is None or x is None:
                        continue
                    value = f(f(y[3] * x[3]) * pixels[y[0], x[0]]) + f(f(y[3] * x[2]) * pixels[y[0], x[1]])
                    value = f(value + f(f(y[2] * x[3]) * pixels[y[1], x[0]]))
                    value = f(value + f(f(y[2] * x[2]) * pixels[y[1], x[1]]))
                    total = f(total + value)
            out[i, j] = f(total / f(max(grid_h * grid_w, 1))) >= f(0.5)
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [1, 5, 14, 28, 70])
def test_equals_maskrcnn_benchmark(place: Place, guarded: Guards, size: int, dtype: torch.dtype) -> None:
    count = some(place, 150)
    maps, boxes = blobs(6, size), random_boxes(150, size)[:count]
    idxs = torch.arange(count) % 6
    masks = found(place, guarded(maps.to(dtype)), idxs, guarded(boxes), size)
    wanted = [crop_by_maskrcnn_benchmark(maps[i], b, size) for i, b in zip(idxs, boxes.tolist(), strict=True)]
    assert masks.dtype == np.uint8
    assert 0.05 < np.mean(wanted) < 0.95
    assert np.array_equal(masks, wanted)


@pytest.mark.parametrize("size", [5, 9])
def test_equals_detectron2(place: Place, guarded: Guards, size: int) -> None:
    count = some(place, 30)
    maps, boxes = blobs(6, size), random_boxes(150, size)[:count]
    idxs = torch.arange(count) % 6
    masks = found(place, guarded(maps), idxs, guarded(boxes), size, convention="detectron2")
    wanted = [align_by_loops(maps[i], b, size) for i, b in zip(idxs, boxes.tolist(), strict=True)]
    assert 0.05 < np.mean(wanted) < 0.95
    assert np.array_equal(masks, wanted)


@pytest.mark.parametrize("size", [14, 28])
def test_equals_roi_align_of_torchvision(place: Place, size: int) -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    count = some(place, 150)
    maps, boxes = blobs(6, size), random_boxes(150, size)[:count]
    idxs = torch.arange(count) % 6
    rois = torch.cat([idxs[:, None].float(), boxes], dim=1)
    theirs = ops.roi_align(maps[:, None].float(), rois, (size, size), 1.0, 0, True)[:, 0] >= 0.5
    assert np.array_equal(found(place, maps, idxs, boxes, size, convention="detectron2"), theirs.numpy())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_hand_computed(place: Place, convention: str) -> None:
    bitmap = torch.zeros(1, 16, 16, dtype=torch.uint8)
    bitmap[0, 4:12, 4:12] = 255  # what is not 0 is set
    boxes = torch.tensor([[4.0, 4, 12, 12], [0, 0, 16, 16], [4, 4, 20, 12], [0, 0, 4, 4]])
    masks = found(place, bitmap, torch.zeros(4, dtype=torch.int64), boxes, 4, convention=convention)
    assert masks[0].all()
    assert masks[1].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert masks[2, :, :2].all()
    assert not masks[3].any()


def test_corners_between_pixels_are_rounded_half_to_even(place: Place) -> None:
    """maskrcnn-benchmark's ``crop`` rounds with Python's ``round``: 0.5 and 2.5 go down, 1.5 and 3.5 up."""
    bitmap = torch.zeros(1, 8, 8, dtype=torch.uint8)
    bitmap[0, 0:2, 0:2] = 1  # rows and columns 0 and 1
    boxes = torch.tensor([[0.5, 0.5, 2.5, 2.5], [1.5, 1.5, 3.5, 3.5]])  # pixels [0, 2) and [2, 4)
    masks = found(place, bitmap, torch.zeros(2, dtype=torch.int64), boxes, 2)
    assert masks[0].all()
    assert not masks[1].any()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bad_boxes_and_no_instance_give_zeros(place: Place, convention: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0, 0, 8, 8], [3, 3, 3, 9], [9, 3, 3, 9], [nan, 0, 8, 8], [0, 0, 8, nan], [0, 0, inf, 8], [-inf, 0, 8, 8]]
    rows += [[0, 0, 1e9, 9], [0, 0, 8, 8], [0, 0, 8, 8]]
    idxs = torch.tensor([0] * 8 + [-1, 7])  # an instance too high is the last
    maps = torch.ones(1, 20, 20, dtype=torch.uint8)
    masks = found(place, maps, idxs, torch.tensor(rows), 7, convention=convention)
    assert [bool(m.any()) for m in masks] == [True, *[False] * 8, True]
    # maskrcnn-benchmark truncates sums of weights, of which a few round to just below one.
    assert masks[0].all() if convention == "detectron2" else masks[0].mean() > 0.9


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_empty(place: Place, convention: str) -> None:
    for shape, count in (((0, 5, 5), 2), ((2, 0, 5), 2), ((2, 5, 5), 0)):
        maps = torch.ones(shape, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1)
        masks = found(place, maps, torch.zeros(count, dtype=torch.int64), boxes, 6, convention=convention)
        assert masks.shape == (count, 6, 6)
        assert not masks.any()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_not_contiguous(place: Place, convention: str) -> None:
    maps, boxes, idxs = blobs(4, 3), random_boxes(20, 3)[5:9], torch.tensor([3, 2, 0, 3])
    expected = found(place, maps, idxs, boxes, 9, convention=convention)
    strided = found(place, maps.mT.contiguous().mT, idxs, boxes.T.contiguous().T, 9, convention=convention)
    assert np.array_equal(strided, expected)
    assert np.array_equal(found(place, maps, idxs.int(), boxes.double(), 9, convention=convention), expected)


def test_opcheck(place: Place) -> None:
    operator = torch.ops.fastrcnn_kernels.rasterize_bitmaps.default
    tensors = [t.to(place.device) for t in (blobs(3, 3), torch.tensor([2, 0]), random_boxes(20, 3)[5:7])]
    for convention in CONVENTIONS:
        torch.library.opcheck(operator, (*tensors, 5, convention))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitmaps": torch.zeros(1, 8, 8)}, "bitmaps must be"),
        ({"boxes": torch.zeros(1, 5)}, "boxes must be"),
        ({"instance_idxs": torch.zeros(2, dtype=torch.int64)}, "instance_idxs for 1 boxes"),
        ({"mask_size": 0}, "mask_size must be at least 1"),
        ({"convention": "coco"}, "convention must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "bitmaps": torch.zeros(1, 8, 8, dtype=torch.uint8),
        "instance_idxs": torch.tensor([0]),
        "boxes": torch.zeros(1, 4),
        "mask_size": 28,
    }
    with pytest.raises(ValueError, match=message):
        rasterize_bitmaps(**(arguments | change))
