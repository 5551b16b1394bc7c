"""FBNet: names and shapes against the published architectures, options, training of each."""

from __future__ import annotations

import json

import pytest
import torch

from fastrcnn.build import build_model
from fastrcnn.build.fbnet import build_fbnet_extractor
from fastrcnn.config import Config, ConfigError, load_config
from fastrcnn.conventions import MASKRCNN_BENCHMARK
from fastrcnn.models.pooler import Pooler
from fastrcnn.structures import Targets
from tests.kernels.nosync import forbid_host_sync
from tests.models import expected_keys as keys
from tests.models.inputs import random_batch, with_keypoints

FBNET = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.CONV_BODY", "FBNet", "MODEL.FBNET.WIDTH_DIVISOR", "8",
         "MODEL.RPN.RPN_HEAD", "FBNet.rpn_head", "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FBNet.roi_head",
         "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "6"]  # fmt: skip
MASKS = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", "FBNet.roi_head_mask",
         "MODEL.ROI_MASK_HEAD.PREDICTOR", "MaskRCNNConv1x1Predictor", "MODEL.ROI_MASK_HEAD.RESOLUTION", "12",
         "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "6", "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR",
         "False"]  # fmt: skip
# the same code in a tenth of the time
SMALL = ["MODEL.FBNET.SCALE_FACTOR", "0.35", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "5", "MODEL.RPN.PRE_NMS_TOP_N_TRAIN",
         "100", "MODEL.RPN.POST_NMS_TOP_N_TRAIN", "40", "MODEL.RPN.POST_NMS_TOP_N_TEST", "40", "MODEL.RPN.ANCHOR_SIZES",
         "(16, 32, 64)", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
         "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]  # fmt: skip
SINGLE_CONV = ["MODEL.RPN.RPN_HEAD", "SingleConvRPNHead"]

# Published: channels of the first convolution; for each stage rows (expansion, channels, blocks) and the kernel sizes;
# which stage the heads are made of. MobileNetV2 has no RPN blocks.
PUBLISHED = {
    "default": (
        32,
        [([(1, 16, 1)], [3]), ([(6, 24, 2)], [3] * 2), ([(6, 32, 3)], [3] * 3), ([(6, 64, 4), (6, 96, 3)], [3] * 7),
         ([(4, 160, 1), (6, 160, 2), (6, 240, 1)], [3] * 4), ([(6, 96, 3)], [3] * 3),
         ([(4, 160, 1), (6, 160, 3), (3, 80, 1)], [3] * 5)],
        {"box": 4, "rpn": 5, "mask": 6},
    ),
    "xirb16d_dsmask": (
        16,
        [([(1, 16, 1)], [3]), ([(6, 32, 2)], [3] * 2), ([(6, 48, 3)], [3] * 3), ([(6, 96, 4), (6, 128, 3)], [3] * 7),
         ([(4, 128, 1), (6, 128, 2), (6, 160, 1)], [3] * 4), ([(4, 128, 1), (6, 128, 3), (3, 64, 1)], [3] * 5),
         ([(6, 128, 3)], [3] * 3)],
        {"box": 4, "mask": 5, "rpn": 6},
    ),
    "mobilenet_v2": (
        32,
        [([(1, 16, 1)], [3]), ([(6, 24, 2)], [3] * 2), ([(6, 32, 3)], [3] * 3), ([(6, 64, 4), (6, 96, 3)], [3] * 7),
         ([(6, 160, 3), (6, 320, 1)], [3] * 4)],
        {"box": 4},
    ),
    "cham_v1a": (
        32,
        [([(1, 24, 1)], [3]), ([(4, 48, 2)], [7] * 2), ([(7, 64, 5)], [3] * 5),
         ([(12, 56, 7), (8, 88, 5)], [5] * 7 + [3] * 5), ([(7, 152, 4), (10, 104, 1)], [3] * 5),
         ([(8, 88, 3)], [3] * 3)],
        {"box": 4, "rpn": 5},
    ),
    "cham_v2": (
        32,
        [([(1, 24, 1)], [3]), ([(8, 32, 4)], [5] * 4), ([(5, 48, 6)], [7] * 6),
         ([(9, 56, 3), (6, 56, 6)], [5] * 3 + [3] * 6), ([(2, 160, 6), (6, 112, 1)], [3] * 7), ([(6, 56, 1)], [3])],
        {"box": 4, "rpn": 5},
    ),
}  # fmt: skip
# parameters of body, box head, RPN blocks and mask head, counted in maskrcnn-benchmark's modules
COUNTS = {
    "default": {"body": 536_256, "box": 1_134_048, "rpn": 351_360, "mask": 1_177_728},
    "xirb16d_dsmask": {"body": 1_043_200, "box": 777_536, "rpn": 615_936, "mask": 830_976},
    "mobilenet_v2": {"body": 536_256, "box": 1_262_272},
    "cham_v1a": {"body": 1_605_440, "box": 1_567_360, "rpn": 395_472},
    "cham_v2": {"body": 732_816, "box": 828_848, "rpn": 41_440},
}


def expected_blocks(prefix: str, name: str, stage: int, inside: int) -> tuple[keys.Shapes, int]:
    """Names and shapes of a stage whose input has ``inside`` channels, and the channels of its output."""
    rows, kernels = PUBLISHED[name][1][stage]
    found: keys.Shapes = {}
    index = 0
    for expansion, out, count in rows:
        for _ in range(count):
            block, hidden = f"{prefix}.xif{stage}_{index}", inside * expansion  # multiples of 8 already
            found[f"{block}.pw.conv.weight"] = (hidden, inside, 1, 1)
            found |= keys.trained_batch_norm(f"{block}.pw.bn", hidden)
            found[f"{block}.dw.conv.weight"] = (hidden, 1, kernels[index], kernels[index])
            found[f"{block}.pwl.conv.weight"] = (out, hidden, 1, 1)
            found |= keys.trained_batch_norm(f"{block}.pwl.bn", out)
            inside, index = out, index + 1
    return found, inside


def expected_model(name: str) -> dict[str, keys.Shapes]:
    """The parts of the detector with 81 classes."""
    first, _, parts = PUBLISHED[name]
    body: keys.Shapes = {"backbone.body.first.conv.weight": (first, 3, 3, 3)}
    body |= keys.trained_batch_norm("backbone.body.first.bn", first)
    channels = first
    for stage in range(4):
        found, channels = expected_blocks("backbone.body.stages", name, stage, channels)
        body |= found
    found_parts = {"body": body, "rest": {"rpn.anchor_generator.cell_anchors.0": (15, 4)}}
    if "rpn" in parts:
        found_parts["rpn"], out = expected_blocks("rpn.head.0.head", name, parts["rpn"], channels)
        found_parts["rest"] |= keys.layer("rpn.head.1.cls_logits", 15, out, 1, 1)
        found_parts["rest"] |= keys.layer("rpn.head.1.bbox_pred", 60, out, 1, 1)
    else:
        found_parts["rest"] |= keys.rpn(channels, levels=1, anchors=15)
    found_parts["box"], out = expected_blocks(
        "roi_heads.box.feature_extractor.head.blocks", name, parts["box"], channels
    )
    found_parts["rest"] |= keys.box_predictor(out)
    if "mask" in parts:
        prefix = "roi_heads.mask.feature_extractor.head.blocks"
        found_parts["mask"], out = expected_blocks(prefix, name, parts["mask"], channels)
        found_parts["rest"] |= keys.layer("roi_heads.mask.predictor.mask_fcn_logits", 81, out, 1, 1)
    return found_parts


def config(name: str, *overrides: str) -> Config:
    parts = PUBLISHED[name][2] if name in PUBLISHED else {"rpn": 0}
    family = [*(MASKS if "mask" in parts else []), *([] if "rpn" in parts else SINGLE_CONV)]
    return load_config(None, [*FBNET, *family, "MODEL.FBNET.ARCH", name, *overrides])


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_is_that_of_maskrcnn_benchmark(name):
    model = build_model(config(name))
    parts = expected_model(name)
    expected = {key: shape for part in parts.values() for key, shape in part.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert {part: sum(sizes.get(key, 0) for key in parts[part]) for part in COUNTS[name]} == COUNTS[name]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_steps_and_an_inference(name):
    torch.manual_seed(0)
    model = build_model(config(name, *SMALL))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = random_batch([3, 1], [(96, 64), (64, 96)])
    mean = model.backbone.body.first.bn.running_mean
    for step in range(2):
        before = mean.clone()
        losses = model(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        assert not torch.equal(mean, before)
        assert int(model.backbone.body.first.bn.num_batches_tracked) == step + 1
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        found, alone = model(images), model(random_batch([3, 1], [(96, 64), (64, 96)])[0])
    assert all(len(detections) > 0 for detections in found)
    assert torch.equal(found[0].boxes, alone[0].boxes)  # statistics are read and not moved
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if "mask" in model.roi_heads:
        assert tuple(found[0].masks.shape[1:]) == (1, 12, 12)


def test_padded_slots_do_not_count_in_the_statistics():
    """The mask head on its 8 slots, most of them padding, and on the positives alone: same losses, same statistics."""
    images, targets = random_batch([2, 0], [(96, 64), (64, 96)], dtype=torch.float64)
    states, losses = [], []
    for alone in ("True", "False"):
        torch.manual_seed(0)
        model = build_model(config("default", *SMALL, "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", alone)).double()
        losses.append(model(images, targets))
        sum(losses[-1].values()).backward()
        states.append(model)
    assert losses[0]["loss_mask"] > 0
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], rtol=1e-9, atol=1e-9)
    for (name, first), (_, second) in zip(states[0].state_dict().items(), states[1].state_dict().items(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9, msg=name)
    for (name, first), (_, second) in zip(states[0].named_parameters(), states[1].named_parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=1e-9, msg=name)


def test_images_without_ground_truth_leave_the_mask_statistics_alone():
    images, targets = random_batch([0, 0], [(96, 64), (64, 96)])
    for alone in ("True", "False"):
        model = build_model(config("default", *SMALL, "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", alone))
        losses = model(images, targets)
        assert losses["loss_mask"] == 0
        sum(losses.values()).backward()
        norm = model.roi_heads["mask"].feature_extractor.head.blocks.xif6_0.pw.bn
        assert int(norm.num_batches_tracked) == 0
        assert not norm.running_mean.any()
        assert norm.weight.grad is not None  # every process of a group has the same gradients to sum up


def test_a_training_step_never_waits():
    model = build_model(config("default", *SMALL, "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False"))
    images, targets = random_batch([2, 0], [(96, 64), (64, 96)])
    padded = Targets.from_boxlists(targets)
    model(images, padded)
    with forbid_host_sync():
        sum(model(images, padded).values()).backward()


def extractor_keys(part: str, *overrides: str, name: str = "default") -> dict[str, tuple[int, ...]]:
    cfg = config(name, *overrides)
    extractor = build_fbnet_extractor(cfg, part, 96, Pooler(6, (0.0625,), 0, MASKRCNN_BENCHMARK), MASKRCNN_BENCHMARK)
    return {key: tuple(value.shape) for key, value in extractor.state_dict().items()}


def test_heads_can_use_some_blocks_and_end_in_a_convolution():
    every = extractor_keys("bbox")
    some = extractor_keys("bbox", "MODEL.FBNET.DET_HEAD_BLOCKS", "[0, 2]")
    assert {key.split(".")[2] for key in some} == {"xif4_0", "xif4_2"}
    assert some.items() <= every.items()
    last = extractor_keys("bbox", "MODEL.FBNET.DET_HEAD_LAST_SCALE", "-0.5")
    expected = {"head.last.conv.weight": (120, 240, 1, 1), **keys.trained_batch_norm("head.last.bn", 120)}
    assert {key: last[key] for key in last.keys() - every.keys()} == expected


def test_a_part_without_stages_is_made_of_all():
    """Upstream's rule, and what its keypoint heads are made of."""
    blocks = {key.split(".")[2] for key in extractor_keys("kpts")}
    assert len(blocks) == 1 + 2 + 3 + 7 + 4 + 3 + 5


def test_keypoints_train_on_a_head_of_all_blocks():
    cfg = config("default", *SMALL, "MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True",
                 "MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR", "FBNet.roi_head_keypoints",
                 "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False",
                 "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "8", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2")  # fmt: skip
    model = build_model(cfg)
    images, targets = random_batch([2, 1], [(96, 64), (64, 96)], num_classes=2)
    losses = model(images, with_keypoints(targets))
    assert losses["loss_kp"] > 0
    sum(losses.values()).backward()
    assert model.roi_heads["keypoint"].feature_extractor.head.blocks.xif0_0.pw.conv.weight.grad.any()
    model.eval()
    with torch.no_grad():
        assert tuple(model(images)[0].keypoints.points.shape[1:]) == (17, 3)


def test_the_first_block_can_have_another_stride():
    sides = []
    for stride in ("0", "1", "2"):
        cfg = config("default", "MODEL.FBNET.DET_HEAD_STRIDE", stride, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "6")
        pooler = Pooler(6, (0.0625,), 0, MASKRCNN_BENCHMARK)
        extractor = build_fbnet_extractor(cfg, "bbox", 96, pooler, MASKRCNN_BENCHMARK)
        features, rois = torch.randn(1, 96, 4, 4), torch.tensor([[0.0, 0, 0, 40, 40]])
        assert extractor([features], rois).shape[-1] == extractor.out_resolution
        sides.append(extractor.out_resolution)
    assert sides == [3, 6, 3]


def test_rpn_and_normalisation_options():
    model = build_model(config("default", *SMALL, "MODEL.FBNET.RPN_HEAD_BLOCKS", "2", "MODEL.FBNET.RPN_BN_TYPE", "gn",
                               "MODEL.GROUP_NORM.NUM_GROUPS", "8", "MODEL.FBNET.BN_TYPE", "af",
                               "MODEL.FBNET.DW_CONV_SKIP_BN", "False"))  # fmt: skip
    state = model.state_dict()
    assert {key.split(".")[4] for key in state if key.startswith("rpn.head.0.")} == {"xif5_1", "xif5_2"}
    assert type(model.rpn.head[0].head.xif5_1.dw.bn) is torch.nn.GroupNorm
    assert "backbone.body.stages.xif0_0.dw.bn.running_var" in state
    assert not any(key.endswith("num_batches_tracked") for key in state)
    parameters = dict(model.named_parameters())
    assert "backbone.body.first.bn.weight" not in parameters  # frozen norms are buffers


DEFINITION = {
    "block_op_type": [["ir_k3"], ["ir_k5", "ir_k3_e3_se"], ["ir_k3_s4"], ["ir_k3"]],
    "block_cfg": {"first": [16, 2], "last": [0, 0.0], "backbone": [0, 1, 2], "bbox": [3],
                  "stages": [[[1, 16, 1, 2]], [[3, 24, 2, 2]], [[4, 32, 1, 2]], [[4, 40, 1, 1]]]},
}  # fmt: skip


def test_an_architecture_of_ones_own():
    cfg = config("mine", *SMALL, *SINGLE_CONV, "MODEL.FBNET.SCALE_FACTOR", "1.0", "MODEL.FBNET.ARCH_DEF",
                 json.dumps(DEFINITION))  # fmt: skip
    model = build_model(cfg)
    state = model.state_dict()
    assert tuple(state["backbone.body.stages.xif1_0.dw.conv.weight"].shape) == (48, 1, 5, 5)
    assert tuple(state["backbone.body.stages.xif1_1.se4.op.1.weight"].shape) == (8, 24, 1, 1)
    assert tuple(state["backbone.body.stages.xif2_0.pw.conv.weight"].shape) == (96, 6, 1, 1)
    images, targets = random_batch([2, 1], [(96, 64), (64, 96)])
    assert all(loss.isfinite() for loss in model(images, targets).values())


WRONG = {**DEFINITION, "block_op_type": [["ir_k3"], ["ir_k3"], ["ir_k3"], ["ir_k3"]]}
UNKNOWN = {**DEFINITION, "block_op_type": [["skip"], ["ir_k5", "ir_k3"], ["ir_k3"], ["ir_k3"]]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.FBNET.ARCH", "fbnet_c"], "ARCH 'fbnet_c' is unknown; choose default, xirb16d_dsmask"),
        (["MODEL.FBNET.ARCH_DEF", "{"], "ARCH_DEF: not JSON"),
        (["MODEL.FBNET.ARCH_DEF", "{}"], "ARCH_DEF: no entry 'block_cfg'"),
        (["MODEL.FBNET.ARCH_DEF", '{"block_cfg": 3}'], "ARCH_DEF: an entry has the wrong form"),
        (["MODEL.FBNET.ARCH_DEF", json.dumps(WRONG)], "other numbers of blocks"),
        (["MODEL.FBNET.ARCH_DEF", json.dumps(DEFINITION)], "defines another architecture than 'default'"),
        (
            ["MODEL.FBNET.ARCH", "x", "MODEL.FBNET.ARCH_DEF", json.dumps(UNKNOWN)],
            "unknown block 'skip'; the blocks",
        ),
        (["MODEL.RPN.ANCHOR_STRIDE", "(32,)"], r'set MODEL.RPN.ANCHOR_STRIDE "\(16,\)"'),
        (["MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.125,)"], r'set MODEL.ROI_BOX_HEAD.POOLER_SCALES "\(0.0625,\)"'),
        (["MODEL.ROI_MASK_HEAD.RESOLUTION", "14"], "set MODEL.ROI_MASK_HEAD.RESOLUTION 12"),
        (["MODEL.FBNET.ARCH", "mobilenet_v2", "MODEL.MASK_ON", "False"], "set MODEL.RPN.RPN_HEAD SingleConvRPNHead"),
        (["MODEL.FBNET.RPN_HEAD_BLOCKS", "4"], "RPN_HEAD_BLOCKS 4: MODEL.FBNET.ARCH default has 3"),
        (["MODEL.FBNET.DET_HEAD_BLOCKS", "[9]"], "DET_HEAD_BLOCKS .* leaves no block"),
        (["MODEL.FBNET.MASK_HEAD_STRIDE", "3"], "MASK_HEAD_STRIDE must be 0, 1 or 2, got 3"),
        (["MODEL.FBNET.BN_TYPE", "sync"], "must be bn, gn or af"),
    ],
)
def test_what_cannot_be_built_says_why(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_model(config("default", *overrides))
