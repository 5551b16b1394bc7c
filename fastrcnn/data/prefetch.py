"""The next batch travels to the device while the step still works on this one.

:class:`Prefetcher` copies a batch into page-locked memory and from there to the device, on a stream of its own: the
host is ahead of the device, so that the copy runs beside the step before. The page-locked buffers are a ring that is
made once, because asking CUDA for such memory waits for the device. What is particular to CUDA is in
:class:`CudaCopies`; :class:`HostCopies` is its twin for a CPU, with which the ring is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fastrcnn.data.arena import ArenaBatch

B = TypeVar("B")


class Copies(Protocol):
    """Asynchronous copies from the host to a device."""

    def staging(self, size: int) -> Tensor:
        """uint8 [size] on the host, page-locked where that helps."""
        ...

    def start(self, source: Tensor, size: int) -> tuple[Tensor, Any]:
        """Begin to copy ``source`` to the start of a new buffer of ``size`` bytes; also a ticket for the copy."""
        ...

    def hand_over(self, buffer: Tensor, ticket: Any) -> None:
        """What is enqueued from now on finds the copy done; its memory is kept until that has run. Does not wait."""
        ...

    def wait(self, ticket: Any) -> None:
        """Until the copy is done, so that its source can be overwritten."""
        ...


class CudaCopies:
    """On a side stream. Nothing waits for the device but :meth:`wait`, for a copy that was handed over long ago."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, source: Tensor, size: int) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self.stream):
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            buffer[: len(source)].copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return buffer, done

    def hand_over(self, buffer: Tensor, ticket: torch.cuda.Event) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ticket)
        # The allocator gave the memory to the side stream and would give it out again without asking this one.
        buffer.record_stream(current)

    def wait(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()


class HostCopies:
    """To the host itself, at once."""

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def start(self, source: Tensor, size: int) -> tuple[Tensor, None]:
        buffer = torch.empty(size, dtype=torch.uint8)
        buffer[: len(source)].copy_(source)
        return buffer, None

    def hand_over(self, buffer: Tensor, ticket: None) -> None:
        """It is."""

    def wait(self, ticket: None) -> None:
        """It is done."""


class Ring:
    """A few buffers on the host that take turns; each grows to the largest batch that it has held."""

    def __init__(self, copies: Copies, slots: int) -> None:
        self.copies = copies
        self.buffers: list[Tensor | None] = [None] * slots
        self.tickets: list[Any] = [None] * slots
        self.turn = 0

    def send(self, data: Tensor, size: int) -> tuple[Tensor, Any]:
        """Start to copy ``data`` to a device buffer of ``size`` bytes; ``data`` may be overwritten at once."""
        slot = self.turn
        self.turn = (slot + 1) % len(self.buffers)
        buffer = self.buffers[slot]
        if buffer is not None:
            self.copies.wait(self.tickets[slot])
        if buffer is None or len(buffer) < len(data):
            # Room for what may come, so that it is rarely made again.
            buffer = self.buffers[slot] = self.copies.staging(max(size, len(data)))
        staged = buffer[: len(data)]
        staged.copy_(data)
        target, self.tickets[slot] = self.copies.start(staged, size)
        return target, self.tickets[slot]


class Prefetcher(Generic[B]):
    """Iterates over batches, those in one buffer (:class:`ArenaBatch`) on the device, in their order.

    Other kinds of batches pass through, and on a CPU all do.

    Args:
        copies: default by ``device``.
        slots: buffers in page-locked memory: one is filled while another is copied and a third may still be.
    """

    def __init__(
        self, batches: Iterable[B], device: torch.device, *, copies: Copies | None = None, slots: int = 3
    ) -> None:
        self.batches = batches
        if copies is None and device.type == "cuda":
            copies = CudaCopies(device)
        self.copies = copies
        self.slots = slots

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[B]:
        if self.copies is None:
            yield from self.batches
            return
        ring = Ring(self.copies, self.slots)
        for batch in self.batches:
            if not isinstance(batch, ArenaBatch):
                yield batch
                continue
            buffer, ticket = ring.send(batch.buffer[: batch.used], len(batch.buffer))
            self.copies.hand_over(buffer, ticket)
            yield batch.over(buffer)  # type: ignore[misc]
