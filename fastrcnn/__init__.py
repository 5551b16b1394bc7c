"""Faster R-CNN and Mask R-CNN: train, evaluate and predict on kernels of its own.

Example::

    cfg = fastrcnn.load_config("configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.DEVICE", "cpu"])
    model = fastrcnn.build_model(cfg)
    report = fastrcnn.load_weights(model, "weights.pth")
    losses = model(images, targets)  # in training: ImageList, list[BoxList] -> dict of losses
    found = model(images)  # in evaluation: list[BoxList] with scores, labels, masks
"""

import os

# On a CPU torch takes the memory of each large tensor anew from the system, page by page: for feature maps, which live
# for milliseconds, that took as long as the convolutions. Torch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # pages of 2 MiB

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
