"""From a Config to objects: the only package, beside the entry points, that reads one."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastrcnn.build.backbone import build_resnet_backbone
from fastrcnn.build.data import (
    build_catalog,
    build_dataset,
    build_test_augmentation,
    build_test_loader,
    build_test_transform,
    build_train_loader,
)
from fastrcnn.build.family import classes_key, gives_proposals, num_classes
from fastrcnn.build.fbnet import build_fbnet_backbone
from fastrcnn.build.heads import build_box_head, build_keypoint_head, build_mask_head
from fastrcnn.build.rpn import build_retinanet, build_rpn
from fastrcnn.build.switches import step_switches
from fastrcnn.build.weights import load_model_weights
from fastrcnn.config import Config, ConfigError
from fastrcnn.conventions import CONVENTIONS, Convention
from fastrcnn.models.augmentation import TestTimeAugmentation
from fastrcnn.models.detector import GeneralizedRCNN

__all__ = [
    "build_catalog",
    "build_dataset",
    "build_model",
    "build_test_augmentation",
    "build_test_loader",
    "build_test_transform",
    "build_train_loader",
    "classes_key",
    "count_parameters",
    "for_testing",
    "gives_proposals",
    "load_model_weights",
    "num_classes",
    "step_switches",
]


def build_model(cfg: Config) -> GeneralizedRCNN:
    """The detector that the configuration describes, with initial weights, on ``MODEL.DEVICE``.

    Raises:
        ConfigError: the configuration names a part that does not exist or does not fit.
    """
    try:
        model = _assemble(cfg, CONVENTIONS[cfg.MODEL.CONVENTION])
    except ValueError as error:  # sizes that do not fit each other, found by the part that they belong to
        raise ConfigError(str(error)) from error
    return model.to(cfg.MODEL.DEVICE)


def _assemble(cfg: Config, convention: Convention) -> GeneralizedRCNN:
    detector = partial(
        GeneralizedRCNN, fused_convolutions=cfg.MODEL.FUSED_CONVOLUTIONS, channels_last=cfg.MODEL.CHANNELS_LAST
    )
    is_fbnet = cfg.MODEL.BACKBONE.CONV_BODY == "FBNet"
    backbone = (build_fbnet_backbone if is_fbnet else build_resnet_backbone)(cfg, convention)
    if cfg.MODEL.RETINANET_ON:
        retinanet = build_retinanet(cfg, backbone.out_channels, convention)
        return detector(backbone, retinanet)
    box = mask = keypoint = None
    if not cfg.MODEL.RPN_ONLY:
        box = build_box_head(cfg, backbone.out_channels, convention)
        if cfg.MODEL.MASK_ON:
            mask = build_mask_head(cfg, backbone.out_channels, convention, box)
        if cfg.MODEL.KEYPOINT_ON:
            keypoint = build_keypoint_head(cfg, backbone.out_channels, convention, box)
    rpn = build_rpn(cfg, backbone.out_channels, convention)
    return detector(backbone, rpn, box, mask, keypoint)


def for_testing(cfg: Config, model: nn.Module) -> nn.Module:
    """What takes the batches of the test loader: ``model``, or with ``TEST.BBOX_AUG`` what shows it several views."""
    if not cfg.TEST.BBOX_AUG.ENABLED:
        return model
    if not isinstance(model, GeneralizedRCNN):
        raise ConfigError("TEST.BBOX_AUG.ENABLED: needs a model of this package")
    return TestTimeAugmentation(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those that are trained)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
