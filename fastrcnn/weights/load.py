"""Load a file of weights into a model, by the longest matching end of the names.

maskrcnn-benchmark's rule (``align_and_update_state_dicts``): a tensor ``layer1.0.conv1.weight`` of an ImageNet file
goes to ``backbone.body.layer1.0.conv1.weight`` of the model, because the model's name ends with it. Where several names
of the file fit, the longest wins. Names of whole detectors match in full.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class WeightsError(ValueError):
    """Weights that cannot be loaded; one line that says which file, which name and what to do."""


@dataclass(frozen=True)
class WeightsReport:
    """What loading did.

    Attributes:
        path: the file.
        loaded: model names that were filled.
        missing: model names (parameters and buffers) that the file does not have; they keep their initial values.
        unexpected: names of the file that no part of the model took.
        mismatched: model names whose shape differs in the file, with both shapes; they were not loaded.
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.path}: {len(self.loaded)} tensors loaded, {len(self.missing)} of the model not in the file, "
            f"{len(self.unexpected)} of the file not in the model, {len(self.mismatched)} of another shape"
        )


def load_weights(
    model: nn.Module, path: str | Path, *, strict_shapes: bool = True, complete: bool = False
) -> WeightsReport:
    """Fill ``model`` from a file.

    Args:
        model: its parameters and buffers are overwritten in place, whatever device they are on.
        path: a ``torch.save`` file: a state dict, or a checkpoint with one under ``model`` or ``state_dict``. Read with
            ``weights_only=True``: a file cannot run code.
        strict_shapes: raise where a tensor has another shape; False leaves such tensors as they are and reports them,
            which is what fine-tuning with another number of classes wants.
        complete: raise where the file lacks a tensor of the model, as a model to be used, not trained, must have all.
            Cell anchors may be absent: they follow from the configuration, and other systems do not save them.

    Raises:
        WeightsError: the file is missing, unreadable, fits nowhere, has tensors of another shape, or lacks some.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    report = WeightsReport(str(path))
    used = set()
    with torch.no_grad():
        for name, target in own.items():
            source = _longest_suffix(name, state)
            if source is None:
                report.missing.append(name)
                continue
            used.add(source)
            value = state[source]
            if value.shape != target.shape:
                report.mismatched.append(f"{name}: {_shape(value)} in the file, {_shape(target)} in the model")
                continue
            target.copy_(value)
            report.loaded.append(name)
    report.unexpected.extend(name for name in state if name not in used)
    if not report.loaded and not report.mismatched:
        raise WeightsError(f"{path}: none of its {len(state)} tensors fits a name of the model")
    if report.mismatched and strict_shapes:
        raise WeightsError(
            f"{path}: {len(report.mismatched)} tensors have another shape, the first is {report.mismatched[0]}; "
            "choose the configuration that the weights were trained with"
        )
    absent = [name for name in report.missing if ".cell_anchors." not in name]
    if complete and absent:
        raise WeightsError(
            f"{path}: lacks {len(absent)} of the model's tensors, the first is {absent[0]}; "
            "choose the configuration that the weights were trained with"
        )
    return report


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, without the ``module.`` that DataParallel adds."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than tensors and plain containers, so it is not read (it could run code): "
            f"{str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: not a readable torch.save file ({reason})") from None
    if isinstance(content, dict):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _longest_suffix(name: str, state: dict[str, Tensor]) -> str | None:
    """The longest end of the dotted ``name`` that is a name of the file."""
    parts = name.split(".")
    for start in range(len(parts) - 1):
        candidate = ".".join(parts[start:])
        if candidate in state:
            return candidate
    return None


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a scalar"
