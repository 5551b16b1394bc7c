"""What decides whether two runs give the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastrcnn.engine.reproducibility import time_convolutions, use_deterministic_algorithms


@pytest.fixture(autouse=True)
def former_switches() -> Iterator[None]:
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def test_convolutions_are_timed_unless_runs_shall_repeat() -> None:
    torch.backends.cudnn.benchmark = False
    time_convolutions()
    assert torch.backends.cudnn.benchmark
    use_deterministic_algorithms()
    assert not torch.backends.cudnn.benchmark
    time_convolutions()
    assert not torch.backends.cudnn.benchmark
