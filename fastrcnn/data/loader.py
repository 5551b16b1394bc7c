"""Batches in the order of their steps, prepared by worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastrcnn.data.arena import ArenaBatch, ArenaCollate, PackedArena
from fastrcnn.data.augmentation import TestAugmentation
from fastrcnn.data.collate import Batch, Normalization, PackedBatch, TestBatch, collate_test, collate_train
from fastrcnn.data.dataset import DataError, DetectionDataset
from fastrcnn.data.sampler import BatchSchedule, aspect_ratio_groups, rank_slice, shard_range
from fastrcnn.data.transforms import Prepared, TestTransform, TrainTransform, Transform, sample_generator
from fastrcnn.structures import Targets

B = TypeVar("B", bound="Batch | ArenaBatch | TestBatch")


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker: torch would wrap the message into thirty lines of traceback."""

    message: str


class Loader(Generic[B]):
    """Iterates over batches; ``len`` is their number. A new iteration starts again at the first batch.

    Raises (while iterating):
        DataError: an image or its annotations cannot be read; raised at the step that needed them.
    """

    def __init__(self, batches: DataLoader[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[B]:
        for item in self._batches:
            if isinstance(item, _Failure):
                raise DataError(item.message)
            yield cast(B, item.unpack() if isinstance(item, PackedBatch | PackedArena) else item)


def make_train_loader(
    dataset: DetectionDataset,
    *,
    ims_per_batch: int,
    num_steps: int,
    transform: Transform,
    normalization: Normalization,
    start_step: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    on_device: bool = False,
    pad_targets: Callable[[Targets], Targets] | None = None,
) -> Loader[Any]:
    """The batches of the steps ``start_step`` to ``num_steps - 1``, this rank's share of each.

    What a step sees depends on (seed, step) alone: not on the number of workers or ranks, nor on where the run was
    resumed.

    Args:
        ims_per_batch: images of the global batch, over all ranks (``SOLVER.IMS_PER_BATCH``).
        num_steps: number of the last step plus one (``SOLVER.MAX_ITER``), resumed or not.
        transform: see :mod:`fastrcnn.data.transforms`; runs in the worker, and so has to be picklable.
        aspect_ratio_grouping: batches hold only landscape or only portrait images, which saves padding; where
            ``normalization`` has buckets, only images of one bucket.
        num_workers: processes of this rank; 0 prepares the batches in the calling process.
        pin_memory: page-locked pixels, for asynchronous copies to a CUDA device. Not for ``on_device``, whose batches
            :class:`fastrcnn.data.prefetch.Prefetcher` stages itself.
        on_device: resizing, flipping and normalising is left to the device: batches are :class:`ArenaBatch`, else
            :class:`Batch`. Pixels and ground truth are the same.
        pad_targets: see :class:`ArenaCollate`; runs in the worker.

    Raises:
        ValueError: ``ims_per_batch`` is not divisible by ``world_size``.
        DataError: the data set is empty.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset!r} has no image to train on")
    share = rank_slice(ims_per_batch, rank, world_size)
    schedule = BatchSchedule(
        _groups(dataset, transform, normalization) if aspect_ratio_grouping else None,
        num_images=len(dataset),
        batch_size=ims_per_batch,
        seed=seed,
    )
    steps = _TrainSteps(schedule, share, range(start_step, max(start_step, num_steps)))
    arena = ArenaCollate(normalization, pad_targets) if on_device else None
    batches = _TrainBatches(dataset, transform, normalization, seed, arena)
    return Loader(_data_loader(batches, steps, num_workers, pin_memory and not on_device, prefetch_factor))


def _groups(dataset: DetectionDataset, transform: Transform, normalization: Normalization) -> np.ndarray:
    """int64 [n]: images of different groups do not share a batch."""
    if normalization.buckets is None or not isinstance(transform, TrainTransform):
        return aspect_ratio_groups(dataset)
    return normalization.buckets.groups(dataset, transform.min_sizes, transform.max_size, transform.rounding)


def make_test_loader(
    dataset: DetectionDataset,
    *,
    ims_per_batch: int,
    normalization: Normalization,
    transform: TestTransform | None = None,
    augmentation: TestAugmentation | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> Loader[TestBatch]:
    """Every image of this rank's shard once, in order; over all ranks, every image exactly once.

    Args:
        ims_per_batch: images over all ranks (``TEST.IMS_PER_BATCH``); the last batch may be smaller.
        augmentation: the batches hold the Views that it makes, instead of what ``transform`` makes.

    Raises:
        ValueError: ``ims_per_batch`` is not divisible by ``world_size``.
    """
    share = rank_slice(ims_per_batch, rank, world_size, key="TEST.IMS_PER_BATCH")
    shard = shard_range(len(dataset), rank, world_size)
    size = share.stop - share.start
    steps = [list(shard[first : first + size]) for first in range(0, len(shard), size)]
    batches = _TestBatches(dataset, transform or TestTransform(), normalization, augmentation)
    return Loader(_data_loader(batches, steps, num_workers, pin_memory, prefetch_factor))


def _data_loader(
    batches: Dataset[Any], steps: Any, num_workers: int, pin_memory: bool, prefetch_factor: int
) -> DataLoader[Any]:
    # More workers than processors only take turns; what a step sees does not depend on their number.
    num_workers = min(num_workers, os.cpu_count() or 1)
    # batch_size=None: an item is a whole batch, so that workers take turns by step and batches keep their order.
    return DataLoader(
        batches,
        sampler=steps,
        batch_size=None,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # Of its own, because an iteration draws a number from it: the global generator is the model's.
        generator=torch.Generator(),
    )


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the parent ends its workers, whose tracebacks would bury its message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(item: Any) -> Any:
    return item


class _TrainSteps:
    """(epoch, indices of this rank) of every step."""

    def __init__(self, schedule: BatchSchedule, share: slice, steps: range) -> None:
        self.schedule, self.share, self.steps = schedule, share, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for step in self.steps:
            epoch, indices = self.schedule.batch_for_step(step)
            yield epoch, indices[self.share].tolist()


class _TrainBatches(Dataset[Any]):
    """``self[(epoch, indices)]`` reads, transforms and collates a batch."""

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        normalization: Normalization,
        seed: int,
        arena: ArenaCollate | None = None,
    ) -> None:
        self.dataset, self.transform, self.normalization, self.seed = dataset, transform, normalization, seed
        self.arena = arena

    def __getitem__(self, item: tuple[int, Sequence[int]]) -> PackedBatch | PackedArena | _Failure:
        epoch, indices = item
        try:
            if self.arena is not None:
                return self.arena([self._prepare(epoch, i) for i in indices], epoch)
            samples = [self.transform(self.dataset[i], sample_generator(self.seed, epoch, i)) for i in indices]
        except DataError as error:
            return _Failure(str(error))
        return collate_train(samples, self.normalization, epoch)

    def _prepare(self, epoch: int, index: int) -> Prepared:
        sample, generator = self.dataset[index], sample_generator(self.seed, epoch, index)
        if isinstance(self.transform, TrainTransform):
            return self.transform.prepare(sample, generator)
        return Prepared.done(self.transform(sample, generator))


class _TestBatches(Dataset[Any]):
    """``self[indices]`` reads, resizes and collates a batch."""

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: TestTransform,
        normalization: Normalization,
        augmentation: TestAugmentation | None,
    ) -> None:
        self.dataset, self.transform, self.normalization = dataset, transform, normalization
        self.augmentation = augmentation

    def __getitem__(self, indices: Sequence[int]) -> TestBatch | _Failure:
        samples, sizes = [], []
        try:
            for index in indices:
                sample = self.dataset[index]
                sizes.append((int(sample.image.shape[0]), int(sample.image.shape[1])))
                samples.append(sample if self.augmentation is not None else self.transform(sample))
        except DataError as error:
            return _Failure(str(error))
        if self.augmentation is not None:
            return collate_test(samples, sizes, partial(self.augmentation, normalization=self.normalization))
        return collate_test(samples, sizes, self.normalization)
