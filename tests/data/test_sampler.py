"""The order of the data is a function of (seed, step), for every world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrcnn.data import BatchSchedule
from fastrcnn.data.sampler import aspect_ratio_groups, random_order, rank_slice, shard_range

groups = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(groups, st.integers(1, 9), st.integers(-5, 2**40), st.integers(0, 1000))
def test_an_epoch(group_ids: list[int], batch_size: int, seed: int, epoch: int) -> None:
    schedule = BatchSchedule(group_ids, batch_size=batch_size, seed=seed)
    batches = schedule.epoch_batches(epoch)
    sizes = np.bincount(group_ids)
    assert batches.shape == (schedule.batches_per_epoch, batch_size)
    assert schedule.batches_per_epoch == sum(-(-int(n) // batch_size) for n in sizes)
    assert set(batches.ravel().tolist()) == set(range(len(group_ids)))
    for batch in batches:
        assert len({group_ids[i] for i in batch}) == 1
    for group, n in enumerate(sizes):
        shown = np.bincount(batches.ravel(), minlength=len(group_ids))[np.array(group_ids) == group]
        if n:
            # Filling goes round the group's order, so no image is more than one ahead of another.
            assert shown.max() - shown.min() <= 1
            assert shown.sum() == -(-int(n) // batch_size) * batch_size


@given(groups, st.integers(1, 5), st.integers(0, 3), st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_a_step_does_not_depend_on_what_was_asked_before(
    group_ids: list[int], batch_size: int, seed: int, steps: list[int]
) -> None:
    schedule = BatchSchedule(group_ids, batch_size=batch_size, seed=seed)
    for step in steps:
        epoch, indices = schedule.batch_for_step(step)
        fresh_epoch, fresh = BatchSchedule(group_ids, batch_size=batch_size, seed=seed).batch_for_step(step)
        assert epoch == fresh_epoch == step // schedule.batches_per_epoch
        assert np.array_equal(indices, fresh)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 50))
def test_ranks_share_the_same_global_batch(share: int, world_size: int, step: int) -> None:
    batch_size = share * world_size
    _, indices = BatchSchedule(num_images=37, batch_size=batch_size).batch_for_step(step)
    parts = [indices[rank_slice(batch_size, rank, world_size)] for rank in range(world_size)]
    assert all(len(part) == share for part in parts)
    assert np.array_equal(np.concatenate(parts), indices)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    schedule = BatchSchedule(num_images=50, batch_size=5, seed=0)
    orders = {tuple(schedule.epoch_batches(epoch).ravel().tolist()) for epoch in range(20)}
    orders |= {tuple(BatchSchedule(num_images=50, batch_size=5, seed=s).epoch_batches(0).ravel()) for s in range(1, 20)}
    assert len(orders) == 39


def test_batches_of_the_groups_are_mixed() -> None:
    """Not all landscape batches first."""
    schedule = BatchSchedule([0] * 100 + [1] * 100, batch_size=4, seed=1)
    first_half = schedule.epoch_batches(0)[:25, 0] >= 100
    assert 4 < first_half.sum() < 21


def test_every_image_is_equally_likely_everywhere() -> None:
    counts = np.zeros(10)
    for seed in range(2000):
        counts[random_order(10, seed)[0]] += 1
    assert counts.min() > 140
    assert counts.max() < 260


def test_the_order_never_changes() -> None:
    """A checkpoint of today has to resume to the same data in every later version."""
    assert random_order(8, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    schedule = BatchSchedule([0, 1, 0, 0, 1, 0, 0], batch_size=2, seed=7)
    assert schedule.epoch_batches(3).tolist() == [[2, 3], [5, 6], [1, 4], [6, 0]]


@given(st.integers(0, 200), st.integers(1, 16))
def test_shards_cover_every_image_once(num_images: int, world_size: int) -> None:
    shards = [shard_range(num_images, rank, world_size) for rank in range(world_size)]
    assert [i for shard in shards for i in shard] == list(range(num_images))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_aspect_ratio_groups() -> None:
    class Sizes:
        sizes = ((480, 640), (640, 480), (500, 500), (499, 500))

        def __len__(self) -> int:
            return 4

        def image_info(self, index: int) -> dict:
            height, width = self.sizes[index]
            return {"id": index, "height": height, "width": width, "file_name": ""}

    assert aspect_ratio_groups(Sizes()).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("batch_size", "world_size", "advice"), [(16, 3, "15 or 18"), (2, 4, "such as 4"), (5, 2, "4 or 6")]
)
def test_a_batch_that_ranks_cannot_share(batch_size: int, world_size: int, advice: str) -> None:
    with pytest.raises(ValueError, match=f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} .*{advice}"):
        rank_slice(batch_size, 0, world_size)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no images"):
        BatchSchedule([], batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        BatchSchedule([0], batch_size=0)
    with pytest.raises(ValueError, match="2 group ids for 3 images"):
        BatchSchedule([0, 0], num_images=3, batch_size=1)
    with pytest.raises(ValueError, match="step must not be negative"):
        BatchSchedule([0], batch_size=1).batch_for_step(-1)
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        rank_slice(4, 2, 2)
    with pytest.raises(ValueError, match="rank -1 is not one of 2 ranks"):
        shard_range(4, -1, 2)
