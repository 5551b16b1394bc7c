"""Every Triton kernel, with the constants it is launched with, compiles for NVIDIA and AMD GPUs without spills."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.compile_for_gpu import REGISTER_LIMIT, SHARED_LIMIT, TARGETS, jobs, occupancy, published

PROGRAM = Path(__file__).with_name("compile_for_gpu.py")
CASES = published()
# FASTRCNN_COMPILE_ALL=1: every case for every target, as `make compile-check` does.
EVERYTHING = os.environ.get("FASTRCNN_COMPILE_ALL", "0") == "1"
SECONDS = 3 * 3600 if EVERYTHING else 1500  # an idle pair of processors takes three minutes, or one and a half
JOBS = [(module, label, target) for module, _, label, target, _ in jobs([], TARGETS, "", EVERYTHING)]
CUDA = [target for target in TARGETS if target.startswith("sm_")]


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str, str], dict[str, Any]]:
    """All cases for all architectures, compiled once in a Python of their own, which says how far it is."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), *([] if EVERYTHING else ["--quick"])]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if EVERYTHING and capture else nullcontext():
        stderr = None if EVERYTHING else subprocess.PIPE
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, timeout=SECONDS
        )
    assert run.returncode == 0, (run.stderr or "")[-4000:]
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {(r["module"], r["label"], r["target"]): r for r in results}


@pytest.mark.timeout(SECONDS + 100)
@pytest.mark.parametrize(("module", "label", "target"), JOBS, ids=["-".join(job) for job in JOBS])
def test_compiles_without_spills(compiled: Any, module: str, label: str, target: str) -> None:
    result = compiled[module, label, target]
    assert "error" not in result, result["error"]
    assert result["stack"] == 0, f"spills: {result['stack']} bytes of stack at {result['registers']} registers"
    assert result["local"] == 0, f"spills: {result['local']}"
    assert result["registers"] <= REGISTER_LIMIT[target]
    assert result["shared"] <= SHARED_LIMIT[target], f"shared memory: {result['shared']} bytes"


def test_occupancy() -> None:
    """Worked by hand, as NVIDIA's occupancy calculator gives them."""
    assert occupancy("sm_90", 32, 0, 4) == 1.0
    assert occupancy("sm_90", 128, 0, 4) == 0.25
    assert occupancy("sm_90", 33, 0, 4) == 48 / 64  # 1,280 registers a warp, 12 blocks of 4
    assert occupancy("sm_80", 32, 80 * 1024, 8) == 0.25  # two blocks of 81 KB
    assert occupancy("gfx942", 64, 0, 4) == 1.0
    assert occupancy("gfx942", 128, 0, 4) == 0.5
    assert occupancy("gfx942", 64, 32 * 1024, 4) == 0.25


@pytest.mark.parametrize("sm", CUDA)
def test_nms_arithmetic_is_pinned(compiled: Any, sm: str) -> None:
    """Overlaps round alike in every back-end: no product fused into a sum, every division rounded to nearest."""
    masks = [
        r for (module, label, at), r in compiled.items() if module == "nms" and label.startswith("mask") and at == sm
    ]
    assert masks
    for result in masks:
        ptx = result["ptx"]
        assert "fma." not in ptx, result["label"]
        assert "div.rn." in ptx, result["label"]
        assert "div.full" not in ptx, result["label"]
        assert "div.approx" not in ptx, result["label"]


def test_every_kernel_is_published() -> None:
    """A kernel that is launched but is not in COMPILE_CASES would never be compiled before a GPU sees it.

    Device functions are called by kernels and compiled with them; by habit of this package only kernels are named
    ``*_kernel``.
    """
    package = importlib.import_module("fastrcnn_kernels.triton")
    modules = [importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__)]
    # A kernel may be launched by another module than the one that has its cases.
    compiled_ones = {id(case.kernel) for module in modules for case in getattr(module, "COMPILE_CASES", ())}
    absent = [
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in sorted(vars(module).items())
        if name.endswith("_kernel") and id(value) not in compiled_ones
    ]
    assert not absent, f"not in COMPILE_CASES: {absent}"


def test_labels_are_unique() -> None:
    keys = [(module, label) for module, _, label in CASES]
    assert len(set(keys)) == len(keys), f"two cases of one module share a label: {sorted(keys)}"


def test_a_spilling_kernel_is_caught(tmp_path: Path) -> None:
    """The test must be able to fail: a kernel that cannot fit its registers is reported with a stack."""
    source = tmp_path / "spilling.py"
    source.write_text(
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(PROGRAM.parent.parent.parent)!r})\n"
        "import types, triton, triton.language as tl\n"
        "from fastrcnn_kernels.triton._launch import CompileCase\n"
        "from tests.kernels import compile_for_gpu\n"
        "@triton.jit\n"
        "def greedy_kernel(x_ptr, out_ptr, n: tl.constexpr):\n"
        "    offsets = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]\n"
        "    x = tl.load(x_ptr + offsets)\n"
        "    tl.debug_barrier()\n"
        "    y = tl.load(x_ptr + offsets + n * n)\n"
        "    tl.debug_barrier()\n"
        "    tl.store(out_ptr + offsets, x * tl.sum(y, 0)[None, :] + y * tl.sum(x, 1)[:, None])\n"
        "module = types.ModuleType('fastrcnn_kernels.triton.spilling')\n"
        "module.COMPILE_CASES = [CompileCase('greedy', greedy_kernel, {'x_ptr': '*fp32', 'out_ptr': '*fp32'},"
        " {'n': 256}, {'num_warps': 4})]\n"
        "sys.modules[module.__name__] = module\n"
        "import os, tempfile, json\n"
        "folder = tempfile.mkdtemp(dir=pathlib.Path(__file__).parent)\n"
        "os.environ['TRITON_CACHE_DIR'] = folder\n"
        "result = compile_for_gpu.compile_case(('spilling', 0, 'greedy', 'sm_90', folder))\n"
        "result.pop('ptx', None)\n"
        "print(json.dumps(result))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(source)], capture_output=True, text=True, env=environment, timeout=300)
    result = json.loads(run.stdout.splitlines()[-1])
    assert "error" not in result, result
    assert result["stack"] > 0, f"expected spills: {result}"
