"""Operators broken on purpose: a test that cannot see the damage tests nothing."""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

_IMPORT = "from fastrcnn_kernels import _library\n"


def mutated(module: ModuleType, old: str, new: str) -> dict[str, Any]:
    """The names of ``module`` with one piece of its source replaced, its public functions on the broken reference.

    Args:
        module: an operator module; operators are not registered again.
        old: must occur exactly once in the source, so that a mutation cannot silently go stale.
        new: what it is replaced by.
    """
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__}: {source.count(old)} places with {old!r}, expected one"
    assert source.count(_IMPORT) == 1
    library = SimpleNamespace(define=lambda schema, *, reference, **others: reference)
    namespace: dict[str, Any] = {"__name__": f"{module.__name__}_mutated", "_library": library}
    code = compile(source.replace(_IMPORT, "").replace(old, new), f"<mutated {module.__name__}>", "exec")
    exec(code, namespace)
    return namespace
