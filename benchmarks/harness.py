"""What every operator benchmark shares: providers, the gate, memory, and the figures stored beside each time.

A benchmark of an operator is one function, parametrised over cases and providers::

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def bench_nms(benchmark, device, case, provider):
        boxes, scores = ...
        def peer(): return torchvision().ops.nms(boxes, scores, 0.7)
        call = provider_call(provider, "nms", device, ours=lambda: nms(boxes, scores, 0.7),
                             compiled=lambda: compiled_reference(boxes, scores, 0.7), torchvision=peer)
        measure(benchmark, call, truth=lambda: nms(boxes, scores, 0.7), equal=assert_equal,
                group=f"nms-{case}", provider=provider, bytes=..., flops=..., target=("torchvision", 5))

Every provider's result is compared with ours before it is timed. ``FASTRCNN_BENCH_SMALL=1`` asks for small cases, as
a check that every benchmark runs; ``--benchmark-disable`` runs each call once, as a check that all sides agree.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels

# Ours by back-end, and "compiled": ``torch.compile`` of the reference.
OURS = ("reference", "compiled", "cpp", "triton")
PROVIDERS = (*OURS, "torchvision")

SMALL = os.environ.get("FASTRCNN_BENCH_SMALL", "0") == "1"

Call = Callable[[], Any]


def torchvision(module: str = "torchvision") -> ModuleType:
    """torchvision, or one of its modules; skips where it is absent."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    return importlib.import_module(module)


def provider_call(
    provider: str, operators: str | tuple[str, ...], device: torch.device, *, ours: Call, **others: Call
) -> Call:
    """The call of one provider, or a skip with the reason.

    Args:
        operators: the registered operators that ``ours`` runs: all must have the back-end.
        ours: runs under ``set_backend(provider)`` for reference, cpp and triton.
        others: the calls of ``compiled`` and of the peers, by the name of the provider.
    """
    if provider in others:
        if provider == "torchvision":
            torchvision()
        return others[provider]
    if provider not in fastrcnn_kernels._library.BACKENDS:
        pytest.skip(f"{provider} does not do this")
    report = fastrcnn_kernels.backend_report(device)
    for name in (operators,) if isinstance(operators, str) else operators:
        if report[name][provider] != "available":
            pytest.skip(report[name][provider])
    if provider == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter is for tests, not for timing")

    def call() -> Any:
        with fastrcnn_kernels.set_backend(provider):
            return ours()

    return call


def assert_equal(actual: Any, expected: Any) -> None:
    """For integers: equal or wrong. Tensors, or (nested) tuples and lists of them."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual.to(expected.device), expected), "the provider's result differs: nothing to time"
    elif isinstance(expected, (tuple, list)):
        for a, b in zip(actual, expected, strict=True):
            assert_equal(a, b)
    else:
        assert actual == expected


def assert_close(rtol: float = 1e-4, atol: float = 1e-4) -> Callable[[Any, Any], None]:
    """For real numbers. Compared in float32 where the types differ (a peer without half precision)."""

    def check(actual: Any, expected: Any) -> None:
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)
        else:
            for a, b in zip(actual, expected, strict=True):
                check(a, b)

    return check


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Bytes by which the body exceeded, at its peak, what was held before: on a GPU what torch allocated, on a CPU the
    resident set of the process (Linux; None elsewhere). Buffers that torch or malloc kept from before are given back
    first, so that they do not hide what is used."""
    result: dict[str, int | None] = {"bytes": None}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield result
        torch.cuda.synchronize()
        result["bytes"] = torch.cuda.max_memory_allocated() - before
        return
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield result
        return
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        reset.write_text("5")  # the peak of the resident set starts again from here
    except OSError:
        yield result
        return
    before = _status("VmRSS:")
    yield result
    result["bytes"] = max(0, _status("VmHWM:") - before)


@lru_cache(maxsize=2)
def ceilings(device_type: str) -> dict[str, float]:
    """What this machine reaches: bytes a second of a large copy (read and written), FLOP a second of a large product.

    Measured once a session, in float32 on a CPU and in bfloat16 on a GPU: the roofline that times are compared with.
    """
    device = torch.device(device_type)
    cuda = device_type == "cuda"
    size = 1 << (28 if cuda else 25)
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    dtype, side = (torch.bfloat16, 8192) if cuda else (torch.float32, 1536)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def best(call: Call, rounds: int) -> float:
        seconds = []
        for _ in range(rounds):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    copy, product = best(lambda: target.copy_(source), 10), best(lambda: a @ b, 10)
    return {"bytes_per_second": 2 * 4 * size / copy, "flop_per_second": 2 * side**3 / product}


def measure(
    benchmark: Any,
    call: Call,
    *,
    truth: Call,
    equal: Callable[[Any, Any], None],
    group: str,
    provider: str,
    device: torch.device,
    bytes: int,
    flops: int = 0,
    target: tuple[str, float] | None = None,
    rounds: int | None = None,
    **info: Any,
) -> None:
    """Compare ``call`` with ours, then time it and store bytes, FLOPs, peak memory and per cent of the roofline.

    Args:
        truth: our own result, by the back-end that ``auto`` takes.
        equal: raises AssertionError where the provider's result is not the same.
        group: operator and case; the providers of a group are compared with one another.
        bytes: what no implementation can do without: inputs read once, outputs written once.
        flops: likewise.
        target: (provider, factor) that issue or documentation asks of the C++ or Triton kernel in this group.
        rounds: a fixed number of rounds for slow providers; default 3 for the reference and its compiled form.
        info: stored beside the times (shapes, dtype).
    """
    with fastrcnn_kernels.set_backend("auto"):
        expected = truth()
    equal(call(), expected)
    del expected
    with peak_memory(device) as memory:
        call()
    benchmark.group = group
    benchmark.extra_info.update(
        provider=provider, bytes=bytes, flops=flops, peak_bytes=memory["bytes"], device=str(device), **info
    )
    if target is not None:
        benchmark.extra_info["target"] = list(target)
    if rounds is None and provider in ("reference", "compiled"):
        rounds = 3
    if rounds is not None:
        benchmark.pedantic(call, rounds=rounds, iterations=1)
    else:
        benchmark(call)
    if benchmark.stats is not None:
        limits = ceilings(device.type)
        least = max(bytes / limits["bytes_per_second"], flops / limits["flop_per_second"])
        benchmark.extra_info["roofline_percent"] = round(100 * least / benchmark.stats.stats.median, 2)
