"""Between the images and the optimizer step the host never waits for the device."""

from __future__ import annotations

import pytest
import torch

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


def step(model, images, targets, optimizer):
    losses = model(images, targets)
    total = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    return losses


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("make", FAMILIES)
def test_a_training_step_never_waits(backend, make):
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    images, targets = random_batch([3, 0], [(128, 96), (96, 128)])
    targets = with_keypoints(targets) if "keypoint" in model.roi_heads else targets
    padded = Targets.from_boxlists(targets)
    with set_backend(backend):
        step(model, images, padded, optimizer)  # the grids of anchors are made once
        with forbid_host_sync():
            losses = step(model, images, padded, optimizer)
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
