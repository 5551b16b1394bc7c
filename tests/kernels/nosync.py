"""``forbid_host_sync()``: fails where the host would wait for a GPU, on machines without one.

Two modes together, because neither sees everything. A dispatch mode sees every operator that runs, also those of
backward and of torch's own functions; a function mode sees the calls that read a CPU tensor without any operator
(``tolist``, ``numpy``, ``cpu``), which on a GPU would be a copy to the host.

What it cannot see: the inside of a registered operator (``torch.ops.fastrcnn_kernels.*``) is one call to it. Tests
call the implementation itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Data, or a shape that depends on data, reaches the host.
READS_DATA = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::equal",
    "aten::allclose",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",
    "aten::tensor_split",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
READING_METHODS = ("tolist", "numpy", "cpu", "__array__", "item")
BUILDING_FUNCTIONS = ("tensor", "as_tensor", "from_numpy")
# Poisons and guards the buffers that the code under test allocates, in the middle of it.
TEST_MACHINERY = {"tests.kernels.helpers"}


class HostSync(AssertionError):
    """An operation on the training path would make the host wait for the device."""


def _device_of(value: Any) -> torch.device | None:
    return value.device if isinstance(value, torch.Tensor) else None


class _ForbidOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS_DATA:
            raise HostSync(f"{func} reads data on the host")
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            raise HostSync(f"{func} without output_size reads the repeats on the host")
        if name in INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise HostSync(f"{func} with a {masks[0].dtype} mask of {list(masks[0].shape)} calls nonzero")
        if name in ("aten::_to_copy", "aten::copy_"):
            source = _device_of(args[1] if name == "aten::copy_" else args[0])
            target = kwargs.get("device") if name == "aten::_to_copy" else _device_of(args[0])
            if (
                source is not None
                and target is not None
                and source.type != "cpu"
                and torch.device(target).type == "cpu"
            ):
                raise HostSync(f"{func} copies from {source} to the host")
        return func(*args, **kwargs)


class _ForbidCalls(TorchFunctionMode):
    def __init__(self, allow_constants: bool) -> None:
        super().__init__()
        self.reading = {getattr(torch.Tensor, name): f"Tensor.{name}" for name in READING_METHODS}
        building = {getattr(torch, name): f"torch.{name}" for name in BUILDING_FUNCTIONS}
        building[torch.Tensor.new_tensor] = "Tensor.new_tensor"
        self.building = {} if allow_constants else building

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if sys._getframe(1).f_globals.get("__name__") in TEST_MACHINERY:
            return func(*args, **kwargs)
        if func in self.reading:
            raise HostSync(f"{self.reading[func]} reads data on the host")
        if func in self.building:
            raise HostSync(f"{self.building[func]} copies from the host, which no CUDA graph can capture")
        if func is torch.Tensor.to and "cpu" in (*args[1:], *kwargs.values()):
            raise HostSync("Tensor.to('cpu') copies to the host")
        return func(*args, **kwargs)


@contextmanager
def forbid_host_sync(*, allow_constants: bool = True) -> Iterator[None]:
    """Raise ``HostSync`` (an AssertionError) at the first operation of the block that would synchronise.

    Forbidden: ``item``, ``bool``, ``int`` and ``float`` of a tensor, ``nonzero``, ``masked_select``, ``unique*``,
    ``equal``, indexing with bool or uint8 masks, ``repeat_interleave`` without ``output_size``, copies from a device
    to the host, ``tolist``, ``numpy``, ``cpu``.

    Args:
        allow_constants: whether ``torch.tensor`` and its like may build tensors from Python data. On a GPU that is
            a copy from pageable memory: legal in a step, fatal in a captured one.
    """
    with _ForbidCalls(allow_constants), _ForbidOperators():
        yield
