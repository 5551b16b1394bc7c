"""``ROI_MASK_HEAD.POSTPROCESS_MASKS``: masks pasted inside the model, and what becomes of them behind it."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.engine.inference import in_original_image
from fastrcnn.evaluation import RleMasks, masks_to_rle
from tests.models.inputs import random_batch, small_model

THRESHOLD = ["MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD", "0.45"]


@pytest.fixture(scope="module")
def found():
    """The same detections with probabilities and with bitmaps."""
    images, _ = random_batch([0, 0], [(96, 64), (64, 80)])
    with torch.no_grad():
        plain = small_model().eval()(images)
        pasted = small_model("MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", "True", *THRESHOLD).eval()(images)
    return plain, pasted


def test_bitmaps_are_the_pasted_probabilities(found):
    for plain, pasted in zip(*found, strict=True):
        width, height = plain.size
        assert torch.equal(plain.boxes, pasted.boxes)
        assert pasted.masks.dtype == torch.bool
        assert tuple(pasted.masks.shape) == (len(plain), 1, height, width)
        # another kernel, whose result pycocotools decodes
        expected = RleMasks(masks_to_rle(plain.masks, plain.boxes, (height, width), threshold=0.45))
        assert pasted.masks.any(dim=(1, 2, 3)).float().mean() > 0.5
        for mask, wanted in zip(pasted.masks[:, 0], expected, strict=True):
            assert torch.equal(mask, torch.from_numpy(wanted))


def test_evaluation_takes_bitmaps_to_the_original_image(found):
    pasted = found[1][0]
    assert in_original_image(pasted, 7, 0, (64, 96)).masks == masks_to_rle(pasted.masks, pasted.boxes, (64, 96))
    doubled = RleMasks(in_original_image(pasted, 7, 0, (128, 192)).masks)
    for mask, larger in zip(pasted.masks[:, 0], doubled, strict=True):
        expected = mask.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
        assert torch.equal(expected, torch.from_numpy(larger))


def test_no_detection_has_no_bitmap():
    images, _ = random_batch([0], [(96, 64)])
    model = small_model("MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", "True", "MODEL.ROI_HEADS.SCORE_THRESH", "1.0").eval()
    with torch.no_grad():
        found = model(images)[0]
    assert tuple(found.masks.shape) == (0, 1, 64, 96)
    assert in_original_image(found, 7, 0, (128, 192)).masks == []
