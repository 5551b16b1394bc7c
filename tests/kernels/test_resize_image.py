"""Resizing against Pillow to the bit."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrcnn_kernels import preprocess, resize_image, set_backend
from tests.kernels.helpers import Place
from tests.kernels.mutations import mutated
from tests.kernels.test_preprocess import by_pillow, noise


def passes_exchanged(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow resizes along y first, which it does since version 13 for some shapes."""
    shrunk = before[0] - after[0]
    return int(PIL.__version__.split(".")[0]) >= 13 and shrunk > 0 and shrunk > 2 * (before[1] - after[1])


def ramp(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.indices((height, width)).sum(0).astype(np.uint8)[..., None].repeat(3, 2))


RESIZES = [
    ((9, 33), (18, 66)),
    ((24, 32), (12, 16)),
    ((18, 26), (20, 15)),
    ((16, 33), (16, 20)),
    ((8, 65), (17, 65)),
    ((1, 1), (5, 7)),
    ((9, 1), (3, 4)),
    ((7, 9), (7, 9)),
    ((2, 70), (3, 7)),
    ((12, 20), (13, 19)),
]


LARGE = [
    ((480, 640), (200, 267)),
    ((48, 64), (400, 500)),
    ((37, 53), (80, 31)),
    ((100, 100), (1, 1)),
    ((1, 200), (1, 3)),
    ((300, 400), (70, 90)),
    ((30, 999), (31, 100)),
    ((64, 300), (64, 65)),
    ((64, 300), (64, 69)),
]


@pytest.mark.parametrize(("before", "after"), RESIZES, ids=lambda size: "x".join(map(str, size)))
def test_resize_image_equals_pillow(place: Place, before: tuple[int, int], after: tuple[int, int]) -> None:
    image = noise(*before)
    found = resize_image(image.to(place.device), after)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), by_pillow(image, after))


@pytest.mark.parametrize("backend_name", ["reference", "cpp"])
@pytest.mark.parametrize(("before", "after"), LARGE, ids=lambda size: "x".join(map(str, size)))
def test_resize_image_equals_pillow_large(backend_name: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    for image in (noise(*before), ramp(*before)):
        with set_backend(backend_name):
            assert torch.equal(resize_image(image, after), by_pillow(image, after))


def test_resize_image_equals_pillow_on_one_level(place: Place) -> None:
    """White stays white and black black: the weights of an output may add up to a little more than one."""
    for level in (0, 1, 255):
        image = torch.full((11, 13, 3), level, dtype=torch.uint8, device=place.device)
        assert resize_image(image, (23, 9)).unique().tolist() == [level]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_resize_image_equals_pillow_anywhere(h: int, w: int, oh: int, ow: int, seed: int) -> None:
    image = noise(h, w, seed)
    wanted = by_pillow(image, (oh, ow))
    tolerance = int(passes_exchanged((h, w), (oh, ow)))
    for name in ("reference", "cpp"):
        with set_backend(name):
            difference = resize_image(image, (oh, ow)).int() - wanted.int()
        assert difference.abs().max() <= tolerance, name


def test_resize_image_keeps_channels_apart(place: Place) -> None:
    image = torch.zeros(20, 30, 3, dtype=torch.uint8, device=place.device)
    image[..., 1], image[..., 2] = 100, 200
    assert resize_image(image, (13, 44)).flatten(0, 1).unique(dim=0).tolist() == [[0, 100, 200]]


def test_resize_image_of_the_same_size_is_a_copy(place: Place) -> None:
    image = noise(7, 9).to(place.device)
    same = resize_image(image, (7, 9))
    assert torch.equal(same, image)
    same.zero_()
    assert image.any()


def test_resize_image_takes_any_layout(place: Place) -> None:
    image = noise(20, 50).to(place.device)
    wanted = by_pillow(image.cpu(), (11, 31)).to(place.device)
    for other in (
        image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        image.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([image, image], dim=2)[..., :3],
        torch.cat([image, image], dim=1)[:, :50],
        image.flip(1).flip(1),
    ):
        assert torch.equal(resize_image(other, (11, 31)), wanted)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_resize_image_mirrored_is_mirrored_resized(h: int, w: int, oh: int, ow: int, seed: int) -> None:
    image = noise(h, w, seed)
    difference = resize_image(image.flip(1), (oh, ow)).flip(1).int() - resize_image(image, (oh, ow)).int()
    # Not 0: where the taps are cut off, Pillow rounds its windows to the right.
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


def test_resize_image_without_antialiasing_is_caught() -> None:
    broken = mutated(preprocess, "support = max(scale, 1.0)", "support = 1.0")["resize_image"]
    image = noise(100, 120)
    assert (broken(image, (40, 50)).int() - by_pillow(image, (40, 50)).int()).abs().max() > 10
