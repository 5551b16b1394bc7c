"""The files of a run in OUTPUT_DIR.

====================  ================================================================================================
config.yml            the configuration in force
command.txt           command line, git commit, versions, devices, data sets
labels.json           the class name of each label
log.txt               the log; ``log.rank{k}.txt`` of the other ranks
metrics.jsonl         one JSON object a line, see :class:`MetricsFile`
tensorboard/          the same numbers, if TensorBoard is installed
model_*.pth           checkpoints, see :mod:`fastrcnn.engine.checkpoint`
last_checkpoint       the name of the newest
inference/<dataset>/  ``bbox.json``, ``segm.json`` (COCO results), ``summary.json``, ``images/`` (drawn detections)
====================  ================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import logging.handlers
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrcnn.engine.checkpoint import BEST, FINAL, NUMBERED, POINTER, TEMPORARY
from fastrcnn.files import write_atomically

LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
FILES = ("config.yml", "command.txt", "labels.json", "log.txt", "metrics.jsonl", POINTER, FINAL, BEST)
INFERENCE_FILES = ("bbox.json", "segm.json", "summary.json")


class OutputDirError(ValueError):
    """OUTPUT_DIR cannot be used, in one line."""


def check_output_dir(directory: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a directory that is in use or cannot be written, before anything is built or written.

    A directory that holds any file is refused without ``resume`` or ``overwrite``. The working directory itself
    (OUTPUT_DIR's default, where other files are to be expected) is refused only if it holds files of a run.

    Raises:
        OutputDirError: with what to do.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputDirError(f"OUTPUT_DIR {directory} is a file: pass another OUTPUT_DIR")
    existing = next(parent for parent in [directory, *directory.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputDirError(f"OUTPUT_DIR {directory} cannot be written: no permission in {existing}")
    if not directory.is_dir() or resume or overwrite:
        return
    in_use = own_files(directory)
    if not in_use and directory.resolve() != Path.cwd():
        in_use = sorted(directory.iterdir())
    if in_use:
        raise OutputDirError(
            f"OUTPUT_DIR {directory} is not empty (it holds {in_use[0].name}): pass --resume to go on with its run, "
            "--overwrite to replace the files of its run, or another OUTPUT_DIR"
        )


def own_files(directory: Path) -> list[Path]:
    """The files in ``directory`` that a run writes, and no others: what ``--overwrite`` removes."""
    if not directory.is_dir():
        return []
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and (
            path.name in FILES
            or NUMBERED.fullmatch(path.name)
            or TEMPORARY.fullmatch(path.name)
            or (path.name.startswith("log.rank") and path.suffix == ".txt")
        )
    ]
    found += sorted((directory / "tensorboard").glob("events.out.tfevents.*"))
    for name in INFERENCE_FILES:
        found += sorted((directory / "inference").glob(f"*/{name}"))
    return found + sorted((directory / "inference").glob("*/images/*.png"))


def prepare_output_dir(directory: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make the directory ready to be written: the first change on disk of a run, after everything else was built.

    Raises:
        OutputDirError: as :func:`check_output_dir`, which is asked again.
    """
    check_output_dir(directory, resume=resume, overwrite=overwrite)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if overwrite and not resume:
            for path in own_files(directory):
                path.unlink()
        for path in directory.iterdir():
            if TEMPORARY.fullmatch(path.name):  # a process killed while it saved
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputDirError(f"OUTPUT_DIR {directory} cannot be written: {error}") from error


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as one JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content) + "\n")


def set_up_logging(rank: int = 0) -> None:
    """Log to stdout in maskrcnn-benchmark's form; ranks other than 0 print warnings only.

    What is said before OUTPUT_DIR may be written is kept for :func:`log_to_file`.
    """
    root = logging.getLogger("fastrcnn")
    root.setLevel(logging.INFO)
    root.propagate = False
    close_logging()
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(logging.Formatter(LOG_FORMAT))
    root.addHandler(console)
    root.addHandler(logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1))


def log_to_file(directory: Path, rank: int = 0) -> None:
    """Log to ``log.txt`` or ``log.rank{k}.txt`` in ``directory`` too, what was said so far included."""
    root = logging.getLogger("fastrcnn")
    name = "log.txt" if rank == 0 else f"log.rank{rank}.txt"
    file = logging.FileHandler(directory / name, encoding="utf-8")
    file.setFormatter(logging.Formatter(LOG_FORMAT))
    for handler in list(root.handlers):
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.close()
            root.removeHandler(handler)
    root.addHandler(file)


def close_logging() -> None:
    """Take the handlers of :func:`set_up_logging` away again."""
    root = logging.getLogger("fastrcnn")
    for handler in list(root.handlers):
        handler.close()
        root.removeHandler(handler)


def git_state(folder: Path) -> str:
    """``<commit>`` or ``<commit> dirty <hash of the changes>``; ``not a git checkout`` where there is none."""

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=20).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return commit if not changes else f"{commit} dirty {hashlib.sha256(changes).hexdigest()[:12]}"


def describe_run(argv: Sequence[str], device: torch.device, world_size: int, datasets: Mapping[str, str]) -> str:
    """What has to be known to repeat a run: the text of ``command.txt``.

    Args:
        argv: the command line.
        datasets: a fingerprint of each data set.
    """
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    if device.type == "cuda":
        hardware = f"{world_size} x {torch.cuda.get_device_name(device)}"
    else:
        hardware = f"{world_size} x cpu {_cpu_name()}, {torch.get_num_threads()} threads"
    rows = {
        "command": shlex.join(argv),
        "directory": os.getcwd(),
        "git": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or "none",
        "system": platform.platform(),
        "device": hardware,
        **{f"dataset {name}": fingerprint for name, fingerprint in datasets.items()},
    }
    return "".join(f"{key}: {value}\n" for key, value in rows.items())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class MetricsFile:
    """``metrics.jsonl`` and, if it is installed, TensorBoard.

    Each line is one JSON object with ``type`` and ``iteration`` (1-based: the number of steps done):

    - ``train``, one a log period, means over the period: ``loss``, one entry a loss by its name, ``time`` (seconds an
      iteration), ``data_time`` (of it, waiting for data), ``images_per_second`` (all ranks), ``lr`` (first group,
      after the step), ``max_mem_mib``.
    - ``eval``, one a data set: ``dataset``, and ``bbox/AP``, ``bbox/AP50``, ..., ``segm/AP``, ... in [0, 1].
    - ``nonfinite``, the last line of a run that ended so: the losses of that iteration; ``"nan"``, ``"inf"`` as text.

    Args:
        directory: None keeps nothing (ranks other than 0).
        start_iteration: lines after it are dropped: a run that is resumed writes them again.
    """

    def __init__(self, directory: Path | None, start_iteration: int = 0) -> None:
        self.file = None
        self.board: Any = None
        if directory is None:
            return
        path = directory / "metrics.jsonl"
        if path.exists():
            write_text(path, "".join(_lines_up_to(path, start_iteration)))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_iteration + 1)

    def write(self, kind: str, iteration: int, values: Mapping[str, float | str]) -> None:
        """Append one line and flush it."""
        if self.file is None:
            return
        plain = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self.file.write(json.dumps({"type": kind, "iteration": iteration, **plain}) + "\n")
        self.file.flush()
        if self.board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{key}", value, iteration)
            self.board.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.board is not None:
            self.board.close()


def _lines_up_to(path: Path, iteration: int) -> list[str]:
    """The whole lines of ``path`` of steps not after ``iteration``; a line cut off by a crash is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def free_space_warning(directory: Path, needed_bytes: int) -> str:
    """A sentence if the disk of ``directory`` has less than ``needed_bytes`` left, else empty."""
    free = shutil.disk_usage(directory).free
    if free >= needed_bytes:
        return ""
    return f"{directory} has {free / 2**20:.0f} MiB left; one checkpoint needs about {needed_bytes / 2**20:.0f} MiB"
