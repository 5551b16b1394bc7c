"""Where the milliseconds of a step go: its kernels by time on a GPU, its operators on a CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.train_step.ablation import as_arguments, base_overrides, best_mode, build
from benchmarks.train_step.measure import synchronize
from benchmarks.train_step.run import Options, Row, failure, free, make_batches, mode_keys, nothing, warm_up
from benchmarks.train_step.sides import NotHere

STEPS = 3
SHOWN = 40  # rows of a table; what is left is one more row

# The first that a name matches. Kernels of ours are Triton functions, whose names begin with an underscore.
KINDS = (
    ("ours", r"^_[a-z]|fastrcnn_kernels"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|cudnn|xmma|implicit"),
    ("matrix product", r"gemm|gemv|cublas|cutlass|splitk|addmm|aten::(mm|bmm)\b|nvjet"),
    ("copy", r"memcpy|memset|copy|aten::(zero_|fill_)|nchwtonhwc|nhwctonchw"),
    ("sort", r"sort|topk|radix"),
    ("optimizer", r"sgd|foreach|multi_tensor"),
)


def kind_of(name: str) -> str:
    """What a kernel or an operator does, as far as its name says; ``other`` for pointwise ones and reductions."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


def short(name: str, length: int = 90) -> str:
    """A kernel's name without the arguments of its templates."""
    return re.sub(r"\s+", " ", re.sub(r"<.*", "", name).replace("void ", "")).strip()[:length]


def table_rows(times: Sequence[tuple[str, int, float]], steps: int = STEPS, shown: int = SHOWN) -> list[Row]:
    """Rows by falling time from (name, calls, milliseconds) over ``steps`` steps, names that shorten alike together."""
    merged: dict[str, list[float]] = {}
    for name, calls, ms in times:
        entry = merged.setdefault(short(name), [0.0, 0.0])
        entry[0] += calls / steps
        entry[1] += ms / steps
    total = sum(ms for _, ms in merged.values()) or 1.0
    order = sorted(merged.items(), key=lambda item: (-item[1][1], item[0]))
    rows = [
        {"name": name, "kind": kind_of(name), "calls": calls, "ms": ms, "percent": 100 * ms / total}
        for name, (calls, ms) in order[:shown]
    ]
    rest = order[shown:]
    if rest:
        calls, ms = (sum(entry[i] for _, entry in rest) for i in (0, 1))
        rows.append({"name": f"{len(rest)} others", "kind": "", "calls": calls, "ms": ms, "percent": 100 * ms / total})
    return rows


def by_kind(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds and calls of each kind, by falling time."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        entry = kinds.setdefault(row["kind"] or "not shown", [0.0, 0.0, 0.0])
        for i, name in enumerate(("calls", "ms", "percent")):
            entry[i] += row[name]
    return [
        {"kind": kind, "calls": calls, "ms": ms, "percent": percent}
        for kind, (calls, ms, percent) in sorted(kinds.items(), key=lambda item: -item[1][1])
    ]


def measure_profile(options: Options, batch_size: int, save: Callable[[list[Row]], None] = nothing) -> list[Row]:
    """One entry: our step with everything on (a graph where there is one), ``kernels`` and ``kinds`` of it, or
    ``reason``."""
    from torch.profiler import ProfilerActivity, profile

    cuda = options.device.type == "cuda"
    mode, dtype = best_mode(options), options.dtypes[-1]
    entry: Row = {"batch_size": batch_size, "side": "ours", "mode": mode, "dtype": dtype}
    try:
        batches = make_batches(options, "padded" if options.synthetic else "real", batch_size)
        keys = as_arguments(base_overrides(options)) | mode_keys(mode)
        side = build(options, batches, batch_size, dtype=dtype, mode=mode, **keys)
        if options.synthetic and options.positives:
            side.calibrate(options.positives)
        warm_up(side, max(1, options.warmup))
        synchronize(options.device)
        activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            for number in range(STEPS):
                side.step(number)
            synchronize(options.device)
        entry["kernels"] = table_rows(times_of(profiler, cuda))
        entry["kinds"] = by_kind(entry["kernels"])
    except (NotHere, RuntimeError, AssertionError, ValueError) as error:
        entry["reason"] = failure(error)
    free()
    save([entry])
    return [entry]


def times_of(profiler: Any, cuda: bool) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of the GPU's kernels; on a CPU of the operators, without what they call."""
    found = []
    for event in profiler.key_averages():
        if cuda and event.device_type == torch.autograd.DeviceType.CUDA:
            found.append((event.key, event.count, event.self_device_time_total / 1e3))
        elif not cuda and event.self_cpu_time_total > 0:
            found.append((event.key, event.count, event.self_cpu_time_total / 1e3))
    return found
