"""Everything that needs a GPU, in under ten minutes: ``make gpu-check``, or ``python -m benchmarks.gpu_check``.

Five parts, each a process of its own with a limit: the tests marked ``gpu``; the training step at batch 2 and 16
against torchvision (:mod:`benchmarks.train_step`); a short real training on generated shapes; the operators'
benchmarks; the convolutions. ``OUTPUT/gpu-check.json`` (pytest-benchmark's format with more sections) and
``OUTPUT/gpu-check.md`` are written after each part and hold what a part that was stopped had found until then. The
first table has a row for each part and for each thing that failed, with its reason.

``--device cpu --small`` runs the same code in under a minute on a machine without a GPU, on next to nothing.

Exits with 1 where a part failed or was stopped, with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import convs, pytest_lines, report
from benchmarks.machine import describe
from benchmarks.train_step import tables as step_tables

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "demo_shapes.yaml"
# The training step has a part of its own.
BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py") if path.name != "bench_step.py")
TIMED_OUT = 124

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A process: what it runs, for at most ``limit`` seconds, and what reads its findings from ``folder``.

    ``read`` returns sections of the result, and lines that say what failed and why.
    """

    name: str
    limit: float
    command: Sequence[str]
    read: Callable[[Path], tuple[Result, list[str]]]


def run_limited(command: Sequence[str], limit: float, log: Path, **environment: str) -> int:
    """The exit code of ``command``, whose output goes to ``log``; 124 where it was stopped after ``limit`` seconds."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    # Not what a pytest around it has set: pytest-benchmark times nothing in a worker of xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {**inherited, "TRITON_INTERPRET": "0", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            for signum, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
                os.killpg(process.pid, signum)  # its workers too: the group is the process's own
                try:
                    process.wait(timeout=patience)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return TIMED_OUT


def last_lines(log: Path, count: int = 2) -> str:
    """The end of a log, as a reason."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-count:])[:300]


def read_json(path: Path) -> Result:
    try:
        found: Result = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def read_tests(folder: Path) -> tuple[Result, list[str]]:
    tests, _ = pytest_lines.read(folder / "lines.jsonl")
    failed = [f"{test['test']}: {test['reason']}" for test in tests if test["outcome"] == "failed"]
    return {"tests": tests}, failed


def read_operators(folder: Path) -> tuple[Result, list[str]]:
    tests, benchmarks = pytest_lines.read(folder / "lines.jsonl")
    failed = [f"{test['test']}: {test['reason']}" for test in tests if test["outcome"] == "failed"]
    return {"benchmarks": benchmarks}, failed


def read_step(folder: Path) -> tuple[Result, list[str]]:
    found = read_json(folder / "train_step.json")
    sections = {name: found.get(name, []) for name in ("train", "ablation", "inference")}
    failed = [
        f"{section}, batch {row['batch_size']}, {row['side']} {row['mode']} {row['dtype']}: {row['reason']}"
        for section, rows in sections.items()
        for row in rows
        if "reason" in row
    ]
    return {**sections, "notes": found.get("notes", [])}, failed


def read_convs(folder: Path) -> tuple[Result, list[str]]:
    found = read_json(folder / "convs.json")
    rows = found.get("rows", [])
    failed = sorted({row["reason"] for row in rows if "reason" in row})
    return {"convs": {"rows": rows, "sums": found.get("sums", [])}}, [f"convolutions: {reason}" for reason in failed]


def read_training(folder: Path) -> tuple[Result, list[str]]:
    """What a short training says: its losses, whether they fell, and whether its step was recorded."""
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    losses = [line["loss"] for line in lines if line.get("type") == "train" and "loss" in line]
    speeds = [line["images_per_second"] for line in lines if line.get("type") == "train"]
    found = {"losses": losses, "images_per_second": speeds[-1] if speeds else None}
    failed = []
    if len(losses) < 2:
        failed.append("training: wrote fewer than two losses")
    elif not all(isinstance(loss, float) and loss == loss and abs(loss) != float("inf") for loss in losses):
        failed.append(f"training: a loss is not finite: {losses}")
    elif not losses[-1] < losses[0]:
        failed.append(f"training: the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
    log = folder / "log.txt"
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        if "operator by operator" in line:  # what the step says where it is no graph
            failed.append(f"training: {line.partition('INFO: ')[2] or line}"[:300])
    return {"training": found}, failed


def train_on_shapes(folder: Path, device: str, small: bool) -> int:
    """Generate shapes and train on them; the exit code of the training. Runs in the part's own process."""
    from fastrcnn import train
    from fastrcnn.data import shapes

    images, side, steps, period = (8, 64, 8, 2) if small else (64, 160, 200, 20)
    source = folder / "shapes"
    code = shapes.main(
        [
            "--output",
            str(source),
            "--num-train",
            str(images),
            "--num-val",
            "1",
            "--image-size",
            str(side),
            "--overwrite",
        ]
    )
    if code:
        return code
    overrides = {
        "MODEL.DEVICE": device,
        "DATASETS.TRAIN": f"('{source}/annotations/instances_train.json@{source}/images',)",
        "DATASETS.TEST": "()",
        "INPUT.MIN_SIZE_TRAIN": f"({side},)",
        "INPUT.MAX_SIZE_TRAIN": str(side),
        "SOLVER.IMS_PER_BATCH": "2" if small else "8",
        "SOLVER.MAX_ITER": str(steps),
        "SOLVER.STEPS": "()",
        "SOLVER.WARMUP_ITERS": str(steps // 4),
        "SOLVER.LOG_PERIOD": str(period),
        "SOLVER.CHECKPOINT_PERIOD": str(10 * steps),
        "DTYPE": "float32" if device == "cpu" else "bfloat16",
        "OUTPUT_DIR": str(folder / "run"),
    }
    overrides |= {"STEP.GRAPH": "True", "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY": "False"}
    pairs = [word for pair in overrides.items() for word in pair]
    return train.main(["--config-file", str(DEMO), "--overwrite", "--skip-test", *pairs])


def parts(output: Path, device: str, small: bool) -> list[Part]:
    """The parts in the order of their worth, and their limits: together under ten minutes."""
    python = [sys.executable, "-m"]

    def folder(name: str) -> str:
        return str(output / name)

    def pytest(name: str, *arguments: str) -> list[str]:
        lines = ["-p", "benchmarks.pytest_lines", "--lines", str(output / name / "lines.jsonl")]
        return [*python, "pytest", "-q", "-p", "no:cacheprovider", *lines, *arguments]

    on = ["--device", device]
    tiny = ["--config-file", str(DEMO), "--size", "64x64", "--seconds", "0"]
    # torch.compile of each reference takes minutes to compile: `make bench` has that column.
    operators = ["-k", "not compiled", "--benchmark-max-time=0.5", "--benchmark-min-rounds=3"]
    operators.append("--benchmark-columns=min,median,rounds")
    training = [*python, "benchmarks.gpu_check", "--train-on-shapes", folder("training"), *on, *["--small"] * small]
    if small:
        return [
            Part("tests", 60, pytest("tests", "tests/test_report.py"), read_tests),
            Part(
                "step", 60,
                [*python, "benchmarks.train_step", *on, *tiny, "--batch-sizes", "1", "--boxes", "2", "--rounds", "1",
                 "--positives", "6", "--no-torchvision", "--output", folder("step")], read_step,
            ),
            Part("training", 60, training, read_training),
            Part("operators", 60, pytest("operators", "benchmarks/bench_boxes.py", *operators), read_operators),
            Part("convs", 60, [*python, "benchmarks.convs", *on, *tiny, "--output", folder("convs")], read_convs),
        ]  # fmt: skip
    return [
        Part("tests", 130, pytest("tests", "-m", "gpu", "tests"), read_tests),
        Part(
            "step", 200,
            [*python, "benchmarks.train_step", *on, "--batch-sizes", "2,16", "--dtypes", "bfloat16",
             "--seconds", "1.5", "--inference", "2", "--budget", "150", "--output", folder("step")], read_step,
        ),
        Part("training", 60, training, read_training),
        Part(
            "operators", 130, pytest("operators", *(f"benchmarks/{name}" for name in BENCHMARKS), *operators),
            read_operators,
        ),
        Part(
            "convs", 50, [*python, "benchmarks.convs", *on, "--budget", "35", "--output", folder("convs")], read_convs
        ),
    ]  # fmt: skip


def run_part(part: Part, output: Path, **environment: str) -> Result:
    """Run a part and read what it found.

    Returns:
        ``part``, ``status`` (passed, failed, stopped), ``seconds``, ``reasons`` of what failed, ``sections``.
    """
    folder = output / part.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    log = folder / "log.txt"
    code = run_limited(part.command, part.limit, log, **environment)
    seconds = time.monotonic() - began
    sections, reasons = part.read(folder)
    status = "stopped" if code == TIMED_OUT else "failed" if code else "passed"
    if code == TIMED_OUT:
        reasons.insert(0, f"{part.name}: stopped after {part.limit:g} s")
    elif code and not reasons:
        reasons.insert(0, f"{part.name}: exit code {code}: {last_lines(log)}")
    elif part.name == "training" and reasons and not code:
        status = "failed"
    return {"part": part.name, "status": status, "seconds": seconds, "reasons": reasons, "sections": sections}


def summary_of(part: Result) -> str:
    """What a part found, in a few words."""
    sections = part["sections"]
    if "tests" in sections:
        outcomes = [test["outcome"] for test in sections["tests"]]
        counts = ((name, outcomes.count(name)) for name in ("passed", "failed", "skipped"))
        return ", ".join(f"{count} {name}" for name, count in counts if count)
    if "train" in sections:
        ratios = step_tables.ratios(sections["train"])
        found = [f"batch {row['batch_size']}: {row['over_best']:.2f} x torchvision" for row in ratios]
        measured = sum("images_per_second" in row for row in sections["train"])
        return "; ".join([f"{measured} rows measured", *found])
    if "training" in sections:
        losses = sections["training"]["losses"]
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    if "benchmarks" in sections:
        return f"{len(sections['benchmarks'])} benchmarks"
    if "convs" in sections:
        return f"{sum('forward_ms' in row for row in sections['convs']['rows'])} rows measured"
    return ""


def combine(found: Sequence[Result]) -> Result:
    """One result of all parts so far: the parts, and the sections that each of them adds."""
    result: Result = {"machine_info": describe(), "benchmarks": [], "parts": []}
    for part in found:
        row = {name: part[name] for name in ("part", "status", "seconds", "reasons")}
        result["parts"].append({**row, "found": summary_of(part)})
        result.update(part["sections"])
    return result


def markdown(result: Result) -> str:
    """The table of parts and failures, and behind it the tables of each part."""

    def clean(text: str) -> str:
        return " ".join(text.replace("|", "/").split())

    lines = [report.machine_line(result["machine_info"]), "", "| part | result | seconds | what |", "|---|---|---|---|"]
    for part in result["parts"]:
        lines.append(f"| {part['part']} | {part['status']} | {part['seconds']:.0f} | {clean(part['found'])} |")
        lines += [f"| {part['part']} | - | | {clean(reason)} |" for reason in part["reasons"]]
    sections = [step_tables.markdown(result)] if result.get("train") else []
    if result.get("convs", {}).get("rows"):
        sections.append(convs.markdown({**result, **result["convs"]}))
    if result["benchmarks"]:
        groups: dict[str, list[Any]] = {}
        for row in result["benchmarks"]:
            groups.setdefault(row["group"] or row["name"], []).append(row)
        sections.append(report.markdown(result["machine_info"], dict(sorted(groups.items()))))
    # Each begins with the line of the machine, which stands at the top already.
    return "\n".join([*lines, *(text.partition("\n")[2] for text in sections)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-check", help="folder of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="next to nothing of each part: a check of this script")
    parser.add_argument("--only", default="", help="parts to run, separated by commas")
    parser.add_argument("--train-on-shapes", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no CUDA device here; --device cpu --small checks the script itself", file=sys.stderr
        )
        return 2
    if args.device == "cpu" and not args.small:
        print("error: --device cpu goes with --small: the whole check would take a CPU hours", file=sys.stderr)
        return 2
    if args.train_on_shapes:
        return train_on_shapes(args.train_on_shapes, args.device, args.small)
    wanted = parts(args.output, args.device, args.small)
    chosen = [name for name in args.only.split(",") if name] or [part.name for part in wanted]
    unknown = set(chosen) - {part.name for part in wanted}
    if unknown:
        names = ", ".join(part.name for part in wanted)
        print(f"error: --only {args.only}: the parts are {names}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    environment = {"FASTRCNN_BENCH_SMALL": "1"} if args.small else {}
    found: list[Result] = []
    for part in wanted:
        if part.name not in chosen:
            continue
        print(f"{part.name}: at most {part.limit:g} s, log in {args.output / part.name / 'log.txt'}", flush=True)
        found.append(run_part(part, args.output, **environment))
        result = combine(found)
        (args.output / "gpu-check.json").write_text(json.dumps(result, indent=1))
        (args.output / "gpu-check.md").write_text(markdown(result))
    print((args.output / "gpu-check.md").read_text())
    return 0 if all(part["status"] == "passed" for part in found) else 1


if __name__ == "__main__":
    sys.exit(main())
