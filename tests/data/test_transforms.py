"""Boxes and polygons move with the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch import Tensor

from fastrcnn.data import Sample, TestTransform, TrainTransform
from fastrcnn.data.transforms import (
    color_jitter,
    flip_left_right,
    flip_top_bottom,
    get_size,
    resize,
    sample_generator,
)
from fastrcnn.structures import BoxList, SegmentationMask


def upstream_get_size(image_size: tuple[int, int], size: int, max_size: int | None) -> tuple[int, int]:
    """``Resize.get_size`` of maskrcnn-benchmark (data/transforms/transforms.py), for a given choice of the size."""
    w, h = image_size
    if max_size is not None:
        min_original_size = float(min((w, h)))
        max_original_size = float(max((w, h)))
        if max_original_size / min_original_size * size > max_size:
            size = int(round(max_size * min_original_size / max_original_size))  # noqa: RUF046
    if (w <= h and w == size) or (h <= w and h == size):
        return (h, w)
    if w < h:
        ow = size
        oh = int(size * h / w)
    else:
        oh = size
        ow = int(size * w / h)
    return (oh, ow)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),  # 1066.67 is truncated
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((375, 500), (800, 1066)),
        ((500, 500), (800, 800)),
        ((300, 640), (625, 1333)),
        ((240, 640), (500, 1333)),
        ((100, 1000), (133, 1330)),  # the short edge is rounded down, so the long one misses 1333
        ((201, 1000), (268, 1333)),
        ((800, 1000), (800, 1000)),
        ((1, 5000), (1, 5000)),
    ],
    ids=str,
)
def test_get_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert get_size(*size, 800, 1333) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1400), st.one_of(st.none(), st.integers(1, 2000)))
def test_get_size_is_upstreams(height: int, width: int, min_size: int, max_size: int | None) -> None:
    mine = get_size(height, width, min_size, max_size)
    if max_size is None or round(max_size * min(height, width) / max(height, width)) >= 1:
        assert mine == upstream_get_size((width, height), min_size, max_size)
    assert min(mine) >= 1
    assert get_size(width, height, min_size, max_size) == mine[::-1]
    if max_size is not None and min(height, width) / max(height, width) * max_size >= 1:
        # Rounding the short edge by half a pixel moves the long one by half the aspect ratio.
        assert max(mine) <= max(max_size + max(height, width) / min(height, width) / 2, min_size)


def scene(height: int = 60, width: int = 90) -> Sample:
    """Black, with white objects that the polygons enclose exactly."""
    polygons = [
        [torch.tensor([[10.0, 5], [40, 5], [40, 35], [10, 35]])],
        [torch.tensor([[50.0, 20], [80, 20], [80, 30], [65, 30], [65, 50], [50, 50]])],
    ]
    masks = SegmentationMask(polygons, (width, height))
    image = masks.decode().amax(0) * 255
    boxes = torch.tensor([[10.0, 5, 39, 34], [50, 20, 79, 49]])
    target = BoxList(boxes, (width, height), labels=torch.tensor([1, 2]), masks=masks)
    return Sample(image[:, :, None].repeat(1, 1, 3), target, image_id=5, index=0)


def white(sample: Sample) -> Tensor:
    return sample.image[:, :, 0] > 127


def drawn(sample: Sample) -> Tensor:
    return sample.target.masks.decode().amax(0).bool()


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def extent(pixels: Tensor) -> list[int]:
    y, x = torch.nonzero(pixels, as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max()), int(y.max())]


def test_the_scene_is_consistent() -> None:
    assert torch.equal(white(scene()), drawn(scene()))


def test_flip_left_right() -> None:
    before, after = scene(), flip_left_right(scene())
    assert torch.equal(after.image, before.image.flip(1))
    # maskrcnn-benchmark mirrors vertices about (width - 1) / 2, not width / 2: its polygons end up a pixel to the left.
    assert torch.equal(drawn(after), drawn(before).flip(1).roll(-1, dims=1))
    right_half = white(after).clone()
    right_half[:, :45] = False
    assert after.target.boxes[0].tolist() == extent(right_half)
    assert after.target.labels.tolist() == [1, 2]


def test_flip_top_bottom() -> None:
    before, after = scene(), flip_top_bottom(scene())
    assert torch.equal(after.image, before.image.flip(0))
    assert torch.equal(drawn(after), drawn(before).flip(0).roll(-1, dims=0))
    left_half = white(after).clone()
    left_half[:, 45:] = False
    x1, y1, x2, y2 = extent(left_half)
    # maskrcnn-benchmark's box flip lacks the - 1 here.
    assert after.target.boxes[0].tolist() == [x1, y1 + 1, x2, y2 + 1]


@pytest.mark.parametrize("flip", [flip_left_right, flip_top_bottom])
def test_flipping_twice_changes_nothing(flip: Any) -> None:
    before, after = scene(), flip(flip(scene()))
    assert torch.equal(after.image, before.image)
    assert torch.equal(after.target.boxes, before.target.boxes)
    assert torch.equal(drawn(after), drawn(before))


@pytest.mark.parametrize("size", [(120, 180), (45, 70), (200, 100), (60, 90)], ids=str)
def test_resize(size: tuple[int, int]) -> None:
    after = resize(scene(), size)
    assert tuple(after.image.shape) == (*size, 3)
    assert after.target.size == size[::-1]
    assert iou(white(after), drawn(after)) > 0.95
    ratio = torch.tensor([size[1] / 90, size[0] / 60] * 2)
    assert torch.allclose(after.target.boxes, scene().target.boxes * ratio)


def test_inputs_are_not_changed() -> None:
    sample = scene()
    TrainTransform((100,), 200, horizontal_flip_prob=1.0, vertical_flip_prob=1.0, brightness=0.5)(
        sample, sample_generator(0, 0, 0)
    )
    assert torch.equal(sample.image, scene().image)
    assert torch.equal(sample.target.boxes, scene().target.boxes)
    assert torch.equal(drawn(sample), drawn(scene()))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 100), st.integers(0, 10**6))
def test_everything_moves_together(seed: int, epoch: int, index: int) -> None:
    transform = TrainTransform((90, 133, 180), 400, horizontal_flip_prob=0.5, vertical_flip_prob=0.5)
    after = transform(scene(), sample_generator(seed, epoch, index))
    assert min(after.image.shape[:2]) in (90, 133, 180)
    # Each flip moves polygons by a pixel, see above; left where they were, they would be under 0.5.
    assert iou(white(after), drawn(after)) > 0.87
    again = transform(scene(), sample_generator(seed, epoch, index))
    assert torch.equal(after.image, again.image)
    assert torch.equal(after.target.boxes, again.target.boxes)


def test_probabilities_and_sizes_are_drawn() -> None:
    transform = TrainTransform((30, 60, 90), 400, horizontal_flip_prob=0.25)
    heights, flipped = [], 0
    for index in range(400):
        after = transform(scene(), sample_generator(3, 1, index))
        heights.append(after.image.shape[0])
        flipped += bool(after.target.boxes[0, 0] > after.target.boxes[1, 0])
    counts = np.bincount(heights)
    assert counts[[30, 60, 90]].sum() == 400
    assert counts[[30, 60, 90]].min() > 100
    assert 70 < flipped < 130


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_certain_flips(probability: float, expected: bool) -> None:
    for index in range(20):
        after = TrainTransform((60,), 1000, horizontal_flip_prob=probability)(scene(), sample_generator(0, 0, index))
        assert bool(after.target.boxes[0, 0] > after.target.boxes[1, 0]) == expected


def test_test_transform_only_resizes() -> None:
    after = TestTransform(120, 1000)(scene())
    expected = resize(scene(), (120, 180))
    assert torch.equal(after.image, expected.image)
    assert torch.equal(after.target.boxes, expected.target.boxes)


def test_generators_of_different_images_epochs_and_seeds_differ() -> None:
    draws = [sample_generator(*key).random() for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 0, 0)]]
    assert len(set(draws)) == 5
    assert draws[0] == sample_generator(0, 0, 0).random()


def photograph() -> Sample:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Sample(torch.from_numpy(pixels), scene().target, 5, 0)


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
def test_color_jitter_is_pillows_enhancement(name: str, enhancer: Any) -> None:
    sample = photograph()
    factor = 0.5 + sample_generator(0, 0, 9).random()  # uniform in [1 - 0.5, 1 + 0.5]
    after = color_jitter(sample, sample_generator(0, 0, 9), **{name: 0.5})
    expected = enhancer(Image.fromarray(sample.image.numpy())).enhance(factor)
    assert np.array_equal(after.image.numpy(), np.asarray(expected))
    assert not torch.equal(after.image, sample.image)


def test_hue_turns_the_colour_circle() -> None:
    red = Sample(torch.tensor([255, 0, 0], dtype=torch.uint8).repeat(4, 4, 1), scene().target, 5, 0)
    gray = Sample(torch.full((4, 4, 3), 90, dtype=torch.uint8), scene().target, 5, 0)
    shift = (sample_generator(0, 0, 2).random() - 0.5) * 1.0
    after = color_jitter(red, sample_generator(0, 0, 2), hue=0.5)
    hue = Image.fromarray(after.image.numpy()).convert("HSV").getpixel((0, 0))[0]
    assert abs((hue - shift * 255 + 128) % 256 - 128) <= 2
    assert torch.equal(color_jitter(gray, sample_generator(0, 0, 2), hue=0.5).image, gray.image)


@pytest.mark.parametrize(
    ("setting", "function"),
    [
        ("brightness", "adjust_brightness"),
        ("contrast", "adjust_contrast"),
        ("saturation", "adjust_saturation"),
        ("hue", "adjust_hue"),
    ],
)
def test_color_jitter_against_torchvision(setting: str, function: str) -> None:
    """The pixels of torchvision's functions of Pillow images, which its ColorJitter calls, bit for bit."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    sample = photograph()
    for seed in range(5):
        draws = sample_generator(0, 0, seed).random()
        factor = -0.4 + 0.8 * draws if setting == "hue" else 0.6 + 0.8 * draws
        expected = getattr(functional, function)(Image.fromarray(sample.image.numpy()), factor)
        found = color_jitter(sample, sample_generator(0, 0, seed), **{setting: 0.4})
        assert np.array_equal(found.image.numpy(), np.asarray(expected))


def test_color_jitter_of_zero_is_the_same_sample() -> None:
    sample = photograph()
    assert color_jitter(sample, sample_generator(0, 0, 0)) is sample


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="min_sizes must hold positive sizes"):
        TrainTransform(())
    with pytest.raises(ValueError, match="hue must be at most"):
        TrainTransform(hue=0.6)
