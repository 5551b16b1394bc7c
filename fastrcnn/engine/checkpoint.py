"""Checkpoints: written whole or not at all, and read back safely.

A file has the keys of maskrcnn-benchmark (``model``, ``optimizer``, ``scheduler``, ``iteration``) and of this package
(``scaler``, ``seed``, ``config_hash``, ``best``). There is no state of random generators: all random choices follow
from the seed and the step.

Names: ``model_{iteration:07d}.pth``, ``model_final.pth``, ``model_best.pth``, and ``last_checkpoint``, a text file
with the name of the newest.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrcnn.engine.distributed import unwrap_model
from fastrcnn.engine.solver import WarmupMultiStepLR, load_optimizer_state
from fastrcnn.files import write_atomically

logger = logging.getLogger("fastrcnn.checkpoint")

NUMBERED = re.compile(r"model_(\d{7,})\.pth")
FINAL = "model_final.pth"
BEST = "model_best.pth"
POINTER = "last_checkpoint"
TEMPORARY = re.compile(r"\.[\w.]+\.tmp-\d+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line."""


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint, on the host; only tensors and plain containers are ever unpickled.

    Args:
        mmap: read the tensors when they are used, without comparing checksums.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a checkpoint.
    """
    try:
        if not mmap and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load compares no checksums
            if damaged is not None:
                raise CheckpointError(f"{path}: not a whole checkpoint (the checksum of {damaged} is wrong)")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a whole checkpoint ({reason})") from error
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{path}: not a checkpoint: it has no entry 'model'")
    return content


def last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names, if both are there.

    maskrcnn-benchmark writes a path there, this package a name, so that the folder can be moved.
    """
    pointer = directory / POINTER
    if not pointer.is_file():
        return None
    named = Path(pointer.read_text().strip())
    for path in (directory / named.name, named):
        if path.is_file():
            return path
    return None


class Checkpointer:
    """Saves and restores the state of a run in ``directory``.

    Args:
        model: plain or wrapped; saved without the wrapper's prefix.
        scaler: the loss scaler of float16 training.
        keep: how many numbered checkpoints to keep; 0 keeps all.
        extra: entries of this package that do not change in a run (seed, config_hash).
        is_main: whether this process writes; the others only read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: WarmupMultiStepLR,
        scaler: torch.amp.GradScaler | None = None,
        keep: int = 0,
        extra: Mapping[str, Any] | None = None,
        is_main: bool = True,
    ) -> None:
        self.directory = directory
        self.model = unwrap_model(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.keep = keep
        self.extra = dict(extra or {})
        self.is_main = is_main
        self.best: dict[str, Any] | None = None

    def weights_are_finite(self) -> bool:
        """Whether every weight is finite. Waits for the device."""
        finite = [p.detach().isfinite().all() for p in self.model.parameters() if p.requires_grad]
        return bool(torch.stack(finite).all()) if finite else True

    def save(self, iteration: int, name: str | None = None) -> Path:
        """Write the state after ``iteration`` steps and point ``last_checkpoint`` to it.

        Args:
            name: default ``model_{iteration:07d}.pth``.

        Raises:
            OSError: if it cannot be written; the former checkpoints stay.
        """
        path = self.directory / (name or f"model_{iteration:07d}.pth")
        if self.is_main:
            self._write(path, iteration)
            write_atomically(self.directory / POINTER, lambda file: file.write(path.name.encode()))
            self._remove_old()
        return path

    def save_best(self, iteration: int, metric: str, value: float) -> bool:
        """Write ``model_best.pth`` if ``value`` is the highest so far; whether it was."""
        if self.best is not None and self.best["metric"] == metric and value <= self.best["value"]:
            return False
        self.best = {"metric": metric, "value": value, "iteration": iteration}
        if self.is_main:
            self._write(self.directory / BEST, iteration)
        return True

    def _write(self, path: Path, iteration: int) -> None:
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "iteration": iteration,
            **({"scaler": self.scaler.state_dict()} if self.scaler is not None and self.scaler.is_enabled() else {}),
            **self.extra,
            "best": self.best,
        }
        logger.info("Saving checkpoint to %s", path)
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:
            # torch.save hides a full disk behind an assertion about positions in the archive.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                cause.errno, f"checkpoint not written, earlier ones are whole: {cause.strerror}", str(path)
            ) from error

    def _remove_old(self) -> None:
        if self.keep <= 0:
            return
        for path in self._numbered()[self.keep :]:
            path.unlink(missing_ok=True)

    def _numbered(self) -> list[Path]:
        """The numbered checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.directory.iterdir() if (match := NUMBERED.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def _candidates(self) -> list[Path]:
        """The checkpoints to resume from, the best choice first: by iteration, and the pointed-to one before equals."""
        pointed = last_checkpoint(self.directory)
        final = self.directory / FINAL
        ranked = [(int(NUMBERED.fullmatch(path.name)[1]), path == pointed, path) for path in self._numbered()]  # type: ignore[index]
        for path in {final, pointed} - {None, *self._numbered()}:
            assert path is not None
            if not path.is_file():
                continue
            try:
                iteration = int(read_checkpoint(path, mmap=True).get("iteration", 0))
            except CheckpointError:
                iteration = 2**62  # damaged: tried first, so that the fall-back is said
            ranked.append((iteration, path == pointed, path))
        return [path for _, _, path in sorted(ranked, key=lambda r: r[:2], reverse=True)]

    def load_for_resume(self) -> int:
        """Restore the newest whole checkpoint of the directory.

        A damaged one is passed over with a warning. Hyper-parameters come from the configuration of this run, not
        from the checkpoint (see :func:`fastrcnn.engine.solver.load_optimizer_state`).

        Returns:
            The number of steps done; 0 if the directory has no checkpoint.

        Raises:
            CheckpointError: if there are checkpoints but none is whole, or one does not fit the model.
        """
        candidates = self._candidates()
        for path in candidates:
            try:
                content = read_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s; trying the one before it", error)
                continue
            self._restore(path, content)
            logger.info("Resumed from %s after %d iterations", path, content["iteration"])
            return int(content["iteration"])
        if candidates:
            raise CheckpointError(f"{self.directory}: none of its {len(candidates)} checkpoints can be read")
        return 0

    def _restore(self, path: Path, content: dict[str, Any]) -> None:
        absent = [key for key in ("optimizer", "scheduler", "iteration") if key not in content]
        if absent:
            raise CheckpointError(
                f"{path}: has weights but no {', '.join(absent)}: it cannot be resumed from; pass it as MODEL.WEIGHT"
            )
        theirs, ours = content["model"], self.model.state_dict()
        wrong = [key for key in ours if key not in theirs or theirs[key].shape != ours[key].shape]
        wrong += [key for key in theirs if key not in ours]
        if wrong:
            raise CheckpointError(
                f"{path}: does not fit this model ({len(wrong)} entries differ, first {wrong[0]}): resume with the "
                "model settings that the run was started with"
            )
        self.model.load_state_dict(theirs)
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        try:
            load_optimizer_state(self.optimizer, content["optimizer"], names)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.scheduler.load_state_dict(content["scheduler"])
        if self.scaler is not None and self.scaler.is_enabled() and "scaler" in content:
            self.scaler.load_state_dict(content["scaler"])
        self.best = content.get("best")
        saved = content.get("config_hash")
        if saved is not None and saved != self.extra.get("config_hash", saved):
            logger.warning("The configuration differs from the one of %s: the present one is used", path)
