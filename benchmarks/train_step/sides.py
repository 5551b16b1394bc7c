"""What the sides of the comparison have in common.

A side has ``mode``, ``dtype``, ``model`` and ``optimizer``; ``step(i)`` trains on batch ``i`` (they are cycled through)
and returns the losses, ``detect(i)`` gives the number of detections of each image. :mod:`benchmarks.train_step.ours`
is our detector in its modes, :mod:`benchmarks.train_step.peer` torchvision's Mask R-CNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.train_step.batches import StepBatch
from fastrcnn.config import ConfigError, load_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# So small that the statistics of the first step are those of the last; the update is computed all the same.
LEARNING_RATE = 1e-7


class NotHere(RuntimeError):
    """Something that this machine or this version of the package cannot run, with the reason."""


class Side(Protocol):
    """One column of the comparison."""

    mode: str
    dtype: str
    model: nn.Module
    optimizer: Any
    batches: Sequence[StepBatch]

    def step(self, number: int) -> dict[str, Tensor]: ...
    def detect(self, number: int) -> list[int]: ...
    def positives(self, number: int) -> float: ...
    def set_score_threshold(self, value: float) -> None: ...
    def class_logits(self, number: int) -> Tensor: ...
    @property
    def box_predictor(self) -> nn.Module: ...


def known_key(config_file: Path, name: str, value: str) -> bool:
    """Whether this version of the package has the configuration key ``name``.

    Raises:
        ConfigError: it has, and does not take ``value``.
    """
    try:
        load_config(config_file, [name, value])
    except ConfigError as error:
        if "unknown key" in str(error).lower():
            return False
        raise
    return True


def capture(module: nn.Module, call: Callable[[], Any]) -> Any:
    """What ``module`` returned the last time that it ran within ``call()``."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        call()
    finally:
        handle.remove()
    if not seen:
        raise NotHere(f"{type(module).__name__} did not run as a module")
    return seen[-1]


def each_once(batches: Sequence[StepBatch], convert: Callable[[StepBatch], Any]) -> list[Any]:
    """``convert`` of each batch, called once for one that recurs."""
    found = {id(batch): batch for batch in batches}
    converted = {key: convert(batch) for key, batch in found.items()}
    return [converted[id(batch)] for batch in batches]
