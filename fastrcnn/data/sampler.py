"""Which images make up the batch of a step: a pure function of (seed, step).

There is no iterator state to save or to replay: a resumed run asks for the batch of its step, and a rank takes its
slice of the global batch, so the order is the same for every number of workers, ranks and resumes. maskrcnn-benchmark
gets there only approximately: its samplers depend on the world size and lose their place on resume.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class _HasImageInfo(Protocol):
    def __len__(self) -> int: ...

    def image_info(self, index: int): ...  # type: ignore[no-untyped-def]


def aspect_ratio_groups(dataset: _HasImageInfo, boundaries: Sequence[float] = (1.0,)) -> np.ndarray:
    """int64 [n]: the group of each image by height / width; with the default, 0 is landscape and 1 the rest."""
    ratios = []
    for index in range(len(dataset)):
        info = dataset.image_info(index)
        ratios.append(info["height"] / info["width"])
    return np.array([bisect_right(boundaries, ratio) for ratio in ratios], dtype=np.int64)


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation of ``count`` that depends on ``key`` alone (non-negative integers).

    Raw Philox output is sorted instead of calling ``Generator.permutation``: NumPy promises the stream of a bit
    generator for ever, that of a generator's methods only within a version.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


class BatchSchedule:
    """The global batch of every step.

    An epoch goes through each group in an order of its own, in full batches of one group each; the last batch of a
    group is filled up from the start of that group's order, so an epoch always has the same number of batches,
    ``sum(ceil(n_g / batch_size))``, and shows every image at least once. The batches of an epoch are shuffled too.

    Args:
        group_ids: the group of each image; None puts all into one.
        num_images: number of images; may be left out if ``group_ids`` is given.
        batch_size: images of the global batch.
        seed: of the order; any two seeds give unrelated orders.
    """

    def __init__(
        self,
        group_ids: Sequence[int] | np.ndarray | None = None,
        *,
        num_images: int | None = None,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if group_ids is None:
            group_ids = np.zeros(num_images or 0, dtype=np.int64)
        groups = np.asarray(group_ids, dtype=np.int64)
        if num_images is not None and num_images != len(groups):
            raise ValueError(f"BatchSchedule: {len(groups)} group ids for {num_images} images")
        if len(groups) == 0:
            raise ValueError("BatchSchedule: there are no images to train on")
        if batch_size < 1:
            raise ValueError(f"BatchSchedule: batch_size must be positive, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.num_images = len(groups)
        self._members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self._members)
        self._cached: tuple[int, np.ndarray] | None = None

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """int64 [batches_per_epoch, batch_size]: the indices of every batch of an epoch."""
        if self._cached is None or self._cached[0] != epoch:
            key = (_unsigned(self.seed), epoch)
            order = random_order(self.num_images, *key, 0)
            rank = np.empty(self.num_images, dtype=np.int64)
            rank[order] = np.arange(self.num_images)
            batches = []
            for members in self._members:
                shuffled = members[np.argsort(rank[members])]
                rows = -(-len(shuffled) // self.batch_size)
                # np.resize starts again from the beginning, as often as it takes.
                batches.append(np.resize(shuffled, (rows, self.batch_size)))
            table = np.concatenate(batches)
            self._cached = (epoch, table[random_order(len(table), *key, 1)])
        return self._cached[1]

    def batch_for_step(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 [batch_size]) of a step, counted from 0."""
        if step < 0:
            raise ValueError(f"BatchSchedule: step must not be negative, got {step}")
        epoch, position = divmod(step, self.batches_per_epoch)
        return epoch, self.epoch_batches(epoch)[position]


def rank_slice(batch_size: int, rank: int, world_size: int, *, key: str = "SOLVER.IMS_PER_BATCH") -> slice:
    """The part of the global batch that a rank works on.

    Raises:
        ValueError: the ranks cannot have equal shares; ``key`` names the setting in the message.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        advice = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise ValueError(
            f"{key} is {batch_size}, which {world_size} processes cannot share equally: "
            f"use a multiple of {world_size}, such as {advice}"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def shard_range(num_images: int, rank: int, world_size: int) -> range:
    """The images that a rank evaluates: contiguous, each image on exactly one rank, lengths differ by at most one."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    return range(num_images * rank // world_size, num_images * (rank + 1) // world_size)


def _unsigned(seed: int) -> int:
    """SeedSequence takes no negative numbers; a negative seed is as good as any other."""
    return seed & 0xFFFFFFFFFFFFFFFF
