"""Each convention as a whole against plain Python loops: losses of a training step, and detections."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import ImageList
from tests.models import scalar_chain
from tests.models.inputs import random_batch, small_model

SIZES = {"wanted": 8000, "pre": 40, "post": 40}
THRESHOLD = 0.2


def chain_model(system: str) -> GeneralizedRCNN:
    overrides = [
        "MODEL.CONVENTION", system,
        "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4",
        "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "4",
        "MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(8,)",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", str(SIZES["wanted"]),  # more than there are anchors: all are taken
        "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", str(SIZES["pre"]),
        "MODEL.RPN.PRE_NMS_TOP_N_TEST", str(SIZES["pre"]),
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", str(SIZES["post"]),
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", str(SIZES["post"]),
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "400",
        "MODEL.ROI_HEADS.SCORE_THRESH", str(THRESHOLD),
        "MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "0",
    ]  # fmt: skip
    if system == "detectron2":  # the file says 2
        overrides += ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0", "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "0"]
    model = small_model(*overrides).double()
    return model


@torch.no_grad()
def calibrate(model: GeneralizedRCNN, images: ImageList) -> None:
    """Outputs that differ from each other: boxes that move and leave the image, scores that are neither 0 nor 1."""
    model.eval()
    head, predictor = model.rpn.head, model.roi_heads["box"].predictor
    for module, layers in ((head, ("cls_logits", "bbox_pred")), (predictor, ("cls_score", "bbox_pred"))):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = module.register_forward_hook(lambda _, inputs, outputs, seen=seen: seen.append(outputs))
        model(images)
        hook.remove()
        for layer, output, largest in zip(layers, seen[0], (4.0, 5.0), strict=True):
            values = output if isinstance(output, torch.Tensor) else torch.cat([level.flatten() for level in output])
            module.get_submodule(layer).weight.mul_(largest / values.abs().max())
    model.train()


@pytest.mark.parametrize("system", list(scalar_chain.RULES))
def test_losses_equal_scalar_loops(system):
    model = chain_model(system)
    images, targets = random_batch([3, 2], [(160, 130), (150, 140)], num_classes=4, seed=4, dtype=torch.float64)
    calibrate(model, images)
    with torch.no_grad():
        found = model(images, targets)
        expected = scalar_chain.losses(model, system, images, targets, **SIZES)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert value > 0, name
        assert found[name].item() == pytest.approx(value, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("system", list(scalar_chain.RULES))
def test_detections_equal_scalar_loops(system):
    model = chain_model(system)
    images, _ = random_batch([3, 2], [(160, 130), (150, 140)], num_classes=4, seed=4, dtype=torch.float64)
    calibrate(model, images)
    model.eval()
    with torch.no_grad():
        found = model(images)
        expected = scalar_chain.detections(
            model, system, images, pre=SIZES["pre"], post=SIZES["post"], threshold=THRESHOLD
        )
    for detections, wanted in zip(found, expected, strict=True):
        assert len(wanted) > 5
        scores, labels, boxes, masks = zip(*wanted, strict=True)
        assert detections.labels.tolist() == list(labels)
        torch.testing.assert_close(detections.scores, torch.tensor(scores, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(detections.boxes, torch.tensor(boxes, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(detections.masks[:, 0], torch.tensor(masks, dtype=torch.float64), rtol=0, atol=1e-5)
