"""Files of weights, whatever their format, as tensors by name. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrcnn.weights.pickles import read_pickle
from fastrcnn.weights.report import WeightsError
from fastrcnn.weights.safetensors import is_safetensors, read_safetensors

# How torch.save began before the format was a zip archive: a pickled magic number.
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
CONTAINERS = ("model", "state_dict", "model_state", "blobs")  # entries of a checkpoint that hold the weights
OWN_ENTRY = "fastrcnn"  # the entry with which this package notes what another format has no place for
OWN_PREFIX = "fastrcnn:"  # the same, of names in a safetensors file


@dataclass
class FileContent:
    """What a file holds.

    Attributes:
        tensors: by the file's own names, on the CPU, without the ``module.`` that DataParallel adds.
        own: the entry of this package, see :mod:`fastrcnn.weights.write`.
        training_state: entries beside the weights that loading leaves alone: optimizer, scheduler, iteration ...
    """

    tensors: dict[str, Tensor]
    own: dict[str, Any] = field(default_factory=dict)
    training_state: list[str] = field(default_factory=list)


def read_file(path: Path) -> FileContent:
    """Read a ``torch.save`` file (new or old), a pickle of numpy arrays, or a safetensors file.

    Raises:
        WeightsError: there is no such file, it is damaged, is something else, or would run code.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    try:
        with open(path, "rb") as file:
            start = file.read(32)
        if is_safetensors(start):
            return _from_safetensors(path)
        content = _unpickle(path, start)
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise WeightsError(
            f"{path}: is damaged, or holds more than tensors and plain containers; it is not read, as it could run "
            f"code ({reason})"
        ) from None
    except WeightsError:
        raise
    except Exception as error:  # damaged data makes readers raise many kinds
        raise WeightsError(f"{path}: not a readable file of weights ({_first_line(error)})") from None
    return _from_containers(path, content)


def _unpickle(path: Path, start: bytes) -> Any:
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        if damaged is not None:
            raise WeightsError(f"{path}: not a readable file of weights (the checksum of {damaged} is wrong)")
        return torch.load(path, map_location="cpu", weights_only=True)
    if start.startswith(LEGACY_TORCH):
        return torch.load(path, map_location="cpu", weights_only=True)
    if not start:
        raise WeightsError(f"{path}: not a readable file of weights (it is empty)")
    # Protocols 2 and later say so in their first byte; a pickle of Python 2 may be of protocol 0, which is text.
    if start[:1] != b"\x80" and start[:1] not in (b"(", b"}"):
        raise WeightsError(
            f"{path}: not a file of weights: it is neither of torch.save, a pickle, nor safetensors "
            f"(it begins with {start[:12]!r})"
        )
    return read_pickle(path.read_bytes())


def _from_safetensors(path: Path) -> FileContent:
    tensors, metadata = read_safetensors(path.read_bytes())
    own: dict[str, Any] = json.loads(metadata.get(OWN_ENTRY, "{}"))
    for name in [name for name in tensors if name.startswith(OWN_PREFIX)]:
        _, *groups, _ = name.split(":")
        place = own
        for group in groups:
            place = place.setdefault(group, {})
        place[name.rpartition(":")[2]] = tensors.pop(name)
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return FileContent(_without_wrapper(tensors), own)


def _from_containers(path: Path, content: Any) -> FileContent:
    own: dict[str, Any] = {}
    others: list[str] = []
    for _ in range(2):  # a checkpoint may hold its state dict one level down
        if not isinstance(content, dict):
            break
        key = next((key for key in CONTAINERS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        entry = content.get(OWN_ENTRY)
        own = entry if isinstance(entry, dict) else own
        others += [str(name) for name in content if name not in (key, OWN_ENTRY)]
        content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    tensors = _tensors(content)
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    training_state = [name for name in others if name in ("optimizer", "scheduler", "iteration", "scaler", "trainer")]
    return FileContent(_without_wrapper(tensors), own, training_state)


def _tensors(content: dict[Any, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            native = value.astype(value.dtype.newbyteorder("="), copy=False)
            if native.dtype.kind == "u" and native.dtype.itemsize > 1:
                native = native.astype(np.int64)
            value = torch.from_numpy(np.ascontiguousarray(native).reshape(value.shape))
        if isinstance(value, Tensor):
            found[str(name)] = value
    return found


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
