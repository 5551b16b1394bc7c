"""Operator registry, back-end choice and capability report.

An operator has one schema and up to three implementations that must agree:

- ``reference``: vectorised PyTorch. The specification, and what runs where nothing else can.
- ``cpp``: the compiled CPU kernels (``fastrcnn_kernels._C``). CPU tensors only.
- ``triton``: Triton kernels. CUDA tensors; CPU tensors too under ``TRITON_INTERPRET=1``.

Operators are registered with ``torch.library.Library`` (``define`` + ``impl``), not with the ``custom_op``
decorator, whose dispatch costs about four times as much per call.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "fastrcnn_kernels"
BACKENDS = ("reference", "cpp", "triton")
CHOICES = ("auto", *BACKENDS)

# Kept for the life of the process: registrations vanish with the Library object.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One registered operator: its name and, for each back-end, the function or the ``module:function`` to import."""

    name: str
    implementations: dict[str, Implementation | str]


_OPERATORS: dict[str, Operator] = {}
_RESOLVED: dict[tuple[str, str], Implementation] = {}


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"{NAMESPACE}._C"), ""
    except ImportError as error:
        return None, f"the C++ extension is not built ({error}); install a C++17 compiler and reinstall"


_EXTENSION, _EXTENSION_MISSING = _load_extension()


def extension() -> ModuleType:
    """The compiled CPU kernels. Raises RuntimeError where they were not built."""
    if _EXTENSION is None:
        raise RuntimeError(f"{NAMESPACE}: {_EXTENSION_MISSING}")
    return _EXTENSION


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and therefore on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _initial_choice() -> str:
    choice = os.environ.get("FASTRCNN_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"FASTRCNN_BACKEND={choice!r}: choose one of {', '.join(CHOICES)}")
    return choice


# A plain global, not a context variable: autograd runs backward in threads of its own.
_choice = _initial_choice()


def get_backend() -> str:
    """The back-end in force: ``auto``, ``reference``, ``cpp`` or ``triton``."""
    return _choice


def set_backend(backend: str) -> AbstractContextManager[None]:
    """Choose the implementation that every operator of this package runs.

    Takes effect at once; the return value is a context manager that puts the former choice back::

        set_backend("reference")
        with set_backend("triton"):
            keep = nms(boxes, scores, 0.5)

    Args:
        backend: ``auto`` (Triton for CUDA tensors, C++ for CPU tensors, the reference where those are missing),
            ``reference``, ``cpp`` or ``triton``. A forced back-end never falls back: it raises instead.

    Raises:
        ValueError: for another name.
    """
    global _choice
    if backend not in CHOICES:
        raise ValueError(f"unknown back-end {backend!r}: choose one of {', '.join(CHOICES)}")
    former, _choice = _choice, backend
    return _restore(former)


@contextmanager
def _restore(former: str) -> Iterator[None]:
    global _choice
    try:
        yield
    finally:
        _choice = former


def _why_not(operator: Operator, backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run ``operator`` on tensors of ``device_type``; empty if it can."""
    if backend not in operator.implementations:
        return "this operator has no such implementation"
    if backend == "cpp":
        if device_type != "cpu":
            return f"the C++ kernels take CPU tensors, not {device_type} tensors"
        return _EXTENSION_MISSING
    if backend == "triton":
        if device_type == "cpu" and not interpreting():
            return "Triton kernels take CUDA tensors; for CPU tensors set TRITON_INTERPRET=1 before the first import"
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton is not installed ({error})"
    return ""


def _resolve(operator: Operator, backend: str) -> Implementation:
    key = (operator.name, backend)
    if key not in _RESOLVED:
        target = operator.implementations[backend]
        if isinstance(target, str):
            module, function = target.split(":")
            target = getattr(importlib.import_module(module), function)
        _RESOLVED[key] = target
    return _RESOLVED[key]


def _choose(operator: Operator, device_type: str) -> str:
    if _choice != "auto":
        reason = _why_not(operator, _choice, device_type)
        if reason:
            raise RuntimeError(f"{NAMESPACE}.{operator.name}: back-end {_choice!r} cannot run here: {reason}")
        return _choice
    preferred = "cpp" if device_type == "cpu" else "triton"
    return "reference" if _why_not(operator, preferred, device_type) else preferred


def define(
    schema: str,
    *,
    reference: Implementation,
    fake: Implementation,
    cpp: Implementation | None = None,
    triton: str | None = None,
) -> Implementation:
    """Register an operator and return the callable that dispatches to it.

    Args:
        schema: ``name(Tensor boxes, ...) -> Tensor`` in torch's schema language.
        reference: the PyTorch implementation.
        fake: the same call on fake tensors: shapes, dtypes and strides of the outputs, no data.
        cpp: the launcher of the C++ kernel.
        triton: ``module:function`` of the Triton launcher, imported when first used.
    """
    name = schema.split("(", 1)[0]
    implementations: dict[str, Implementation | str] = {"reference": reference}
    if cpp is not None:
        implementations["cpp"] = cpp
    if triton is not None:
        implementations["triton"] = triton
    operator = Operator(name, implementations)
    _OPERATORS[name] = operator

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return _resolve(operator, _choose(operator, "cpu"))(*args, **kwargs)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        return _resolve(operator, _choose(operator, "cuda"))(*args, **kwargs)

    LIBRARY.define(schema)
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_autograd(name: str, backward: Implementation, setup_context: Implementation) -> None:
    """Give a defined operator its gradient (``torch.library.register_autograd`` in this package's library)."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def backend_report(device: str | torch.device | None = None) -> dict[str, dict[str, str]]:
    """What can run each operator on ``device`` (default: CUDA if there is one, else the CPU), and why not.

    Returns:
        ``{operator: {back-end: "available" or the reason why not, "auto": the back-end that auto takes}}``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    report = {}
    for name, operator in sorted(_OPERATORS.items()):
        row = {backend: _why_not(operator, backend, kind) or "available" for backend in BACKENDS}
        preferred = "cpp" if kind == "cpu" else "triton"
        row["auto"] = preferred if row[preferred] == "available" else "reference"
        report[name] = row
    return report
