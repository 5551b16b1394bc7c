"""Every kind of image file becomes uint8 RGB; what is not an image is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn.data import DataError, read_image
from fastrcnn.data import image as image_module


def picture(width: int = 37, height: int = 29) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))


def test_png_is_read_exactly(tmp_path: Path) -> None:
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), pixels)


@pytest.mark.parametrize("size", [(37, 29), (1, 1), (16, 16), (241, 133)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}, {"optimize": True}],
    ids=str,
)
def test_simplejpeg_equals_pillow(tmp_path: Path, size: tuple[int, int], options: dict) -> None:
    pytest.importorskip("simplejpeg")
    for mode in ("RGB", "L"):
        path = tmp_path / f"{mode}.jpg"
        Image.fromarray(picture(*size)).convert(mode).save(path, **options)
        with Image.open(path) as file:
            expected = np.asarray(file.convert("RGB"))
        assert image_module._decode_jpeg(path.read_bytes()) is not None
        assert np.array_equal(read_image(path).numpy(), expected)


def test_without_simplejpeg_the_pixels_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    first = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(image_module, "simplejpeg", None)
    assert torch.equal(read_image(tmp_path / "a.jpg"), first)


def test_cmyk_jpeg_is_converted(tmp_path: Path) -> None:
    pixels = picture()
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    difference = np.abs(read_image(tmp_path / "a.jpg").numpy().astype(int) - pixels)
    assert difference.max() < 20


def test_palette_with_transparency_drops_the_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(picture()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    palette.save(tmp_path / "a.png", transparency=3)
    assert np.array_equal(read_image(tmp_path / "a.png").numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA"])
def test_gray_and_alpha(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(picture()).convert(mode)
    source.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").numpy(), np.asarray(source.convert("RGB")))


def test_16_bit_png_keeps_the_upper_byte(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png").numpy()
    assert image[:, :, 0].tolist() == [[0, 0, 1], [0x12, 0x80, 255]]
    assert (image == image[:, :, :1]).all()


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    pixels = picture(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn this image by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert tuple(read_image(tmp_path / "a.jpg").shape) == (20, 40, 3)


def jpeg_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(200, 150)).save(stream, "JPEG")
    return stream.getvalue()


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(200, 150)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jpg", b"", "is empty"),
        ("cut.jpg", jpeg_bytes()[:-1500], "is damaged"),
        ("header.jpg", jpeg_bytes()[:20], "is (damaged|not an image)"),
        ("cut.png", png_bytes()[:-1500], "is damaged"),
        ("page.jpg", b"<html><body>404</body></html>", "is not an image"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v else "",
)
@pytest.mark.parametrize("with_simplejpeg", [True, False], ids=["simplejpeg", "pillow"])
def test_damaged_files_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    message: str,
    with_simplejpeg: bool,
) -> None:
    if not with_simplejpeg:
        monkeypatch.setattr(image_module, "simplejpeg", None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jpg does not exist"):
        read_image(tmp_path / "none.jpg")
