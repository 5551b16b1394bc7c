"""Put the operators of this package into torchvision, detectron2 or mmcv, and take them out again.

::

    import fastrcnn_kernels

    handle = fastrcnn_kernels.patch("torchvision")   # from here on torchvision's models run on our kernels
    print(handle.report())
    handle.unpatch()

    with fastrcnn_kernels.patch("torchvision"):      # or for a while
        detections = model(images)

A function is replaced in every module that holds it, so ``from torchvision.ops import nms`` in code that was imported
before is replaced too; a method is replaced in its class, so models that exist already run on it. Every operator is
first compared with the peer's own on a small case: one that differs is left alone and the report says why. What holds a
function in another way (an attribute of an object, a closure, a scripted or compiled graph) keeps the peer's.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PEERS = ("torchvision", "detectron2", "mmcv")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Swap:
    """One symbol of a peer and what replaces it.

    Attributes:
        symbol: ``module:name`` of a function, ``module:Class.method`` of a method.
        replacement: the same signature, and ``original`` as a keyword: called for what we do not do.
        check: called with the original and the replacement; raises AssertionError where they differ.
    """

    symbol: str
    replacement: Function
    check: Callable[[Function, Function], None]


@dataclass
class Outcome:
    """What became of a symbol: where it was swapped (module and attribute), or why it was not."""

    symbol: str
    places: list[str] = field(default_factory=list)
    reason: str = ""


def close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """For checks: raise AssertionError where results (tensors, or sequences of them) differ."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True, check_stride=False)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{len(actual)} results instead of {len(expected)}"
        for a, b in zip(actual, expected, strict=True):
            close(a, b, rtol, atol)
    else:
        assert actual == expected, f"{actual!r} instead of {expected!r}"


def close_with_gradient(
    original: Function, replacement: Function, inputs: Sequence[torch.Tensor], rtol: float = 1e-4, atol: float = 1e-4
) -> None:
    """For checks: compare results and the gradients of all ``inputs`` that are floating point."""
    found = []
    for function in (original, replacement):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = function(*leaves)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True) if out.requires_grad else ()
        found.append([out.detach(), *(g for g in grads if g is not None)])
    close(found[1], found[0], rtol, atol)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def on_each_device(check: Callable[[Function, Function, str], None]) -> Callable[[Function, Function], None]:
    """Make a check of (original, replacement, device) run on the CPU and, where there is one, on a GPU."""

    def run(original: Function, replacement: Function) -> None:
        for device in _devices():
            check(original, replacement, device)

    return run


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [t for value in values for t in _tensors(value)]
    if isinstance(values, dict):
        return [t for value in values.values() for t in _tensors(value)]
    return []


def _ours_can(args: Any, kwargs: Any) -> bool:
    """Whether a call is one for our kernels: plain tensors on the CPU or a CUDA device, nothing traced or exported."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    tensors = _tensors(args) + _tensors(kwargs)
    return all(t.device.type in ("cpu", "cuda") and not t.is_quantized for t in tensors)


def _wrap(original: Function, swap: Swap) -> Function:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _ours_can(args, kwargs):
            return original(*args, **kwargs)
        return swap.replacement(*args, original=original, **kwargs)

    call.__fastrcnn_original__ = original  # type: ignore[attr-defined]
    return call


def _find(symbol: str) -> tuple[Any, str, Any]:
    """The object that owns the symbol, its name there, and what it is."""
    module_name, path = symbol.split(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    value = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
    return owner, name, value


def _compare(swap: Swap, original: Function, call: Function) -> str:
    """Empty where both give the same, else what is wrong."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            swap.check(original, call)
    except AssertionError as error:
        return f"the results differ: {' '.join(str(error).split())[:200]}"
    except Exception as error:
        return f"the comparison did not run: {type(error).__name__}: {error}"
    return ""


def _holders(function: Any, peer: str) -> list[tuple[Any, str]]:
    """Every module attribute that is this very function, in the peer and in whatever imported it.

    Left alone are this package and, where the peer has the function from another package, that package.
    """
    own = __name__.split(".")[0]
    home = (getattr(function, "__module__", "") or peer).split(".")[0]
    left_alone = {own} if home == peer else {own, home}
    found = []
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType) or module.__name__.split(".")[0] in left_alone:
            continue
        for name, value in list(vars(module).items()):
            if value is function:
                found.append((module, name))
    return found


class Patch:
    """A peer with our operators in it, until :meth:`unpatch`. Made by :func:`patch`; also a context manager.

    Attributes:
        peer: the package.
        outcomes: what became of each symbol.
    """

    def __init__(self, peer: str, swaps: Sequence[Swap], kept: Sequence[Outcome]) -> None:
        self.peer = peer
        self.outcomes: list[Outcome] = []
        self._undo: list[tuple[Any, str, Any, Any]] = []
        # All comparisons come first: a function of the peer must not be compared while it runs on ours inside.
        ready = []
        for swap in swaps:
            outcome = Outcome(swap.symbol)
            self.outcomes.append(outcome)
            try:
                owner, name, original = _find(swap.symbol)
            except (ImportError, AttributeError, KeyError) as error:
                outcome.reason = f"this version of {peer} has no such symbol ({error})"
                continue
            call = _wrap(original, swap)
            outcome.reason = _compare(swap, original, call)
            if not outcome.reason:
                ready.append((outcome, owner, name, original, call))
        for outcome, owner, name, original, call in ready:
            for holder, attribute in [(owner, name)] if isinstance(owner, type) else _holders(original, peer):
                self._undo.append((holder, attribute, original, call))
                setattr(holder, attribute, call)
                where = f"{holder.__module__}.{holder.__qualname__}" if isinstance(holder, type) else holder.__name__
                outcome.places.append(f"{where}.{attribute}")
        self.outcomes += kept

    @property
    def swapped(self) -> list[str]:
        """The symbols that run on our kernels."""
        return [outcome.symbol for outcome in self.outcomes if outcome.places]

    @property
    def kept(self) -> dict[str, str]:
        """The symbols that are the peer's own still, and why."""
        return {outcome.symbol: outcome.reason for outcome in self.outcomes if not outcome.places}

    def report(self) -> str:
        """One line a symbol: swapped, and in how many places, or why not."""
        lines = [f"{self.peer}: {len(self.swapped)} symbols swapped, {len(self.kept)} not"]
        for outcome in self.outcomes:
            state = f"swapped in {len(outcome.places)} places" if outcome.places else f"not swapped: {outcome.reason}"
            lines.append(f"  {outcome.symbol.replace(':', '.')}: {state}")
        return "\n".join(lines)

    def unpatch(self) -> None:
        """Put the peer's own functions back. A symbol that somebody else replaced since is left to them."""
        while self._undo:
            holder, attribute, original, call = self._undo.pop()
            if vars(holder).get(attribute) is call:
                setattr(holder, attribute, original)
        if _ACTIVE.get(self.peer) is self:
            del _ACTIVE[self.peer]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        return f"<Patch of {self.peer}: {len(self.swapped)} symbols swapped, {len(self.kept)} not>"


_ACTIVE: dict[str, Patch] = {}


def patch(peer: str) -> Patch:
    """Replace a peer's operators with those of this package.

    Args:
        peer: ``torchvision``, ``detectron2`` or ``mmcv``; it must be installed.

    Returns:
        A handle with ``report()`` and ``unpatch()``, which is also a context manager.

    Raises:
        ValueError: for another name.
        ImportError: where the peer is not installed.
        RuntimeError: where it is patched already.
    """
    if peer not in PEERS:
        raise ValueError(f"patch: no operators for {peer!r}: choose one of {', '.join(PEERS)}")
    if peer in _ACTIVE:
        raise RuntimeError(f"patch: {peer} is patched already: call unpatch() first")
    importlib.import_module(peer)
    table = importlib.import_module(f"fastrcnn_kernels.patches.{peer}")
    kept = [Outcome(symbol, reason=reason) for symbol, reason in table.KEPT.items()]
    _ACTIVE[peer] = made = Patch(peer, table.SWAPS, kept)
    return made
