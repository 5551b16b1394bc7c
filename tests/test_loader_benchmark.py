"""The loader benchmark runs, and what it says of padding follows from the sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import loader


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found" / "loader.json"
    threads = torch.get_num_threads()
    try:
        arguments = ["--count", "1", "--rounds", "1", "--photographs", str(tmp_path), "--output", str(output)]
        assert loader.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert f"No photographs of 640 x 480 under {tmp_path}: left out" in printed
    found = json.loads(output.read_text())
    times = found["milliseconds"]["generated"]
    assert all(milliseconds > 0 for milliseconds in times.values())
    assert f"| ours: decode | {times['ours: decode']:.2f} |" in printed


def test_padding_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """640 x 480 alone: 800 x 1066 of 800 x 1088, and of 800 x 1344."""
    monkeypatch.setattr(loader, "COCO_SIZES", {(480, 640): 1})
    found = loader.padding(2, count=100)
    assert found["ways"]["to buckets, batches of one bucket"] == {"area": pytest.approx(1088 / 1066), "sizes": 1}
    assert found["ways"]["to the largest image"] == {"area": pytest.approx(1088 / 1066), "sizes": 1}
    assert found["ways"]["to 800x1344 or 1344x800"]["area"] == pytest.approx(1344 / 1066)
    assert found["buckets"] == {"800x1088": {"share": 1.0, "filled": pytest.approx(1066 / 1088)}}


def test_buckets_waste_less_than_one_size() -> None:
    rows = loader.padding(16, count=2000)["ways"]
    assert rows["to buckets, batches of one bucket"]["area"] < 1.06 < rows["to 800x1344 or 1344x800"]["area"]
    assert rows["to buckets, batches of one bucket"]["area"] < rows["to the largest image"]["area"]
