"""Image files to uint8 RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastrcnn.data.dataset import DataError, ImageInfo

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Only these are decoded by simplejpeg as Pillow would: CMYK files need Pillow's conversion.
_SIMPLEJPEG_COLORSPACES = ("YCbCr", "Gray")


def read_annotated_image(path: Path, info: ImageInfo, annotation: str) -> Tensor:
    """:func:`read_image`, of the size that its annotation gives.

    Args:
        annotation: what says so, for the message.

    Raises:
        DataError: as :func:`read_image`, or the file has another size than ``info``.
    """
    image = read_image(path)
    if tuple(image.shape[:2]) != (info["height"], info["width"]):
        raise DataError(
            f"image file {path} is {image.shape[1]}x{image.shape[0]} pixels, but {annotation} says "
            f"{info['width']}x{info['height']} for image {info['id']}"
        )
    return image


def read_image(path: str | Path) -> Tensor:
    """Read an image file as uint8 RGB, [H, W, 3].

    Grayscale, palette, CMYK and 16-bit files are converted (16-bit values keep their upper byte); transparency is
    dropped; the EXIF orientation is ignored, as in maskrcnn-benchmark, because annotations are in file coordinates.
    JPEG files are decoded by simplejpeg where it is installed (twice as fast, the same pixels), else by Pillow.

    Raises:
        DataError: the file is missing, empty, truncated or not an image.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"image file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"image file {path} cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(f"image file {path} is empty (0 bytes)")
    pixels = _decode_jpeg(data) if data[:2] == b"\xff\xd8" else None
    if pixels is None:
        pixels = _decode_with_pillow(data, path)
    return torch.from_numpy(pixels)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """None where simplejpeg is absent or gives up: Pillow then decides, so that its presence changes no result."""
    if simplejpeg is None:
        return None
    try:
        colorspace = simplejpeg.decode_jpeg_header(data)[2]
        if colorspace not in _SIMPLEJPEG_COLORSPACES:
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _decode_with_pillow(data: bytes, path: str | Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # "Palette images with Transparency ..." and the size warning are about uses that are not ours.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return _to_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"image file {path} is not an image that Pillow can read ({len(data)} bytes)") from None
    # Pillow's decoders raise all of these on damaged files, depending on the format.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"image file {path} is damaged: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit gray at 255, which turns most such images white.
        wide = np.asarray(image).astype(np.int64)
        gray = np.clip(wide >> 8, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range; store 8 or 16 bits")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
