"""Batches that the device finishes are those that the workers finish."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrcnn.data import (
    ArenaBatch,
    Batch,
    CocoDataset,
    Normalization,
    Prefetcher,
    Sample,
    ShapeBuckets,
    TrainTransform,
    make_train_loader,
)
from fastrcnn.data.arena import ArenaCollate, PackedArena
from fastrcnn.data.prefetch import CudaCopies, HostCopies
from fastrcnn.data.transforms import Prepared
from fastrcnn.structures import BoxList, SegmentationMask, Targets
from tests.data.conftest import CocoFolder

# Sizes above and below those of the images: some grow on the device, some shrink in the worker.
TRANSFORM = TrainTransform((24, 40, 96), 120, vertical_flip_prob=0.4, brightness=0.2, hue=0.1)
BUCKETS = ShapeBuckets(((96, 128), (128, 96)), 32)


@pytest.fixture
def dataset(coco_folder: CocoFolder) -> CocoDataset:
    coco_folder.write()
    return CocoDataset(coco_folder.annotations, coco_folder.images)


def batches(dataset: CocoDataset, **changes: Any) -> list[Any]:
    arguments: dict[str, Any] = {
        "ims_per_batch": 2,
        "num_steps": 9,
        "transform": TRANSFORM,
        "normalization": Normalization(size_divisible=32),
        "seed": 3,
    }
    return list(make_train_loader(dataset, **{**arguments, **changes}))


def tensors_of(targets: Targets) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(targets).items()}


def assert_same(arena: ArenaBatch, plain: Batch) -> None:
    images = arena.images.image_list()
    assert torch.equal(images.tensors, plain.images.tensors)
    assert torch.equal(images.sizes, plain.images.sizes)
    assert torch.equal(images.ids, plain.images.ids)
    assert (arena.indices, arena.epoch) == (plain.indices, plain.epoch)
    assert tensors_of(arena.targets) == tensors_of(Targets.from_boxlists(plain.targets))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("buckets", [None, BUCKETS], ids=["largest", "buckets"])
def test_the_device_makes_the_batches_that_workers_make(
    dataset: CocoDataset, buckets: ShapeBuckets | None, num_workers: int
) -> None:
    normalization = Normalization((10.0, 20.0, 30.0), (2.0, 4.0, 5.0), size_divisible=32, buckets=buckets)
    plain = batches(dataset, normalization=normalization)
    arena = batches(dataset, normalization=normalization, on_device=True, num_workers=num_workers)
    assert len(arena) == len(plain) == 9
    flips = set()
    for one, other in zip(arena, plain, strict=True):
        assert_same(one, other)
        flips |= set(one.images.table[:, 5].tolist())
    assert flips == {0, 1, 2, 3}


def test_a_transform_of_ones_own_is_finished_by_the_worker(dataset: CocoDataset) -> None:
    def upside_down(sample: Sample, generator: np.random.Generator) -> Sample:
        return replace(sample, image=sample.image.flip(0))

    plain = batches(dataset, transform=upside_down)
    for one, other in zip(batches(dataset, transform=upside_down, on_device=True), plain, strict=True):
        assert_same(one, other)
        assert torch.equal(one.images.table[:, 1:3], one.images.table[:, 3:5])


def test_no_more_pixels_travel_than_the_batch_has(dataset: CocoDataset) -> None:
    transform = replace(TRANSFORM, min_sizes=(16,))
    for batch in batches(dataset, transform=transform, on_device=True):
        table = batch.images.table
        assert (table[:, 1:3].prod(1) <= table[:, 3:5].prod(1)).all()
        assert batch.used - batch.pieces[-1].offset == 3 * table[:, 1:3].prod(1).sum()


def prepared(count: int, height: int = 6, width: int = 8) -> Prepared:
    boxes = torch.arange(4 * count).reshape(count, 4).float()
    polygons = [[torch.rand(3 + i, 2)] * (i % 3) for i in range(count)]
    target = BoxList(
        boxes, (width, height), labels=torch.arange(count), masks=SegmentationMask(polygons, (width, height))
    )
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return Prepared(image, target, (2 * height, 2 * width), 1, 7, 0)


@pytest.mark.parametrize("counts", [[0], [0, 0], [3, 0], [5, 2]])
def test_what_a_worker_sends(counts: list[int]) -> None:
    """One tensor, whatever the ground truth; the same batch comes out."""
    samples = [prepared(count) for count in counts]
    packed = ArenaCollate(Normalization())(samples, epoch=4)
    sent = packed.__getstate__()

    def count_tensors(value: Any) -> int:
        if isinstance(value, Tensor):
            return 1
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
        return sum(map(count_tensors, parts))

    assert count_tensors(sent) == 1
    received = pickle.loads(pickle.dumps(packed))
    assert isinstance(received, PackedArena)
    batch = received.unpack()
    assert tensors_of(batch.targets) == tensors_of(Targets.from_boxlists([s.target for s in samples]))
    assert batch.epoch == 4
    assert len(batch.images) == len(counts)
    used = sum(s.image.numel() for s in samples)
    assert torch.equal(batch.images.arena[:used], torch.cat([s.image.flatten() for s in samples]))
    assert len(batch.buffer) - batch.used == len(batch.images.arena) - used == len(counts) * 2**20 - used


class RecordedCopies(HostCopies):
    """Copies that are not done before they are waited for or handed over, as on a device."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: list[int] = []
        self.log: list[str] = []

    def staging(self, size: int) -> Tensor:
        self.made.append(size)
        return super().staging(size)

    def start(self, source: Tensor, size: int) -> tuple[Tensor, Any]:
        buffer = torch.full((size,), 255, dtype=torch.uint8)
        ticket = len(self.log)
        self.pending[ticket] = (source, buffer)
        self.log.append("start")
        return buffer, ticket

    def _finish(self, ticket: int) -> None:
        if ticket in self.pending:
            source, buffer = self.pending.pop(ticket)
            buffer[: len(source)].copy_(source)

    def hand_over(self, buffer: Tensor, ticket: Any) -> None:
        self.log.append("hand over")

    def wait(self, ticket: Any) -> None:
        self.log.append("wait")
        self._finish(ticket)


def test_prefetched_batches_are_the_same(dataset: CocoDataset) -> None:
    plain, arena = batches(dataset), batches(dataset, on_device=True)
    copies = RecordedCopies()
    held = list(Prefetcher(arena, torch.device("cpu"), copies=copies, slots=2))
    # As late as possible: a slot that was filled again before its copy was done would show.
    for ticket in list(copies.pending):
        copies._finish(ticket)
    for one, other in zip(held, plain, strict=True):
        assert_same(one, other)
        assert len(one.images.arena) == 2 * 2**20
    assert len(copies.made) == 2, "the ring is made once"
    assert copies.log.count("start") == copies.log.count("hand over") == 9
    assert copies.log.count("wait") == 7


def test_a_larger_batch_gets_a_larger_slot() -> None:
    copies = RecordedCopies()
    collate = ArenaCollate(Normalization())
    made = [collate([prepared(2, side, side)], 0).unpack() for side in (4, 700, 5)]
    held = list(Prefetcher(made, torch.device("cpu"), copies=copies, slots=1))
    for ticket in list(copies.pending):
        copies._finish(ticket)
    assert [size >> 20 for size in copies.made] == [1, 2]
    for one, other in zip(held, made, strict=True):
        assert torch.equal(one.images.image_list().tensors, other.images.image_list().tensors)


def test_a_cpu_and_other_batches_pass_through(dataset: CocoDataset) -> None:
    arena, plain = batches(dataset, on_device=True), batches(dataset)
    assert all(a is b for a, b in zip(Prefetcher(arena, torch.device("cpu")), arena, strict=True))
    assert len(Prefetcher(arena, torch.device("cpu"))) == 9
    copies = HostCopies()
    assert all(a is b for a, b in zip(Prefetcher(plain, torch.device("cpu"), copies=copies), plain, strict=True))
    for one, other in zip(Prefetcher(arena, torch.device("cpu"), copies=copies), plain, strict=True):
        assert_same(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetched_batches_on_a_gpu(dataset: CocoDataset) -> None:
    plain, arena = batches(dataset), batches(dataset, on_device=True)
    device = torch.device("cuda")
    held = list(Prefetcher(arena, device, copies=CudaCopies(device), slots=2))
    for one, other in zip(held, plain, strict=True):
        images = one.images.image_list()
        assert images.tensors.is_cuda
        assert torch.equal(images.tensors.cpu(), other.images.tensors)
        assert tensors_of(one.targets) == tensors_of(Targets.from_boxlists(other.targets))


def test_sizes_of_images_on_the_device_are_not_on_the_host() -> None:
    images = ArenaCollate(Normalization())([prepared(1)], 0).unpack().images
    made = images.to("cpu").image_list(torch.bfloat16, torch.channels_last, 4)
    assert made.tensors.shape == (1, 4, 12, 16)
    assert made.to("cpu").sizes.tolist() == [[12, 16]]
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="has to use sizes"):
        _ = made.image_sizes
