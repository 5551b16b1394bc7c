"""From images to updated weights the host never waits for the device; `test_sync_source.py` reads the source for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.structures import Targets
from fastrcnn_kernels import set_backend
from tests.kernels.nosync import HostSync, forbid_host_sync
from tests.models.inputs import random_batch, small_keypoint_rcnn, small_model, small_retinanet, with_keypoints

FAMILIES = [
    pytest.param(lambda: small_model("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False"), id="mask-rcnn"),
    pytest.param(lambda: small_model(config_file="rpn_R_50_FPN_1x.yaml"), id="rpn"),
    pytest.param(small_retinanet, id="retinanet"),
    pytest.param(lambda: small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY", "False"), id="keypoint-rcnn"),
]


def train_step(model, **settings):
    """The step that training runs: forward, backward, optimizer, schedule."""
    optimizer = make_optimizer(model, base_lr=1e-6, momentum=0.9, weight_decay=1e-4)
    schedule = WarmupMultiStepLR(optimizer, milestones=[1, 3], warmup_iters=2)
    return TrainStep(model, optimizer, schedule, device=torch.device("cpu"), **settings)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("make", FAMILIES)
def test_a_training_step_never_waits(backend, make):
    model = make()
    step = train_step(model)
    images, targets = random_batch([3, 0], [(128, 96), (96, 128)])
    targets = with_keypoints(targets) if "keypoint" in model.roi_heads else targets
    batch = SimpleNamespace(images=images, targets=targets)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with set_backend(backend):
        step(batch, 0)  # the grids of anchors are made once, and so is the momentum
        with forbid_host_sync():
            for number in range(1, 4):  # over the end of the warm-up and a milestone
                losses = step(batch, number)
    assert all(loss.isfinite() for loss in losses.values())
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"clip_gradients": 1.0}], ids=["bfloat16", "clipped"])
def test_nor_does_one_in_bfloat16_or_with_clipped_gradients(settings):
    step = train_step(small_model("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False"), **settings)
    images, targets = random_batch([3, 0], [(128, 96), (96, 128)])
    batch = SimpleNamespace(images=images, targets=targets)
    step(batch, 0)
    with forbid_host_sync():
        losses = step(batch, 1)
    assert all(loss.isfinite() for loss in losses.values())


def test_packing_the_positives_is_found():
    """The check sees what it must: a mask head that packs its positives reads their number."""
    model = small_model("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "True")
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    padded = Targets.from_boxlists(targets)
    model(images, padded)
    with forbid_host_sync(), pytest.raises(HostSync, match="nonzero"):
        model(images, padded)


def test_shapes_do_not_depend_on_the_data():
    """The same padded sizes with other data give the same shapes everywhere in the heads."""
    model = small_model("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False")
    shapes: list[list[tuple[int, ...]]] = []
    for seed, counts in enumerate([[3, 0], [0, 0], [2, 3]]):
        seen: list[tuple[int, ...]] = []
        hooks = [
            module.register_forward_hook(lambda m, i, out, seen=seen: seen.append(tuple(out.shape)))
            for module in model.modules()
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.ConvTranspose2d)
        ]
        images, targets = random_batch(counts, [(128, 96), (96, 128)], seed=seed)
        model(images, Targets.from_boxlists(targets, min_capacity=3))
        shapes.append(seen)
        for hook in hooks:
            hook.remove()
    assert len(shapes[0]) > 30
    assert shapes[0] == shapes[1] == shapes[2]
