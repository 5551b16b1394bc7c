"""The warning where one number of proposals for a whole batch does not mean what it meant in maskrcnn-benchmark."""

from __future__ import annotations

import pytest

from fastrcnn.config import load_config
from fastrcnn.train import shared_proposals_warning
from tests.models.inputs import CONFIGS

MASK_RCNN = "e2e_mask_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize("images", [1, 4, 16])
def test_another_batch_size_is_said_with_what_to_set(images):
    message = shared_proposals_warning(load_config(CONFIGS / MASK_RCNN), images)
    assert message is not None
    assert f"set it to {1000 * images} (1000 an image)" in message
    assert f"over the {images} image{'s' if images > 1 else ''} of a process" in message


@pytest.mark.parametrize(
    ("name", "overrides", "images"),
    [
        (MASK_RCNN, [], 2),
        (MASK_RCNN, ["MODEL.RPN.FPN_POST_NMS_PER_BATCH", "False"], 8),
        (MASK_RCNN, ["MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "8000"], 8),
        (MASK_RCNN, ["MODEL.CONVENTION", "torchvision"], 8),
        ("e2e_faster_rcnn_R_50_C4_1x.yaml", [], 8),
        ("retinanet/retinanet_R-50-FPN_1x.yaml", [], 8),
        ("rpn_R_50_FPN_1x.yaml", [], 8),
    ],
)
def test_where_it_means_the_same_nothing_is_said(name, overrides, images):
    assert shared_proposals_warning(load_config(CONFIGS / name, overrides), images) is None
