"""Faster R-CNN and Mask R-CNN: train, evaluate and predict on kernels of its own.

Example::

    cfg = fastrcnn.load_config("configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.DEVICE", "cpu"])
    model = fastrcnn.build_model(cfg)
    report = fastrcnn.load_weights(model, "weights.pth")
    losses = model(images, targets)  # in training: ImageList, list[BoxList] -> dict of losses
    found = model(images)  # in evaluation: list[BoxList] with scores, labels, masks
"""

from fastrcnn.build import build_model
from fastrcnn.config import ConfigError, load_config
from fastrcnn.structures import BoxList, ImageList, SegmentationMask, to_image_list
from fastrcnn.weights import WeightsError, WeightsReport, load_weights

__version__ = "0.1.0"

__all__ = [
    "BoxList",
    "ConfigError",
    "ImageList",
    "SegmentationMask",
    "WeightsError",
    "WeightsReport",
    "build_model",
    "load_config",
    "load_weights",
    "to_image_list",
]
