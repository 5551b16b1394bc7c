"""Each optimisation of the training step is exact: on against off, losses and all parameter gradients, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import BoxList, ImageList
from tests.models.inputs import random_batch, small_keypoint_rcnn, small_model, with_keypoints

# Largest difference of a tensor, as a share of its largest value. Sums in another order differ by some 1e-13.
TOLERANCE = 1e-9


class Optimisation(NamedTuple):
    """Settings (KEY, VALUE, ...) with it and without it; the rest of the configuration is the same."""

    on: tuple[str, ...]
    off: tuple[str, ...]


OPTIMISATIONS = {
    "sparse-rpn-backward": Optimisation(
        on=("MODEL.RPN.SPARSE_BACKWARD", "True"), off=("MODEL.RPN.SPARSE_BACKWARD", "False")
    ),
    "positives-only": Optimisation(
        on=("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "True"), off=("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False")
    ),
    "fused-convolutions": Optimisation(
        on=("MODEL.FUSED_CONVOLUTIONS", "True"), off=("MODEL.FUSED_CONVOLUTIONS", "False")
    ),
    "channels-last": Optimisation(on=("MODEL.CHANNELS_LAST", "True"), off=("MODEL.CHANNELS_LAST", "False")),
}
OPTIMISATIONS["all"] = Optimisation(
    on=tuple(setting for one in OPTIMISATIONS.values() for setting in one.on),
    off=tuple(setting for one in OPTIMISATIONS.values() for setting in one.off),
)

# Anchors of the coarse levels are larger than the images; those levels shall have a gradient too.
COMMON = ("MODEL.RPN.STRADDLE_THRESH", "-1")
# A threshold of 0 matches every box with some ground truth.
ALL_POSITIVE = (
    "MODEL.RPN.FG_IOU_THRESHOLD", "0.0", "MODEL.RPN.BG_IOU_THRESHOLD", "0.0", "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.ROI_HEADS.FG_IOU_THRESHOLD", "0.0", "MODEL.ROI_HEADS.BG_IOU_THRESHOLD", "0.0",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0",
)  # fmt: skip


class Case(NamedTuple):
    """Ground truths of each of two images, and settings."""

    counts: tuple[int, int]
    settings: tuple[str, ...] = ()


CASES = {
    "no-ground-truth": Case((0, 0)),  # no positives either
    "one-and-none": Case((1, 0)),
    "many": Case((40, 3)),
    "all-positive": Case((2, 5), ALL_POSITIVE),
    # Equal to a ground truth is a positive: there are as many positives as ground truths, and no more.
    "ground-truth-alone-is-positive": Case((4, 1), ("MODEL.ROI_HEADS.FG_IOU_THRESHOLD", "1.0")),
}


def batch(counts: tuple[int, int]) -> tuple[ImageList, list[BoxList]]:
    return random_batch(counts, [(128, 96), (96, 128)], seed=3, dtype=torch.float64)


def step(model: GeneralizedRCNN, images: ImageList, targets: list[BoxList]) -> dict[str, Tensor]:
    """Losses and gradients by name."""
    model.set_sampling(seed=1, step=7)
    losses = model(images, targets)
    assert isinstance(losses, dict)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: loss.detach() for name, loss in losses.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A head without a positive has no gradient where it did not run, and zeros where it ran on padding.
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def assert_equal(on: dict[str, Tensor], off: dict[str, Tensor]) -> None:
    assert on.keys() == off.keys()
    for name, wanted in off.items():
        difference, scale = (on[name] - wanted).abs().max(), wanted.abs().max()
        assert wanted.isfinite().all(), name
        assert difference <= TOLERANCE * scale, f"{name}: differs by {difference:.3g}, its largest value is {scale:.3g}"


def grew(weights: GeneralizedRCNN) -> GeneralizedRCNN:
    """Predictions of some size: with the small ones of the initialisation an error in them would be a small one too."""
    with torch.no_grad():
        for name, parameter in weights.named_parameters():
            if any(part in name for part in ("cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits")):
                parameter.mul_(5)
    return weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimisation", OPTIMISATIONS)
def test_losses_and_gradients_are_the_same(optimisation: str, case: str) -> None:
    counts, settings = CASES[case]
    found = []
    for overrides in OPTIMISATIONS[optimisation]:
        model = grew(small_model(*COMMON, *settings, *overrides).double())
        found.append(step(model, *batch(counts)))
    on, off = found
    assert_equal(on, off)
    # The case is what it says, and reaches what it must.
    assert off["loss_objectness"] > 0
    assert (off["loss_mask"] > 0) == (off["loss_box_reg"] > 0) == (sum(counts) > 0)
    assert off["rpn.head.conv.weight"].abs().max() > 0
    backbone = [name for name in off if name.startswith("backbone") and name.endswith("weight")]
    assert len(backbone) > 10
    assert not [name for name in backbone if off[name].abs().max() == 0]


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (12, 3)])
def test_keypoints_of_the_positives_alone(counts: tuple[int, int]) -> None:
    found = []
    for value in ("True", "False"):
        model = small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY", value).double()
        images, targets = batch(counts)
        found.append(step(model, images, with_keypoints(targets)))
    assert_equal(*found)
    assert (found[1]["loss_kp"] > 0) == (sum(counts) > 0)


def test_a_difference_is_found() -> None:
    """The comparison sees a gradient of one parameter that is off by a millionth."""
    found = step(small_model().double(), *batch((3, 1)))
    wrong = dict(found)
    name = "roi_heads.mask.predictor.mask_fcn_logits.weight"
    wrong[name] = found[name] * (1 + 1e-6)
    with pytest.raises(AssertionError, match=r"mask_fcn_logits\.weight: differs"):
        assert_equal(wrong, found)


def weights_after(fused: bool, counts: tuple[int, int], steps: int = 3) -> dict[str, Tensor]:
    """The weights after some steps of training in float32, over the end of the warm-up."""
    model = small_model(*COMMON)
    optimizer = make_optimizer(model, base_lr=1e-5, momentum=0.9, weight_decay=1e-4, fused=fused)
    schedule = WarmupMultiStepLR(optimizer, milestones=[10], warmup_iters=2)
    run = TrainStep(model, optimizer, schedule, device=torch.device("cpu"), seed=1)
    images, targets = random_batch(counts, [(128, 96), (96, 128)], seed=3)
    for number in range(steps):
        run(SimpleNamespace(images=images, targets=targets), number)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (12, 3)])
def test_the_fused_optimizer_gives_the_same_weights(counts: tuple[int, int]) -> None:
    """SGD over one buffer against PyTorch's, also where a head has no gradient; in float32, the type of the buffer."""
    start = {name: p for name, p in small_model(*COMMON).named_parameters() if p.requires_grad}
    on, off = weights_after(True, counts), weights_after(False, counts)
    assert on.keys() == off.keys() == start.keys()
    for name, wanted in off.items():
        assert (on[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name
    assert any((wanted - start[name]).abs().max() > 1e-4 * wanted.abs().max() for name, wanted in off.items())
