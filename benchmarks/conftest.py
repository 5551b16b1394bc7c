"""pytest-benchmark set-up: a clock that waits for the GPU, and the machine in the stored results."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch


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


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds what decides a kernel's time and what pytest-benchmark does not record."""
    for name in ("node", "release", "python_build"):  # names of a host and its builds say nothing about speed
        machine_info.pop(name, None)
    try:
        import triton

        machine_info["triton"] = triton.__version__
    except ImportError:
        machine_info["triton"] = None
    machine_info["torch"] = torch.__version__
    machine_info["cpu_name"] = _cpu_name()
    machine_info["cpu_count"] = os.cpu_count()
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["gpu"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
