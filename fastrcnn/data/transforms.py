"""What happens to a training image before it is normalised: colour jitter, resize, flips.

Pure functions ``(Sample, generator) -> Sample``: boxes and polygons move with the pixels, inputs are not changed, and
all random numbers come from the generator, which the loader seeds from (seed, epoch, index of the image). Order and
parameters are maskrcnn-benchmark's: ColorJitter, Resize, RandomHorizontalFlip, RandomVerticalFlip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from fastrcnn.data.dataset import Sample
from fastrcnn.structures import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, BoxList
from fastrcnn_kernels import resize_image

Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Prepared:
    """A training sample whose pixels are not moved yet.

    Attributes:
        image: uint8 [H, W, 3], RGB, to be resized to ``size`` and then flipped.
        target: the ground truth as it is after that.
        size: (height, width).
        flip: 1 left and right, plus 2 top and bottom.
        image_id, index: as of :class:`Sample`.
    """

    image: Tensor
    target: BoxList
    size: tuple[int, int]
    flip: int
    image_id: int
    index: int

    @classmethod
    def done(cls, sample: Sample) -> Prepared:
        """Of a sample that nothing is left to do for."""
        height, width = sample.image.shape[:2]
        return cls(sample.image, sample.target, (height, width), 0, sample.image_id, sample.index)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one image in one epoch, whichever worker or rank draws them."""
    key = np.random.SeedSequence((seed & 0xFFFFFFFFFFFFFFFF, epoch, index))
    return np.random.Generator(np.random.Philox(key))


def get_size(
    height: int, width: int, min_size: int, max_size: int | None = None, rounding: str = "maskrcnn_benchmark"
) -> tuple[int, int]:
    """The size to which an image is resized: shortest edge ``min_size``, longest at most ``max_size``.

    Args:
        rounding: ``maskrcnn_benchmark``: where ``max_size`` decides, the short edge is rounded; the long edge is always
            truncated, so that it may end up a pixel under ``max_size`` or, after rounding the short edge up, over it.
            ``nearest`` (detectron2) rounds both edges times one scale to the nearest, ``truncate`` (torchvision) down.

    Returns:
        (height, width) of the resized image; both at least 1.
    """
    if rounding == "nearest":
        scale = min_size / min(height, width)
        sides: tuple[float, float] = (min_size, scale * width) if height < width else (scale * height, min_size)
        if max_size is not None and max(sides) > max_size:
            scale = max_size / max(sides)
            sides = (sides[0] * scale, sides[1] * scale)
        return max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5))
    if rounding == "truncate":
        scale = min_size / min(height, width)
        scale = scale if max_size is None else min(scale, max_size / max(height, width))
        return max(1, int(height * scale)), max(1, int(width * scale))
    size = min_size
    if max_size is not None:
        shortest, longest = float(min(height, width)), float(max(height, width))
        if longest / shortest * size > max_size:
            size = max(1, round(max_size * shortest / longest))
    if (width <= height and width == size) or (height <= width and height == size):
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize to ``size`` (height, width): pixels by antialiased bilinear filtering, ground truth by the ratios."""
    height, width = size
    if tuple(sample.image.shape[:2]) == (height, width):
        return sample
    return replace(
        sample, image=resize_image(sample.image, (height, width)), target=sample.target.resize((width, height))
    )


def flip_left_right(sample: Sample) -> Sample:
    """Mirror left and right."""
    return replace(sample, image=sample.image.flip(1), target=sample.target.transpose(FLIP_LEFT_RIGHT))


def flip_top_bottom(sample: Sample) -> Sample:
    """Mirror top and bottom."""
    return replace(sample, image=sample.image.flip(0), target=sample.target.transpose(FLIP_TOP_BOTTOM))


def color_jitter(
    sample: Sample,
    generator: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Sample:
    """Vary the colours, as torchvision's ColorJitter does on a Pillow image, in a random order of the four.

    Args:
        brightness, contrast, saturation: the factor is uniform in [max(0, 1 - value), 1 + value].
        hue: the shift, in turns of the colour circle, is uniform in [-hue, hue]; at most 0.5.
    """
    operations: list[Callable[[Image.Image], Image.Image]] = []
    for amount, enhancer in (
        (brightness, ImageEnhance.Brightness),
        (contrast, ImageEnhance.Contrast),
        (saturation, ImageEnhance.Color),
    ):
        if amount > 0:
            factor = _uniform(generator, max(0.0, 1.0 - amount), 1.0 + amount)
            operations.append(lambda image, e=enhancer, f=factor: e(image).enhance(f))  # type: ignore[misc]
    if hue > 0:
        shift = _uniform(generator, -hue, hue)
        operations.append(lambda image: _shift_hue(image, shift))
    if not operations:
        return sample
    image = Image.fromarray(sample.image.numpy())
    for position in np.argsort(generator.random(len(operations)), kind="stable"):
        image = operations[position](image)
    return replace(sample, image=torch.from_numpy(np.array(image)))


@dataclass(frozen=True)
class TrainTransform:
    """The training augmentation of maskrcnn-benchmark.

    Args:
        min_sizes: shortest edge, drawn for each image (``INPUT.MIN_SIZE_TRAIN``).
        max_size: bound of the longest edge, or None.
        horizontal_flip_prob, vertical_flip_prob: probability of each flip.
        brightness, contrast, saturation, hue: see :func:`color_jitter`.
        rounding: see :func:`get_size`.
        box_offset: the reading of boxes (``BoxList.offset``) that the model wants.
    """

    min_sizes: Sequence[int] = (800,)
    max_size: int | None = 1333
    horizontal_flip_prob: float = 0.5
    vertical_flip_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    rounding: str = "maskrcnn_benchmark"
    box_offset: int = 1

    def __post_init__(self) -> None:
        if not self.min_sizes or min(self.min_sizes) < 1:
            raise ValueError(f"TrainTransform: min_sizes must hold positive sizes, got {self.min_sizes!r}")
        if self.hue > 0.5:
            raise ValueError(f"TrainTransform: hue must be at most 0.5, got {self.hue}")

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        sample, size, left_right, top_bottom = self._draw(sample, generator)
        sample = resize(sample, size)
        if left_right:
            sample = flip_left_right(sample)
        return flip_top_bottom(sample) if top_bottom else sample

    def prepare(self, sample: Sample, generator: np.random.Generator) -> Prepared:
        """What a call does, except that resizing and flipping the pixels is left to the device."""
        sample, (height, width), left_right, top_bottom = self._draw(sample, generator)
        target = sample.target
        if tuple(sample.image.shape[:2]) != (height, width):
            target = target.resize((width, height))
        if left_right:
            target = target.transpose(FLIP_LEFT_RIGHT)
        if top_bottom:
            target = target.transpose(FLIP_TOP_BOTTOM)
        flip = int(left_right) + 2 * int(top_bottom)
        return Prepared(sample.image, target, (height, width), flip, sample.image_id, sample.index)

    def _draw(self, sample: Sample, generator: np.random.Generator) -> tuple[Sample, tuple[int, int], bool, bool]:
        """The sample in other colours, the size to resize it to, and whether to flip left-right and top-bottom."""
        if sample.target.offset != self.box_offset:
            sample = replace(sample, target=sample.target.with_offset(self.box_offset))
        sample = color_jitter(
            sample,
            generator,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
        )
        # Always the same number of draws, so that one setting does not change what another one draws.
        choice, horizontal, vertical = generator.random(3)
        min_size = self.min_sizes[int(choice * len(self.min_sizes))]
        height, width = sample.image.shape[:2]
        size = get_size(height, width, min_size, self.max_size, self.rounding)
        return sample, size, bool(horizontal < self.horizontal_flip_prob), bool(vertical < self.vertical_flip_prob)


@dataclass(frozen=True)
class TestTransform:
    """Resize only; the generator is not used."""

    min_size: int = 800
    max_size: int | None = 1333
    rounding: str = "maskrcnn_benchmark"

    __test__ = False  # pytest would take the class for tests

    def __call__(self, sample: Sample, generator: np.random.Generator | None = None) -> Sample:
        height, width = sample.image.shape[:2]
        return resize(sample, get_size(height, width, self.min_size, self.max_size, self.rounding))


def _uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(generator.random())


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue).astype(np.int16) + int(shift * 255)
    hue = Image.fromarray((turned % 256).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
