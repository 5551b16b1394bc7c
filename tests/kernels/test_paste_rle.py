"""Run lengths of pasted masks, character for character what pycocotools makes of the pasted image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor

from fastrcnn_kernels import paste_masks_rle
from fastrcnn_kernels.paste import _paste_masks_reference
from fastrcnn_kernels.paste_rle import _places, rle_string, strings_from_places
from tests.kernels.exact_fma import exact_fma  # noqa: F401  a fixture
from tests.kernels.helpers import Guards, Place
from tests.kernels.paste_oracle import HEIGHT, WIDTH, random_boxes, smooth_masks

CONVENTIONS = ("maskrcnn_benchmark", "detectron2")


def some(place: Place, count: int) -> int:
    """How many masks a test pastes: the interpreter takes a tenth of a second for each."""
    return min(count, 2) if place == Place("triton", "cpu") else count


def encoded(place: Place, masks: Tensor, boxes: Tensor, size: tuple[int, int] = (HEIGHT, WIDTH), **others: Any) -> Any:
    return paste_masks_rle(masks.to(place.device), boxes.to(place.device), size, **others)


def wanted(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    threshold: float = 0.5,
    padding: int = 1,
    convention: str = "maskrcnn_benchmark",
) -> list[dict[str, object]]:
    """pycocotools' encoding of the pasted masks."""
    images = _paste_masks_reference(masks, boxes, *size, threshold, padding, convention).numpy()
    return [coco_mask.encode(np.asfortranarray(image)) for image in images]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("size", [1, 14, 28])
def test_equals_pycocotools(place: Place, guarded: Guards, size: int, convention: str) -> None:
    count = some(place, 120)
    masks, boxes = smooth_masks(200, size, 0)[-count:], random_boxes(200, size)[-count:]
    found = encoded(place, guarded(masks), guarded(boxes), convention=convention)
    assert found == wanted(masks, boxes, convention=convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_noise(place: Place, convention: str) -> None:
    """Nothing between the cells is clear, and the columns change often."""
    count = some(place, 40)
    masks = torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(1))
    boxes = random_boxes(count, 6)
    boxes[0] = torch.tensor([2.0, 1, 80, 59])
    assert encoded(place, masks, boxes, convention=convention) == wanted(masks, boxes, convention=convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_more_changes_than_are_kept_at_first(place: Place, convention: str) -> None:
    masks = torch.zeros(1, 28, 28)
    masks[:, ::2] = 1.0
    boxes, size = torch.tensor([[2.0, 1, 9, 60]]), (61, 12)
    found = encoded(place, masks, boxes, size, convention=convention)
    assert found == wanted(masks, boxes, size, convention=convention)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.9])
def test_threshold_and_padding(place: Place, threshold: float) -> None:
    count = some(place, 40)
    masks, boxes = smooth_masks(count, 14, 2), random_boxes(count, 8)
    for padding in (0, 2):
        found = encoded(place, masks, boxes, threshold=threshold, padding=padding)
        assert found == wanted(masks, boxes, threshold=threshold, padding=padding)
    found = encoded(place, masks, boxes, threshold=threshold, convention="detectron2")
    assert found == wanted(masks, boxes, threshold=threshold, convention="detectron2")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_sums_round_alike(place: Place, convention: str) -> None:
    """Masks of one value which is the threshold too: each pixel is decided by the rounding of a sum."""
    count = some(place, 40)
    masks, boxes = torch.full((count, 28, 28), 0.7), random_boxes(200, 5)[:count]
    boxes[0] = torch.tensor([-30.0, -20, 75, 57])
    found = encoded(place, masks, boxes, threshold=0.7, convention=convention)
    assert found == wanted(masks, boxes, threshold=0.7, convention=convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_full_columns_run_on(place: Place, convention: str) -> None:
    """The image covered whole, from the top, to the bottom: runs go on from column to column."""
    boxes = torch.tensor([[-99.0, -99, 199, 199], [2, -50, 9, 99], [2, -50, 9, 7], [2, 4, 9, 99], [-50, 3, 99, 9]])
    masks, size = torch.ones(5, 28, 28), (11, 13)
    assert encoded(place, masks, boxes, size, convention=convention) == wanted(
        masks, boxes, size, convention=convention
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bad_input(place: Place, convention: str) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan, 0, 9, 9], [0, 0, inf, 9], [9, 9, 2, 2], [200, 5, 300, 9], [4, 4, 60, 50]])
    masks = torch.ones(5, 28, 28)
    masks[4, 3, 3], masks[4, 8:12, 8:20], masks[4, 15, 15] = nan, inf, -inf
    assert encoded(place, masks, boxes, convention=convention) == wanted(masks, boxes, convention=convention)


@pytest.mark.parametrize(("count", "height", "width"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
def test_empty_and_one_pixel(place: Place, count: int, height: int, width: int) -> None:
    masks, boxes = torch.ones(count, 28, 28), torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1)
    found = encoded(place, masks, boxes, (height, width))
    assert [rle["size"] for rle in found] == [[height, width]] * count
    if height and width:
        assert found == wanted(masks, boxes, (height, width))
    else:
        assert [rle["counts"] for rle in found] == [b"0"] * count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(place: Place, dtype: torch.dtype) -> None:
    masks, boxes = smooth_masks(3, 28, 6).to(dtype), random_boxes(3, 11)
    assert encoded(place, masks, boxes) == encoded(place, masks.float(), boxes)
    assert encoded(place, masks.mT.contiguous().mT, boxes.T.contiguous().T) == encoded(place, masks, boxes)


def test_large_image(place: Place) -> None:
    """Runs of more than 16 bits, and boxes of the larger kernel."""
    if place == Place("triton", "cpu"):
        pytest.skip("the interpreter walks down columns of hundreds of pixels for minutes")
    masks, boxes = smooth_masks(6, 28, 3), random_boxes(6, 2) * 15
    boxes[0] = torch.tensor([100.0, 50, 900, 740])
    for convention in CONVENTIONS:
        found = encoded(place, masks, boxes, (800, 1344), convention=convention)
        assert found == wanted(masks, boxes, (800, 1344), convention=convention)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_rle_string(height: int, width: int, seed: int, share: float) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    expected = coco_mask.encode(np.asfortranarray(mask))["counts"]
    places = _places(torch.from_numpy(mask))
    assert rle_string(places, height * width).numpy().tobytes() == expected
    # A place that comes twice is none.
    twice = torch.cat([places, torch.full((2,), height * width // 2)]).sort().values
    data, offsets = strings_from_places(twice, torch.tensor([len(twice)]), height * width)
    assert data.numpy().tobytes() == expected
    assert offsets.tolist() == [0, len(expected)]


def test_opcheck(place: Place) -> None:
    operator = torch.ops.fastrcnn_kernels.paste_masks_rle.default
    masks, boxes = smooth_masks(2, 14, 7).to(place.device), random_boxes(2, 13).to(place.device)
    torch.library.opcheck(operator, (masks, boxes, 20, 30, 0.5, 1, "maskrcnn_benchmark"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.zeros(1, 1, 8, 8)}, "masks must be"),
        ({"boxes": torch.zeros(2, 4)}, "boxes must be"),
        ({"threshold": -1.0}, "threshold must not be negative"),
        ({"convention": "coco"}, "convention must be one of"),
    ],
    ids=["masks", "boxes", "threshold", "convention"],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"masks": torch.zeros(1, 8, 8), "boxes": torch.zeros(1, 4), "image_size": (5, 5)} | change
    with pytest.raises(ValueError, match=message):
        paste_masks_rle(**arguments)
