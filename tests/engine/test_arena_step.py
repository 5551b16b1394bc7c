"""Training on batches that the step preprocesses, and on batches padded to buckets: the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrcnn.build import build_train_loader
from fastrcnn.build.data import shape_buckets
from fastrcnn.config import Config
from fastrcnn.data import ArenaBatch, Batch, CocoDataset, Normalization, ShapeBuckets, TrainTransform, make_train_loader
from fastrcnn.engine.graph import OperatorRecorder
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import ImageList, pad_targets
from tests.data.conftest import CocoFolder
from tests.engine.standin import assert_same
from tests.models.inputs import random_batch, small_config, small_model

STATIC = ["MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False"]


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    folder = CocoFolder(tmp_path).write()
    return CocoDataset(folder.annotations, folder.images)


def make_step(model: GeneralizedRCNN, **graph: Any) -> TrainStep:
    optimizer = make_optimizer(model, base_lr=0.002, momentum=0.9, weight_decay=1e-4, fused=True)
    scheduler = WarmupMultiStepLR(optimizer, milestones=(5,), warmup_iters=4)
    return TrainStep(model, optimizer, scheduler, device=torch.device("cpu"), **graph)


def batches(dataset: CocoDataset, **changes: Any) -> list[Any]:
    buckets = ShapeBuckets.of([64], 110, 32)
    arguments: dict[str, Any] = {
        "ims_per_batch": 2,
        "num_steps": 6,
        "transform": TrainTransform((48, 64), 110, vertical_flip_prob=0.3),
        "normalization": Normalization(size_divisible=32, buckets=buckets),
    }
    return list(make_train_loader(dataset, **{**arguments, **changes}))


@pytest.mark.parametrize("channels_last", ["False", "True"])
def test_a_step_preprocesses_what_workers_would(dataset: CocoDataset, channels_last: str) -> None:
    model = lambda: small_model(*STATIC, "MODEL.CHANNELS_LAST", channels_last)  # noqa: E731
    mine, theirs = make_step(model()), make_step(model())
    for number, (arena, plain) in enumerate(zip(batches(dataset, on_device=True), batches(dataset), strict=True)):
        assert isinstance(arena, ArenaBatch)
        found, wanted = mine(arena, number), theirs(plain, number)
        assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in wanted.items()}
    assert_same(dict(mine.model.state_dict()), dict(theirs.model.state_dict()))


def test_a_recorded_step_preprocesses_each_batch_anew(dataset: CocoDataset) -> None:
    """Pixels, sizes, flips and ground truth of later batches reach what was recorded from an earlier one."""
    recorded = make_step(small_model(*STATIC), graph=True, recorder=OperatorRecorder(), warm_up=0)
    plain = make_step(small_model(*STATIC))
    arenas = batches(dataset, on_device=True, pad_targets=pad_targets)
    for number, (arena, batch) in enumerate(zip(arenas, batches(dataset), strict=True)):
        found, wanted = recorded(arena, number), plain(batch, number)
        for name, loss in wanted.items():
            torch.testing.assert_close(found[name], loss, rtol=1e-6, atol=1e-6)
    assert recorded._graphed is not None
    padded = {arena.images.padded_size for arena in arenas}
    assert recorded._graphed.recorded == len(padded) < len(arenas)


def quiet_model() -> GeneralizedRCNN:
    """A model to which a zero is nothing, in float64: no bias in the trunk, and no proposal where there is no feature.

    Where this does not hold, padding has an influence, upstream as here: features reach over the edge of an image and
    back, anchors out there stand in line for the best before NMS, and which anchors are sampled for the loss depends on
    how many there are; here all are.
    """
    few = ["MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "3", "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "20"]
    model = small_model(*STATIC, *few, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "200000").double()
    with torch.no_grad():
        for name, value in (*model.backbone.named_parameters(), *model.backbone.named_buffers()):
            if name.endswith(("bias", "running_mean")):
                value.zero_()
        model.rpn.head.conv.bias.zero_()
        model.rpn.head.cls_logits.weight.abs_()  # above the bias wherever there is a feature
    return model


def test_losses_do_not_change_with_the_bucket() -> None:
    images, targets = random_batch([3], [(448, 416)], dtype=torch.float64)
    pixels = images.tensors.clone()
    # What lies within the reach of the network of the edge is zero: then nothing gets over it.
    pixels[:, :, 24:] = 0
    pixels[:, :, :, 24:] = 0
    losses: list[dict[str, Tensor]] = []
    gradients = []
    for height, width in ((416, 448), (512, 640)):
        model = quiet_model()
        model.set_sampling(1, 2)
        padded = torch.nn.functional.pad(pixels, (0, width - 448, 0, height - 416))
        found = model(ImageList(padded, images.image_sizes, images.ids), targets)
        sum(found.values()).backward()
        losses.append(found)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0]["loss_mask"] > 0
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-6, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")
    for name, gradient in gradients[0].items():
        if not name.endswith("bias"):  # there is more that a bias could change
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)


def config(*overrides: str) -> Config:
    return small_config("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "110", *overrides)


def test_what_the_keys_select() -> None:
    usual = ShapeBuckets.of([64], 110, 32)
    assert shape_buckets(config()) is None, "auto on a CPU"
    assert shape_buckets(config("STEP.GRAPH", "True")) == usual
    assert shape_buckets(config("MODEL.DEVICE", "cuda")) == usual
    assert shape_buckets(config("MODEL.DEVICE", "cuda", "STEP.GRAPH", "False")) is None
    assert shape_buckets(config("DATALOADER.SHAPE_BUCKETS", "True")) == usual
    assert shape_buckets(config("MODEL.DEVICE", "cuda", "DATALOADER.SHAPE_BUCKETS", "False")) is None
    by_hand = config("DATALOADER.SHAPE_BUCKETS", "((64, 128), (128, 64))")
    assert shape_buckets(by_hand) == ShapeBuckets(((64, 128), (128, 64)), 32)


def test_the_training_loader_follows_the_keys(dataset: CocoDataset) -> None:
    off = list(build_train_loader(config("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2"), dataset))
    assert all(isinstance(batch, Batch) for batch in off)
    keys = ["SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.DEVICE_PREPROCESSING", "True"]
    cfg = config(*keys, "STEP.GRAPH", "True")
    usual = shape_buckets(cfg)
    assert usual is not None
    for batch in build_train_loader(cfg, dataset):
        assert isinstance(batch, ArenaBatch)
        assert batch.images.padded_size in usual.sizes
        assert batch.targets.labels.shape == (2, 16), "padded in the worker"
    # The same images in the same order as ever, without buckets.
    for batch, plain in zip(build_train_loader(config(*keys), dataset), off, strict=True):
        assert batch.indices == plain.indices
        assert torch.equal(batch.images.image_list().tensors, plain.images.tensors)


def test_a_bucket_pads_the_plain_batch_too(dataset: CocoDataset) -> None:
    normalization = Normalization(size_divisible=32, buckets=ShapeBuckets(((96, 160), (160, 96)), 32))
    padded = batches(dataset, normalization=normalization)
    assert {batch.images.padded_size for batch in padded} == {(96, 160), (160, 96)}
    for batch in padded:
        height, width = (max(side) for side in zip(*batch.images.image_sizes, strict=True))
        assert not batch.images.tensors[:, :, height:].any()
        assert not batch.images.tensors[:, :, :, width:].any()
