"""The shapes of the published walk-through of maskrcnn-benchmark: two images padded to 800 x 1344, R-50-FPN."""

from __future__ import annotations

import pytest
import torch

import fastrcnn_kernels
from fastrcnn.build import build_model
from fastrcnn.config import load_config
from tests.models.inputs import CONFIGS, random_batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def walk():
    """One training forward at full size, recording what passes between the parts."""
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHT", ""])
    model = build_model(cfg)
    images, targets = random_batch([4, 35], [(1333, 800), (1204, 800)], num_classes=81)
    seen = {}

    def record(name):
        def hook(module, inputs, outputs):
            seen[name] = outputs

        return hook

    box, mask = model.roi_heads["box"], model.roi_heads["mask"]
    for name, module in {
        "features": model.backbone,
        "rpn_head": model.rpn.head,
        "box_features": box.feature_extractor,
        "box_predictor": box.predictor,
        "mask_features": mask.feature_extractor,
    }.items():
        module.register_forward_hook(record(name))
    sample, draw = box.sample, fastrcnn_kernels.sample_balanced
    seen["draws"] = []

    def recorded_sample(*args):
        seen["sampled"] = sample(*args)
        return seen["sampled"]

    def recorded_draw(*args, **kwargs):
        seen["draws"].append(draw(*args, **kwargs))
        return seen["draws"][-1]

    box.sample = recorded_sample
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastrcnn_kernels, "sample_balanced", recorded_draw)
        seen["losses"] = model(images, targets)
    seen["images"], seen["model"] = images, model
    return seen


LEVELS = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]


def test_features_and_rpn_outputs(walk):
    assert tuple(walk["images"].tensors.shape) == (2, 3, 800, 1344)
    assert [tuple(f.shape) for f in walk["features"]] == [(2, 256, h, w) for h, w in LEVELS]
    objectness, deltas = walk["rpn_head"]
    assert [tuple(x.shape) for x in objectness] == [(2, 3, h, w) for h, w in LEVELS]
    assert [tuple(x.shape) for x in deltas] == [(2, 12, h, w) for h, w in LEVELS]
    anchors = walk["model"].rpn.anchor_generator(walk["features"])
    assert [len(a) for a in anchors] == [201600, 50400, 12600, 3150, 819]


def test_rpn_samples(walk):
    indices, num_positive, num_sampled = walk["draws"][0]
    assert tuple(indices.shape) == (2, 256)
    assert num_sampled.tolist() == [256, 256]
    assert all(0 < n <= 128 for n in num_positive.tolist())
    assert len(walk["draws"]) == 2  # the other is the box head's


def test_box_head_shapes(walk):
    sampled = walk["sampled"]
    assert tuple(sampled.labels.shape) == (2, 512)
    assert sampled.num_sampled.tolist() == [512, 512]
    assert all(0 < n <= 128 for n in sampled.num_positive.tolist())
    assert tuple(walk["box_features"].shape) == (1024, 1024)
    class_logits, box_regression = walk["box_predictor"]
    assert tuple(class_logits.shape) == (1024, 81)
    assert tuple(box_regression.shape) == (1024, 324)


def test_mask_head_shapes(walk):
    positives = int(walk["sampled"].num_positive.sum())
    assert tuple(walk["mask_features"].shape) == (positives, 256, 14, 14)
    # Training computes each region's own class alone; the predictor called as a module gives them all.
    logits = walk["model"].roi_heads["mask"].predictor(walk["mask_features"][:2])
    assert tuple(logits.shape) == (2, 81, 28, 28)


def test_losses(walk):
    assert set(walk["losses"]) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    }
    for name, loss in walk["losses"].items():
        assert loss.dim() == 0, name
        assert loss.isfinite(), name
