"""The machine that figures come from: what decides a kernel's time, and no names of hosts."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

import torch


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The version of an importable package, None where it is absent."""
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def describe() -> dict[str, Any]:
    """Versions, processor, threads and the GPU, or None in its place."""
    machine: dict[str, Any] = {
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "torchvision": version("torchvision"),
        "cpu_name": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return machine
