"""Session set-up: Triton's interpreter where there is no GPU, made quicker, the report header, the shared data."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import hypothesis
import pytest
import torch

from tests import interpreter

# Triton reads this when a kernel is decorated, so it has to be set before the first module with a kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run; no deadline, because a busy machine is not a failure.
hypothesis.settings.register_profile("fastrcnn", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastrcnn")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_report_header(config: pytest.Config) -> list[str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    interpreter = "yes" if os.environ.get("TRITON_INTERPRET") == "1" else "no"
    return [f"device: {device}, torch {torch.__version__}, triton {triton_version}, Triton interpreter: {interpreter}"]


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Triton's interpreter without the work that it repeats (`interpreter.py`)."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        interpreter.quicken()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and reference answers; the test is skipped where it is absent."""
    path = Path(os.environ.get("FASTRCNN_TEST_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no test data at {path}: set FASTRCNN_TEST_DATA")
    return path
