"""Break the kernels one line at a time and see that the named test fails.

    python -m tests.kernels.breakages.run [--language python|cpp] [--only SUBSTRING] [--every 12] [--processes 2]

Each breakage is applied to a copy of the package, never to the checkout; the C++ ones to a copy of ``csrc`` that is
built with it. Prints one JSON object a breakage: ``caught``, or what happened instead. A test that fails for another
reason than an assertion of its own (no such test, an error while collecting, a hang) does not count as caught.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kernels import breakages as package
from tests.kernels.breakages import Breakage

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 90  # a test that takes longer than this hangs


def collect(language: str = "") -> list[Breakage]:
    """All breakages, in the order of files and lists; ``python`` or ``cpp`` only those of that language."""
    found: list[Breakage] = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if info.name != "run":
            found += importlib.import_module(f"{package.__name__}.{info.name}").BREAKAGES
    return [b for b in found if not language or (language == "cpp") == ("/csrc/" in b.path)]


def apply(breakage: Breakage, tree: Path) -> None:
    """Break the copy of the file in ``tree``."""
    path = tree / breakage.path
    source = path.read_text()
    places = source.count(breakage.old)
    if places != 1:
        raise ValueError(f"{breakage.path} has {places} places with {breakage.old!r}, expected one")
    path.write_text(source.replace(breakage.old, breakage.new))


def copy_tree(source: Path, tree: Path) -> None:
    """What is imported and what is built, modification times kept."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / "kernels", tree / "kernels", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(source / name, tree / name)
    # build_ext looks for every package that pyproject.toml lists.
    (tree / "fastrcnn").symlink_to(source / "fastrcnn")
    if (source / "build").exists():
        shutil.copytree(source / "build", tree / "build")


def build(tree: Path) -> str:
    """Build the extension in place; the compiler's complaint if that fails."""
    environment = dict(os.environ, FASTRCNN_BUILD_EXT="1", FASTRCNN_BUILD_JOBS="1")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return "" if run.returncode == 0 else run.stderr[-1500:]


def run_test(breakage: Breakage, tree: Path) -> str:
    """``caught`` or what happened, in a child process that imports the package from ``tree``."""
    log = tree / "pytest.log"
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, str(tree / "kernels"))
        os.chdir(ROOT)
        import pytest

        code = pytest.main(
            [
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:benchmark",
                "--no-header",
                *breakage.test.split(maxsplit=2),
            ]
        )
        os._exit(int(code))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        return f"the test did not end in {SECONDS} s"
    code = os.waitstatus_to_exitcode(status)
    if code == 1:
        return "caught"
    if code == 0:
        return "NOT CAUGHT: the test passes"
    return f"exit code {code}: {log.read_text()[-1500:]}"


def judge(job: tuple[Breakage, str]) -> dict[str, Any]:
    """One breakage: copy, break, build where needed, test."""
    breakage, source = job
    result: dict[str, Any] = breakage._asdict()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        try:
            copy_tree(Path(source), tree)
            apply(breakage, tree)
            error = build(tree) if "/csrc/" in breakage.path else ""
            result["outcome"] = f"does not compile: {error}" if error else run_test(breakage, tree)
        except (OSError, ValueError) as error:
            result["outcome"] = str(error)
    return result


def warm_up() -> None:
    """Import what every test imports, but nothing of this package: the children then start in no time."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in ("torch", "numpy", "pytest", "hypothesis", "triton", "triton.language", "torch._dynamo", "PIL.Image"):
        importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] in ("fastrcnn", "fastrcnn_kernels")]
    assert not loaded, f"imported too early: {loaded}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", choices=("python", "cpp"), default="")
    parser.add_argument("--only", default="", help="breakages whose path or test contains this")
    parser.add_argument("--every", type=int, default=1, help="only each n-th of them")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [b for b in collect(arguments.language) if arguments.only in b.path or arguments.only in b.test]
    jobs = jobs[:: arguments.every]
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder)
        copy_tree(ROOT, whole)
        if any("/csrc/" in b.path for b in jobs):
            error = build(whole)
            if error:
                raise RuntimeError(f"the unbroken kernels do not compile: {error}")
        context = multiprocessing.get_context("fork")
        with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
            results = []
            for result in pool.imap(judge, [(b, folder) for b in jobs], chunksize=1):
                print(json.dumps(result), flush=True)
                results.append(result)
    return 0 if all(r["outcome"] == "caught" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
