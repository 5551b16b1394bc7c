"""Compile every published Triton kernel for real GPUs, without one, and print what ptxas made of it.

Run as a program, in an interpreter of its own: under ``TRITON_INTERPRET=1`` a ``@triton.jit`` function is a Python
function that cannot be compiled. ``test_compile_for_gpu.py`` starts it and reads the JSON lines it prints::

    python tests/kernels/compile_for_gpu.py [--processes 2] [module ...]
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
from pathlib import Path
from typing import Any

# Shared memory that one thread block may have, in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTER_LIMIT = 255


def published() -> list[tuple[str, int, str]]:
    """(module, index in its COMPILE_CASES, label) of every case, in a fixed order."""
    package = importlib.import_module("fastrcnn_kernels.triton")
    found = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for index, case in enumerate(getattr(module, "COMPILE_CASES", ())):
            found.append((info.name, index, case.label))
    return found


def _resource_usage(cubin: bytes, tools: Path, folder: Path) -> dict[str, int]:
    path = folder / f"{os.getpid()}.cubin"
    path.write_bytes(cubin)
    command = [str(tools / "cuobjdump"), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if "REG" not in usage:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return usage


def compile_case(job: tuple[str, int, str, int, str]) -> dict[str, Any]:
    """Compile one case for one architecture; the result says what it uses, or why it failed."""
    module, index, label, capability, folder = job
    result: dict[str, Any] = {"module": module, "label": label, "sm": capability}
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        case = importlib.import_module(f"fastrcnn_kernels.triton.{module}").COMPILE_CASES[index]
        names = case.kernel.arg_names
        missing = set(names) ^ (set(case.signature) | set(case.constexprs))
        if missing:
            raise ValueError(f"arguments without a type or value, or unknown: {sorted(missing)}")
        signature = {name: case.signature.get(name, "constexpr") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(case.kernel, signature, constexprs=case.constexprs, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=dict(case.options))
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _resource_usage(compiled.asm["cubin"], tools, Path(folder))
        result.update(
            registers=usage["REG"],
            stack=usage.get("STACK", 0),
            local=usage.get("LOCAL", 0),
            shared=compiled.metadata.shared,
            shared_limit=SHARED_LIMIT[capability],
            num_warps=compiled.metadata.num_warps,
            ptx=compiled.asm["ptx"],
        )
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def main() -> int:
    """Compile, print one JSON object a line, return 0: judging is the test's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules of fastrcnn_kernels.triton (default: all)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sm", type=int, nargs="*", default=sorted(SHARED_LIMIT))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own: a stale entry must not hide that a kernel no longer compiles.
        os.environ["TRITON_CACHE_DIR"] = folder
        jobs = [
            (module, index, label, sm, folder)
            for module, index, label in published()
            if not arguments.modules or module in arguments.modules
            for sm in arguments.sm
        ]
        context = multiprocessing.get_context("fork")
        with context.Pool(arguments.processes) as pool:
            for result in pool.imap(compile_case, jobs, chunksize=1):
                print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
