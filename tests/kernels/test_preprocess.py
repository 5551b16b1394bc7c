"""Resizing against Pillow, batching against a NumPy transcription of maskrcnn-benchmark's transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastrcnn_kernels import preprocess, preprocess_images, resize_image
from tests.kernels.helpers import ForbidSync
from tests.kernels.mutations import mutated

CAFFE = {"pixel_mean": [102.9801, 115.9465, 122.7717], "pixel_std": [1.0, 1.0, 1.0], "to_bgr255": True}
SCALED = {"pixel_mean": [102.9801, 115.9465, 122.7717], "pixel_std": [57.375, 57.12, 58.395], "to_bgr255": True}
UNIT = {"pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225], "to_bgr255": False}
STYLES = {"caffe": CAFFE, "scaled": SCALED, "unit": UNIT}


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def batch_by_maskrcnn_benchmark(
    images: list[Tensor],
    pixel_mean: list[float],
    pixel_std: list[float],
    to_bgr255: bool,
    size_divisible: int,
    flip: list[bool],
) -> NDArray[np.float32]:
    """``hflip``, ``ToTensor``, ``Normalize`` and ``to_image_list``, each step in float32, with its / 255 and * 255."""
    normalised = []
    for image, mirrored in zip(images, flip, strict=True):
        pixels = image.numpy()
        if mirrored:
            pixels = pixels[:, ::-1]
        values = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        if to_bgr255:
            values = values[[2, 1, 0]] * np.float32(255)
        mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (pixel_mean, pixel_std))
        normalised.append((values - mean) / std)
    height, width = (max(values.shape[axis] for values in normalised) for axis in (1, 2))
    if size_divisible > 0:
        height = int(np.ceil(height / size_divisible) * size_divisible)
        width = int(np.ceil(width / size_divisible) * size_divisible)
    batch = np.zeros((len(images), 3, height, width), np.float32)
    for target, values in zip(batch, normalised, strict=True):
        target[:, : values.shape[1], : values.shape[2]] = values
    return batch


RESIZES = [
    ((48, 64), (96, 128)),
    ((48, 64), (24, 32)),
    ((480, 640), (200, 267)),
    ((37, 53), (80, 31)),
    ((33, 65), (33, 20)),
    ((33, 65), (70, 65)),
    ((1, 1), (5, 7)),
    ((9, 1), (3, 4)),
    ((1, 200), (1, 3)),
    ((100, 100), (1, 1)),
]


@pytest.mark.parametrize(("before", "after"), RESIZES, ids=lambda size: "x".join(map(str, size)))
def test_resize_image_is_within_one_level_of_pillow(before: tuple[int, int], after: tuple[int, int]) -> None:
    for image in (noise(*before), torch.from_numpy(np.indices(before).sum(0).astype(np.uint8)[..., None].repeat(3, 2))):
        found = resize_image(image, after)
        assert found.shape == (*after, 3)
        assert found.dtype == torch.uint8
        assert found.is_contiguous()
        wanted = np.array(Image.fromarray(image.numpy()).resize(after[::-1], Image.Resampling.BILINEAR))
        assert np.abs(found.numpy().astype(int) - wanted).max() <= 1


def test_resize_image_keeps_channels_apart() -> None:
    image = torch.zeros(20, 30, 3, dtype=torch.uint8)
    image[..., 1], image[..., 2] = 100, 200
    assert resize_image(image, (13, 44)).flatten(0, 1).unique(dim=0).tolist() == [[0, 100, 200]]


def test_resize_image_of_the_same_size_is_a_copy() -> None:
    image = noise(7, 9)
    same = resize_image(image, (7, 9))
    assert torch.equal(same, image)
    same.zero_()
    assert image.any()


def test_resize_image_takes_any_layout() -> None:
    image = noise(40, 50)
    wanted = resize_image(image, (23, 31))
    for other in (
        image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        image.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([image, image], dim=2)[..., :3],
        image.flip(1).flip(1),
    ):
        assert torch.equal(resize_image(other, (23, 31)), wanted)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_resize_image_mirrored_is_mirrored_resized(h: int, w: int, oh: int, ow: int, seed: int) -> None:
    image = noise(h, w, seed)
    difference = resize_image(image.flip(1), (oh, ow)).flip(1).int() - resize_image(image, (oh, ow)).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (torch.zeros(3, 4, 5, dtype=torch.uint8), (5, 5), "must be uint8"),
        (torch.zeros(4, 5, dtype=torch.uint8), (5, 5), "must be uint8"),
        (torch.zeros(4, 5, 3), (5, 5), "must be uint8"),
        (torch.zeros(0, 5, 3, dtype=torch.uint8), (5, 5), "not empty"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), (0, 5), "at least 1x1"),
    ],
    ids=["channels first", "grey", "float", "empty", "no pixels wanted"],
)
def test_resize_image_bad_arguments(image: Tensor, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_image(image, size)


@pytest.mark.parametrize("size_divisible", [0, 1, 32])
@pytest.mark.parametrize("style", STYLES)
def test_preprocess_images_equals_maskrcnn_benchmark(style: str, size_divisible: int) -> None:
    shapes = [(33, 65), (64, 40), (1, 1), (50, 3)]
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(shapes)]
    flip = [True, False, True, False]
    batch, sizes = preprocess_images(images, size_divisible=size_divisible, flip=flip, **STYLES[style])
    wanted = batch_by_maskrcnn_benchmark(images, size_divisible=size_divisible, flip=flip, **STYLES[style])
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert np.array_equal(batch.numpy(), wanted)
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == [list(s) for s in shapes]


def test_preprocess_images_every_grey_level_survives() -> None:
    """Dividing by 255 and multiplying by 255 in float32 changes no grey level, so leaving both out is exact."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).repeat(1, 1, 3)
    plain = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "size_divisible": 0}
    batch, _ = preprocess_images([levels], to_bgr255=True, **plain)
    assert batch[0, 0].flatten().tolist() == list(range(256))
    unit, _ = preprocess_images([levels], to_bgr255=False, **plain)
    assert np.array_equal(unit[0, 0].flatten().numpy(), np.arange(256, dtype=np.float32) / np.float32(255))


def test_preprocess_images_channel_order() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).expand(2, 2, 3)
    plain = {"pixel_std": [1.0] * 3, "size_divisible": 0}
    bgr, _ = preprocess_images([image], pixel_mean=[1.0, 2.0, 3.0], to_bgr255=True, **plain)
    assert bgr[0, :, 0, 0].tolist() == [29.0, 18.0, 7.0]
    rgb, _ = preprocess_images([image], pixel_mean=[0.0] * 3, to_bgr255=False, **plain)
    torch.testing.assert_close(rgb[0, :, 0, 0], torch.tensor([10, 20, 30]) / 255)


def test_preprocess_images_pads_with_zeros_after_normalising() -> None:
    batch, _ = preprocess_images([noise(5, 7), noise(9, 4)], size_divisible=4, **CAFFE)
    assert batch.shape == (2, 3, 12, 8)
    assert not batch[0, :, 5:].any()
    assert not batch[0, :, :, 7:].any()
    assert not batch[1, :, :, 4:].any()
    assert (batch[0, :, :5, :7] != 0).all()


def test_preprocess_images_pad_to() -> None:
    images = [noise(5, 7)]
    small, _ = preprocess_images(images, size_divisible=0, **CAFFE)
    large, sizes = preprocess_images(images, size_divisible=32, pad_to=(40, 64), **CAFFE)
    assert large.shape == (1, 3, 64, 64)
    assert torch.equal(large[..., :5, :7], small)
    assert sizes.tolist() == [[5, 7]]
    with pytest.raises(ValueError, match="does not fit pad_to"):
        preprocess_images(images, size_divisible=0, pad_to=(5, 6), **CAFFE)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=3), st.integers(0, 99))
def test_preprocess_images_flipped_twice_is_not_flipped(shapes: list[tuple[int, int]], seed: int) -> None:
    images = [noise(h, w, seed) for h, w in shapes]
    mirrored = [image.flip(1) for image in images]
    wanted, _ = preprocess_images(images, size_divisible=8, **UNIT)
    found, _ = preprocess_images(mirrored, size_divisible=8, flip=[True] * len(images), **UNIT)
    assert torch.equal(found, wanted)


def test_preprocess_images_leaves_its_arguments_alone() -> None:
    images = [noise(6, 8), noise(8, 6)]
    copies = [image.clone() for image in images]
    preprocess_images(images, size_divisible=0, flip=[True, True], **SCALED)
    assert all(torch.equal(a, b) for a, b in zip(images, copies, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"images": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, "must be uint8"),
        ({"images": [torch.zeros(8, 8, 3)]}, "must be uint8"),
        ({"images": [torch.zeros(8, 0, 3, dtype=torch.uint8)]}, "not empty"),
        ({"flip": [True, False]}, "2 flips for 1 images"),
        ({"pixel_mean": [0.0]}, "pixel_mean must have 3"),
        ({"pixel_std": [1.0] * 4}, "pixel_std must have 3"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "must not be 0"),
    ],
    ids=["none", "channels first", "float", "empty image", "flips", "mean", "std", "std of 0"],
)
def test_preprocess_images_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": [noise(8, 8)], "size_divisible": 32, **CAFFE} | change
    with pytest.raises(ValueError, match=message):
        preprocess_images(**arguments)


def test_preprocess_opcheck() -> None:
    operators = torch.ops.fastrcnn_kernels
    torch.library.opcheck(operators.resize_image.default, (noise(9, 8), 5, 12))
    arguments = ([noise(9, 8), noise(4, 12)], [1.0, 2.0, 3.0], [1.0, 2.0, 1.0], True, [True, False], 16, 16)
    torch.library.opcheck(operators.preprocess_images.default, arguments)


def test_preprocess_never_waits_for_the_device() -> None:
    with ForbidSync():
        preprocess._resize_image_reference(noise(9, 8), 5, 12)
        preprocess._preprocess_images_reference([noise(9, 8)], [0.0] * 3, [2.0] * 3, False, [True], 16, 16)


MUTATIONS = {
    "RGB for BGR": ("2 - channel if to_bgr255 else channel", "channel"),
    "BGR for RGB": ("2 - channel if to_bgr255 else channel", "2 - channel"),
    "flipped upside down": ("image.flip(1) if mirrored", "image.flip(0) if mirrored"),
    "never flipped": ("image.flip(1) if mirrored", "image if mirrored"),
    "not divided by 255": ("plane.div_(255.0)", "plane.div_(256.0)"),
    "std before mean": ("plane.sub_(mean)", "plane.sub_(mean * std)"),
    "std forgotten": ("if std != 1.0:", "if False:"),
    "rounded down": ("height, width = -(-height // step) * step", "height, width = max(height // step, 1) * step"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_preprocess_images_mutations_are_caught(name: str) -> None:
    broken = mutated(preprocess, *MUTATIONS[name])["preprocess_images"]
    images, flip = [noise(33, 60), noise(20, 40, 1)], [True, False]
    for style in STYLES.values():
        wanted = batch_by_maskrcnn_benchmark(images, size_divisible=32, flip=flip, **style)
        try:
            found, _ = broken(images, size_divisible=32, flip=flip, **style)
        except RuntimeError:  # the batch has become too small for its images
            return
        if not np.array_equal(found.numpy(), wanted):
            return
    raise AssertionError(f"no value differs: {name}")


def test_resize_image_without_antialiasing_is_caught() -> None:
    broken = mutated(preprocess, "antialias=True", "antialias=False")["resize_image"]
    image = noise(100, 120)
    wanted = np.array(Image.fromarray(image.numpy()).resize((50, 40), Image.Resampling.BILINEAR))
    assert np.abs(broken(image, (40, 50)).numpy().astype(int) - wanted).max() > 10
