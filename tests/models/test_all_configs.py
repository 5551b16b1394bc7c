"""Every configuration of maskrcnn-benchmark: loads, builds, trains two steps and detects, narrow and on small images.

Architecture and rules are those of the file; only widths, class counts and sample sizes are reduced, so that all 66
take about a minute together.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastrcnn.build import build_model, for_testing
from fastrcnn.config import Config, load_config
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.structures import BoxList, ImageList, Views
from tests.config_helpers import upstream_configs
from tests.models.inputs import CONFIGS, random_batch, with_keypoints

NARROW = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHT", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "32",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
    "MODEL.FBNET.SCALE_FACTOR", "0.25",
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "32",
    "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", "32",
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "5",
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(32, 32, 32, 32)",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(16,) * 8",
    "MODEL.RETINANET.NUM_CLASSES", "5",
    "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "200",
    "MODEL.RPN.PRE_NMS_TOP_N_TEST", "100",
    "MODEL.RPN.POST_NMS_TOP_N_TRAIN", "100",
    "MODEL.RPN.POST_NMS_TOP_N_TEST", "50",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32",
    "MODEL.ROI_HEADS.SCORE_THRESH", "0.0",  # untrained scores are all alike
    "MODEL.RETINANET.INFERENCE_TH", "0.001",
]  # fmt: skip


@dataclass(frozen=True)
class OneBatch:
    images: ImageList
    targets: list[BoxList]


def narrow(name: str) -> Config:
    """The configuration with few channels and classes; 32 groups of a normalisation or of a ResNeXt stay 32."""
    full = load_config(CONFIGS / name)
    changes = [c if c != "(16,) * 8" else str((16,) * 8) for c in NARROW]
    if full.MODEL.RESNETS.NUM_GROUPS > 1:
        changes += ["MODEL.RESNETS.WIDTH_PER_GROUP", "1"]
    if full.MODEL.RESNETS.TRANS_FUNC.endswith("GN"):
        for key in ("STEM_OUT_CHANNELS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS"):
            changes += [f"MODEL.RESNETS.{key}", "32"]
    if "FPN" in full.MODEL.BACKBONE.CONV_BODY:
        changes += ["MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "32"]
    if full.MODEL.KEYPOINT_ON:
        changes += ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2"]
    return load_config(CONFIGS / name, changes)


def train_step(cfg: Config, model: torch.nn.Module) -> TrainStep:
    solver = cfg.SOLVER
    optimizer = make_optimizer(
        model,
        base_lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    scheduler = WarmupMultiStepLR(
        optimizer,
        milestones=solver.STEPS,
        gamma=solver.GAMMA,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_method=solver.WARMUP_METHOD,
    )
    return TrainStep(model, optimizer, scheduler, device=torch.device("cpu"))


def expected_losses(cfg: Config) -> set[str]:
    model = cfg.MODEL
    if model.RETINANET_ON:
        return {"loss_retina_cls", "loss_retina_reg"}
    names = {"loss_objectness", "loss_rpn_box_reg"}
    if not model.RPN_ONLY:
        names |= {"loss_classifier", "loss_box_reg"}
    if model.MASK_ON:
        names |= {"loss_mask"}
    if model.KEYPOINT_ON:
        names |= {"loss_kp"}
    return names


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", upstream_configs())
def test_trains_two_steps_and_detects(name):
    cfg = narrow(name)
    torch.manual_seed(0)
    model = build_model(cfg)
    classes = cfg.MODEL.RETINANET.NUM_CLASSES if cfg.MODEL.RETINANET_ON else cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
    images, targets = random_batch([3, 2], [(128, 96), (96, 96)], num_classes=classes)
    images.tensors /= 50  # without trained statistics nothing normalises: larger pixels would diverge
    targets = with_keypoints(targets) if cfg.MODEL.KEYPOINT_ON else targets
    step = train_step(cfg, model)
    before = trained(model)
    for iteration in range(2):
        losses = step(OneBatch(images, targets), iteration)
        assert set(losses) - {"loss"} == expected_losses(cfg)
        assert all(loss.isfinite() for loss in losses.values()), losses
    after = trained(model)
    moved = [key for key in after if not torch.equal(before[key], after[key])]
    assert len(moved) > 0.8 * len(after)

    model.eval()
    with torch.no_grad():
        found = for_testing(cfg, model)(Views([images], [False]) if cfg.TEST.BBOX_AUG.ENABLED else images)
    assert [f.size for f in found] == [(128, 96), (96, 96)]
    for detections in found:
        assert len(detections) > 0
        assert detections.boxes.isfinite().all()
        if cfg.MODEL.MASK_ON:
            side = cfg.MODEL.ROI_MASK_HEAD.RESOLUTION
            assert tuple(detections.masks.shape) == (len(detections), 1, side, side)
        if cfg.MODEL.KEYPOINT_ON:
            assert tuple(detections.keypoints.points.shape) == (len(detections), 17, 3)
