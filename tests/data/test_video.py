"""Frames of video files."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn.data import DataError
from fastrcnn.data.video import read_frames


def colours(count: int) -> list[np.ndarray]:
    return [np.full((12, 16, 3), 60 * (i + 1), dtype=np.uint8) for i in range(count)]


def test_animated_picture(tmp_path: Path) -> None:
    first, *others = map(Image.fromarray, colours(3))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    frames = list(read_frames(tmp_path / "a.gif"))
    assert [tuple(frame.shape) for frame in frames] == [(12, 16, 3)] * 3
    assert [int(frame[0, 0, 0]) for frame in frames] == [60, 120, 180]
    assert frames[0].dtype == torch.uint8
    first.save(tmp_path / "one.png")
    assert len(list(read_frames(tmp_path / "one.png"))) == 1


def test_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"reading \.mp4 files needs PyAV \(pip install av\); or pass the frames"):
        next(read_frames(tmp_path / "a.mp4"))


def test_with_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's interface, in small: open(path) is a context whose decode(video=0) gives frames."""

    class Frame:
        def __init__(self, pixels: np.ndarray) -> None:
            self.pixels = pixels

        def to_ndarray(self, format: str) -> np.ndarray:
            assert format == "rgb24"
            return self.pixels

    class Container:
        def __enter__(self) -> Container:
            return self

        def __exit__(self, *_: object) -> None: ...

        def decode(self, video: int) -> Iterator[Frame]:
            assert video == 0
            yield from map(Frame, colours(2))
            raise ValueError("truncated")

    module: Any = types.ModuleType("av")
    module.open = lambda path: Container()
    monkeypatch.setitem(sys.modules, "av", module)
    (tmp_path / "a.mp4").write_bytes(b"0")
    frames = read_frames(tmp_path / "a.mp4")
    assert [int(next(frames)[0, 0, 0]) for _ in range(2)] == [60, 120]
    with pytest.raises(DataError, match=r"a\.mp4 cannot be decoded: truncated"):
        next(frames)


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")
def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="cannot be decoded"):
        next(read_frames(tmp_path / "a.mp4"))


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        next(read_frames(tmp_path / "a.mp4"))
    (tmp_path / "a.gif").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.gif is not a picture"):
        next(read_frames(tmp_path / "a.gif"))
