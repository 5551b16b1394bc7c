"""Calls in other threads, their results in the order of the calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """Runs functions beside the caller.

    Threads and not processes: the operators give up the interpreter's lock while they compute, nothing has to be sent,
    and there is no process whose death or whose Ctrl-C has to be dealt with.

    Leaving it by an exception drops the calls that have not begun.

    Args:
        threads: 0 runs each function at once, in the caller.
        ahead: so many calls may wait for each thread; one more waits for the oldest, which bounds the memory.
    """

    def __init__(self, threads: int, ahead: int = 16) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="in-order") if threads else None
        self._limit = threads * ahead
        self._waiting: deque[Future[T]] = deque()
        self._done: list[T] = []

    def __enter__(self) -> InOrder[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def call(self, function: Callable[[], T]) -> None:
        """Run ``function``; what an earlier one raised may be raised here."""
        if self._pool is None:
            self._done.append(function())
            return
        while len(self._waiting) >= self._limit:
            self._done.append(self._waiting.popleft().result())
        self._waiting.append(self._pool.submit(function))

    def results(self) -> list[T]:
        """All results. Raises what the first function that failed has raised."""
        while self._waiting:
            self._done.append(self._waiting.popleft().result())
        return self._done
