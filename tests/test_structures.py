"""BoxList, SegmentationMask, ImageList, Targets: maskrcnn-benchmark's meaning, without mutation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from fastrcnn.structures import (
    FLIP_LEFT_RIGHT,
    FLIP_TOP_BOTTOM,
    BoxList,
    ImageList,
    Proposals,
    SegmentationMask,
    Targets,
    to_image_list,
)

SQUARE = torch.tensor([[1.0, 2], [6, 2], [6, 7], [1, 7]])


def boxlist(**fields):
    return BoxList(torch.tensor([[1.0, 2, 5, 6], [0, 0, 9, 19]]), (10, 20), **fields)


def test_repr_is_that_of_maskrcnn_benchmark():
    boxes = BoxList(torch.zeros(3, 4), (1066, 800))
    assert repr(boxes) == "BoxList(num_boxes=3, image_width=1066, image_height=800, mode=xyxy)"


def test_widths_count_both_end_pixels():
    wide = boxlist().convert("xywh")
    assert wide.boxes.tolist() == [[1, 2, 5, 5], [0, 0, 10, 20]]
    assert wide.convert("xyxy").boxes.tolist() == boxlist().boxes.tolist()
    assert boxlist().area().tolist() == [25, 200]
    assert BoxList(torch.tensor([[3.0, 4, 0, 0]]), (10, 10), "xywh").convert("xyxy").boxes.tolist() == [[3, 4, 3, 4]]


def test_flips_keep_the_inconsistency_of_maskrcnn_benchmark():
    assert boxlist().transpose(FLIP_LEFT_RIGHT).boxes.tolist() == [[4, 2, 8, 6], [0, 0, 9, 19]]
    assert boxlist().transpose(FLIP_TOP_BOTTOM).boxes.tolist() == [[1, 14, 5, 18], [0, 1, 9, 20]]


@given(st.lists(st.tuples(*[st.floats(0, 99)] * 4), max_size=5), st.sampled_from([0, 1]))
def test_flipping_twice_changes_nothing(rows, method):
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in rows])
    original = BoxList(boxes, (100, 100))
    twice = original.transpose(method).transpose(method)
    torch.testing.assert_close(twice.boxes, original.boxes, rtol=0, atol=1e-4)


def test_resize_moves_boxes_and_polygons():
    masks = SegmentationMask([[SQUARE], [SQUARE]], (10, 20))
    resized = boxlist(masks=masks).resize((20, 30))
    assert resized.size == (20, 30)
    assert resized.boxes[0].tolist() == [2, 3, 10, 9]
    assert resized.masks.size == (20, 30)
    assert resized.masks.polygons[0][0].tolist() == [[2, 3], [12, 3], [12, 10.5], [2, 10.5]]


def test_clip_drops_what_has_no_extent_left():
    boxes = BoxList(
        torch.tensor([[-5.0, 0, 3, 3], [12, 2, 15, 5], [4, 4, 4, 9]]), (10, 10), labels=torch.tensor([1, 2, 3])
    )
    assert boxes.clip_to_image(remove_empty=False).boxes.tolist() == [[0, 0, 3, 3], [9, 2, 9, 5], [4, 4, 4, 9]]
    kept = boxes.clip_to_image()
    assert kept.labels.tolist() == [1]
    assert boxes.boxes[0, 0] == -5  # the original is untouched


def test_crop():
    cropped = boxlist(masks=SegmentationMask([[SQUARE], [SQUARE]], (10, 20))).crop((2, 3, 8, 9))
    assert cropped.size == (6, 6)
    assert cropped.boxes.tolist() == [[0, 0, 3, 3], [0, 0, 6, 6]]
    assert cropped.masks.polygons[0][0][0].tolist() == [-1, -1]


def test_indexing_takes_the_fields_along():
    boxes = boxlist(labels=torch.tensor([3, 4]), scores=torch.tensor([0.5, 0.6]),
                    masks=SegmentationMask([[SQUARE], []], (10, 20)))  # fmt: skip
    for index in (torch.tensor([1]), torch.tensor([False, True]), slice(1, 2), -1):
        one = boxes[index]
        assert one.labels.tolist() == [4]
        assert len(one.masks) == 1
        assert one.masks.polygons[0] == []
    assert len(boxes[torch.zeros(0, dtype=torch.int64)].masks) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoxList(torch.zeros(2, 3), (5, 5)), r"boxes must be \[n, 4\]"),
        (lambda: BoxList(torch.zeros(2, 4), (5, 5), "cxcywh"), "mode must be"),
        (lambda: boxlist(labels=torch.tensor([1])), "1 labels for 2 boxes"),
        (lambda: ImageList(torch.zeros(2, 3, 4, 4), [(4, 4)]), "1 sizes for 2 images"),
        (lambda: ImageList(torch.zeros(3, 4, 4), [(4, 4)]), r"must be \[N, C, H, W\]"),
        (lambda: to_image_list([]), "at least one image"),
        (lambda: Targets.from_boxlists([boxlist()]), r"targets\[0\] has no labels"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bitmap_comes_back_from_its_outline():
    bitmap = np.zeros((12, 9), dtype=np.uint8)
    bitmap[2:8, 1:6] = 1
    bitmap[4:6, 3:4] = 0
    rle = coco_mask.encode(np.asfortranarray(bitmap))
    uncompressed = {"size": [12, 9], "counts": [14, 6, 6, 6, 6, 2, 2, 2, 6, 6, 6, 6, 40]}
    for segmentation in (rle, uncompressed):
        masks = SegmentationMask.from_coco([segmentation], (9, 12))
        assert torch.equal(masks.decode()[0], torch.from_numpy(bitmap))


def test_polygons_with_fewer_than_three_points_are_left_out():
    masks = SegmentationMask.from_coco([[[1, 1, 5, 5], [0, 0, 4, 0, 4, 4]], [[1, 1, 2, 2]]], (9, 9))
    assert [len(p) for p in masks.polygons] == [1, 0]
    assert masks.decode()[1].sum() == 0


def test_image_list_pads_bottom_and_right():
    images = to_image_list([torch.ones(3, 5, 7), torch.ones(3, 8, 4)], 4)
    assert tuple(images.tensors.shape) == (2, 3, 8, 8)
    assert images.image_sizes == [(5, 7), (8, 4)]
    assert images.sizes.tolist() == [[5, 7], [8, 4]]
    assert images.tensors[0].sum() == 3 * 35
    assert images.tensors[0, :, :5, :7].sum() == 3 * 35
    assert to_image_list(images) is images


def test_targets_are_padded_and_flat():
    first = boxlist(labels=torch.tensor([3, 4]), masks=SegmentationMask([[SQUARE, SQUARE[:3]], [SQUARE]], (10, 20)))
    empty = BoxList(torch.zeros(0, 4), (10, 20), labels=torch.zeros(0, dtype=torch.int64))
    targets = Targets.from_boxlists([first, empty], min_capacity=3)
    assert tuple(targets.boxes.shape) == (2, 3, 4)
    assert targets.labels.tolist() == [[3, 4, 0], [0, 0, 0]]
    assert targets.count.tolist() == [2, 0]
    assert targets.valid.tolist() == [[True, True, False], [False] * 3]
    assert targets.polygon_offsets.tolist() == [0, 4, 7, 11]
    assert targets.instance_offsets.tolist() == [0, 2, 3, 3, 3, 3, 3]
    assert (targets.max_vertices, targets.max_polygons) == (7, 2)
    none = Targets.from_boxlists([empty])
    assert tuple(none.boxes.shape) == (1, 1, 4)
    assert none.instance_offsets.tolist() == [0, 0]


def test_proposals_to_boxlists():
    proposals = Proposals(torch.rand(2, 3, 4), torch.rand(2, 3), torch.tensor([2, 0]))
    assert proposals.valid.tolist() == [[True, True, False], [False] * 3]
    first, second = proposals.to_boxlists([(20, 10), (5, 6)])
    assert (len(first), len(second), first.size, second.size) == (2, 0, (10, 20), (6, 5))
