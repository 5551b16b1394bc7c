"""``CLS_AGNOSTIC_BBOX_REG``: one box for all classes, from the last four columns of the regression."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.inputs import random_batch, small_model

AGNOSTIC = ["MODEL.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.MASK_ON", "False"]


@pytest.mark.filterwarnings("ignore::fastrcnn.config.ConfigWarning")
@pytest.mark.parametrize("convention", ["maskrcnn_benchmark", "torchvision", "detectron2"])
def test_the_last_of_two_boxes_is_trained(convention):
    """maskrcnn-benchmark's layout under every convention; what other systems save is converted on the way."""
    model = small_model(*AGNOSTIC, "MODEL.CONVENTION", convention)
    predictor = model.roi_heads["box"].predictor
    assert tuple(predictor.bbox_pred.weight.shape) == (8, 32)
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    loss = model(images, targets)["loss_box_reg"]
    assert loss > 0
    loss.backward()
    assert predictor.bbox_pred.weight.grad[-4:].abs().sum(1).all()
    assert not predictor.bbox_pred.weight.grad[:-4].any()


def test_the_loss_is_that_of_the_last_columns():
    """maskrcnn-benchmark's numbers, region by region."""
    model = small_model(*AGNOSTIC)
    head, found = model.roi_heads["box"], {}
    head.predictor.register_forward_hook(lambda module, inputs, out: found.update(deltas=out[1].detach().double()))
    sample = head.sample
    head.sample = lambda *arguments: found.setdefault("sampled", sample(*arguments))
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)])
    loss = model(images, targets)["loss_box_reg"]
    sampled, total = found["sampled"], 0.0
    rows = found["deltas"].unflatten(0, sampled.labels.shape)
    for image, target in enumerate(targets):
        for slot in range(int(sampled.num_positive[image])):
            x1, y1, x2, y2 = sampled.boxes[image, slot].double().tolist()
            a1, b1, a2, b2 = target.boxes[int(sampled.matched_idxs[image, slot])].double().tolist()
            width, height, wide, high = x2 - x1 + 1, y2 - y1 + 1, a2 - a1 + 1, b2 - b1 + 1
            wanted = [
                10 * (a1 + wide / 2 - x1 - width / 2) / width,
                10 * (b1 + high / 2 - y1 - height / 2) / height,
                5 * math.log(wide / width),
                5 * math.log(high / height),
            ]
            for value, goal in zip(rows[image, slot, 4:].tolist(), wanted, strict=True):
                error = abs(value - goal)
                total += 0.5 * error**2 if error < 1 else error - 0.5
    assert total > 0
    assert loss.item() == pytest.approx(total / int(sampled.num_sampled.sum()), rel=1e-5)


def test_all_classes_have_the_same_boxes():
    model = small_model(*AGNOSTIC, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0", "MODEL.ROI_HEADS.NMS", "1.0",
                        "MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "100000").eval()  # fmt: skip
    images, _ = random_batch([0], [(128, 96)])
    with torch.no_grad():
        found = model(images)[0]
        model.roi_heads["box"].predictor.bbox_pred.bias[:4] = 3.0  # the columns of the background
        again = model(images)[0]
    boxes = [{tuple(box) for box in found.boxes[found.labels == label].tolist()} for label in (1, 2, 3, 4)]
    assert len(boxes[0]) > 10
    assert boxes[0] == boxes[1] == boxes[2] == boxes[3]
    assert torch.equal(found.boxes, again.boxes)
