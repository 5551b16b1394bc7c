"""Generated images and a very small detector for the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrcnn.data import shapes
from tests.conftest import REPOSITORY

# The demonstration's Mask R-CNN at a quarter of its width, on images of 64 pixels.
SMALL = """
_BASE_: "{base}"
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 8, RES2_OUT_CHANNELS: 32, BACKBONE_OUT_CHANNELS: 16}}
  GROUP_NORM: {{NUM_GROUPS: 4}}
  RPN: {{PRE_NMS_TOP_N_TRAIN: 50, PRE_NMS_TOP_N_TEST: 50, POST_NMS_TOP_N_TRAIN: 20, POST_NMS_TOP_N_TEST: 20,
    FPN_POST_NMS_TOP_N_TRAIN: 40, FPN_POST_NMS_TOP_N_TEST: 20, BATCH_SIZE_PER_IMAGE: 32}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH: 0.0, DETECTIONS_PER_IMG: 10}}
  ROI_BOX_HEAD: {{MLP_HEAD_DIM: 32}}
  ROI_MASK_HEAD: {{CONV_LAYERS: [16]}}
INPUT: {{MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}}
DATASETS:
  TRAIN: ["{data}/annotations/instances_train.json@{data}/images"]
  TEST: ["{data}/annotations/instances_val.json@{data}/images"]
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 4, WARMUP_ITERS: 2, STEPS: [3], LOG_PERIOD: 1, CHECKPOINT_PERIOD: 2}}
TEST: {{IMS_PER_BATCH: 2, VIS_IMAGES: 0}}
"""


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and four validation images of 64 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    arguments = ["--output", str(folder / "data"), "--num-train", "6", "--num-val", "4", "--image-size", "64"]
    assert shapes.main([*arguments, "--seed", "3"]) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def small_config(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a configuration that trains in seconds."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL.format(base=REPOSITORY / "configs" / "demo_shapes.yaml", data=shapes_data))
    return str(path)
