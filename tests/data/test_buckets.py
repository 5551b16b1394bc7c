"""The sizes that batches are padded to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastrcnn.data import BatchSchedule, ShapeBuckets
from fastrcnn.data.buckets import capacity
from fastrcnn.data.transforms import get_size

COCO = ShapeBuckets.of([800], 1333, 32)


class Infos:
    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def image_info(self, index: int) -> Any:
        height, width = self.sizes[index]
        return {"height": height, "width": width}


def test_buckets_of_the_usual_configuration() -> None:
    assert set(COCO.sizes) == {(800, 1088), (800, 1216), (800, 1344), (1088, 800), (1216, 800), (1344, 800)}


@pytest.mark.parametrize(
    ("min_sizes", "max_size", "divisor", "longest"),
    [
        ([640, 672, 704, 736, 768, 800], 1333, 32, [(800, 1088), (800, 1216), (800, 1344)]),
        ([600], 1000, 0, [(600, 800), (600, 900), (600, 1000)]),
        ([800], 1000, 32, [(800, 1024)]),
        ([800], None, 32, [(800, 1088), (800, 1216)]),
        ([1024], 2048, 32, [(1024, 1376), (1024, 1536), (1024, 2048)]),
        ([50], 50, 32, [(64, 64)]),
    ],
)
def test_buckets_follow_the_sizes(
    min_sizes: list[int], max_size: int | None, divisor: int, longest: list[tuple[int, int]]
) -> None:
    assert set(ShapeBuckets.of(min_sizes, max_size, divisor).sizes) == {*longest, *((w, h) for h, w in longest)}


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        ([(800, 1066)], (800, 1088)),
        ([(800, 1066), (800, 1089)], (800, 1216)),
        ([(600, 1333)], (800, 1344)),
        ([(1066, 800)], (1088, 800)),
        ([(1333, 480), (1100, 800)], (1344, 800)),
        ([(800, 800)], (800, 1088)),
        ([(10, 10)], (800, 1088)),
        # No bucket: the next multiple.
        ([(1066, 800), (800, 1066)], (1088, 1088)),
        ([(801, 1334)], (832, 1344)),
        ([(800, 1345)], (800, 1376)),
    ],
)
def test_a_batch_gets_the_smallest_bucket_that_holds_it(sizes: list[tuple[int, int]], padded: tuple[int, int]) -> None:
    assert COCO.fit(sizes) == padded
    assert COCO.fit(iter(sizes)) == padded


def test_a_bucket_is_a_multiple_of_the_divisor() -> None:
    with pytest.raises(ValueError, match="800x1000 is not a multiple of 32"):
        ShapeBuckets(((800, 1000),), 32)


def test_batches_of_the_schedule_are_of_one_bucket() -> None:
    """Every batch is padded to the bucket that its own images need alone."""
    random = np.random.default_rng(0)
    shapes = [(480, 640), (427, 640), (640, 480), (640, 427), (300, 640), (640, 640), (100, 900)]
    dataset = Infos([shapes[i] for i in random.integers(0, len(shapes), 200)])
    groups = COCO.groups(dataset, [800], 1333)
    assert len(set(groups.tolist())) == 5
    schedule = BatchSchedule(groups, batch_size=4, seed=1)
    for batch in schedule.epoch_batches(0):
        sizes = [get_size(*dataset.sizes[i], 800, 1333) for i in batch]
        assert len({COCO.fit([size]) for size in sizes}) == 1
        assert COCO.fit(sizes) == COCO.fit(sizes[:1])


def test_images_that_fit_no_bucket_are_a_group_of_their_own() -> None:
    groups = ShapeBuckets(((64, 96),), 32).groups(Infos([(64, 80), (80, 64), (64, 64)]), [64], 200)
    assert groups.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("needed", "images", "mib"),
    [(0, 2, 2), (2 << 20, 2, 2), ((2 << 20) + 1, 2, 4), (9 << 20, 2, 16), (16 * 921_600, 16, 16), (3, 5, 5)],
)
def test_capacity_of_an_arena(needed: int, images: int, mib: int) -> None:
    assert capacity(needed, images) == mib << 20
