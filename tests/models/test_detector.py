"""The detector as a whole: names, families, reproducibility, degenerate input, detections."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.build import build_model, count_parameters
from fastrcnn.config import ConfigError, load_config
from fastrcnn.structures import BoxList, SegmentationMask, to_image_list
from tests.models.inputs import CONFIGS, random_batch, small_config, small_model

GN = ["MODEL.RESNETS.STEM_FUNC", "StemWithGN", "MODEL.RESNETS.TRANS_FUNC", "BasicBlockWithGN",
      "MODEL.FPN.USE_GN", "True", "MODEL.ROI_BOX_HEAD.USE_GN", "True", "MODEL.ROI_MASK_HEAD.USE_GN", "True",
      "MODEL.GROUP_NORM.NUM_GROUPS", "4", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0"]  # fmt: skip
BOTTLENECK = ["MODEL.BACKBONE.CONV_BODY", "R-50-FPN", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithFixedBatchNorm",
              "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]  # fmt: skip
C4 = ["MODEL.BACKBONE.CONV_BODY", "R-50-C4", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithFixedBatchNorm",
      "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RPN.USE_FPN", "False", "MODEL.ROI_HEADS.USE_FPN", "False",
      "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "128",
      "MODEL.RPN.ANCHOR_STRIDE", "(16,)", "MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.0625,)",
      "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0",
      "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor",
      "MODEL.ROI_BOX_HEAD.PREDICTOR", "FastRCNNPredictor",
      "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor",
      "MODEL.ROI_MASK_HEAD.POOLER_SCALES", "(0.0625,)", "MODEL.ROI_MASK_HEAD.RESOLUTION", "14",
      "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"]  # fmt: skip
FAMILIES = [
    pytest.param([], id="basic-blocks"),
    pytest.param(GN, id="group-norm"),
    pytest.param(BOTTLENECK, id="bottleneck"),
    pytest.param(C4, id="c4-shared-extractor"),
    pytest.param([*C4, "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False"], id="c4-own-extractor"),
    pytest.param(["MODEL.CLS_AGNOSTIC_BBOX_REG", "True"], id="class-agnostic"),
    pytest.param(["MODEL.MASK_ON", "False"], id="faster-rcnn"),
    pytest.param(["MODEL.CHANNELS_LAST", "True"], id="channels-last"),
    pytest.param(["MODEL.RPN.FPN_POST_NMS_PER_BATCH", "False"], id="top-n-per-image"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", FAMILIES)
def test_every_family_trains_and_detects(overrides):
    model = small_model(*overrides)
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    losses = model(images, targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        found = model(images)
    assert [f.size for f in found] == [(128, 96), (96, 128)]
    for detections, (height, width) in zip(found, images.image_sizes, strict=True):
        assert len(detections) > 0
        assert (detections.scores.diff() <= 0).all()
        assert (detections.boxes >= 0).all()
        assert (detections.boxes[:, 0::2] <= width - 1).all()
        assert (detections.boxes[:, 1::2] <= height - 1).all()
        assert ((detections.labels >= 1) & (detections.labels <= 4)).all()
        if "mask" in model.roi_heads:
            side = model.roi_heads["mask"].resolution
            assert tuple(detections.masks.shape) == (len(detections), 1, side, side)
            assert ((detections.masks >= 0) & (detections.masks <= 1)).all()
        else:
            assert detections.masks is None


def test_channels_last_gives_the_same_losses():
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    results = []
    for flag in ("False", "True"):
        model = small_model("MODEL.CHANNELS_LAST", flag)
        assert model.rpn.head.conv.weight.is_contiguous(memory_format=torch.channels_last) == (flag == "True")
        results.append(model(images, targets))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


def test_sharing_the_extractor_shares_its_weights():
    model = small_model(*C4)
    box, mask = model.roi_heads["box"], model.roi_heads["mask"]
    assert mask.feature_extractor is box.feature_extractor
    names = set(model.state_dict())
    assert "roi_heads.box.feature_extractor.head.layer4.0.conv1.weight" in names
    assert "roi_heads.mask.feature_extractor.head.layer4.0.conv1.weight" in names


def test_state_dict_names_are_those_of_maskrcnn_benchmark():
    cfg = load_config(CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "backbone.body.stem.conv1.weight": (64, 3, 7, 7),
        "backbone.body.stem.bn1.running_var": (64,),
        "backbone.body.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "backbone.body.layer1.0.conv1.weight": (64, 64, 1, 1),
        "backbone.body.layer4.2.bn3.bias": (2048,),
        "backbone.fpn.fpn_inner4.bias": (256,),
        "backbone.fpn.fpn_layer1.weight": (256, 256, 3, 3),
        "rpn.anchor_generator.cell_anchors.4": (3, 4),
        "rpn.head.conv.weight": (256, 256, 3, 3),
        "rpn.head.cls_logits.weight": (3, 256, 1, 1),
        "rpn.head.bbox_pred.bias": (12,),
        "roi_heads.box.feature_extractor.fc6.weight": (1024, 12544),
        "roi_heads.box.feature_extractor.fc7.bias": (1024,),
        "roi_heads.box.predictor.cls_score.weight": (81, 1024),
        "roi_heads.box.predictor.bbox_pred.weight": (324, 1024),
        "roi_heads.mask.feature_extractor.mask_fcn4.weight": (256, 256, 3, 3),
        "roi_heads.mask.predictor.conv5_mask.weight": (256, 256, 2, 2),
        "roi_heads.mask.predictor.mask_fcn_logits.weight": (81, 256, 1, 1),
    }
    assert {name: state.get(name) for name in expected} == expected
    # 53 convolutions and norms of R-50, 16 tensors of the FPN, 5 cell anchors, 6 of the RPN, 8 of the box head, 12 of
    # the mask head
    assert len(state) == 53 + 53 * 4 + 16 + 5 + 6 + 8 + 12
    # torchvision's Mask R-CNN has 44,401,393 with 91 classes and its norms as buffers
    assert count_parameters(model)[0] == 44_401_393 - 10 * (1024 + 1 + 4 * (1024 + 1) + 256 + 1)


def test_the_first_stages_are_frozen():
    model = small_model()
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "layer1"}
    model = small_model("MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0")
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_state_draws_the_same_samples():
    model = small_model()
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    results = []
    for seed, step in [(1, 7), (1, 7), (1, 8), (2, 7)]:
        model.set_sampling(seed, step)
        results.append({name: loss.item() for name, loss in model(images, targets).items()})
    assert results[0] == results[1]
    assert results[0]["loss_objectness"] != results[2]["loss_objectness"]
    assert results[0]["loss_objectness"] != results[3]["loss_objectness"]
    assert int(model.sampling_step) == 8  # a forward in training advances the step


def test_samples_follow_the_image_not_its_place_in_the_batch():
    model = small_model().double()
    images, targets = random_batch([3, 2], [(128, 96), (128, 96)], dtype=torch.float64)
    images.ids = torch.tensor([40, 41])
    swapped = to_image_list([images.tensors[1, :, :96, :128], images.tensors[0, :, :96, :128]], 32)
    swapped.ids = torch.tensor([41, 40])
    model.set_sampling(3, 3)
    first = model(images, targets)
    model.set_sampling(3, 3)
    second = model(swapped, targets[::-1])
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-9)


def test_images_without_ground_truth_train_as_background():
    model = small_model()
    images, _ = random_batch([0, 0], [(64, 64), (64, 64)])
    empty = BoxList(torch.zeros(0, 4), (64, 64), labels=torch.zeros(0, dtype=torch.int64),
                    masks=SegmentationMask([], (64, 64)))  # fmt: skip
    losses = model(images, [empty, empty])
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
    assert losses["loss_objectness"] > 0
    assert losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    assert model.roi_heads["box"].predictor.cls_score.weight.grad.abs().sum() > 0


def test_training_needs_targets():
    model = small_model()
    images, _ = random_batch([0], [(64, 64)])
    with pytest.raises(ValueError, match="needs targets"):
        model(images)


def test_no_detection_is_a_legal_answer():
    model = small_model("MODEL.ROI_HEADS.SCORE_THRESH", "1.0").eval()
    images, _ = random_batch([0, 0], [(64, 64), (96, 64)])
    with torch.no_grad():
        found = model(images)
    assert [len(f) for f in found] == [0, 0]
    assert tuple(found[0].masks.shape) == (0, 1, 28, 28)


def test_rpn_only_gives_proposals_in_order():
    model = small_model(config_file="rpn_R_50_FPN_1x.yaml")
    images, targets = random_batch([2, 1], [(128, 96), (96, 128)])
    assert set(model(images, targets)) == {"loss_objectness", "loss_rpn_box_reg"}
    model.eval()
    with torch.no_grad():
        found = model(images)
    for proposals in found:
        assert len(proposals) > 100
        assert (proposals.objectness.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_losses_are_near_those_of_float32(dtype):
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    model = small_model()
    expected = model(images, targets)
    model.set_sampling(0, 0)
    with torch.autocast("cpu", dtype=dtype):
        actual = model(images, targets)
    for name, loss in actual.items():
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"], "SHARE_BOX_FEATURE_EXTRACTOR"),
        ([*GN, "MODEL.GROUP_NORM.NUM_GROUPS", "7"], "do not divide into 7 groups"),
    ],
)
def test_what_cannot_be_built_says_why(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_model(small_config(*overrides))
