"""pytest-benchmark set-up: a clock that waits for the GPU, and the machine in the stored results."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.machine import describe


def device_clock() -> float:
    """Seconds; on a GPU after all work queued before, so that a call and not its launch is timed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def device() -> torch.device:
    """The device that the benchmarks run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark takes the clock of all benchmarks by name.
    if hasattr(config.option, "benchmark_timer"):
        config.option.benchmark_timer = "benchmarks.conftest.device_clock"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds what decides a kernel's time and what pytest-benchmark does not record."""
    for name in ("node", "release", "python_build"):  # names of a host and its builds say nothing about speed
        machine_info.pop(name, None)
    machine_info.update(describe())
