"""Padding changes nothing: the padded model against the image-by-image oracle, in float64."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.structures import Targets
from tests.models import dynamic
from tests.models.inputs import random_batch, small_model

CASES = [
    pytest.param([0, 1, 60], [(160, 128), (128, 160), (97, 131)], id="0-1-60-boxes"),
    pytest.param([3], [(128, 96)], id="one-image"),
    pytest.param([0, 0], [(96, 64), (64, 64)], id="no-ground-truth-at-all"),
    pytest.param([5, 2], [(160, 160), (33, 160)], id="narrow"),
]


@pytest.mark.parametrize(("counts", "sizes"), CASES)
@pytest.mark.parametrize("positives_only", ["True", "False"])
def test_padded_losses_equal_dynamic_losses(counts, sizes, positives_only):
    model = small_model("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", positives_only).double()
    # Random weights propose nothing that fits: larger outputs make proposals differ from anchors and from each other.
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.mul_(20)
        model.rpn.head.cls_logits.weight.mul_(50)
    images, targets = random_batch(counts, sizes, dtype=torch.float64, seed=len(counts))
    model.set_sampling(seed=11, step=5)
    expected = dynamic.losses(model, images, targets)
    actual = model(images, targets)
    assert list(actual) == ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"]
    for name, loss in expected.items():
        assert loss.isfinite(), name
        torch.testing.assert_close(actual[name], loss, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    if sum(counts):
        assert actual["loss_mask"] > 0
        assert actual["loss_box_reg"] > 0


def test_padded_gradients_equal_dynamic_gradients():
    images, targets = random_batch([4, 0], [(128, 96), (96, 128)], dtype=torch.float64)
    gradients = []
    for compute in (lambda m: m(images, targets), lambda m: dynamic.losses(m, images, targets)):
        model = small_model("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False").double()
        sum(compute(model).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9)


def test_more_padding_changes_nothing():
    """Unused room for ground truth, and images that pad their neighbours, leave the losses as they are."""
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)], dtype=torch.float64)
    model = small_model().double()
    results = []
    for capacity in (3, 17):
        model.set_sampling(seed=1, step=2)
        results.append(model(images, Targets.from_boxlists(targets, min_capacity=capacity)))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-9)
