"""Fixtures of the operator tests; `helpers.py` has what they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from fastrcnn_kernels import set_backend
from fastrcnn_kernels._library import interpreting
from tests.kernels.helpers import INTERPRETER_BUDGET, PLACES, Guards, Place, limited_interpreter, poisoned_empties


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter_budget(n): programs a launch may have in Triton's interpreter")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs the test once for each back-end and device of this machine, with that back-end forced."""
    here: Place = request.param
    reason = here.why_not()
    if reason:
        pytest.skip(reason)
    with set_backend(here.backend):
        yield here


@pytest.fixture
def backend(place: Place) -> str:
    """The back-end in force: the test runs for each."""
    return place.backend


@pytest.fixture
def device(place: Place) -> torch.device:
    """The device to make tensors on: the test runs for each back-end of each device."""
    return torch.device(place.device)


@pytest.fixture
def guarded() -> Iterator[Guards]:
    """``guarded(tensor)`` copies a tensor between canary margins, which are checked when the test is over."""
    guards = Guards()
    yield guards
    guards.check()


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Buffers that the package allocates hold NaN or INT_MIN, between margins that are checked after the test."""
    guards = Guards()
    poisoned_empties(monkeypatch, guards)
    yield guards
    monkeypatch.undo()
    guards.check()


@pytest.fixture(autouse=True)
def interpreter_budget(request: pytest.FixtureRequest) -> Iterator[None]:
    """No launch of more than 64 programs in the interpreter, unless the test is marked ``interpreter_budget(n)``."""
    mark = request.node.get_closest_marker("interpreter_budget")
    budget = mark.args[0] if mark else INTERPRETER_BUDGET
    with limited_interpreter(budget) if interpreting() else nullcontext():
        yield
