"""Compile every published Triton kernel for real GPUs, without one, and print what the assembler made of it.

Run as a program, in an interpreter of its own: under ``TRITON_INTERPRET=1`` a ``@triton.jit`` function is a Python
function that cannot be compiled. ``test_compile_for_gpu.py`` starts it and reads the JSON lines it prints::

    python tests/kernels/compile_for_gpu.py [--processes 2] [--targets sm_90 gfx942] [--table] [module ...]

How far it is goes to stderr. A case takes half a second of a processor: a third of it is Python reading the kernel,
half the compiler's passes, the rest the assembler. No two cases are the same work, so only more processors help.
``--table`` prints a Markdown row a kernel instead: the most registers and shared memory of its cases, and the least
occupancy that they allow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Shared memory that one thread block may have, in bytes: CUDA C++ Programming Guide, table of compute capabilities; for
# gfx942 the CDNA3 ISA guide.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TARGETS = tuple(SHARED_LIMIT)
# On gfx942 the 512 are vector and accumulation registers together.
REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}


def published() -> list[tuple[str, int, str]]:
    """(module, index in its COMPILE_CASES, label) of every case, in a fixed order."""
    package = importlib.import_module("fastrcnn_kernels.triton")
    found = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for index, case in enumerate(getattr(module, "COMPILE_CASES", ())):
            found.append((info.name, index, case.label))
    return found


def _cuda_usage(compiled: Any, folder: Path) -> dict[str, int]:
    import triton

    path = folder / f"{os.getpid()}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "cuobjdump"), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if "REG" not in usage:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return {"registers": usage["REG"], "stack": usage.get("STACK", 0), "local": usage.get("LOCAL", 0)}


def _hip_usage(compiled: Any) -> dict[str, int]:
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"])}
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        # A scalar register is spilled to a lane of a vector register, not to memory.
        "local": usage["vgpr_spill_count"],
    }


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """The part of a multiprocessor's (compute unit's) warps that registers and shared memory leave room for.

    65,536 registers, given to a warp in units of 256, 64 warps and 32 blocks a multiprocessor, 1 KB of shared memory
    more a block than it asks for. gfx942: 512 registers a lane of each of 4 SIMDs, in units of 8, at most 8 waves each.
    """
    if target == "gfx942":
        waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
        blocks = waves // num_warps
        if shared:
            blocks = min(blocks, SHARED_LIMIT[target] // shared)
        return blocks * num_warps / 32
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        32, 64 // num_warps, 65_536 // (of_a_warp * num_warps), (SHARED_LIMIT[target] + 1024) // (shared + 1024)
    )
    return blocks * num_warps / 64


def compile_case(job: tuple[str, int, str, str, str]) -> dict[str, Any]:
    """Compile one case for one target; the result says what it uses, or why it failed."""
    module, index, label, target, folder = job
    result: dict[str, Any] = {"module": module, "label": label, "target": target}
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        case = importlib.import_module(f"fastrcnn_kernels.triton.{module}").COMPILE_CASES[index]
        result["kernel"] = case.kernel.__name__
        names = case.kernel.arg_names
        missing = set(names) ^ (set(case.signature) | set(case.constexprs))
        if missing:
            raise ValueError(f"arguments without a type or value, or unknown: {sorted(missing)}")
        signature = {name: case.signature.get(name, "constexpr") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(case.kernel, signature, constexprs=case.constexprs, attrs=aligned)
        options = dict(case.options)
        if target.startswith("gfx"):
            options.pop("maxnreg", None)  # an option of ptxas
            gpu = GPUTarget("hip", target, 64)
        else:
            gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        compiled = triton.compile(source, target=gpu, options=options)
        result.update(_hip_usage(compiled) if gpu.backend == "hip" else _cuda_usage(compiled, Path(folder)))
        result.update(
            shared=compiled.metadata.shared, num_warps=compiled.metadata.num_warps, ptx=compiled.asm.get("ptx", "")
        )
        result["occupancy"] = occupancy(target, result["registers"], result["shared"], result["num_warps"])
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def jobs(
    modules: Sequence[str], targets: Sequence[str], folder: str, everything: bool = True
) -> list[tuple[str, int, str, str, str]]:
    """Every case for every target; for gfx942 one case a kernel, which compiles for the others in all its types.

    ``everything=False``: every case for sm_90 and one case a kernel for the others, in a third of the time.
    """
    found, seen = [], set()
    for module, index, label in published():
        if modules and module not in modules:
            continue
        case = importlib.import_module(f"fastrcnn_kernels.triton.{module}").COMPILE_CASES[index]
        kernel = (module, case.kernel.__name__)
        for target in targets:
            whole = target == "sm_90" or (everything and not target.startswith("gfx"))
            if whole or kernel not in seen:
                found.append((module, index, label, target, folder))
        seen.add(kernel)
    return found


def table(results: Sequence[dict[str, Any]], targets: Sequence[str]) -> str:
    """A Markdown row a kernel: what its hungriest case takes on each target."""
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        kernels.setdefault((result["module"], result.get("kernel", "?")), []).append(result)
    lines = [f"| module | kernel | cases | {' | '.join(targets)} |", "|---|---|---|" + "---|" * len(targets)]
    for (module, kernel), rows in kernels.items():
        cells = []
        for target in targets:
            here = [row for row in rows if row["target"] == target]
            if any("error" in row for row in here):
                cells.append("does not compile")
            elif here:
                registers, shared = max(r["registers"] for r in here), max(r["shared"] for r in here)
                cells.append(f"{registers}, {shared / 1024:.1f} KB, {100 * min(r['occupancy'] for r in here):.0f} %")
            else:
                cells.append("")
        labels = {row["label"] for row in rows}
        short = kernel.removesuffix("_kernel").strip("_") or kernel
        lines.append(f"| {module} | `{short}` | {len(labels)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def processors() -> int:
    """How many processors this process may use, at most sixteen: each needs some 300 MB."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Progress:
    """Says on stderr every ten seconds how many cases are compiled, and at once which one failed."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self.start = self.said = time.monotonic()

    def add(self, result: dict[str, Any]) -> None:
        """Count a case, compiled or failed."""
        self.done += 1
        if "error" in result:
            self.failed += 1
            print(f"{result['module']} {result['label']} {result['target']}: {result['error']}", file=sys.stderr)
        now = time.monotonic()
        if now - self.said >= 10 or self.done == self.total:
            self.said = now
            text = f"compiled {self.done}/{self.total}, {self.failed} failed, {now - self.start:.0f} s"
            print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Compile, print one JSON object a line, return 0: judging is the test's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules of fastrcnn_kernels.triton (default: all)")
    parser.add_argument("--processes", type=int, default=processors(), help="default: one a processor")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument("--quick", action="store_true", help="all cases for sm_90, one a kernel for the other targets")
    parser.add_argument("--table", action="store_true", help="a Markdown table instead of JSON lines")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own: a stale entry must not hide that a kernel no longer compiles.
        os.environ["TRITON_CACHE_DIR"] = folder
        context = multiprocessing.get_context("fork")
        with context.Pool(arguments.processes) as pool:
            wanted = jobs(arguments.modules, arguments.targets, folder, not arguments.quick)
            progress = Progress(len(wanted))
            for result in pool.imap(compile_case, wanted, chunksize=1):
                progress.add(result)
                results.append(result)
                if not arguments.table:
                    print(json.dumps(result), flush=True)
    if arguments.table:
        print(table(results, arguments.targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
