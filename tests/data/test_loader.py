"""What a step sees depends on (seed, step) alone."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from typing import Any

import pytest
import torch

from fastrcnn.data import (
    Batch,
    CocoDataset,
    ConcatDataset,
    DataError,
    DetectionDataset,
    ImageInfo,
    Normalization,
    Sample,
    TestTransform,
    TrainTransform,
    make_test_loader,
    make_train_loader,
)
from fastrcnn.data.collate import PackedTargets
from fastrcnn.structures import BoxList, SegmentationMask
from tests.data.conftest import CocoFolder

TRANSFORM = TrainTransform((32, 40, 56), 80, vertical_flip_prob=0.3, brightness=0.2, hue=0.1)
NORMALIZATION = Normalization(size_divisible=32)


@pytest.fixture
def dataset(coco_folder: CocoFolder) -> CocoDataset:
    coco_folder.write()
    return CocoDataset(coco_folder.annotations, coco_folder.images)


def train_batches(dataset: DetectionDataset, **changes: Any) -> list[Batch]:
    arguments: dict[str, Any] = {
        "ims_per_batch": 2,
        "num_steps": 9,
        "transform": TRANSFORM,
        "normalization": NORMALIZATION,
        "seed": 3,
    }
    return list(make_train_loader(dataset, **{**arguments, **changes}))


def assert_same_target(a: BoxList, b: BoxList) -> None:
    assert a.size == b.size
    assert torch.equal(a.boxes, b.boxes)
    assert a.labels is not None
    assert b.labels is not None
    assert torch.equal(a.labels, b.labels)
    if a.masks is None:
        assert b.masks is None
        return
    assert isinstance(a.masks, SegmentationMask)
    assert isinstance(b.masks, SegmentationMask)
    assert [[p.tolist() for p in one] for one in a.masks] == [[p.tolist() for p in one] for one in b.masks]


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images.tensors, b.images.tensors)
    assert a.images.image_sizes == b.images.image_sizes
    assert torch.equal(a.images.ids, b.images.ids)
    assert (a.indices, a.epoch) == (b.indices, b.epoch)
    for mine, theirs in zip(a.targets, b.targets, strict=True):
        assert_same_target(mine, theirs)


def test_a_batch(dataset: CocoDataset) -> None:
    batches = train_batches(dataset)
    assert len(batches) == 9
    # Four landscape and three other images: two batches of two each.
    assert [batch.epoch for batch in batches] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    for batch in batches:
        tensors = batch.images.tensors
        assert tensors.dtype == torch.float32
        assert tensors.shape[-2] % 32 == 0
        assert tensors.shape[-1] % 32 == 0
        assert batch.images.ids.tolist() == [dataset.image_info(i)["id"] for i in batch.indices]
        for (height, width), target, image in zip(batch.images.image_sizes, batch.targets, tensors, strict=True):
            assert target.size == (width, height)
            assert (image[:, height:] == 0).all()
            assert (image[:, :, width:] == 0).all()
            assert (image[:, :height, :width] != 0).any()
            assert target.masks is not None
        infos = [dataset.image_info(i) for i in batch.indices]
        assert len({info["height"] >= info["width"] for info in infos}) == 1
    assert {i for batch in batches[:4] for i in batch.indices} == set(range(7))


def test_pixels_are_normalised(dataset: CocoDataset) -> None:
    normalization = Normalization((10.0, 20.0, 30.0), (2.0, 4.0, 5.0), to_bgr255=True, size_divisible=0)
    transform = TrainTransform((48,), 1000, horizontal_flip_prob=0.0)
    batch = train_batches(dataset, normalization=normalization, transform=transform, ims_per_batch=1)[0]
    index = batch.indices[0]
    image = TestTransform(48, 1000)(dataset[index]).image
    expected = (image.flip(-1).permute(2, 0, 1).float() - torch.tensor([10.0, 20, 30])[:, None, None]) / torch.tensor(
        [2.0, 4, 5]
    )[:, None, None]
    torch.testing.assert_close(batch.images.tensors[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(dataset: CocoDataset, num_workers: int) -> None:
    alone = train_batches(dataset)
    shared = train_batches(dataset, num_workers=num_workers)
    assert len(alone) == len(shared)
    for a, b in zip(alone, shared, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("start_step", [1, 4, 7, 9])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_rest(dataset: CocoDataset, start_step: int, num_workers: int) -> None:
    rest = train_batches(dataset, start_step=start_step, num_workers=num_workers)
    whole = train_batches(dataset)[start_step:]
    assert len(rest) == len(whole) == 9 - start_step
    for a, b in zip(rest, whole, strict=True):
        assert_same(a, b)


def test_a_finished_run_sees_nothing(dataset: CocoDataset) -> None:
    assert train_batches(dataset, start_step=12) == []


def test_ranks_see_the_same_images_between_them(dataset: CocoDataset) -> None:
    whole = train_batches(dataset, ims_per_batch=4)
    parts = [train_batches(dataset, ims_per_batch=4, rank=rank, world_size=2) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert batch.indices == [i for half in halves for i in half.indices]
        assert batch.images.ids.tolist() == [i for half in halves for i in half.images.ids.tolist()]
        targets = [target for half in halves for target in half.targets]
        images = [image for half in halves for image in half.images.tensors]
        for position, (height, width) in enumerate(batch.images.image_sizes):
            mine, theirs = batch.images.tensors[position], images[position]
            assert torch.equal(mine[:, :height, :width], theirs[:, :height, :width])
            assert_same_target(batch.targets[position], targets[position])


def test_seeds_differ(dataset: CocoDataset) -> None:
    assert [b.indices for b in train_batches(dataset)] != [b.indices for b in train_batches(dataset, seed=4)]


def test_without_grouping(dataset: CocoDataset) -> None:
    batches = train_batches(dataset, aspect_ratio_grouping=False, num_steps=40)
    assert max(batch.epoch for batch in batches) == 9
    shapes = [{dataset.image_info(i)["height"] >= dataset.image_info(i)["width"] for i in b.indices} for b in batches]
    assert any(len(shape) == 2 for shape in shapes)


def test_an_epoch_augments_anew(dataset: CocoDataset) -> None:
    batches = train_batches(dataset, ims_per_batch=1, num_steps=70)
    looks = {tuple(b.images.tensors.flatten()[:200].tolist()) for b in batches if b.indices == [0]}
    assert len(looks) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_one_line_at_its_step(
    dataset: CocoDataset, coco_folder: CocoFolder, num_workers: int
) -> None:
    order = [batch.indices for batch in train_batches(dataset)]
    (coco_folder.images / "030.jpg").write_bytes(b"")
    good = next(step for step, indices in enumerate(order) if 2 in indices)
    loader = make_train_loader(
        dataset,
        ims_per_batch=2,
        num_steps=9,
        transform=TRANSFORM,
        normalization=NORMALIZATION,
        seed=3,
        num_workers=num_workers,
    )
    batches = iter(loader)
    for _ in range(good):
        next(batches)
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == f"image file {coco_folder.images / '030.jpg'} is empty (0 bytes)"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_loader_reports_a_damaged_image(dataset: CocoDataset, coco_folder: CocoFolder, num_workers: int) -> None:
    (coco_folder.images / "030.jpg").write_bytes(b"")
    loader = make_test_loader(dataset, ims_per_batch=2, normalization=NORMALIZATION, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^image file \S+030\.jpg is empty \(0 bytes\)$"):
        list(loader)


@pytest.mark.parametrize(("world_size", "ims_per_batch"), [(1, 1), (1, 2), (1, 8), (2, 4), (3, 3), (9, 9)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_evaluated_once(
    dataset: CocoDataset, world_size: int, ims_per_batch: int, num_workers: int
) -> None:
    if num_workers and world_size > 2:
        pytest.skip("many processes for nothing new")
    indices = []
    for rank in range(world_size):
        loader = make_test_loader(
            dataset,
            ims_per_batch=ims_per_batch,
            normalization=NORMALIZATION,
            transform=TestTransform(40, 60),
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert len(batch.indices) <= ims_per_batch // world_size
            infos = [dataset.image_info(i) for i in batch.indices]
            assert batch.image_ids == [info["id"] for info in infos] == batch.images.ids.tolist()
            assert batch.original_sizes == [(info["height"], info["width"]) for info in infos]
            indices += batch.indices
    assert indices == list(range(7))


def test_a_loader_can_be_used_again(dataset: CocoDataset) -> None:
    loader = make_test_loader(dataset, ims_per_batch=3, normalization=NORMALIZATION)
    first, second = list(loader), list(loader)
    assert [b.indices for b in first] == [b.indices for b in second] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(torch.equal(a.images.tensors, b.images.tensors) for a, b in zip(first, second, strict=True))


def test_what_cannot_be_shared_is_refused(dataset: CocoDataset) -> None:
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 3, which 2 processes cannot share"):
        train_batches(dataset, ims_per_batch=3, world_size=2)
    with pytest.raises(ValueError, match=r"TEST\.IMS_PER_BATCH is 3, which 2 processes cannot share"):
        make_test_loader(dataset, ims_per_batch=3, normalization=NORMALIZATION, world_size=2)


def test_an_empty_data_set_is_refused(coco_folder: CocoFolder) -> None:
    coco_folder.content["annotations"] = []
    coco_folder.write()
    empty = CocoDataset(coco_folder.annotations, coco_folder.images, remove_images_without_annotations=True)
    with pytest.raises(DataError, match="has no image to train on"):
        train_batches(empty)


class InMemory:
    """A data set of one's own: nothing but the protocol."""

    has_masks = False
    num_classes = 2

    def __init__(self) -> None:
        self.class_names = ["__background__", "thing"]
        self.label_to_category_id = {1: 1}

    def __len__(self) -> int:
        return 5

    def image_info(self, index: int) -> ImageInfo:
        return {"id": 100 + index, "height": 30, "width": 40, "file_name": str(index)}

    def __getitem__(self, index: int) -> Sample:
        boxes = torch.tensor([[1.0, 2, 20, 25]]).repeat(index, 1)
        target = BoxList(boxes, (40, 30), labels=torch.ones(index, dtype=torch.int64))
        return Sample(torch.full((30, 40, 3), index, dtype=torch.uint8), target, 100 + index, index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_object_of_the_protocol_is_a_data_set(num_workers: int) -> None:
    assert isinstance(InMemory(), DetectionDataset)
    batches = train_batches(InMemory(), num_workers=num_workers, num_steps=3)
    assert all(len(t) == i for batch in batches for t, i in zip(batch.targets, batch.indices, strict=True))
    assert all(target.masks is None for batch in batches for target in batch.targets)


def test_what_a_worker_needs_can_be_pickled(dataset: CocoDataset) -> None:
    """Spawned and fork-server workers (Python 3.14's default) get the data set by pickle."""
    loader = make_train_loader(
        dataset, ims_per_batch=2, num_steps=2, transform=TRANSFORM, normalization=NORMALIZATION, num_workers=1, seed=3
    )
    again = pickle.loads(pickle.dumps(loader._batches.dataset))
    item = next(iter(loader._batches.sampler))
    assert_same(again[item].unpack(), train_batches(dataset, num_steps=1)[0])


def targets_of_many_polygons(count: int) -> BoxList:
    polygons = [[torch.rand(3 + i % 5, 2) for _ in range(i % 4)] for i in range(count)]
    return BoxList(
        torch.rand(count, 4), (50, 40), labels=torch.arange(count), masks=SegmentationMask(polygons, (50, 40))
    )


@pytest.mark.parametrize("counts", [(0,), (3, 0, 7), (0, 0), (400,)], ids=str)
def test_packed_targets(counts: tuple[int, ...]) -> None:
    targets = [targets_of_many_polygons(count) for count in counts]
    packed = PackedTargets.pack(targets)
    # Five tensors, however many polygons: each one costs a file descriptor on its way out of a worker.
    assert sum(isinstance(value, torch.Tensor) for value in vars(packed).values()) == 5
    for before, after in zip(targets, packed.unpack(), strict=True):
        assert_same_target(before, after)


def test_concatenated_data_sets(dataset: CocoDataset, coco_folder: CocoFolder) -> None:
    trained = CocoDataset(coco_folder.annotations, coco_folder.images, remove_images_without_annotations=True)
    both = ConcatDataset([dataset, trained])
    assert len(both) == 7 + 6
    assert both.image_info(0) == dataset.image_info(0)
    assert both.image_info(7) == trained.image_info(0)
    assert both[12].index == 12
    assert both[12].image_id == trained[5].image_id
    assert both.num_classes == 4
    assert isinstance(both, DetectionDataset)
    assert len(train_batches(both)) == 9
    with pytest.raises(IndexError):
        both[13]


def test_concatenated_data_sets_need_the_same_classes(dataset: CocoDataset) -> None:
    with pytest.raises(DataError, match="their classes differ"):
        ConcatDataset([dataset, InMemory()])


def test_concatenation_with_boxes_only_drops_the_masks(dataset: CocoDataset) -> None:
    boxes = InMemory()
    boxes.class_names = dataset.class_names
    boxes.label_to_category_id = dataset.label_to_category_id
    both = ConcatDataset([dataset, boxes])
    assert not both.has_masks
    assert both[0].target.masks is None
    assert dataset[0].target.masks is not None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_numbers_alone(dataset: CocoDataset, num_workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train_batches(dataset, num_workers=num_workers, num_steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_workers_leave_an_interrupt_to_the_parent(dataset: CocoDataset, capfd: pytest.CaptureFixture[str]) -> None:
    batches = iter(make_test_loader(dataset, ims_per_batch=1, normalization=NORMALIZATION, num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGINT)
    assert len(list(batches)) == 6
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pixels_are_pinned(dataset: CocoDataset, num_workers: int) -> None:
    batches = train_batches(dataset, pin_memory=True, num_workers=num_workers, num_steps=2)
    assert all(batch.images.tensors.is_pinned() for batch in batches)
    for a, b in zip(batches, train_batches(dataset, num_steps=2), strict=True):
        assert_same(a, b)
    loader = make_test_loader(dataset, ims_per_batch=2, normalization=NORMALIZATION, pin_memory=True)
    assert all(batch.images.tensors.is_pinned() for batch in loader)
