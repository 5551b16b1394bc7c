"""Families with a ResNet body: their state dicts are maskrcnn-benchmark's, and each trains and detects."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.build import build_model
from fastrcnn.build.backbone import build_resnet_backbone
from fastrcnn.config import load_config
from fastrcnn.conventions import MASKRCNN_BENCHMARK
from tests.models import expected_keys as keys
from tests.models.inputs import CONFIGS, random_batch, small_model

FPN_CONFIG = CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml"
GN = ["MODEL.RESNETS.STEM_FUNC", "StemWithGN", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithGN",
      "MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.FPN.USE_GN", "True", "MODEL.ROI_BOX_HEAD.USE_GN", "True",
      "MODEL.ROI_MASK_HEAD.USE_GN", "True", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0"]  # fmt: skip
XCONV = ["MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPNXconv1fcFeatureExtractor"]
RESNEXT = ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
           "MODEL.RESNETS.STRIDE_IN_1X1", "False"]  # fmt: skip
DCN = ["MODEL.RESNETS.STAGE_WITH_DCN", "(False, True, True, True)"]
C4 = ["MODEL.MASK_ON", "True"]  # the defaults are a C4 model
C5 = ["MODEL.BACKBONE.CONV_BODY", "R-50-C5", "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "2048",
      "MODEL.RPN.ANCHOR_STRIDE", "(32,)", "MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.03125,)",
      "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7", "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPN2MLPFeatureExtractor",
      "MODEL.ROI_BOX_HEAD.PREDICTOR", "FPNPredictor"]  # fmt: skip

FPN_RPN = keys.rpn(256, levels=5, anchors=3)
FPN_HEADS = {**keys.two_mlp_head(), **keys.box_predictor(1024), **keys.mask_head()}
STATE_DICTS = [
    pytest.param(
        FPN_CONFIG, GN, keys.resnet("R-50", group_norm=True) | keys.fpn(group_norm=True) | FPN_RPN
        | keys.two_mlp_head(group_norm=True) | keys.box_predictor(1024) | keys.mask_head(group_norm=True),
        id="group-norm",
    ),
    pytest.param(
        FPN_CONFIG, [*GN, *XCONV], keys.resnet("R-50", group_norm=True) | keys.fpn(group_norm=True) | FPN_RPN
        | keys.xconv_head(group_norm=True) | keys.box_predictor(1024) | keys.mask_head(group_norm=True),
        id="xconv1fc-group-norm",
    ),
    pytest.param(
        FPN_CONFIG, [*XCONV, "MODEL.MASK_ON", "False"],
        keys.resnet("R-50") | keys.fpn() | FPN_RPN | keys.xconv_head(group_norm=False) | keys.box_predictor(1024),
        id="xconv1fc",
    ),
    pytest.param(
        FPN_CONFIG, [*RESNEXT, "MODEL.BACKBONE.CONV_BODY", "R-101-FPN"],
        keys.resnet("R-101", groups=32, width_per_group=8) | keys.fpn() | FPN_RPN | FPN_HEADS, id="X-101-32x8d",
    ),
    pytest.param(
        FPN_CONFIG, [*RESNEXT, "MODEL.BACKBONE.CONV_BODY", "R-152-FPN"],
        keys.resnet("R-152", groups=32, width_per_group=8) | keys.fpn() | FPN_RPN | FPN_HEADS, id="X-152-32x8d",
    ),
    pytest.param(
        FPN_CONFIG, DCN, keys.resnet("R-50", offsets=(0, 18, 18, 18)) | keys.fpn() | FPN_RPN | FPN_HEADS, id="dcn-v1",
    ),
    pytest.param(
        FPN_CONFIG, [*DCN, "MODEL.RESNETS.WITH_MODULATED_DCN", "True"],
        keys.resnet("R-50", offsets=(0, 27, 27, 27)) | keys.fpn() | FPN_RPN | FPN_HEADS, id="dcn-v2",
    ),
    pytest.param(
        FPN_CONFIG, ["MODEL.RESNETS.STAGE_WITH_DCN", "(False, False, False, True)", "MODEL.RESNETS.DEFORMABLE_GROUPS",
                     "4", "MODEL.RESNETS.WITH_MODULATED_DCN", "True"],
        keys.resnet("R-50", offsets=(0, 0, 0, 108)) | keys.fpn() | FPN_RPN | FPN_HEADS, id="dcn-v2-four-groups",
    ),
    pytest.param(
        None, C4, keys.resnet("R-50", last=3) | keys.rpn(1024, levels=1, anchors=15) | keys.conv5_head("box")
        | keys.conv5_head("mask") | keys.box_predictor(2048) | keys.mask_predictor(2048), id="c4",
    ),
    pytest.param(
        None, ["MODEL.BACKBONE.CONV_BODY", "R-101-C4", "MODEL.CLS_AGNOSTIC_BBOX_REG", "True"],
        keys.resnet("R-101", last=3) | keys.rpn(1024, levels=1, anchors=15) | keys.conv5_head("box")
        | keys.box_predictor(2048, box_classes=2), id="c4-class-agnostic",
    ),
    pytest.param(
        None, C5, keys.resnet("R-50") | keys.rpn(2048, levels=1, anchors=15) | keys.two_mlp_head(2048)
        | keys.box_predictor(1024), id="c5",
    ),
    pytest.param(
        FPN_CONFIG, ["MODEL.ROI_MASK_HEAD.PREDICTOR", "MaskRCNNConv1x1Predictor", "MODEL.ROI_MASK_HEAD.RESOLUTION",
                     "14"],
        keys.resnet("R-50") | keys.fpn() | FPN_RPN
        | {name: shape for name, shape in FPN_HEADS.items() if "conv5_mask" not in name}, id="conv1x1-masks",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config_file", "overrides", "expected"), STATE_DICTS)
def test_state_dict_is_that_of_maskrcnn_benchmark(config_file, overrides, expected):
    model = build_model(load_config(config_file, [*overrides, "MODEL.DEVICE", "cpu", "MODEL.WEIGHT", ""]))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("overrides", "published"),
    [  # parameters of torchvision's classifiers, whose last layer maps 2048 features to 1000 classes
        (["MODEL.BACKBONE.CONV_BODY", "R-50-FPN"], 25_557_032),
        (["MODEL.BACKBONE.CONV_BODY", "R-101-FPN"], 44_549_160),
        (["MODEL.BACKBONE.CONV_BODY", "R-152-FPN"], 60_192_808),
        ([*RESNEXT, "MODEL.BACKBONE.CONV_BODY", "R-101-FPN"], 88_791_336),
    ],
    ids=["R-50", "R-101", "R-152", "X-101-32x8d"],
)
def test_bodies_have_the_published_number_of_parameters(overrides, published):
    body = build_resnet_backbone(load_config(FPN_CONFIG, overrides), MASKRCNN_BENCHMARK).body
    state = body.state_dict()
    learned = sum(value.numel() for name, value in state.items() if "running" not in name)  # frozen norms: buffers
    assert learned == published - (2048 * 1000 + 1000)


# Narrow bodies of bottlenecks; the C4 and C5 models on a single level.
NARROW = ["MODEL.BACKBONE.CONV_BODY", "R-50-FPN", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithFixedBatchNorm",
          "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"]  # fmt: skip
SINGLE_LEVEL = ["MODEL.RPN.USE_FPN", "False", "MODEL.ROI_HEADS.USE_FPN", "False", "MODEL.RPN.ANCHOR_SIZES", "(32, 64)"]
SMALL_C4 = [*NARROW, *SINGLE_LEVEL, "MODEL.BACKBONE.CONV_BODY", "R-50-C4", "MODEL.RESNETS.BACKBONE_OUT_CHANNELS",
            "128", "MODEL.RPN.ANCHOR_STRIDE", "(16,)", "MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.0625,)",
            "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor",
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14", "MODEL.ROI_BOX_HEAD.PREDICTOR", "FastRCNNPredictor",
            "MODEL.ROI_MASK_HEAD.RESOLUTION", "14",
            "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"]  # fmt: skip
SMALL_C5 = [*NARROW, *SINGLE_LEVEL, "MODEL.BACKBONE.CONV_BODY", "R-50-C5", "MODEL.RESNETS.BACKBONE_OUT_CHANNELS",
            "256", "MODEL.RPN.ANCHOR_STRIDE", "(32,)", "MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.03125,)",
            "MODEL.ROI_MASK_HEAD.POOLER_SCALES", "(0.03125,)"]  # fmt: skip
TRAINED = [
    pytest.param([*XCONV, "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", "8", "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS", "2",
                  "MODEL.ROI_BOX_HEAD.DILATION", "2"], id="xconv1fc"),
    pytest.param([*NARROW, *GN, *XCONV, "MODEL.GROUP_NORM.NUM_GROUPS", "4", "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", "8"],
                 id="from-scratch-group-norm"),
    pytest.param([*NARROW, "MODEL.RESNETS.STEM_FUNC", "StemWithGN", "MODEL.GROUP_NORM.NUM_GROUPS", "4"],
                 id="stem-alone-group-norm"),
    pytest.param([*NARROW, "MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.RESNETS.WIDTH_PER_GROUP", "2",
                  "MODEL.RESNETS.STRIDE_IN_1X1", "False"], id="resnext"),
    pytest.param([*NARROW, *DCN], id="dcn-v1"),
    pytest.param([*NARROW, *DCN, "MODEL.RESNETS.WITH_MODULATED_DCN", "True", "MODEL.RESNETS.DEFORMABLE_GROUPS", "2"],
                 id="dcn-v2"),
    pytest.param(SMALL_C4, id="c4"),
    pytest.param([*SMALL_C4, "MODEL.RESNETS.RES5_DILATION", "2", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7"],
                 id="c4-dilated"),
    pytest.param(SMALL_C5, id="c5"),
    pytest.param([*SMALL_C5, "MODEL.RESNETS.RES5_DILATION", "2", "MODEL.RPN.ANCHOR_STRIDE", "(16,)",
                  "MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.0625,)", "MODEL.ROI_MASK_HEAD.POOLER_SCALES", "(0.0625,)"],
                 id="c5-dilated"),
    pytest.param(["MODEL.ROI_MASK_HEAD.PREDICTOR", "MaskRCNNConv1x1Predictor", "MODEL.ROI_MASK_HEAD.RESOLUTION", "14"],
                 id="conv1x1-masks"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", TRAINED)
def test_two_steps_and_an_inference(overrides):
    model = small_model(*overrides)
    for name, module in model.backbone.body.named_modules():
        # as in trained weights: neither the stem nor sixteen residuals blow the features up
        if name.endswith(("stem.bn1", "bn3")):
            module.weight.data.fill_(0.02 if "stem" in name else 0.2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    for _ in range(2):
        losses = model(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
    moved = {name: not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(moved[name] for name in moved.keys() - trained)
    # a level of the pyramid that no sample falls into does not move, nor does a bias whose gradient is below rounding
    assert sum(moved[name] for name in trained) > 0.8 * len(trained)
    model.eval()
    with torch.no_grad():
        found = model(images)
    assert all(len(detections) > 0 for detections in found)
    side = model.roi_heads["mask"].resolution
    assert tuple(found[0].masks.shape[1:]) == (1, side, side)
