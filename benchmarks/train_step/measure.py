"""Clocks and counters: turns of several sides, phases of a step, what it dispatches, FLOPs, memory."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.kernels.nosync import INDEXING, READS_DATA

PHASES = ("data", "backbone", "rpn", "heads", "backward", "optimizer")

Call = Callable[[int], Any]  # the number of the step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Timing:
    """Seconds a step of one side, one entry a turn; ``steps`` in all; why it failed, if it did."""

    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def turn_by_turn(
    sides: Sequence[Call], device: torch.device, *, rounds: int, seconds: float, cycle: int = 1
) -> list[Timing]:
    """Time ``sides`` in turns, so that what else the machine does falls on all of them.

    A turn is as many steps as fill ``seconds / rounds``, a multiple of ``cycle`` (the batches that are cycled
    through); the device is waited for at its ends only. Sides have been warmed up before.
    """
    timings = [Timing() for _ in sides]
    lengths = [0] * len(sides)
    for _ in range(rounds):
        for index, (side, timing) in enumerate(zip(sides, timings, strict=True)):
            if timing.failed:
                continue
            count = lengths[index] or cycle
            synchronize(device)
            start = time.perf_counter()
            try:
                for _ in range(count):
                    side(timing.steps)
                    timing.steps += 1
                synchronize(device)
            except RuntimeError as error:  # out of memory: the other sides go on
                timing.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            spent = (time.perf_counter() - start) / count
            timing.seconds.append(spent)
            if not lengths[index]:
                fitting = int(seconds / rounds / max(spent, 1e-9)) // cycle
                lengths[index] = cycle * min(max(fitting, 1), max(1, 200 // cycle))
    return timings


class PhaseClock:
    """When a step entered and left the parts of a detector: CUDA events on a GPU, the host's clock elsewhere.

    Works for every model with ``backbone`` and ``rpn`` modules, ours and torchvision's. A step that does not run as
    Python code (a replayed graph) fires no hook and has no phases.
    """

    def __init__(self, model: nn.Module, optimizer: Any, device: torch.device) -> None:
        self.device = device
        self.marks: dict[str, Any] = {}
        self.handles = [
            model.backbone.register_forward_pre_hook(self._hook("data")),  # type: ignore[union-attr]
            model.backbone.register_forward_hook(self._hook("backbone")),  # type: ignore[union-attr]
            model.rpn.register_forward_hook(self._hook("rpn")),  # type: ignore[union-attr]
            model.register_forward_hook(self._hook("heads")),
        ]
        if isinstance(optimizer, torch.optim.Optimizer):
            self.handles.append(optimizer.register_step_pre_hook(self._hook("backward")))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _hook(self, name: str) -> Callable[..., None]:
        def mark(*_: Any, **__: Any) -> None:
            self.marks[name] = self._now()

        return mark

    def run(self, step: Call, number: int) -> dict[str, float]:
        """Milliseconds of each phase of one step; those that could not be told apart are in the next one."""
        self.marks = {}
        synchronize(self.device)
        start = self._now()
        step(number)
        self.marks["optimizer"] = self._now()
        synchronize(self.device)
        if len(self.marks) == 1:
            return {}
        found, last = {}, start
        for name in PHASES:
            if name in self.marks:
                at = self.marks[name]
                found[name] = last.elapsed_time(at) if self.device.type == "cuda" else 1e3 * (at - last)
                last = at
        return found

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def phases(
    model: nn.Module, optimizer: Any, device: torch.device, step: Call, steps: Sequence[int]
) -> dict[str, float]:
    """Median milliseconds of each phase over ``steps``."""
    clock = PhaseClock(model, optimizer, device)
    try:
        runs = [clock.run(step, number) for number in steps]
    finally:
        clock.close()
    return {name: statistics.median(run[name] for run in runs) for name in PHASES if all(name in run for run in runs)}


def _conv2d_flops(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor) -> int:
    return 2 * out_val.numel() * weight[0].numel()


def _conv2d_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any) -> int:
    return 2 * grad.numel() * weight[0].numel() * sum(rest[-1][:2])  # wanted: x, weight, bias, residual


# What flop_registry is for torch's operators, for ours that are convolutions: the multiplications of a direct one,
# which Winograd's has fewer of.
OUR_FLOPS: dict[str, Callable[..., int]] = {
    "fastrcnn_kernels::conv2d": _conv2d_flops,
    "fastrcnn_kernels::conv2d_backward": _conv2d_backward_flops,
}


class Counter(TorchDispatchMode):
    """What a step asks of the dispatcher, backward included.

    Attributes:
        operators: calls that compute something; views are left out, an operator of ours is one.
        reads: calls that bring data, or a size that depends on data, to the host. On a GPU each waits for it.
        flops: of convolutions and matrix products, a multiplication with its addition being two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view:
            self.operators += 1
        masked = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.reads += name in READS_DATA or masked
        count = flop_registry.get(func._overloadpacket) or OUR_FLOPS.get(name)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        return result


@contextmanager
def count_syncs(device: torch.device) -> Iterator[list[int]]:
    """The number of times that torch made the host wait for the GPU, in the list's only place once the body is left.

    On a CPU there is nothing to wait for: 0, and :class:`Counter` counts the calls that would.
    """
    found = [0]
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found[0] = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def count_kernels(step: Call, device: torch.device) -> int | None:
    """The kernels, copies and fills that one step gives the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(0)
        synchronize(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profiler.events())


@lru_cache(maxsize=8)
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second that a large matrix product reaches here, the best of ten; TF32 counts where it is switched on."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
