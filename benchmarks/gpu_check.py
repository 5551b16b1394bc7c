"""Everything that needs a GPU, in under ten minutes: ``make gpu-check``, or ``python -m benchmarks.gpu_check``.

Runs the tests marked ``gpu``, then the operator benchmarks (torchvision is a side where it is installed) and the
training step, and writes ``OUTPUT/gpu-check.json`` (pytest-benchmark's format, with the machine in it),
``OUTPUT/report.md`` (one table) and ``OUTPUT/report.png``. Exits with 1 where a test or a benchmark's check fails,
with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
# The training step first: the most valuable figure, should time run out.
BENCHMARKS = sorted(
    (path.name for path in (ROOT / "benchmarks").glob("bench_*.py")), key=lambda n: (n != "bench_step.py", n)
)
# Seconds: together under ten minutes.
TEST_LIMIT, BENCHMARK_LIMIT = 240, 340


def run_pytest(arguments: list[str], limit: int) -> int:
    """pytest's exit code; 124 where it ran past ``limit`` seconds."""
    environment = dict(os.environ, TRITON_INTERPRET="0")
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit} s: {' '.join(arguments)}", file=sys.stderr)
        return 124


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output", help="folder of the results")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    stored = args.output / "gpu-check.json"
    stored.unlink(missing_ok=True)
    tests = run_pytest(["-m", "gpu", "tests"], TEST_LIMIT)
    benchmarks = run_pytest(
        [
            *(f"benchmarks/{name}" for name in BENCHMARKS),
            "--benchmark-max-time=0.5",
            f"--benchmark-json={stored}",
            "--benchmark-columns=min,median,rounds",
        ],
        BENCHMARK_LIMIT,
    )
    if stored.is_file():
        report.main([str(stored), "--output", str(args.output)])
        print((args.output / "report.md").read_text())
    print(f"tests: exit code {tests}, benchmarks: exit code {benchmarks}")
    return 0 if tests == benchmarks == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
