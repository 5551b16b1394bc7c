"""Test-time augmentation: nothing changes with one view, several views give what loops over boxes give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrcnn.build import build_test_augmentation, build_test_loader, for_testing
from fastrcnn.config import ConfigError
from fastrcnn.data.augmentation import TestAugmentation
from fastrcnn.data.collate import Normalization
from fastrcnn.data.dataset import Sample
from fastrcnn.data.transforms import get_size
from fastrcnn.models.augmentation import TestTimeAugmentation
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import BoxList, Views
from fastrcnn_kernels import resize_image
from tests.models.inputs import small_config, small_keypoint_rcnn, small_model

NORMALIZATION = Normalization(size_divisible=32)
TEST = ["MODEL.RPN.POST_NMS_TOP_N_TEST", "30", "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", "40"]
ON = ["TEST.BBOX_AUG.ENABLED", "True"]


def pictures(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 9, 12, 3), generator=generator, dtype=torch.uint8)
    return [resize_image(picture, size) for picture, size in zip(coarse, [(70, 100), (110, 80)], strict=False)]


@pytest.fixture(scope="module")
def model() -> GeneralizedRCNN:
    return small_model(*TEST).eval()


def plain(model: GeneralizedRCNN, images: list[Tensor], min_size: int, flip: bool = False) -> Any:
    resized = [resize_image(image, get_size(*image.shape[:2], min_size, 200)) for image in images]
    return NORMALIZATION([image.flip(1) if flip else image for image in resized], list(range(len(images))))


@pytest.mark.parametrize("config", [(), ("MODEL.CLS_AGNOSTIC_BBOX_REG", "True")])
def test_one_view_changes_nothing(config: tuple[str, ...]) -> None:
    model = small_model(*TEST, *config).eval()
    images = pictures()
    with torch.no_grad():
        expected = model(plain(model, images, 96))
        found = TestTimeAugmentation(model)(TestAugmentation(96, 200)(images, [0, 1], NORMALIZATION))
    assert sum(map(len, found)) > 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.masks, other.masks)


def scalar_merge(candidates: list[tuple[Tensor, Tensor]], model: GeneralizedRCNN) -> set[tuple[int, float]]:
    """Threshold, NMS in each class and limit, a box at a time; (label, score) of what is left."""
    box: Any = model.roi_heads["box"]
    kept: list[tuple[float, int]] = []
    classes = candidates[0][1].shape[1]
    for label in range(1, classes):
        rows = [
            (float(scores[i, label]), boxes[i, 4 * label : 4 * label + 4].tolist())
            for boxes, scores in candidates
            for i in range(len(boxes))
        ]
        chosen: list[list[float]] = []
        for score, one in sorted(rows, key=lambda row: -row[0]):
            if score <= box.score_thresh:
                continue
            overlap = 0.0
            for other in chosen:
                w = min(one[2], other[2]) - max(one[0], other[0]) + 1
                h = min(one[3], other[3]) - max(one[1], other[1]) + 1
                area = sum((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (one, other))
                if w > 0 and h > 0:
                    overlap = max(overlap, w * h / (area - w * h))
            if overlap <= box.nms_thresh:
                chosen.append(one)
                kept.append((score, label))
    kept.sort(reverse=True)
    return {(label, round(score, 5)) for score, label in kept[: box.detections_per_image]}


@torch.no_grad()
def test_union_of_views_against_loops(model: GeneralizedRCNN) -> None:
    """The mirrored view's boxes mirrored back, the larger one's scaled, then one NMS over all of them."""
    image = pictures(1)
    augmentation = TestAugmentation(96, 200, h_flip=True, scales=(128,), scale_max_size=200, scale_h_flip=True)
    assert list(augmentation) == [(96, 200, False), (96, 200, True), (128, 200, False), (128, 200, True)]
    found = TestTimeAugmentation(model)(augmentation(image, [0], NORMALIZATION))[0]
    box: Any = model.roi_heads["box"]
    candidates = []
    height, width = plain(model, image, 96).image_sizes[0]
    for size, flip in ((96, False), (96, True), (128, False), (128, True)):
        images = plain(model, image, size, flip)
        features = model.features(images)
        boxes, scores = box.candidates(features, model.rpn(images, features)[0])[0]
        h, w = images.image_sizes[0]
        rows = boxes.unflatten(1, (-1, 4)).clone()
        rows[..., 0::2] = rows[..., 0::2].clamp(0, w - 1)
        rows[..., 1::2] = rows[..., 1::2].clamp(0, h - 1)
        if flip:
            rows = torch.stack([w - 1 - rows[..., 2], rows[..., 1], w - 1 - rows[..., 0], rows[..., 3]], dim=-1)
        rows = rows * torch.tensor([width / w, height / h] * 2)
        rows[..., 0::2] = rows[..., 0::2].clamp(0, width - 1)
        rows[..., 1::2] = rows[..., 1::2].clamp(0, height - 1)
        candidates.append((rows.flatten(1), scores))
    assert found.labels is not None
    assert found.scores is not None
    pairs = {
        (label, round(score, 5)) for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    }
    expected = scalar_merge(candidates, model)
    assert len(expected) > 10
    # scores that round differently, or that tie at the limit, may be on one side alone
    assert len(pairs ^ expected) <= 0.04 * len(expected)


@torch.no_grad()
def test_a_symmetric_picture_gives_symmetric_detections(model: GeneralizedRCNN) -> None:
    """Both views show the same pixels: each box has its mirror image among the candidates, with the same score.

    Without NMS and limits each detection therefore comes with its mirror image, and with the mirrored mask.
    """
    half = pictures(1)[0][:, :48]
    image = torch.cat([half, half.flip(1)], dim=1)
    box: Any = model.roi_heads["box"]
    before = box.nms_thresh, box.detections_per_image
    box.nms_thresh, box.detections_per_image = 1.0, 0
    try:
        views = TestAugmentation(int(image.shape[0]), 200, h_flip=True)([image], [0], NORMALIZATION)
        assert torch.equal(views.images[0].tensors, views.images[1].tensors)
        found = TestTimeAugmentation(model)(views)[0]
    finally:
        box.nms_thresh, box.detections_per_image = before
    assert len(found) > 10
    mirrored = found.transpose(0)
    for i in range(0, len(found), 7):
        same = (found.labels == found.labels[i]) & ((found.boxes - mirrored.boxes[i]).abs().amax(1) < 1e-3)  # type: ignore[index]
        assert same.any()
        twin = int(same.nonzero()[0])
        torch.testing.assert_close(found.masks[twin], mirrored.masks[i], atol=1e-4, rtol=1e-4)  # type: ignore[index]


@torch.no_grad()
def test_masks_are_the_mean_over_the_views(model: GeneralizedRCNN) -> None:
    image = pictures(1)
    views = TestAugmentation(96, 200, scales=(128,), scale_max_size=200)(image, [0], NORMALIZATION)
    found = TestTimeAugmentation(model)(views)[0]
    head: Any = model.roi_heads["mask"]
    seen = []
    for images in views.images:
        height, width = images.image_sizes[0]
        there = BoxList(found.boxes, found.size, labels=found.labels).resize((width, height))
        seen.append(head.forward_test(model.features(images), [there])[0].masks)
    torch.testing.assert_close(found.masks, (seen[0] + seen[1]) / 2)
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


def test_from_the_configuration() -> None:
    cfg = small_config(*ON, "TEST.BBOX_AUG.H_FLIP", "True", "TEST.BBOX_AUG.SCALES", "(400,)", *TEST)
    assert list(build_test_augmentation(cfg) or ()) == [(800, 1333, False), (800, 1333, True), (400, 4000, False)]
    assert build_test_augmentation(small_config()) is None
    model = small_model(*TEST)
    assert for_testing(small_config(), model) is model
    assert isinstance(for_testing(cfg, model), TestTimeAugmentation)

    class Two:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Sample:
            image = pictures()[index]
            return Sample(image, BoxList(torch.zeros((0, 4)), (image.shape[1], image.shape[0])), 7 + index, index)

    small = small_config(
        *ON, "TEST.BBOX_AUG.H_FLIP", "True", "INPUT.MIN_SIZE_TEST", "64",
        "DATALOADER.NUM_WORKERS", "1", "TEST.IMS_PER_BATCH", "2",
    )  # fmt: skip
    (batch,) = build_test_loader(small, Two())  # type: ignore[arg-type]
    assert isinstance(batch.images, Views)
    assert len(batch.images) == 2
    assert batch.images.flipped == [False, True]
    assert batch.original_sizes == [(70, 100), (110, 80)]
    assert batch.images.images[1].ids.tolist() == batch.image_ids == [7, 8]


@pytest.mark.parametrize("other", ["MODEL.RPN_ONLY", "MODEL.KEYPOINT_ON"])
def test_other_families_are_refused(other: str) -> None:
    with pytest.raises(ConfigError, match=f"TEST.BBOX_AUG.ENABLED merges .* does not go with {other}"):
        small_config(
            *ON, other, "True", "MODEL.MASK_ON", "False",
            "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False",
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES", "(0.25,)", "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56",
        )  # fmt: skip
    with pytest.raises(ValueError, match="no keypoints"):
        TestTimeAugmentation(small_keypoint_rcnn())


def test_views_begin_with_the_plain_one() -> None:
    with pytest.raises(ValueError, match="the first of which is not mirrored"):
        Views([NORMALIZATION(pictures(), [0, 1])], [True])


def test_pasted_masks_are_refused() -> None:
    pasting = ["MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", "True"]
    with pytest.raises(ConfigError, match="averages mask probabilities"):
        small_config(*ON, *pasting)
    with pytest.raises(ValueError, match="must not paste"):
        TestTimeAugmentation(small_model(*pasting))
