"""``python -m fastrcnn.doctor``: what this installation can do here, and whether its kernels agree.

Prints versions, devices, the compiler, and for every operator which back-end runs and why others do not; then runs
``nms`` and ``roi_align`` (forward and backward) in every back-end that is available, on every device, against the
reference on the CPU in double precision.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrcnn_kernels as kernels

PACKAGES = ("torch", "triton", "numpy", "pycocotools", "pillow", "pydantic", "pyyaml", "fastrcnn")
OPTIONAL = ("simplejpeg", "tensorboard", "torchvision")
# Float32 against the same in float64: a few roundings of values of order 1; gradients add up to about 50 terms.
TOLERANCE = 1e-4

EPILOG = """examples:
  python -m fastrcnn.doctor
  python -m fastrcnn.doctor --json > doctor.json
  TRITON_INTERPRET=1 python -m fastrcnn.doctor      tests the Triton kernels without a GPU

exit codes: 0 all kernels agree with the reference, 1 one does not or fails, 2 usage"""


def versions() -> dict[str, str]:
    """Python and the packages that matter, by name."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *OPTIONAL):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed" + (" (optional)" if package in OPTIONAL else "")
    return found


def devices() -> list[str]:
    """The CPU with its threads, then the CUDA devices."""
    found = [f"cpu: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda or torch.version.hip}"
        )
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compiler() -> str:
    """The C++ compiler that a rebuild of the extension would use."""
    name = os.environ.get("CXX", "").split() or next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), [])
    if not name:
        return "none found (needed only to build the C++ kernels)"
    try:
        result = subprocess.run([*name, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{' '.join(name)}: does not run ({error})"
    return f"{shutil.which(name[0]) or name[0]}: {result.stdout.splitlines()[0]}"


def reports() -> dict[str, dict[str, dict[str, str]]]:
    """``backend_report`` for the CPU and, where there is one, for CUDA."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {kind: kernels.backend_report(kind) for kind in kinds}


def _check_nms(device: str) -> float:
    """0 if the kept boxes are those of the reference, in order, else the number of places that differ."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 1 + torch.rand(300, 2, generator=generator) * 40], dim=1)
    scores = torch.rand(300, generator=generator)
    scores[100:120] = scores[100]  # equal scores: the lower index comes first
    worst = 0.0
    for offset in (0, 1):
        with kernels.set_backend("reference"):
            expected = kernels.nms(boxes, scores, 0.5, box_offset=offset)
        found = kernels.nms(boxes.to(device), scores.to(device), 0.5, box_offset=offset).cpu()
        length = max(len(expected), len(found))
        same = sum(a == b for a, b in zip(expected.tolist(), found.tolist(), strict=False))
        worst = max(worst, float(length - same))
    return worst


def _check_roi_align(device: str) -> float:
    """The largest difference of outputs and input gradients from the reference in double precision."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 5, 20, 30, generator=generator)
    corners = torch.rand(6, 2, generator=generator) * 80 - 10
    sizes = torch.rand(6, 2, generator=generator) * 60
    image = torch.arange(6).remainder(2).to(features.dtype)[:, None]
    rois = torch.cat([image, corners, corners + sizes], dim=1)
    upstream = torch.rand(6, 5, 7, 7, generator=generator)

    def run(kind: torch.dtype, where: str, sampling_ratio: int, aligned: bool) -> tuple[Tensor, Tensor]:
        source = features.to(where, kind).requires_grad_()
        output = kernels.roi_align(source, rois.to(where, kind), 7, 0.25, sampling_ratio, aligned)
        (gradient,) = torch.autograd.grad(output, source, upstream.to(where, kind))
        return output.detach().cpu().double(), gradient.cpu().double()

    worst = 0.0
    for sampling_ratio, aligned in ((2, False), (0, True)):
        with kernels.set_backend("reference"):
            expected = run(torch.float64, "cpu", sampling_ratio, aligned)
        found = run(torch.float32, device, sampling_ratio, aligned)
        for a, b in zip(expected, found, strict=True):
            difference = (a - b).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


CHECKS: dict[str, Callable[[str], float]] = {"nms": _check_nms, "roi_align": _check_roi_align}


def self_test() -> list[dict[str, Any]]:
    """Run the checks in every available back-end.

    Returns:
        For each operator, device and back-end: ``operator``, ``device``, ``backend``, ``status`` (``ok``, ``differs``,
        ``failed`` or ``not available``), ``difference`` (None where it did not run), ``detail``.
    """
    results = []
    for device, report in reports().items():
        for operator, check in CHECKS.items():
            rows = [row for name, row in report.items() if name in (operator, f"{operator}_backward")]
            for backend in ("reference", "cpp", "triton"):
                result: dict[str, Any] = {"operator": operator, "device": device, "backend": backend}
                result["difference"] = None
                reasons = [row[backend] for row in rows if row[backend] != "available"]
                if reasons or not rows:
                    detail = reasons[0] if reasons else "no such operator is registered"
                    results.append({**result, "status": "not available", "detail": detail})
                    continue
                try:
                    with kernels.set_backend(backend):
                        difference = check(device)
                except Exception as error:
                    detail = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    results.append({**result, "status": "failed", "detail": detail})
                    continue
                agrees = difference <= (0 if operator == "nms" else TOLERANCE)
                results.append(
                    {
                        **result,
                        "difference": difference,
                        "status": "ok" if agrees else "differs",
                        "detail": f"difference {difference:.3g}",
                    }
                )
    return results


def examine() -> dict[str, Any]:
    """All of the above; ``agree`` says whether no check differed or failed."""
    tests = self_test()
    return {
        "versions": versions(),
        "devices": devices(),
        "compiler": compiler(),
        "backend": kernels.get_backend(),
        "operators": reports(),
        "self_test": tests,
        "agree": all(test["status"] in ("ok", "not available") for test in tests),
    }


def to_text(findings: dict[str, Any]) -> str:
    """The findings for people."""
    lines = ["versions", *(f"  {name:<12} {version}" for name, version in findings["versions"].items())]
    lines += ["devices", *(f"  {device}" for device in findings["devices"])]
    lines += ["compiler", f"  {findings['compiler']}"]
    for device, report in findings["operators"].items():
        lines.append(f"operators on {device} (back-end in force: {findings['backend']})")
        width = max((len(name) for name in report), default=0)
        reasons: dict[str, list[str]] = {}
        for name, row in report.items():
            available = [b for b in ("reference", "cpp", "triton") if row[b] == "available"]
            lines.append(f"  {name:<{width}}  runs {row['auto']:<9}  available: {', '.join(available)}")
            for backend in ("reference", "cpp", "triton"):
                if row[backend] != "available":
                    reasons.setdefault(f"{backend}: {row[backend]}", []).append(name)
        for reason, names in reasons.items():
            which = "all" if len(names) == len(report) else ", ".join(names)
            lines.append(f"  not available, {reason}  [{which}]")
    lines.append("self-test against the reference")
    for test in findings["self_test"]:
        place = f"{test['operator']} {test['device']} {test['backend']}"
        lines.append(f"  {place:<26} {test['status']:<13} {test['detail']}")
    lines.append("all available kernels agree" if findings["agree"] else "KERNELS DISAGREE: see the self-test above")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrcnn.doctor",
        description="Show what this installation can do here, and test its kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)
    findings = examine()
    print(json.dumps(findings, indent=2) if arguments.json else to_text(findings))
    return 0 if findings["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
