"""Keypoints of COCO files: what the targets carry, which images are left out, and what is wrong with a file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrcnn.data import CocoDataset, DataError
from fastrcnn.data.collate import Normalization, collate_train
from fastrcnn.data.dataset import ConcatDataset
from fastrcnn.data.transforms import TrainTransform
from fastrcnn.structures import PERSON, Keypoints
from tests.data.conftest import CocoFolder

NAMES = ["nose", "left_ear", "right_ear"]


@pytest.fixture
def keypoint_folder(coco_folder: CocoFolder) -> CocoFolder:
    """Every annotation has three keypoints; the category says what they are called."""
    for annotation in coco_folder.content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["keypoints"] = [x, y, 2, x + width / 2, y + height / 2, 1, 0, 0, 0]
    for category in coco_folder.content["categories"]:
        category |= {"keypoints": NAMES, "skeleton": [[1, 2], [1, 3]]}
    return coco_folder


def load(folder: CocoFolder, *, train: bool = False) -> CocoDataset:
    folder.write()
    return CocoDataset(folder.annotations, folder.images, remove_images_without_annotations=train)


def test_targets_carry_keypoints(keypoint_folder: CocoFolder) -> None:
    del keypoint_folder.annotation(3)["keypoints"]
    dataset = load(keypoint_folder)
    assert dataset.has_keypoints
    assert dataset.skeleton is not None
    assert dataset.skeleton.names == tuple(NAMES)
    assert dataset.skeleton.connections == ((0, 1), (0, 2))
    found = dataset[0].target.keypoints
    assert isinstance(found, Keypoints)
    assert found.size == (48, 64)
    assert found.points.tolist() == [[[4.5, 6.5, 2], [10, 17, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    empty = dataset[4].target  # no annotation
    assert empty.keypoints is not None
    assert tuple(empty.keypoints.points.shape) == (0, 3, 3)


def test_a_file_without_keypoints(coco_folder: CocoFolder) -> None:
    dataset = load(coco_folder)
    assert not dataset.has_keypoints
    assert dataset[0].target.keypoints is None


def test_training_drops_images_with_few_keypoints(keypoint_folder: CocoFolder) -> None:
    """Fewer than ten, or than an instance has."""
    assert [load(keypoint_folder, train=True).image_info(i)["id"] for i in range(1)] == [10], "two instances have four"
    assert len(load(keypoint_folder, train=True)) == 1
    keypoint_folder.annotation(1)["keypoints"] = [1, 1, 1, 2, 2, 1, 3, 3, 2]
    dataset = load(keypoint_folder, train=True)
    assert [dataset.image_info(i)["id"] for i in range(len(dataset))] == [10, 30]
    assert dataset.dropped["images with too few labelled keypoints"] == 4
    assert len(load(keypoint_folder)) == 7


def test_persons_need_ten(coco_folder: CocoFolder) -> None:
    for number, labelled in ((1, 9), (7, 10)):
        coco_folder.annotation(number)["keypoints"] = [5, 5, 2] * labelled + [0, 0, 0] * (17 - labelled)
    dataset = load(coco_folder, train=True)
    assert dataset.skeleton is PERSON, "17 keypoints without names are COCO's"
    assert [dataset.image_info(i)["id"] for i in range(len(dataset))] == [60]


def test_keypoints_that_nobody_names_are_left_out(coco_folder: CocoFolder, caplog: pytest.LogCaptureFixture) -> None:
    coco_folder.annotation(1)["keypoints"] = [5, 5, 2, 6, 6, 2]
    with caplog.at_level(logging.WARNING):
        dataset = load(coco_folder, train=True)
    assert not dataset.has_keypoints
    assert len(dataset) == 6
    assert "no category names its 2 keypoints" in caplog.text


def test_keypoints_follow_the_image(keypoint_folder: CocoFolder) -> None:
    """Resized to twice the size and mirrored; then packed, sent and unpacked."""
    dataset = load(keypoint_folder)
    transform = TrainTransform(min_sizes=(96,), max_size=200, horizontal_flip_prob=1.0)
    sample = transform(dataset[0], np.random.default_rng(0))
    moved = sample.target.keypoints
    assert moved is not None
    assert moved.size == sample.target.size == (96, 128)
    assert moved.points[0].tolist() == [[86, 13, 2], [0, 0, 0], [75, 34, 1]]
    normalization = Normalization(size_divisible=32)
    samples = [sample, replace(transform(dataset[4], np.random.default_rng(0)), index=4)]
    batch = collate_train(samples, normalization, 0).unpack()
    assert batch.targets[0].keypoints.points.tolist() == moved.points.tolist()
    assert batch.targets[0].keypoints.skeleton == dataset.skeleton
    assert len(batch.targets[1].keypoints) == 0


def test_concatenation_keeps_keypoints_of_one_skeleton(keypoint_folder: CocoFolder, tmp_path: Path) -> None:
    dataset = load(keypoint_folder)
    both = ConcatDataset([dataset, dataset])
    assert both.has_keypoints
    assert both.skeleton == dataset.skeleton
    assert torch.equal(both[7].target.keypoints.points, dataset[0].target.keypoints.points)
    (tmp_path / "other").mkdir()
    other = CocoFolder(tmp_path / "other")
    without = load(other)
    mixed = ConcatDataset([dataset, without])
    assert not mixed.has_keypoints
    assert mixed[0].target.keypoints is None


def change(folder: CocoFolder, number: int, keypoints: Any) -> None:
    folder.annotation(number)["keypoints"] = keypoints


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change(f, 2, [1, 2]), r"annotation 2 has 'keypoints' that are not finite numbers in threes"),
        (lambda f: change(f, 2, "abc"), "annotation 2 has 'keypoints' that are not"),
        (lambda f: change(f, 2, [1, 2, float("nan")] * 3), "annotation 2 has 'keypoints' that are not finite"),
        (lambda f: change(f, 2, [1, 2, "2"] * 3), "annotation 2 has 'keypoints' that are not finite"),
        (lambda f: change(f, 2, [1, 2, 2]), "annotation 2 has 1 keypoints, but the annotations before it have 3"),
        (lambda f: f.content["categories"][0].update(keypoints=["a", "b", "c"]), "have different keypoints"),
        (lambda f: [c.update(keypoints=["a"]) for c in f.content["categories"]], "names 1 keypoints, but"),
        (lambda f: f.content["categories"][0].update(skeleton=[[0, 1]]), "'skeleton' that is not pairs of 1 to 3"),
    ],
)
def test_faulty_files(keypoint_folder: CocoFolder, spoil: Any, message: str) -> None:
    spoil(keypoint_folder)
    with pytest.raises(DataError, match=message) as caught:
        load(keypoint_folder)
    assert str(keypoint_folder.annotations) in str(caught.value)
