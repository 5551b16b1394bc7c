"""The table and the chart of stored benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def row(group: str, provider: str, median: float, **info: Any) -> dict[str, Any]:
    return {
        "group": group,
        "name": f"bench[{provider}]",
        "stats": {"min": median / 2, "median": median},
        "extra_info": {"provider": provider, "bytes": 1_000_000, "peak_bytes": 2_000_000, **info},
    }


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored.json"
    rows = [
        row("nms", "torchvision", 0.012),
        row("nms", "cpp", 0.003, target=["torchvision", 5]),
        row("focal", "cpp", 0.001, target=["torchvision", 3], roofline_percent=12.5),
        row("focal", "torchvision", 0.016),
        row("focal", "reference", 0.02),
    ]
    machine = {"cpu_name": "chip", "torch_threads": 2, "torch": "2", "triton": "3", "gpu": None}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}))
    return path


def test_table(stored: Path) -> None:
    lines = report.markdown(*report.load([stored])).splitlines()
    assert lines[0] == "chip, 2 threads. torch 2, triton 3"
    assert "| focal | torchvision | 3 | 16.0 |  |" in lines
    assert "| nms | torchvision | 5 | 4.0 | missed |" in lines
    assert "Geometric mean of the factors reached: 8.0." in lines
    assert "| focal | cpp | 1.000 | 0.500 |  | 1.00 | 12.5 | 2.0 |" in lines
    assert "| focal | torchvision | 16.000 | 8.000 | 16.0 | 0.06 |  | 2.0 |" in lines
    assert "| focal | reference | 20.000 | 10.000 |  | 0.05 |  | 2.0 |" in lines


def test_a_later_file_replaces_a_group(stored: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.json"
    later.write_text(json.dumps({"benchmarks": [row("nms", "cpp", 0.001), row("nms", "torchvision", 0.03)]}))
    _, groups = report.load([stored, later])
    assert [report.provider(r) for r in groups["nms"]] == ["cpp", "torchvision"]
    assert report.ratio(groups["nms"], groups["nms"][1]) == pytest.approx(30)
    assert len(groups["focal"]) == 3


def test_the_triton_kernel_is_ours_on_a_gpu() -> None:
    rows = [row("nms", "cpp", 1.0), row("nms", "triton", 0.5), row("nms", "torchvision", 2.0)]
    assert report.ratio(rows, rows[2]) == 4


def test_files(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(stored), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").read_text().startswith("chip")
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "no.json"), "--output", str(tmp_path)]) == 2
    assert "no.json" in capsys.readouterr().err
