"""Recording a function once and running what it did again: CUDA graphs, and their twin for a CPU.

Both have one interface, :class:`Recorder`, so that everything around it is tested without a GPU. A recording repeats
the operators on the same memory: whatever else the function looked at - a Python number, the data of a tensor on the
host - stays as it was. The CPU's recorder finds such things as a graph would show them, by wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
Replay = Callable[[], None]


class Recorder(Protocol):
    """Runs and records functions of tensors."""

    def run(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the way that a later :meth:`record` needs, without recording it."""
        ...

    def record(self, function: Callable[[], T], group: set[int]) -> tuple[T, Replay]:
        """Take down what ``function`` does; what it returns, and a function that does it.

        The tensors that it returned hold the results of the last replay, and nothing before the first one: recording
        changes no tensor that was there before. All recordings of a recorder share memory: what one left may be gone
        once another ran, but for tensors that are still referred to.

        Args:
            group: one set for recordings that run one after another and hand tensors on, empty before the first.

        Raises:
            RuntimeError: the function does what cannot be recorded.
        """
        ...

    def fetch(self, number: Tensor) -> Callable[[], int]:
        """Begin to read an integer of one element; the returned function waits for it, and for nothing after it."""
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool.

    ``thread_local`` capture lets other threads (pinning of the loader, NCCL's watchdog) use CUDA meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], T]) -> T:
        """On the stream that graphs are captured on, after all that was launched before."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], T], group: set[int]) -> tuple[T, Replay]:
        graph = torch.cuda.CUDAGraph()
        kept = _KeepAlive(group)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with (
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            kept,
        ):
            result = function()

        def replay(kept: _KeepAlive = kept) -> None:
            graph.replay()

        return result, replay

    def fetch(self, number: Tensor) -> Callable[[], int]:
        landed = torch.empty((), dtype=torch.int64, pin_memory=True)
        landed.copy_(number.view(()), non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> int:
            event.synchronize()
            return int(landed)

        return wait


class _KeepAlive(TorchDispatchMode):
    """Holds on to the memory that operators read and that was not made in their group of recordings.

    A graph knows addresses. A table that a module had cached and dropped would be read on, with another's data in it.

    Args:
        made: addresses of what the group made, extended; its tensors may go, and others of the pool take their place.
    """

    def __init__(self, made: set[int]) -> None:
        super().__init__()
        self.made = made
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made:
                self.storages[storage.data_ptr()] = storage
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in self.storages:
                self.made.add(tensor.untyped_storage().data_ptr())
        return result


class OperatorRecorder:
    """The twin of :class:`CudaRecorder` for a CPU: a list of the operators that ran, with their tensors.

    Slow and large, because no memory is used twice; good for tests, and for finding what a graph would get wrong.
    """

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def record(self, function: Callable[[], T], group: set[int]) -> tuple[T, Replay]:
        operators = _Operators()
        try:
            with operators:
                result = function()
        finally:
            operators.undo()
        return result, operators.replay

    def fetch(self, number: Tensor) -> Callable[[], int]:
        return lambda: int(number)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # operator, arguments, and of each result whether it is memory of its own
        self.calls: list[tuple[Any, Any, Any, list[Tensor], list[bool]]] = []
        self.made: set[int] = set()
        # what was there before, and a copy of it from before
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.before:
                # All of them, because some operators change what their schema does not name (batch_norm's statistics).
                content = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage._cdata] = (content, content.clone())
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        results = _tensors(result)
        fresh = [tensor.untyped_storage()._cdata not in known for tensor in results]
        self.made.update(t.untyped_storage()._cdata for t, own in zip(results, fresh, strict=True) if own)
        name = func._schema.name
        # Collectives write into their arguments without saying so.
        writes = func._schema.is_mutable or name.startswith("c10d::")
        only_views = bool(results) and not any(fresh) and not writes
        # What an empty tensor holds is no result; its first values come from the operators after it.
        if not only_views and not name.startswith("aten::empty") and not name.startswith("aten::new_empty"):
            self.calls.append((func, args, kwargs, results, fresh))
        return result

    def undo(self) -> None:
        """Give all that was there before its former content."""
        for content, copy in self.before.values():
            content.copy_(copy)
        self.before.clear()

    def replay(self) -> None:
        """Run all operators again, each result into the memory of the first one."""
        with torch.no_grad():
            for func, args, kwargs, results, fresh in self.calls:
                written = [t for t in (*_tensors((args, kwargs)), *results) if not t.is_inference()]
                # A graph's replay does not count as a change either, for the backward pass of another recording.
                with torch.autograd._unsafe_preserve_version_counter(tuple(written)):
                    result = func(*args, **kwargs)
                    if func._schema.name.startswith("c10d::"):
                        Work.unbox(tree_leaves(result)[-1]).wait()
                    again = _tensors(result)
                    for old, new, own in zip(results, again, fresh, strict=True):
                        if own:
                            old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def make_recorder(device: torch.device) -> Recorder:
    """The recorder for ``device``."""
    return CudaRecorder(device) if device.type == "cuda" else OperatorRecorder()
