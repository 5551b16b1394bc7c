"""Keypoint R-CNN: names, targets, loss and detections against scalar loops over the rules of maskrcnn-benchmark."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastrcnn.build import build_model, count_parameters
from fastrcnn.config import ConfigError, load_config
from fastrcnn.models.box_head import SampledBoxes
from fastrcnn.structures import PERSON, BoxList, Proposals, Targets
from tests.models.inputs import (
    CONFIGS,
    KEYPOINTS,
    random_batch,
    small_config,
    small_keypoint_rcnn,
    small_model,
    with_keypoints,
)
from tests.models.test_detector import C4

SIDE = 28
FULL = ["MODEL.DEVICE", "cpu", *KEYPOINTS[:-6], "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56",
        "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2"]  # fmt: skip
SHARED = [*C4, "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True",
          "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "28", "MODEL.RPN.POST_NMS_TOP_N_TEST", "50"]  # fmt: skip
ANY_SCORE = ["MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]


def cell(value, low, high):
    """The bin of a coordinate in its region, or None."""
    if value == high:
        return SIDE - 1
    place = math.floor((value - low) * (SIDE / (high - low)))
    return place if 0 <= place < SIDE else None


def inside(x, y, box):
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def scalar_loss(head, features, sampled, targets, rule):
    """The mean cross entropy, and how many keypoints it is over, by loops over regions and keypoints."""
    total, count = 0.0, 0
    for n, target in enumerate(targets):
        for slot in range(int(sampled.num_positive[n])):
            gt = int(sampled.matched_idxs[n, slot])
            box = sampled.boxes[n, slot].tolist()
            points = target.keypoints.points[gt].tolist()
            frame = {"ground_truth": target.boxes[gt].tolist(), "proposal": box, "none": None}[rule]
            if frame is not None and not any(v > 0 and inside(x, y, frame) for x, y, v in points):
                continue
            roi = torch.tensor([[n, *box]], dtype=torch.float64)
            logits = head.predictor(head.feature_extractor(features, roi))[0]
            for k, (x, y, v) in enumerate(points):
                column, row = cell(x, box[0], box[2]), cell(y, box[1], box[3])
                if v > 0 and column is not None and row is not None:
                    total -= (logits[k, row, column] - logits[k].flatten().logsumexp(0)).item()
                    count += 1
    return total / max(count, 1), count


def hand_made(targets, moved):
    """Per image four slots whose regions lie near ground truths, and a negative; ``moved``: by (image, slot)."""
    n = len(targets)
    boxes = torch.zeros(n, 6, 4, dtype=torch.float64)
    matched = torch.zeros(n, 6, dtype=torch.int64)
    num_positive = torch.tensor([4 if len(t) else 0 for t in targets])
    generator = torch.Generator().manual_seed(1)
    for i, target in enumerate(targets):
        for slot in range(int(num_positive[i])):
            gt = slot % len(target)
            shift = torch.rand(4, generator=generator, dtype=torch.float64) * 6 - 3
            boxes[i, slot] = target.boxes[gt] + (shift if slot else 0)  # the first is a ground truth itself
            matched[i, slot] = gt
        boxes[i, 4] = torch.tensor([1.0, 2, 30, 40])
    for place, box in moved.items():
        boxes[place] = box
    slot = torch.arange(6).expand(n, 6)
    proposals = Proposals(boxes, torch.zeros(n, 6), torch.full((n,), 6))
    return SampledBoxes.gather(
        proposals, Targets.from_boxlists(targets), matched, slot, num_positive, num_positive + 1, max_positive=4
    )


@pytest.mark.parametrize("rule", ["ground_truth", "proposal", "none"])
@pytest.mark.parametrize("positives_only", ["True", "False"])
def test_loss_equals_scalar_loops(rule, positives_only):
    model = small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY", positives_only).double()
    head = model.roi_heads["keypoint"]
    head.convention = replace(head.convention, keypoint_filter=rule)
    images, targets = random_batch([2, 0, 3], [(96, 64), (64, 64), (64, 80)], dtype=torch.float64)
    targets = with_keypoints(targets)
    points, boxes = targets[0].keypoints.points, targets[0].boxes
    points[0, :2] = torch.cat([boxes[0, 2:], torch.ones(1)])  # on the far corner of the region of slot 0
    points[0, 2, :2] = boxes[0, :2]
    points[1, :, 2] = 0
    points[1, 3] = torch.tensor([boxes[1, 0] - 0.5, boxes[1, 1] + 5, 2])  # seen only outside the ground truth's box
    features = model.backbone(images.tensors)
    # And inside a region that is matched with it.
    sampled = hand_made(targets, {(0, 1): boxes[1] - torch.tensor([2.0, 0, 0, 0])})
    with torch.no_grad():
        expected, count = scalar_loss(head, features, sampled, targets, rule)
    losses = head.forward_train(features, sampled, Targets.from_boxlists(targets))
    assert list(losses) == ["loss_kp"]
    assert losses["loss_kp"].item() == pytest.approx(expected, rel=1e-9)
    assert count > 30
    wanted = head._targets(sampled, Targets.from_boxlists(targets)).view(3, 4, 17)
    assert (wanted[0, 0, :2] == SIDE * SIDE - 1).all()
    assert (wanted[1] < 0).all()
    assert int((wanted[0, 1] >= 0).sum()) == (0 if rule == "ground_truth" else 1)


def test_nothing_to_learn_is_a_loss_of_zero_with_a_graph():
    for positives_only in ("True", "False"):
        model = small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY", positives_only)
        images, targets = random_batch([2, 0], [(96, 64), (64, 64)])
        targets = with_keypoints(targets)
        targets[0].keypoints.points[..., 2] = 0
        losses = model(images, targets)
        assert losses["loss_kp"] == 0
        losses["loss_kp"].backward()
        head = model.roi_heads["keypoint"]
        assert (head.predictor.kps_score_lowres.weight.grad == 0).all()


def test_static_shapes_and_more_padding_change_nothing():
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)], dtype=torch.float64)
    targets = with_keypoints(targets)
    results = []
    for positives_only, room in (("True", 3), ("False", 3), ("False", 11)):
        model = small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY", positives_only).double()
        loss = model(images, Targets.from_boxlists(targets, min_capacity=room))["loss_kp"]
        loss.backward()
        results.append((loss, model.roi_heads["keypoint"].feature_extractor.conv_fcn1.weight.grad))
    assert results[0][0] > 0
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, results[0][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["logit", "probability"])
def test_keypoints_of_detections_are_the_peaks_of_the_resized_maps(rule):
    model = small_keypoint_rcnn().eval()
    head = model.roi_heads["keypoint"]
    head.convention = replace(head.convention, keypoint_score=rule)
    maps = torch.full((3, 17, SIDE, SIDE), -4.0)
    maps[:, :, 7, 21] = 6.0
    head.predictor.forward = lambda x: maps
    boxes = torch.tensor([[10.0, 20, 38, 48], [0, 0, 56, 56], [5, 5, 5, 5]])
    detections = [BoxList(boxes[:2], (96, 64)), BoxList(boxes[2:], (64, 64))]
    features = model.backbone(torch.zeros(2, 3, 64, 96))
    with torch.no_grad():
        first, second = (d.keypoints for d in head.forward_test(features, detections))
    # A region of 28 pixels is the map: the cell's centre. Twice as wide: one of the four pixels about its centre.
    assert first.points[0, 0].tolist() == [31.5, 27.5, 1]
    assert first.points[1, 0, 0].item() in (42.5, 43.5)
    assert first.points[1, 0, 1].item() in (14.5, 15.5)
    assert second.points[0, 0].tolist() == [5.5, 5.5, 1]  # less than a pixel counts as one
    assert first.size == (96, 64)
    assert first.skeleton is PERSON
    wanted = 6.0 if rule == "logit" else math.exp(6) / (math.exp(6) + (SIDE**2 - 1) * math.exp(-4))
    assert first.scores[0].tolist() == pytest.approx([wanted] * 17, rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: small_keypoint_rcnn(*ANY_SCORE), id="fpn"),
        pytest.param(lambda: small_keypoint_rcnn(*SHARED, *ANY_SCORE), id="shared-extractor"),
        pytest.param(lambda: small_model(*KEYPOINTS, *ANY_SCORE), id="with-masks"),
    ],
)
def test_two_steps_and_a_detection(make):
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    before = {name: p.clone() for name, p in model.roi_heads["keypoint"].named_parameters()}
    for step in range(2):
        images, targets = random_batch([3, 1], [(128, 96), (96, 128)], seed=step)
        losses = model(images, with_keypoints(targets))
        assert list(losses)[-1] == "loss_kp"
        assert losses["loss_kp"] > 1
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for name, parameter in model.roi_heads["keypoint"].named_parameters():
        assert parameter.isfinite().all(), name
        assert not parameter.equal(before[name]), name
    model.eval()
    with torch.no_grad():
        found = model(images)
    for detections in found:
        assert len(detections) > 0
        assert tuple(detections.keypoints.points.shape) == (len(detections), 17, 3)
        low, high = detections.boxes[:, None].split(2, dim=-1)
        high = torch.maximum(high, low + 1)  # a region is at least a pixel
        xy = detections.keypoints.points[..., :2]
        assert ((xy >= low) & (xy <= high)).all()


def test_no_detection_is_a_legal_answer():
    model = small_keypoint_rcnn("MODEL.ROI_HEADS.SCORE_THRESH", "1.0").eval()
    with torch.no_grad():
        found = model(random_batch([0, 0], [(64, 64), (96, 64)])[0])
    assert [tuple(f.keypoints.points.shape) for f in found] == [(0, 17, 3)] * 2


def test_targets_need_keypoints_of_the_right_number():
    model = small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "4")
    images, targets = random_batch([2], [(96, 64)])
    with pytest.raises(ValueError, match="needs 4 keypoints an instance, targets have no"):
        model(images, targets)
    with pytest.raises(ValueError, match="needs 4 keypoints an instance, targets have 17"):
        model(images, with_keypoints(targets))


def test_names_and_sizes_are_those_of_maskrcnn_benchmark():
    cfg = load_config(CONFIGS / "e2e_faster_rcnn_R_50_FPN_1x.yaml", FULL)
    model = build_model(cfg)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith("roi_heads.keypoint.")}
    expected = {}
    for index, channels in enumerate([256, *[512] * 7], start=1):
        expected[f"roi_heads.keypoint.feature_extractor.conv_fcn{index}.weight"] = (512, channels, 3, 3)
        expected[f"roi_heads.keypoint.feature_extractor.conv_fcn{index}.bias"] = (512,)
    expected["roi_heads.keypoint.predictor.kps_score_lowres.weight"] = (512, 17, 4, 4)
    expected["roi_heads.keypoint.predictor.kps_score_lowres.bias"] = (17,)
    assert state == expected
    # torchvision's Keypoint R-CNN, which has two classes too and its norms as buffers
    assert count_parameters(model)[0] == 59_137_258


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56"], "ROI_KEYPOINT_HEAD.RESOLUTION 28"),
        ([*SHARED, "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56"], "ROI_KEYPOINT_HEAD.RESOLUTION 28"),
        ([*KEYPOINTS, "MODEL.RPN_ONLY", "True"], "MODEL.KEYPOINT_ON and MODEL.RPN_ONLY exclude each other"),
    ],
)
def test_what_cannot_be_built_says_why(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_model(small_config(*overrides, config_file="e2e_faster_rcnn_R_50_FPN_1x.yaml"))
