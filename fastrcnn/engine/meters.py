"""What a run says about itself: smoothed values, the log line, times and memory.

The log line is maskrcnn-benchmark's, so that its parsers go on working. Its values are read differently: there each
loss is copied to the host in each iteration, here all losses of a log period in one copy (:class:`LossHistory`).
"""

from __future__ import annotations

import datetime
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MIB = 1024.0 * 1024.0


class NonFiniteLoss(RuntimeError):
    """A loss or the weights became infinite or NaN: training cannot go on.

    Attributes:
        iteration: the first iteration (1-based) in which it happened.
        losses: the losses of that iteration.
    """

    def __init__(self, iteration: int, losses: Mapping[str, float], reason: str) -> None:
        super().__init__(
            f"{reason} in iteration {iteration}. No checkpoint was written from this state. Usual causes: a learning "
            "rate too high for the batch size (SOLVER.BASE_LR scales with SOLVER.IMS_PER_BATCH), a warm-up too short "
            "(SOLVER.WARMUP_ITERS), DTYPE float16"
        )
        self.iteration = iteration
        self.losses = dict(losses)


class SmoothedValue:
    """A series of values: the median of the last ``window`` and the mean of all.

    The median of an even number of values is the lower of the two middle ones, as ``torch.median`` has it and
    therefore maskrcnn-benchmark.
    """

    def __init__(self, window: int = 20) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.total = 0.0
        self.count = 0

    def update(self, value: float) -> None:
        self.recent.append(value)
        self.total += value
        self.count += 1

    @property
    def median(self) -> float:
        return sorted(self.recent)[(len(self.recent) - 1) // 2]

    @property
    def global_avg(self) -> float:
        return self.total / self.count

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.global_avg:.4f})"


def format_log_line(
    *, eta_seconds: float, iteration: int, meters: Mapping[str, SmoothedValue], lr: float, max_mem_mib: float
) -> str:
    """maskrcnn-benchmark's log line: ``eta: 5:30:07  iter: 400  loss: 0.2376 (0.2817)  ...  max mem: 3050``.

    Args:
        meters: in the order in which they are to appear.
        lr: the learning rate of the first parameter group, after the step.
    """
    return "  ".join(
        [
            f"eta: {datetime.timedelta(seconds=int(eta_seconds))}",
            f"iter: {iteration}",
            *(f"{name}: {meter}" for name, meter in meters.items()),
            f"lr: {lr:.6f}",
            f"max mem: {max_mem_mib:.0f}",
        ]
    )


def max_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: what PyTorch allocated on a CUDA device; on the CPU the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024.0)  # bytes on macOS, KiB elsewhere


class LossHistory:
    """The losses of the iterations since the last reading, in one table on the device, read in one copy.

    Args:
        device: where the losses are.
        reduce: averages a tensor over the ranks of a distributed run; called by all ranks at the same time.
    """

    def __init__(self, device: torch.device, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.device = device
        self.reduce = reduce
        self.names: tuple[str, ...] = ()
        self.table = torch.empty((0, 0), device=device)  # [capacity, losses], the first rows filled
        self.iterations: list[int] = []

    def append(self, iteration: int, losses: Mapping[str, Tensor]) -> None:
        """Keep the losses of one iteration (0-dim tensors, the same names each time). Does not wait for the device."""
        names = tuple(losses)
        if self.names and names != self.names:
            raise ValueError(f"the losses changed from {self.names} to {names} in iteration {iteration}")
        self.names = names
        used = len(self.iterations)
        if used == len(self.table):
            larger = torch.empty((max(32, 2 * used), len(names)), device=self.device)
            larger[:used] = self.table[:used].view(used, len(names))
            self.table = larger
        torch.stack([loss.detach().float() for loss in losses.values()], out=self.table[used])
        self.iterations.append(iteration)

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """The losses kept since the last reading, averaged over the ranks.

        Raises:
            NonFiniteLoss: naming the first iteration and the first loss that is not finite.
        """
        if not self.iterations:
            return []
        table = self.table[: len(self.iterations)]
        if self.reduce is not None:
            table = self.reduce(table)
        history = [
            (iteration, dict(zip(self.names, row, strict=True)))
            for iteration, row in zip(self.iterations, table.tolist(), strict=True)
        ]
        self.iterations = []
        for iteration, losses in history:
            broken = [name for name, value in losses.items() if not math.isfinite(value)]
            if broken:
                # The total is not finite because one of its parts is: name the part.
                name = broken[1] if broken[0] == "loss" and len(broken) > 1 else broken[0]
                raise NonFiniteLoss(iteration, losses, f"{name} is {losses[name]}")
        return history


class StepClock:
    """The duration of each iteration, and of the wait for its data, in seconds.

    On a CUDA device iterations are timed with events, because the host runs ahead of the device; reading them is
    legal once the device has been waited for (after :meth:`LossHistory.read`).
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.durations: list[float] = []
        self.start()

    def start(self) -> None:
        """Begin to measure here: what happened since the last iteration (a checkpoint, a test) does not count."""
        self.host = time.perf_counter()
        if self.cuda:
            self._flush_events()
            self.events = [self._record()]

    def waited(self) -> float:
        """Seconds on the host since the last iteration ended: the wait for the data."""
        return time.perf_counter() - self.host

    def mark(self) -> None:
        """An iteration ends here."""
        now = time.perf_counter()
        if self.cuda:
            self.events.append(self._record())
        else:
            self.durations.append(now - self.host)
        self.host = now

    def read(self) -> list[float]:
        """The durations of the iterations that ended since the last reading."""
        if self.cuda:
            self._flush_events()
        durations, self.durations = self.durations, []
        return durations

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _flush_events(self) -> None:
        if self.events:
            self.events[-1].synchronize()
            pairs = zip(self.events, self.events[1:], strict=False)
            self.durations += [a.elapsed_time(b) / 1000.0 for a, b in pairs]
            self.events = self.events[-1:]
