"""Breakages of the kernels are caught by the test they name: each twelfth of the Python and Triton ones here.

``make breakages`` runs all: minutes for Python, and a compiler run for each of the C++ ones. That each still applies,
and that there are enough, is checked here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.breakages import Breakage
from tests.kernels.breakages.run import collect

ROOT = Path(__file__).resolve().parents[2]
ALL = collect()
PYTHON = collect("python")
EVERY = 12
SAMPLE = PYTHON[::EVERY]


def name(breakage: Breakage) -> str:
    return f"{Path(breakage.path).parent.name}-{Path(breakage.path).stem}: {breakage.old[:60]}"


@pytest.fixture(scope="session")
def outcomes() -> dict[Breakage, str]:
    """The sample, run once in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.kernels.breakages.run", "--language", "python", "--every", str(EVERY)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1500)
    results: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(SAMPLE), run.stderr[-4000:]
    return {Breakage(r["path"], r["old"], r["new"], r["test"]): r["outcome"] for r in results}


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("breakage", SAMPLE, ids=name)
def test_a_broken_kernel_is_caught(outcomes: dict[Breakage, str], breakage: Breakage) -> None:
    assert outcomes[breakage] == "caught", f"{breakage.path}: {breakage.old!r} -> {breakage.new!r}, {breakage.test}"


@pytest.mark.parametrize("breakage", ALL, ids=name)
def test_a_breakage_still_applies(breakage: Breakage) -> None:
    source = (ROOT / breakage.path).read_text()
    assert source.count(breakage.old) == 1
    assert breakage.old != breakage.new
    assert (ROOT / breakage.test.split("::")[0]).is_file()


def test_there_are_enough() -> None:
    assert len(set(ALL)) == len(ALL)
    assert len(ALL) >= 40
    assert len(ALL) - len(PYTHON) >= 8
