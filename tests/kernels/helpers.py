"""What every operator test shares: where to run, poisoned and guarded memory, tolerances, forbidden syncs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrcnn_kernels import _library

INTERPRETER_BUDGET = 64  # programs a launch: the interpreter takes about a millisecond for each
MARGIN = 64  # canary elements before and behind a tensor; keeps 64-byte alignment for every dtype


@dataclass(frozen=True)
class Place:
    """A back-end and the kind of device whose tensors it gets."""

    backend: str
    device: str

    def why_not(self) -> str:
        """Why nothing can run here on this machine; empty if it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        probe = _library.Operator("probe", dict.fromkeys(_library.BACKENDS, ""))
        return _library._why_not(probe, self.backend, self.device)


PLACES = [
    pytest.param(Place("reference", "cpu"), id="reference-cpu"),
    pytest.param(Place("cpp", "cpu"), id="cpp-cpu"),
    pytest.param(Place("triton", "cpu"), id="triton-cpu"),
    pytest.param(Place("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(Place("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]
if not torch.cuda.is_available():
    PLACES = PLACES[:3]
else:
    # With a GPU the interpreter is off: Triton kernels then run where they are meant to.
    del PLACES[2]


def required_backends() -> set[str]:
    """The back-ends that must work on this machine; a silently absent one is a failure (see ``test_library.py``)."""
    required = {"reference"}
    if os.environ.get("FASTRCNN_BUILD_EXT") != "0":
        required.add("cpp")
    if sys.platform == "linux":
        required.add("triton")
    return required


def poison_value(dtype: torch.dtype) -> Any:
    """What uninitialised memory holds in kernel tests: a value that no right answer contains."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return True
    if dtype == torch.uint8:
        return 0xA5
    return torch.iinfo(dtype).min


def _canary_value(dtype: torch.dtype) -> Any:
    """Unlike the poison, equal to itself, so that a margin can be compared."""
    if dtype.is_floating_point or dtype.is_complex:
        return -31744.0 if dtype in (torch.float16, torch.bfloat16) else -1.2345678e30
    if dtype == torch.bool:
        return True
    return 0x5A if dtype in (torch.uint8, torch.int8) else 0x5A5A


class _Memory:
    """A piece of device memory, as the CUDA array interface describes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _storage_inside(base: torch.Tensor, start: int, extent: int) -> torch.UntypedStorage:
    """A storage over ``base[start : start + extent]``, so that a tensor in it has storage offset 0, as torch's have."""
    first, num_bytes = start * base.element_size(), extent * base.element_size()
    if base.is_cuda:
        memory = _Memory(base.data_ptr() + first, num_bytes)
        return torch.as_tensor(memory, device=base.device).untyped_storage()
    return torch.from_numpy(base.view(torch.uint8).numpy()[first : first + num_bytes]).untyped_storage()


class Guards:
    """Tensors inside larger storages whose margins are filled with a canary and must not change.

    Neither the interpreter nor a GPU notices a write just past a buffer; ``check`` does.
    """

    def __init__(self) -> None:
        self._guarded: list[tuple[torch.Tensor, int, str]] = []

    def allocate(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str
    ) -> torch.Tensor:
        """An uninitialised tensor of this geometry between two margins. Owns its storage: it is no view."""
        extent = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        base = _REAL_EMPTY(extent + 2 * MARGIN, dtype=dtype, device=device)
        base[:MARGIN] = base[MARGIN + extent :] = _canary_value(dtype)
        inner = _REAL_EMPTY(0, dtype=dtype, device=device)
        if extent:
            inner.set_(_storage_inside(base, MARGIN, extent), 0, size, stride)
        else:
            inner = inner.as_strided(size, stride)
        self._guarded.append((base, extent, name))
        return inner

    def __call__(self, tensor: torch.Tensor, name: str = "a guarded tensor") -> torch.Tensor:
        """A copy of ``tensor``, strides and ``requires_grad`` kept, between two margins."""
        with torch.no_grad():
            copy = self.allocate(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, name)
            copy.copy_(tensor)
        return copy.requires_grad_(tensor.requires_grad)

    def check(self) -> None:
        """Raise AssertionError if anything was written outside a tensor given out so far."""
        for base, extent, name in self._guarded:
            value = torch.tensor(_canary_value(base.dtype), dtype=base.dtype, device=base.device)
            for where, margin in (("before", base[:MARGIN]), ("behind", base[MARGIN + extent :])):
                touched = (margin != value).nonzero().flatten().tolist()
                assert not touched, f"{name}: {len(touched)} elements written {where} the buffer, at {touched[:5]}"


_REAL_EMPTY = torch.empty


def poisoned_empties(monkeypatch: pytest.MonkeyPatch, guards: Guards) -> None:
    """Fill what ``torch.empty``, ``empty_like`` and ``new_empty`` give to this package with NaN, INT_MIN or 0xA5.

    An element that a kernel forgets to write is then visible, and so is one that it writes outside (``guards``).
    Only calls from ``fastrcnn_kernels`` are changed: torch's own Python code allocates as ever.
    """

    def poisoned(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.layout != torch.strided:
                return out
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("fastrcnn") or out.is_meta:
                return out
            line = sys._getframe(1).f_lineno
            name = f"the buffer allocated at {caller}:{line}"
            guarded = guards.allocate(tuple(out.shape), out.stride(), out.dtype, out.device, name)
            return guarded.fill_(poison_value(out.dtype)).requires_grad_(out.requires_grad)

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def assert_within_twice_torch(
    actual: torch.Tensor,
    reference_fp64: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    atol: float = 0.0,
    name: str = "result",
) -> None:
    """The tolerance is measured, not guessed: at most twice the error that plain PyTorch makes in the same dtype.

    ``max|actual - reference| <= 2 * max|torch - reference| + atol``, as flash-attention tests it. NaN and infinities
    must sit in the same places in ``actual`` and in the reference.

    Args:
        actual: what the kernel gave.
        reference_fp64: the same computation in float64.
        torch_same_dtype: the same computation by plain PyTorch in ``actual``'s dtype.
        atol: for results that plain PyTorch happens to hit exactly; a few units in the last place of the result.
        name: for the message.
    """
    assert reference_fp64.dtype == torch.float64, f"{name}: the reference is {reference_fp64.dtype}, not float64"
    assert actual.dtype == torch_same_dtype.dtype, f"{name}: {actual.dtype} against {torch_same_dtype.dtype}"
    assert actual.shape == reference_fp64.shape == torch_same_dtype.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(reference_fp64.shape)}, {tuple(torch_same_dtype.shape)}"
    )
    ours, plain, truth = (t.detach().double().cpu() for t in (actual, torch_same_dtype, reference_fp64))
    if not ours.numel():
        return
    finite = truth.isfinite()
    same = torch.where(truth.isnan(), ours.isnan(), ours == truth) | finite
    assert same.all(), f"{name}: non-finite values in other places, first at {_first(~same)}"
    assert ours[finite].isfinite().all(), f"{name}: not finite at {_first(~ours.isfinite() & finite)}"
    zero = torch.zeros_like(truth)
    error = torch.where(finite, (ours - truth).abs(), zero)
    plain_error = torch.where(finite & plain.isfinite(), (plain - truth).abs(), zero)
    limit = 2 * plain_error.max().item() + atol
    worst = error.max().item()
    if worst > limit:
        at = _first(error == worst)
        raise AssertionError(
            f"{name}: error {worst:.3e} at {at} exceeds {limit:.3e} (twice the {plain_error.max().item():.3e} of plain "
            f"PyTorch, plus {atol:.1e}): got {ours[at].item():.9g}, float64 {truth[at].item():.9g}, "
            f"plain {plain[at].item():.9g}"
        )


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


# The operators through which a tensor's data or a data-dependent shape reaches the host.
_SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}


class ForbidSync(TorchDispatchMode):
    """Raises on every operator that would make the host wait for a GPU: stands in for one on a CPU-only machine."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith(f"{_library.NAMESPACE}::"):
            # A mode is off while it handles a call: put it back, to see inside our own operators too.
            operator = _library._OPERATORS[name.split("::")[1]]
            device = next(a.device.type for a in tree_leaves(args) if isinstance(a, torch.Tensor))
            with self:
                return _library._resolve(operator, _library._choose(operator, device))(*args, **kwargs)
        full = f"{name}.{func._schema.overload_name}" if func._schema.overload_name else name
        if name in _SYNCHRONISING or full in _SYNCHRONISING:
            raise AssertionError(f"{full} synchronises with the device")
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            indices = args[1]
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise AssertionError(f"{full} with a boolean mask synchronises with the device")
        if name in ("aten::_to_copy", "aten::copy_"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            target = kwargs.get("device") or tensors[0].device
            if torch.device(target).type == "cpu" and any(t.is_cuda for t in tensors):
                raise AssertionError(f"{full} copies to the host")
        return func(*args, **kwargs)


@contextmanager
def limited_interpreter(budget: int = INTERPRETER_BUDGET) -> Iterator[list[int]]:
    """Fail a launch of more than ``budget`` programs in the interpreter; yields the program counts launched."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    counts: list[int] = []
    original = type(builder).set_grid_dim

    def set_grid_dim(x: int, y: int, z: int) -> None:
        counts.append(x * y * z)
        assert x * y * z <= budget, f"grid ({x}, {y}, {z}) exceeds the interpreter budget of {budget} programs"
        original(builder, x, y, z)

    builder.set_grid_dim = set_grid_dim
    try:
        yield counts
    finally:
        del builder.set_grid_dim
