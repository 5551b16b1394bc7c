"""Video files to frames: Pillow for animated pictures, PyAV (optional) for everything else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastrcnn.data.dataset import DataError

ANIMATED = frozenset({".gif", ".webp", ".apng", ".png", ".tif", ".tiff"})


def read_frames(path: str | Path) -> Iterator[Tensor]:
    """The frames of a video, one after the other, as uint8 RGB [H, W, 3].

    Animated GIF, WebP, PNG and TIFF files are read by Pillow, all others by PyAV where it is installed.

    Raises (while iterating):
        DataError: the file is missing or not a video, or PyAV is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"video file {path} does not exist")
    frames = _with_pillow(path) if path.suffix.lower() in ANIMATED else _with_av(path)
    number = -1
    for number, frame in enumerate(frames):  # noqa: B007
        yield torch.from_numpy(frame)
    if number < 0:
        raise DataError(f"video file {path} holds no frame")


def _with_pillow(path: Path) -> Iterator[np.ndarray]:
    try:
        with Image.open(path) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DataError(f"video file {path} is not a picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"video file {path} is damaged: {error}") from None


def _with_av(path: Path) -> Iterator[np.ndarray]:
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise DataError(
            f"video file {path}: reading {path.suffix or 'such'} files needs PyAV (pip install av); or pass the frames "
            "as arrays to Predictor.frames"
        ) from None
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (OSError, ValueError, IndexError) as error:  # av.FFmpegError is one of the first two
        raise DataError(f"video file {path} cannot be decoded: {error}") from None
