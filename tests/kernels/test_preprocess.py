"""Batching against a NumPy transcription of maskrcnn-benchmark's transforms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastrcnn_kernels import _library, preprocess, preprocess_images, resize_image, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place, required_backends
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


def by_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)))


# Too many taps or pixels for Triton's interpreter. From 4.6 on the blocks of the C++ kernel reach too far.


SHAPES = [(7, 30), (17, 12), (1, 1), (9, 3)]
FLIP = [True, False, True, False]
SIZES = [(8, 33), (9, 7), (5, 6), (9, 3)]


@pytest.mark.parametrize("resized", [False, True], ids=["as they are", "resized"])
@pytest.mark.parametrize("size_divisible", [0, 32])
@pytest.mark.parametrize("style", STYLES)
def test_preprocess_images_equals_maskrcnn_benchmark(
    place: Place, guarded: Guards, style: str, size_divisible: int, resized: bool
) -> None:
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(SHAPES)]
    sizes = SIZES if resized else None
    batch, found_sizes = preprocess_images(
        [guarded(image.to(place.device)) for image in images],
        size_divisible=size_divisible,
        flip=FLIP,
        sizes=sizes,
        **STYLES[style],
    )
    if sizes is not None:
        images = [by_pillow(image, size) for image, size in zip(images, sizes, strict=True)]
    wanted = batch_by_maskrcnn_benchmark(images, size_divisible=size_divisible, flip=FLIP, **STYLES[style])
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert np.array_equal(batch.cpu().numpy(), wanted)
    assert found_sizes.dtype == torch.int64
    assert found_sizes.tolist() == [list(s) for s in (sizes or SHAPES)]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_preprocess_images_types_and_layouts(
    place: Place, dtype: torch.dtype, layout: torch.memory_format, channels: int
) -> None:
    """The float32 batch, rounded once; the fourth channel is zero."""
    style = "caffe" if channels == 3 else "unit"
    shapes, flip, sizes = [(9, 33), (9, 7)], [False, True], [(7, 27), (10, 9)]
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(shapes)]
    resized = [by_pillow(image, size) for image, size in zip(images, sizes, strict=True)]
    wanted = torch.from_numpy(batch_by_maskrcnn_benchmark(resized, size_divisible=4, flip=flip, **STYLES[style]))
    batch, _ = preprocess_images(
        [image.to(place.device) for image in images],
        size_divisible=4,
        flip=flip,
        sizes=sizes,
        dtype=dtype,
        memory_format=layout,
        channels=channels,
        **STYLES[style],
    )
    assert batch.dtype == dtype
    assert batch.shape == (2, channels, 12, 28)
    assert batch.is_contiguous(memory_format=layout)
    torch.testing.assert_close(batch[:, :3].cpu(), wanted.to(dtype), rtol=slack(place, dtype), atol=0)
    assert not batch[:, 3:].any()


def slack(place: Place, dtype: torch.dtype) -> float:
    """Triton's interpreter cuts bfloat16 off instead of rounding; all else is exact."""
    return 2.0**-7 if place == Place("triton", "cpu") and dtype == torch.bfloat16 else 0.0


def test_preprocess_images_in_one_buffer(place: Place) -> None:
    """Images may be views into one uint8 buffer at any offset."""
    shapes = [(11, 13), (7, 20)]
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(shapes)]
    arena = torch.cat([torch.zeros(5, dtype=torch.uint8), *(image.flatten() for image in images)]).to(place.device)
    views, offset = [], 5
    for h, w in shapes:
        views.append(arena[offset : offset + 3 * h * w].view(h, w, 3))
        offset += 3 * h * w
    found, _ = preprocess_images(views, size_divisible=8, sizes=[(9, 15), (14, 8)], **SCALED)
    with set_backend("reference"):
        wanted, _ = preprocess_images(images, size_divisible=8, sizes=[(9, 15), (14, 8)], **SCALED)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("mean", [[0.0, 1.5, math.nan], [math.inf, 3e38, 1e-42]], ids=["nan", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_preprocess_images_unusual_constants(place: Place, mean: list[float], dtype: torch.dtype) -> None:
    style = {"pixel_mean": mean, "pixel_std": [-3.0, 1e-39, 1e30], "to_bgr255": True, "size_divisible": 4}
    image = noise(6, 21)
    found, _ = preprocess_images([image.to(place.device)], dtype=dtype, **style)
    with set_backend("reference"):
        wanted, _ = preprocess_images([image], dtype=dtype, **style)
    torch.testing.assert_close(found.cpu(), wanted, rtol=slack(place, dtype), atol=0, equal_nan=True)


@pytest.mark.parametrize("sizes", [(33, 65), (20, 31), (70, 90), (5, 7)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("mirrored", [False, True])
def test_portable_rows_equal_the_vectorised_ones(sizes: tuple[int, int], mirrored: bool) -> None:
    """What the C++ kernels do on a processor without AVX2."""
    if "cpp" not in required_backends():
        pytest.skip("the C++ kernels are not built")
    image = noise(33, 65)
    out = torch.empty((*sizes, 3), dtype=torch.uint8)
    description = (image.data_ptr(), 33, 65, image.stride(0), *sizes, mirrored)
    _library.extension().resize_image(description, out.data_ptr(), True, 2)
    wanted = by_pillow(image, sizes)
    if not mirrored:
        assert torch.equal(out, wanted)
    grid = itertools.product([torch.float32, torch.float16, torch.bfloat16], [False, True], [3, 4], STYLES.values())
    for dtype, channels_last, channels, style in grid:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        batch = torch.empty((1, channels, *sizes), dtype=dtype, memory_format=layout)
        code = [torch.float32, torch.float16, torch.bfloat16].index(dtype)
        _library.extension().preprocess_images(
            [description], style["pixel_mean"], style["pixel_std"], style["to_bgr255"], *sizes, channels, code,
            channels_last, batch.data_ptr(), True, 2,
        )  # fmt: skip
        expected = batch_by_maskrcnn_benchmark([wanted], size_divisible=0, flip=[mirrored], **style)
        assert torch.equal(batch[:, :3], torch.from_numpy(expected).to(dtype))


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
        ({"sizes": [(5, 5)] * 2}, "2 sizes for 1 images"),
        ({"sizes": [(5, 0)]}, "at least 1x1"),
        ({"sizes": [(50, 9)], "pad_to": (49, 64)}, "does not fit pad_to"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"memory_format": torch.preserve_format}, "memory_format must be"),
        ({"channels": 5}, "channels must be 3 or 4"),
        ({"pixel_mean": [0.0]}, "pixel_mean must have 3"),
        ({"pixel_std": [1.0] * 4}, "pixel_std must have 3"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "must not be 0"),
    ],
    ids=[
        "none",
        "channels first",
        "float",
        "empty image",
        "flips",
        "sizes",
        "size of 0",
        "too large",
        "dtype",
        "layout",
        "channels",
        "mean",
        "std",
        "std of 0",
    ],
)
def test_preprocess_images_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": [noise(8, 8)], "size_divisible": 32, **CAFFE} | change
    with pytest.raises(ValueError, match=message):
        preprocess_images(**arguments)


def test_preprocess_opcheck(place: Place) -> None:
    operators = torch.ops.fastrcnn_kernels
    images = [noise(3, 4).to(place.device), noise(2, 5).to(place.device)]
    torch.library.opcheck(operators.resize_image.default, (images[0], 3, 5))
    style = ([1.0, 2.0, 3.0], [1.0, 2.0, 1.0], True)
    arguments = (images, *style, [True, False], [3, 4, 3, 5], 8, 8, 4, torch.float16, True)
    torch.library.opcheck(operators.preprocess_images.default, arguments)


def test_preprocess_compiles(place: Place) -> None:
    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        batch, _ = preprocess_images([image], sizes=[(5, 4)], size_divisible=8, flip=[True], **CAFFE)
        return batch, resize_image(image, (3, 5))

    image = noise(4, 4).to(place.device)
    torch._dynamo.reset()
    for found, wanted in zip(torch.compile(run, fullgraph=True, backend="eager")(image), run(image), strict=True):
        assert torch.equal(found, wanted)


def test_preprocess_never_waits_for_the_device(place: Place) -> None:
    image = noise(9, 8).to(place.device)
    resize, batch = (
        _library._resolve(_library._OPERATORS[name], place.backend) for name in ("resize_image", "preprocess_images")
    )
    with ForbidSync():
        resize(image, 5, 12)
        batch([image], [0.0] * 3, [2.0] * 3, False, [True], [7, 9], 16, 16, 3, torch.float16, False)


MUTATIONS = {
    "RGB for BGR": ("2 - channel if to_bgr255 else channel", "channel"),
    "BGR for RGB": ("2 - channel if to_bgr255 else channel", "2 - channel"),
    "flipped upside down": ("pixels.flip(1) if mirrored", "pixels.flip(0) if mirrored"),
    "never flipped": ("pixels.flip(1) if mirrored", "pixels if mirrored"),
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
