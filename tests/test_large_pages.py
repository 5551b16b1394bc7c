"""Large tensors of a process that imports fastrcnn first lie on large pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The page faults of a tensor of 64 MB.
PROGRAM = """
import resource, {first}
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def faults(first: str, **environment: str) -> int:
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", PROGRAM.format(first=first)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env | environment)
    return int(result.stdout)


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="the system gives large pages to all, to none, or does not know them",
)
def test_large_tensors_take_few_page_faults() -> None:
    assert faults("torch") > 8000
    assert faults("fastrcnn") < 2000
    assert faults("fastrcnn", THP_MEM_ALLOC_ENABLE="0") > 8000  # the user's word stands
