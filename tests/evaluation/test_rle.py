"""Masks pasted into images and encoded as COCO run lengths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from fastrcnn.evaluation import RleMasks, encode_mask, masks_to_rle


def test_encode_mask() -> None:
    mask = np.random.default_rng(0).random((7, 11)) > 0.5
    for kind in (mask, torch.from_numpy(mask), torch.from_numpy(mask.astype(np.uint8))):
        rle = encode_mask(kind)
        assert rle["size"] == [7, 11]
        assert isinstance(rle["counts"], str)
        assert np.array_equal(coco_mask.decode(rle), mask)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_encode_mask_equals_pycocotools(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_mask(mask) == {"size": [height, width], "counts": expected["counts"].decode()}


PASTED = {
    # A full mask fills its box, both end pixels included.
    "inside": ([10.0, 20.0, 29.0, 39.0], (slice(20, 40), slice(10, 30))),
    "sticks out at the top left": ([-10.0, -10.0, 9.0, 9.0], (slice(0, 10), slice(0, 10))),
    "sticks out at the bottom right": ([60.0, 50.0, 99.0, 89.0], (slice(50, 60), slice(60, 80))),
    "one pixel": ([5.0, 6.0, 5.0, 6.0], (slice(6, 7), slice(5, 6))),
    "all outside": ([100.0, 100.0, 120.0, 120.0], (slice(0, 0), slice(0, 0))),
    "far larger than the image": ([-1000.0, -1000.0, 1000.0, 1000.0], (slice(0, 60), slice(0, 80))),
}


@pytest.mark.parametrize(("box", "inside"), PASTED.values(), ids=PASTED)
def test_masks_to_rle_full_mask(box: list[float], inside: tuple[slice, slice]) -> None:
    (rle,) = masks_to_rle(torch.ones(1, 1, 28, 28), torch.tensor([box]), (60, 80))
    expected = np.zeros((60, 80), np.uint8)
    expected[inside] = 1
    # Integer truncation of the padded box may move an edge by one pixel, as in maskrcnn-benchmark.
    wrong = coco_mask.decode(rle) != expected
    rows, columns = np.nonzero(expected)
    if rows.size:
        near = np.zeros_like(wrong)
        near[max(rows.min() - 1, 0) : rows.max() + 2, max(columns.min() - 1, 0) : columns.max() + 2] = True
        near[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()] = False
        assert not (wrong & ~near).any()
    else:
        assert not wrong.any()


def test_masks_to_rle_many() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(5, 1, 28, 28, generator=generator)
    boxes = torch.tensor([[0.0, 0, 30, 30], [20, 10, 79, 59], [5, 5, 5, 5], [-20, -5, 40, 70], [60.5, 3.2, 70.1, 50]])
    together = masks_to_rle(probs, boxes, (60, 80))
    assert together == [r for i in range(5) for r in masks_to_rle(probs[i : i + 1, 0], boxes[i : i + 1], (60, 80))]
    assert json.loads(json.dumps(together)) == together
    assert masks_to_rle(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (60, 80)) == []
    low = masks_to_rle(probs, boxes, (60, 80), threshold=0.1)
    assert coco_mask.area(low).sum() > coco_mask.area(together).sum()


def test_rle_masks() -> None:
    bitmaps = np.random.default_rng(0).random((3, 7, 11)) > 0.5
    masks = RleMasks([encode_mask(bitmap) for bitmap in bitmaps])
    assert len(masks) == 3
    assert masks[1].dtype == bool
    assert np.array_equal(np.stack(list(masks)), bitmaps)
    assert np.array_equal(masks[1:][0], bitmaps[1])
