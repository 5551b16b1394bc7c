"""Decoding, clipping and marking of proposals in one pass: equal to its three parts."""

from __future__ import annotations

import math

import pytest
import torch

from fastrcnn_kernels import (
    clip_boxes_to_image,
    decode_boxes,
    decode_proposals,
    is_large_enough,
)
from tests.kernels.test_box_coder import WEIGHTS, random_boxes, random_deltas


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_decode_proposals(device: torch.device, offset: int, dtype: torch.dtype, shared: bool) -> None:
    """Equal to its three parts, for images of different sizes and anchors of one or of each image."""
    deltas = random_deltas(3, 70, 4).to(device, dtype)
    deltas[0, 3, 1] = math.nan
    anchors = (random_boxes(70) if shared else random_boxes(3, 70)).to(device)
    sizes = torch.tensor([[200, 300], [90, 400], [1, 1]], device=device)
    boxes, valid = decode_proposals(deltas, anchors, sizes, WEIGHTS[2], box_offset=offset, min_size=20.0)
    expected = clip_boxes_to_image(
        decode_boxes(deltas, anchors, WEIGHTS[2], box_offset=offset), sizes, box_offset=offset
    )
    assert torch.equal(boxes.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))
    assert torch.equal(valid, is_large_enough(expected, 20.0, box_offset=offset))
    assert 0 < int(valid[:2].sum()) < 140, "the case would prove nothing"
    assert not valid[0, 3]
    assert not valid[2].any()


def test_decode_proposals_by_hand(device: torch.device) -> None:
    anchors = torch.tensor([[0.0, 0.0, 9.0, 9.0], [95.0, 5.0, 104.0, 14.0], [40.0, -9.0, 49.0, 0.0]], device=device)
    sizes = torch.tensor([[50, 100]], device=device)
    deltas = torch.zeros(1, 3, 4, device=device)
    boxes, valid = decode_proposals(deltas, anchors, sizes, box_offset=1, min_size=5)
    assert boxes[0].tolist() == [[0, 0, 9, 9], [95, 5, 99, 14], [40, 0, 49, 0]]
    assert valid[0].tolist() == [True, True, False], "5 pixels reach the smallest side, 1 does not"
    assert decode_proposals(deltas, anchors, sizes, box_offset=1, min_size=5.5)[1][0].tolist() == [True, False, False]
