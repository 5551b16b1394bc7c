"""Triton's interpreter without the work that it repeats: the tests spend most of their time in it.

It prepares ``triton.language`` again for every call of a device function, by looking through all its members, and
builds a table of types for every operation. Both are repetition within a launch; what is computed stays the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def prepare_once_a_launch(interpreter: Any, language: Any) -> Callable[[Any], Any]:
    """A replacement of ``_patch_lang(fn)``: within a launch, the modules that ``fn`` sees are prepared once.

    The scope that a launch gets for itself undoes all when it ends; those of device functions are never undone, as in
    the original, so that one which prepares nothing is as good.
    """
    original = interpreter._patch_lang
    visible: dict[Any, frozenset[int]] = {}
    prepared: set[frozenset[int]] = set()

    class LaunchScope:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            prepared.clear()
            self.scope.restore()

    def patch(fn: Any) -> Any:
        if fn not in visible:
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            visible[fn] = frozenset(id(module) for module in modules if module in (language, language.core))
        if visible[fn] in prepared:
            return None
        outermost = not prepared
        scope = original(fn)
        prepared.add(visible[fn])
        return LaunchScope(scope) if outermost else scope

    return patch


def look_up_types_once(interpreter: Any) -> Callable[[Any], Any]:
    """A replacement of ``_get_np_dtype(type)`` that remembers what it said of scalars and pointers, by name."""
    original = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        name = "pointer" if scalar.is_ptr() else scalar.name
        if name not in known:
            known[name] = original(scalar)
        return known[name]

    return np_dtype


def quicken() -> None:
    """Install both replacements, where this version of Triton has what they replace."""
    from triton import language
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = prepare_once_a_launch(interpreter, language)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = look_up_types_once(interpreter)
