"""Calls beside the caller: order, errors, bounds."""

from __future__ import annotations

import threading
import time

import pytest

from fastrcnn.engine.in_order import InOrder


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_calls(threads: int) -> None:
    def slow(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        return number

    with InOrder[int](threads) as calls:
        for number in range(20):
            calls.call(lambda n=number: slow(n))  # type: ignore[misc]
        assert calls.results() == list(range(20))


def test_the_caller_does_not_wait() -> None:
    go = threading.Event()
    with InOrder[bool](2) as calls:
        for _ in range(4):
            calls.call(lambda: go.wait(30))
        go.set()
        assert calls.results() == [True] * 4


def test_the_caller_waits_when_too_many_are_ahead() -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def count() -> None:
        with lock:
            running[0] -= 1

    with InOrder[None](1, ahead=2) as calls:
        for _ in range(10):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            calls.call(count)
        calls.results()
    assert running[0] == 0
    assert most[0] <= 3, "two waiting and the one that is added"


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_the_callers(threads: int) -> None:
    def fail() -> int:
        raise ValueError("image 7 is odd")

    def run() -> None:
        with InOrder[int](threads) as calls:
            for function in (lambda: 1, fail, lambda: 2):
                calls.call(function)
            calls.results()

    with pytest.raises(ValueError, match="image 7 is odd"):
        run()


def test_leaving_early_drops_what_has_not_begun() -> None:
    begun: list[int] = []
    started, go = threading.Event(), threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        started.set()
        go.wait(30)

    def run() -> None:
        with InOrder[None](1) as calls:
            for number in range(5):
                calls.call(lambda n=number: work(n))  # type: ignore[misc]
            started.wait(30)
            threading.Timer(0.1, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert begun == [0]
    assert not [t for t in threading.enumerate() if t.name.startswith("in-order")]
