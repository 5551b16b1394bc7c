"""Ctrl-C and SIGTERM: finish the step, save, stop, on all ranks after the same step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TypeVar

from fastrcnn.engine.distributed import World

T = TypeVar("T")
HANDLED = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was asked to stop and has stopped.

    Attributes:
        signum: the signal; the exit code is 128 + signum (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: stopped {where}")
        self.signum = signum
        self.exit_code = 128 + signum


class StopSignals:
    """While entered, SIGINT and SIGTERM only set a flag, which the training loop asks for after each step.

    A second Ctrl-C raises KeyboardInterrupt at once. A collective inside a handler could interleave with those of
    the main thread, so the ranks agree in :meth:`agreed`, called by the loop.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.requested = 0
        self._pid = os.getpid()
        self._vote: Callable[[], int] | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in HANDLED:
                self._former[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for signum, former in self._former.items():
            signal.signal(signum, former)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked worker: the run, not the worker, decides what to do
        if signum == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signum
        if signum == signal.SIGINT:
            os.write(2, b"\nStopping after this step and saving; press Ctrl-C again to stop at once.\n")

    def agreed(self) -> int:
        """The signal that all ranks have agreed to stop for, or 0. Called by all ranks once in each step.

        With several ranks the answer is that of the step before, so that no rank waits for the vote.
        """
        if not self.world.distributed:
            return self.requested
        former, self._vote = self._vote, self.world.max_later(self.requested)
        return former() if former is not None else 0

    def check(self, where: str) -> None:
        """Raise :class:`Stopped` if a signal has come. For work of one process; several go on to its end."""
        if self.requested and not self.world.distributed:
            raise Stopped(self.requested, where)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back; processes started inside inherit that and never get them.

    A terminal or a job scheduler signals the whole process group: data workers would die of it before the run has
    finished its step. They end when the run closes their queues.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def iterate(loader: Iterable[T]) -> Iterator[T]:
    """The items of ``loader``, whose workers are started out of reach of Ctrl-C and SIGTERM."""
    with signals_held():
        iterator = iter(loader)
        try:
            first = next(iterator)
        except StopIteration:
            return
    yield first
    yield from iterator
