"""Keypoints: what moves with the image, and which keypoint is on the other side."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.structures import (
    FLIP_LEFT_RIGHT,
    FLIP_TOP_BOTTOM,
    PERSON,
    BoxList,
    Keypoints,
    PersonKeypoints,
    Skeleton,
    Targets,
)

HAND = Skeleton(("palm", "left thumb", "right thumb"), ((0, 1), (0, 2)))
POINTS = [[[2.0, 3, 2], [8, 1, 1], [0, 0, 0]], [[9, 19, 2], [0, 0, 2], [4, 5, 1]]]


def keypoints(**fields):
    return Keypoints(torch.tensor(POINTS), (10, 20), **{"skeleton": HAND, **fields})


def test_persons_have_the_names_pairs_and_lines_of_maskrcnn_benchmark():
    assert len(PersonKeypoints.NAMES) == 17
    assert PersonKeypoints.NAMES[:3] == ("nose", "left_eye", "right_eye")
    assert PersonKeypoints.NAMES[-2:] == ("left_ankle", "right_ankle")
    assert PersonKeypoints.FLIP_MAP["left_wrist"] == "right_wrist"
    assert PersonKeypoints.FLIP_INDS == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    lines = {frozenset(line) for line in PersonKeypoints.CONNECTIONS}
    assert len(PersonKeypoints.CONNECTIONS) == len(lines) == 15
    wanted = [(1, 2), (1, 0), (2, 0), (2, 4), (1, 3), (6, 8), (8, 10), (5, 7), (7, 9), (12, 14), (14, 16), (11, 13),
              (13, 15), (6, 5), (12, 11)]  # fmt: skip
    assert lines == {frozenset(line) for line in wanted}
    assert PersonKeypoints(torch.zeros(1, 51), (5, 5)).skeleton is PERSON
    assert tuple(PersonKeypoints(torch.zeros(1, 51), (5, 5)).points.shape) == (1, 17, 3)


def test_resize_scales_places_and_leaves_visibility():
    moved = keypoints().resize((20, 10))
    assert moved.size == (20, 10)
    assert moved.points[0].tolist() == [[4, 1.5, 2], [16, 0.5, 1], [0, 0, 0]]


def test_a_flip_changes_sides_and_zeroes_what_is_not_labelled():
    flipped = keypoints().transpose(FLIP_LEFT_RIGHT)
    assert flipped.points[0].tolist() == [[7, 3, 2], [0, 0, 0], [1, 1, 1]]
    assert flipped.points[1].tolist() == [[0, 19, 2], [5, 5, 1], [9, 0, 2]]
    upside = keypoints().transpose(FLIP_TOP_BOTTOM)
    assert upside.points[0].tolist() == [[2, 16, 2], [0, 0, 0], [8, 18, 1]]
    for method in (FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM):
        assert keypoints().transpose(method).transpose(method).points.tolist() == POINTS
    scored = keypoints(scores=torch.tensor([[1.0, 2, 3], [4, 5, 6]])).transpose(FLIP_LEFT_RIGHT)
    assert scored.scores.tolist() == [[1, 3, 2], [4, 6, 5]]


def test_a_crop_hides_what_lies_outside():
    cropped = keypoints().crop((2, 0, 9, 10))
    assert cropped.size == (7, 10)
    assert cropped.points.tolist() == [[[0, 3, 2], [6, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [2, 5, 1]]]


def test_selecting_and_moving():
    scored = keypoints(scores=torch.arange(6.0).view(2, 3))
    assert scored[1].points.tolist() == POINTS[1:]
    assert scored[-1].scores.tolist() == [[3, 4, 5]]
    assert len(scored[torch.tensor([False, True])]) == 1
    assert scored[torch.tensor([1, 0])].points.tolist() == POINTS[::-1]
    assert scored.to("cpu").scores is not None
    assert repr(scored) == "Keypoints(num_instances=2, image_width=10, image_height=20)"


def test_boxes_take_their_keypoints_along():
    boxes = BoxList(torch.tensor([[1.0, 2, 5, 6], [0, 0, 9, 19]]), (10, 20), keypoints=keypoints())
    assert boxes.resize((20, 40)).keypoints.points[0, 0].tolist() == [4, 6, 2]
    assert boxes.transpose(FLIP_LEFT_RIGHT).keypoints.points[0, 0].tolist() == [7, 3, 2]
    assert boxes.crop((1, 1, 9, 19)).keypoints.points[0, 0].tolist() == [1, 2, 2]
    assert boxes[1].keypoints.points.tolist() == POINTS[1:]
    assert boxes.to("cpu").keypoints.points.tolist() == POINTS


def test_targets_pad_keypoints():
    def boxlist(n, **fields):
        return BoxList(torch.zeros(n, 4), (10, 20), labels=torch.ones(n, dtype=torch.int64), **fields)

    targets = Targets.from_boxlists([boxlist(0), boxlist(2, keypoints=keypoints())])
    assert tuple(targets.keypoints.shape) == (2, 2, 3, 3)
    assert (targets.keypoints[0] == 0).all()
    assert targets.keypoints[1].tolist() == POINTS
    assert targets.to("cpu").keypoints is not None
    assert Targets.from_boxlists([boxlist(2)]).keypoints is None
    with pytest.raises(ValueError, match=r"targets\[1\] has no keypoints"):
        Targets.from_boxlists([boxlist(2, keypoints=keypoints()), boxlist(1)])
    persons = boxlist(1, keypoints=PersonKeypoints(torch.zeros(1, 17, 3), (10, 20)))
    with pytest.raises(ValueError, match=r"targets\[1\] has 17 keypoints an instance, others have 3"):
        Targets.from_boxlists([boxlist(2, keypoints=keypoints()), persons])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Keypoints(torch.zeros(2, 4), (5, 5)), r"points must be \[n, k, 3\]"),
        (lambda: Keypoints(torch.zeros(2, 4, 3), (5, 5), HAND), "4 points for a skeleton of 3 names"),
        (lambda: keypoints(scores=torch.zeros(2, 4)), "scores"),
        (lambda: keypoints().transpose(2), "method must be"),
        (lambda: Keypoints(torch.zeros(2, 4, 3), (5, 5)).transpose(0), "left and right"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
