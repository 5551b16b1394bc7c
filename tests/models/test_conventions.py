"""MODEL.CONVENTION: each numeric choice reaches the model, and the keys whose default it gives."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from fastrcnn.build import build_test_transform
from fastrcnn.config import ConfigWarning, load_config, with_overrides
from fastrcnn.config.describe import leaves
from fastrcnn.conventions import CONVENTIONS, KEYS, MASKRCNN_BENCHMARK, TORCHVISION, Convention
from fastrcnn.data.collate import PackedTargets
from fastrcnn.data.dataset import Sample
from fastrcnn.data.transforms import TrainTransform, get_size
from fastrcnn.engine.inference import in_original_image
from fastrcnn.evaluation import RleMasks
from fastrcnn.predictor import Predictor
from fastrcnn.structures import BoxList, ImageList, SegmentationMask
from fastrcnn_kernels import decode_boxes
from tests.config_helpers import lookup
from tests.models.inputs import CONFIGS, random_batch, small_config, small_model
from tests.models.test_scalar_chain import calibrate, chain_model

# Choices of the two-stage models and a value far enough from all systems' to be seen in one step.
CHOICES: list[tuple[str, Any]] = [
    ("box_offset", 0),
    ("delta_clip", 0.01),
    ("anchor_style", "torchvision"),
    ("rpn_normaliser", "wanted"),
    ("rpn_box_beta", 3.0),
    ("box_beta", 0.0),
    ("mask_target", "roi_align"),
    ("canonical_size", 30.0),
    ("canonical_level", 7),
    ("level_eps", 1.0),
    ("level_eps_outside", 3.0),
    ("roi_align_aligned", True),
    ("detection_min_size", 60.0),
]


def outputs(convention: Convention, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Losses of a step and detections of a fixed small model."""
    monkeypatch.setitem(CONVENTIONS, "maskrcnn_benchmark", MASKRCNN_BENCHMARK)
    images, targets = random_batch([3, 2], [(150, 130), (140, 140)], num_classes=4, seed=4, dtype=torch.float64)
    weights = chain_model("maskrcnn_benchmark")
    calibrate(weights, images)
    monkeypatch.setitem(CONVENTIONS, "maskrcnn_benchmark", convention)
    model = chain_model("maskrcnn_benchmark")
    cells = {name: value for name, value in model.state_dict().items() if "cell_anchors" in name}
    model.load_state_dict(weights.state_dict() | cells)
    with torch.no_grad():
        losses = model(images, targets)
        found = model.eval()(images)
    return [*losses.values(), *(f.boxes.flatten() for f in found), *(f.scores for f in found)]


@pytest.mark.parametrize(("field", "value"), CHOICES)
def test_each_choice_reaches_the_model(field, value, monkeypatch):
    plain = outputs(MASKRCNN_BENCHMARK, monkeypatch)
    changed = outputs(replace(MASKRCNN_BENCHMARK, **{field: value}), monkeypatch)
    assert any(a.shape != b.shape or not torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, changed, strict=True))
    again = outputs(replace(MASKRCNN_BENCHMARK), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(("ties", "found"), [(True, 3), (False, 1)])
def test_ties_of_the_last_detection(ties, found, monkeypatch):
    """Three candidates of one score where one is allowed."""
    monkeypatch.setitem(CONVENTIONS, "maskrcnn_benchmark", replace(MASKRCNN_BENCHMARK, detection_ties=ties))
    head = small_model("MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "1").roi_heads["box"]
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
    scores = torch.tensor([0.1, 0.9, 0.0, 0.0, 0.0]).repeat(3, 1)
    assert len(head.detect(boxes, scores, (50, 60), torch.tensor([50, 60]))) == found


@pytest.mark.parametrize(("drop", "found"), [(False, 2), (True, 1)])
def test_detections_without_an_area(drop, found, monkeypatch):
    convention = replace(MASKRCNN_BENCHMARK, drop_empty_detections=drop)
    monkeypatch.setitem(CONVENTIONS, "maskrcnn_benchmark", convention)
    head = small_model().roi_heads["box"]
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 20, 9]])
    scores = torch.tensor([0.1, 0.9, 0.0, 0.0, 0.0]).repeat(2, 1)
    assert len(head.detect(boxes, scores, (50, 60), torch.tensor([50, 60]))) == found


@pytest.mark.parametrize(("inclusive", "exact"), [(True, True), (False, False)])
def test_proposals_of_exactly_the_smallest_size(inclusive, exact, monkeypatch):
    convention = replace(MASKRCNN_BENCHMARK, min_size_inclusive=inclusive)
    monkeypatch.setitem(CONVENTIONS, "maskrcnn_benchmark", convention)
    rpn = small_model("MODEL.RPN.MIN_SIZE", "5").rpn
    sides = torch.tensor([5.0, 5.000001])
    assert (sides >= rpn.smallest_side).tolist() == [exact, True]


def test_strides_of_torchvision_follow_the_image():
    """P6 of an 800 x 1344 image is 13 x 21: steps of 61 and 64, by explicit anchors and by moved deltas."""
    generator = small_model("MODEL.CONVENTION", "torchvision").rpn.anchor_generator
    shapes = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    features = [torch.zeros(1, 1, h, w) for h, w in shapes]
    nominal, own = generator(features), generator(features, (800, 1344))
    assert all(torch.equal(a, b) for a, b in zip(nominal[:4], own[:4], strict=True))
    corners = own[4].view(13, 21, 3, 4)
    assert (corners[1:, :, :, 1] - corners[:-1, :, :, 1]).unique().tolist() == [61]
    assert (corners[:, 1:, :, 0] - corners[:, :-1, :, 0]).unique().tolist() == [64]

    deltas = [torch.randn(1, 12, h, w) * 0.1 for h, w in shapes]
    moved = generator.move_deltas(deltas, (800, 1344))
    assert all(a is b for a, b in zip(deltas[:4], moved[:4], strict=True))
    in_order = [d[0].view(3, 4, 13, 21).permute(2, 3, 0, 1).reshape(-1, 4) for d in (deltas[4], moved[4])]
    torch.testing.assert_close(
        decode_boxes(in_order[0], own[4]), decode_boxes(in_order[1], nominal[4]), rtol=0, atol=1e-3
    )


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_defaults_of_the_schema_are_maskrcnn_benchmarks():
    for name, field in KEYS.items():
        assert leaves()[name].default == getattr(MASKRCNN_BENCHMARK, field), name
    assert set(KEYS.values()) <= {field.name for field in fields(Convention)}


@pytest.mark.parametrize("system", list(CONVENTIONS))
def test_a_convention_gives_the_defaults_of_its_keys(system):
    cfg = load_config(None, ["MODEL.CONVENTION", system])
    for name, field in KEYS.items():
        assert lookup(cfg, name) == getattr(CONVENTIONS[system], field), name


def test_what_is_set_wins_and_a_file_that_differs_warns(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL:\n  CONVENTION: torchvision\n  RPN:\n    STRADDLE_THRESH: 0\n")
    with pytest.warns(ConfigWarning, match=r"config\.yaml:4: MODEL\.RPN\.STRADDLE_THRESH 0 .* torchvision .* is -1"):
        cfg = load_config(path, ["MODEL.RPN.MIN_SIZE", "3"])
    assert (cfg.MODEL.RPN.STRADDLE_THRESH, cfg.MODEL.RPN.MIN_SIZE) == (0, 3)
    assert cfg.INPUT.PIXEL_MEAN == TORCHVISION.pixel_mean


def test_another_convention_later_brings_its_defaults():
    cfg = load_config(CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.RPN.MIN_SIZE", "7"])
    changed = with_overrides(cfg, ["MODEL.CONVENTION", "torchvision"])
    assert changed.INPUT.PIXEL_STD == TORCHVISION.pixel_std
    assert changed.MODEL.RPN.MIN_SIZE == 7
    assert changed.MODEL.RPN.FPN_POST_NMS_TOP_N_TEST == 1000
    assert with_overrides(changed, ["MODEL.CONVENTION", "maskrcnn_benchmark"]).INPUT.PIXEL_STD == (1.0, 1.0, 1.0)


def test_boxes_of_edges():
    """A box of columns 2 to 5 of an image 10 wide: its last pixel is 5, its far edge 6."""
    masks = SegmentationMask([[torch.tensor([[2.0, 0], [6, 0], [6, 3]])]], (10, 8))
    pixels = BoxList(torch.tensor([[2.0, 0, 5, 2]]), (10, 8), masks=masks)
    edges = pixels.with_offset(0)
    assert edges.boxes.tolist() == [[2, 0, 6, 3]]
    assert edges.convert("xywh").boxes.tolist() == pixels.convert("xywh").boxes.tolist() == [[2, 0, 4, 3]]
    assert edges.convert("xywh").convert("xyxy").boxes.tolist() == [[2, 0, 6, 3]]
    assert edges.area().tolist() == [12]
    flipped = edges.transpose(0)
    assert flipped.boxes.tolist() == [[4, 0, 8, 3]]
    assert flipped.masks.polygons[0][0].tolist() == [[8, 0], [4, 0], [4, 3]]
    assert pixels.transpose(0).with_offset(0).boxes.tolist() == flipped.boxes.tolist()
    outside = BoxList(torch.tensor([[2.0, 0, 50, 50]]), (10, 8), offset=0)
    assert outside.clip_to_image().boxes.tolist() == [[2, 0, 10, 8]]
    assert edges.with_offset(1).boxes.tolist() == pixels.boxes.tolist()


@pytest.mark.parametrize(("system", "edge"), [("maskrcnn_benchmark", 10.0), ("detectron2", 10.5)])
def test_training_boxes_are_read_as_the_model_reads_them(system, edge):
    """Halved: the last pixel 20 becomes 10, the far edge 21 becomes 10.5."""
    offset = CONVENTIONS[system].box_offset
    target = BoxList(torch.tensor([[0.0, 0, 20, 20]]), (40, 40), labels=torch.ones(1, dtype=torch.int64))
    sample = Sample(torch.zeros(40, 40, 3, dtype=torch.uint8), target, 1, 0)
    transform = TrainTransform((20,), 100, horizontal_flip_prob=0.0, box_offset=offset)
    boxes = transform(sample, np.random.default_rng(0)).target
    assert boxes.boxes.tolist() == [[0, 0, edge, edge]]
    assert boxes.offset == offset
    assert PackedTargets.pack([boxes]).unpack()[0].offset == offset


@pytest.mark.parametrize("system", list(CONVENTIONS))
def test_detections_carry_the_reading_of_their_boxes(system):
    model = small_model("MODEL.CONVENTION", system, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0").eval()
    images, _ = random_batch([0], [(64, 64)])
    with torch.no_grad():
        assert model(images)[0].offset == CONVENTIONS[system].box_offset


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [("maskrcnn_benchmark", (267, 1335)), ("nearest", (267, 1333)), ("truncate", (266, 1333))],
)
def test_size_of_a_wide_image(rounding, expected):
    assert get_size(200, 1000, 800, 1333, rounding) == expected
    assert get_size(1000, 200, 800, 1333, rounding) == expected[::-1]


@pytest.mark.parametrize("system", list(CONVENTIONS))
def test_loaders_resize_as_the_system_does(system):
    cfg = load_config(CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.CONVENTION", system])
    assert build_test_transform(cfg).rounding == CONVENTIONS[system].resize_rounding


@pytest.mark.parametrize("system", list(CONVENTIONS))
def test_masks_are_pasted_as_the_system_does(system):
    """A full mask on columns 10.4 to 20.4: whole pixels 9 to 21 with a margin, or pixels whose centre is inside."""
    rule = CONVENTIONS[system].mask_paste
    boxes = torch.tensor([[10.4, 10.4, 20.4, 20.4]])
    found = BoxList(boxes, (40, 40), labels=torch.ones(1, dtype=torch.int64), scores=torch.ones(1))
    found = replace(found, masks=torch.ones(1, 1, 28, 28))
    prediction = in_original_image(found, 1, 0, (40, 40), rule)
    columns = RleMasks(prediction.masks)[0].any(axis=0).nonzero()[0]
    predictor = Predictor(small_model("MODEL.CONVENTION", system), small_config("MODEL.CONVENTION", system))
    assert predictor.rles(found) == prediction.masks
    assert [columns.min(), columns.max()] == ([10, 19] if system == "detectron2" else [10, 20])


def test_padding_is_of_the_batch():
    images = ImageList(torch.zeros(2, 3, 64, 96), [(60, 90), (64, 70)])
    assert images.padded_size == (64, 96)
