"""Data sets, transforms and loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastrcnn.build.switches import device_preprocessing, step_switches
from fastrcnn.config import Config
from fastrcnn.conventions import CONVENTIONS
from fastrcnn.data.augmentation import TestAugmentation
from fastrcnn.data.buckets import ShapeBuckets
from fastrcnn.data.catalog import Catalog
from fastrcnn.data.collate import Normalization, TestBatch
from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.loader import Loader, make_test_loader, make_train_loader
from fastrcnn.data.transforms import TestTransform, TrainTransform
from fastrcnn.structures import pad_targets


def build_catalog(cfg: Config, catalog: Catalog | None = None) -> Catalog:
    """``catalog`` (maskrcnn-benchmark's names by default) and the names of ``DATASETS.OWN``.

    Raises:
        DataError: a name is taken, or where it lies is of no known form.
    """
    found = Catalog() if catalog is None else catalog.copy()
    for name, source in cfg.DATASETS.OWN:
        found.register(name, source)
    return found


def build_dataset(
    cfg: Config, names: Sequence[str], *, is_train: bool, catalog: Catalog | None = None
) -> DetectionDataset:
    """The data sets called ``names``, joined. Training drops images without annotations (``DATASETS.FILTER_EMPTY``).

    Raises:
        DataError: an unknown name, or faulty files.
    """
    return build_catalog(cfg, catalog).open(
        names, is_train=is_train, filter_empty=is_train and cfg.DATASETS.FILTER_EMPTY
    )


def _normalization(cfg: Config) -> Normalization:
    return Normalization(
        cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, cfg.INPUT.TO_BGR255, cfg.DATALOADER.SIZE_DIVISIBILITY
    )


def shape_buckets(cfg: Config) -> ShapeBuckets | None:
    """The sizes that training batches are padded to; None pads each batch to its largest image."""
    wanted, step = cfg.DATALOADER.SHAPE_BUCKETS, cfg.DATALOADER.SIZE_DIVISIBILITY
    if wanted == "auto":
        wanted = step_switches(cfg, torch.device(cfg.MODEL.DEVICE))[0]
    if isinstance(wanted, bool):
        return ShapeBuckets.of(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, step) if wanted else None
    return ShapeBuckets(wanted, max(1, step))


def build_train_loader(
    cfg: Config,
    dataset: DetectionDataset,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    *,
    on_device: bool | None = None,
) -> Loader[Any]:
    """The batches of the steps ``start_step`` to ``SOLVER.MAX_ITER - 1``, this rank's share of each.

    :class:`fastrcnn.data.ArenaBatch` where the device preprocesses (``on_device``, by default
    ``DATALOADER.DEVICE_PREPROCESSING``), else :class:`fastrcnn.data.Batch`.
    """
    image, convention, device = cfg.INPUT, CONVENTIONS[cfg.MODEL.CONVENTION], torch.device(cfg.MODEL.DEVICE)
    return make_train_loader(
        dataset,
        ims_per_batch=cfg.SOLVER.IMS_PER_BATCH,
        num_steps=cfg.SOLVER.MAX_ITER,
        start_step=start_step,
        transform=TrainTransform(
            min_sizes=image.MIN_SIZE_TRAIN,
            max_size=image.MAX_SIZE_TRAIN,
            horizontal_flip_prob=image.HORIZONTAL_FLIP_PROB_TRAIN,
            vertical_flip_prob=image.VERTICAL_FLIP_PROB_TRAIN,
            brightness=image.BRIGHTNESS,
            contrast=image.CONTRAST,
            saturation=image.SATURATION,
            hue=image.HUE,
            rounding=convention.resize_rounding,
            box_offset=convention.box_offset,
        ),
        normalization=replace(_normalization(cfg), buckets=shape_buckets(cfg)),
        seed=cfg.SOLVER.SEED,
        rank=rank,
        world_size=world_size,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=device.type == "cuda",
        on_device=device_preprocessing(cfg, device) if on_device is None else on_device,
        pad_targets=pad_targets if step_switches(cfg, device)[0] else None,
    )


def build_test_transform(cfg: Config) -> TestTransform:
    rounding = CONVENTIONS[cfg.MODEL.CONVENTION].resize_rounding
    return TestTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, rounding)


def build_test_augmentation(cfg: Config) -> TestAugmentation | None:
    """The views of ``TEST.BBOX_AUG``; None where it is not enabled."""
    augmentation = cfg.TEST.BBOX_AUG
    if not augmentation.ENABLED:
        return None
    return TestAugmentation(
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        h_flip=augmentation.H_FLIP,
        scales=augmentation.SCALES,
        scale_max_size=augmentation.MAX_SIZE,
        scale_h_flip=augmentation.SCALE_H_FLIP,
        rounding=CONVENTIONS[cfg.MODEL.CONVENTION].resize_rounding,
    )


def build_test_loader(cfg: Config, dataset: DetectionDataset, rank: int = 0, world_size: int = 1) -> Loader[TestBatch]:
    """Every image of this rank's shard once, in order."""
    return make_test_loader(
        dataset,
        ims_per_batch=cfg.TEST.IMS_PER_BATCH,
        transform=build_test_transform(cfg),
        augmentation=build_test_augmentation(cfg),
        normalization=_normalization(cfg),
        rank=rank,
        world_size=world_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )
