"""Models and batches for the tests: small or full size, random, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastrcnn.build import build_model
from fastrcnn.config import Config, load_config
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import BoxList, ImageList, PersonKeypoints, SegmentationMask, to_image_list

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# A few channels of everything: the same code paths as the full model in a hundredth of the time.
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHT", "",
    "MODEL.BACKBONE.CONV_BODY", "R-18-FPN",
    "MODEL.RESNETS.TRANS_FUNC", "BasicBlockWithFixedBatchNorm",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "16",
    "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "5",
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(16, 16)",
    "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "200",
    "MODEL.RPN.POST_NMS_TOP_N_TRAIN", "100",
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "250",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64",
]  # fmt: skip

# RetinaNet with bottlenecks, on top of rpn_R_50_FPN_1x.yaml.
RETINANET = [
    "MODEL.RETINANET_ON", "True",
    "MODEL.BACKBONE.CONV_BODY", "R-50-FPN-RETINANET",
    "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithFixedBatchNorm",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "32",
    "MODEL.RETINANET.NUM_CLASSES", "5",
    "MODEL.RETINANET.NUM_CONVS", "2",
]  # fmt: skip

# Keypoint R-CNN on top of e2e_faster_rcnn_R_50_FPN_1x.yaml.
KEYPOINTS = [
    "MODEL.KEYPOINT_ON", "True",
    "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES", "(0.25, 0.125, 0.0625, 0.03125)",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", "2",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "7",
    "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "28",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(16, 16)",
]  # fmt: skip


def small_keypoint_rcnn(*overrides: str, seed: int = 0) -> GeneralizedRCNN:
    return small_model(*KEYPOINTS, *overrides, seed=seed, config_file="e2e_faster_rcnn_R_50_FPN_1x.yaml")


def small_retinanet(*overrides: str, seed: int = 0) -> GeneralizedRCNN:
    return small_model(*RETINANET, *overrides, seed=seed, config_file="rpn_R_50_FPN_1x.yaml")


def small_config(*overrides: str, config_file: str = "e2e_mask_rcnn_R_50_FPN_1x.yaml") -> Config:
    return load_config(CONFIGS / config_file, [*SMALL, *overrides])


def small_model(*overrides: str, seed: int = 0, **kwargs: str) -> GeneralizedRCNN:
    torch.manual_seed(seed)
    return build_model(small_config(*overrides, **kwargs))


def random_target(
    num_boxes: int, size: tuple[int, int], num_classes: int, generator: torch.Generator, dtype: torch.dtype
) -> BoxList:
    """``num_boxes`` boxes inside an image of ``size`` (width, height), each with a polygon of 3 to 9 vertices."""
    width, height = size
    corner = torch.rand(num_boxes, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7])
    extent = torch.rand(num_boxes, 2, generator=generator) ** 2 * torch.tensor([width * 0.6, height * 0.6]) + 6
    boxes = torch.cat([corner, corner + extent], dim=1)
    boxes = torch.minimum(boxes, torch.tensor([width - 1.0, height - 1.0] * 2))
    polygons = []
    for box in boxes:
        vertices = 3 + int(torch.randint(7, (), generator=generator))
        polygons.append([box[:2] + torch.rand(vertices, 2, generator=generator) * (box[2:] - box[:2])])
    labels = torch.randint(1, num_classes, (num_boxes,), generator=generator)
    return BoxList(boxes.to(dtype), size, labels=labels, masks=SegmentationMask(polygons, size))


def with_keypoints(targets: Sequence[BoxList], seed: int = 0) -> list[BoxList]:
    """The targets with 17 keypoints each, a few of them outside the box and a third not labelled."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for target in targets:
        low, extent = target.boxes[:, None, :2], (target.boxes[:, 2:] - target.boxes[:, :2])[:, None]
        places = low + extent * (torch.rand(len(target), 17, 2, generator=generator) * 1.2 - 0.1)
        visibility = torch.randint(0, 3, (len(target), 17, 1), generator=generator)
        points = torch.cat([places, visibility.to(places.dtype)], dim=2)
        result.append(replace(target, keypoints=PersonKeypoints(points, target.size)))
    return result


def random_batch(
    counts: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    *,
    num_classes: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[ImageList, list[BoxList]]:
    """Images of ``sizes`` (width, height) with noise, padded to 32, and ``counts`` ground truths each."""
    generator = torch.Generator().manual_seed(seed)
    images: list[Tensor] = [
        torch.randn(3, height, width, generator=generator, dtype=dtype) * 50 for width, height in sizes
    ]
    targets = [
        random_target(count, size, num_classes, generator, dtype) for count, size in zip(counts, sizes, strict=True)
    ]
    return to_image_list(images, 32), targets
