"""Pickles of numpy arrays (Detectron's and detectron2's ``.pkl``), read without running any code of theirs.

A pickle is a program that may call any function it names. This reader knows the few names by which numpy arrays,
numpy scalars and ordered dicts are written, and gives each a stand-in of its own that can only hold data. Any other
name ends the reading before anything is called.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np

KINDS = "fiub"  # of dtypes: float, int, unsigned, bool


class _Dtype:
    """Stands for numpy.dtype: a name such as ``f4`` and a byte order."""

    def __init__(self, name: Any, *unused: Any) -> None:
        self.name = name if isinstance(name, str) else ""
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if self.name[:1] not in KINDS or not self.name[1:].isdigit():
            raise pickle.UnpicklingError(f"an array of {self.name or 'unknown'} elements, not of numbers")
        return np.dtype(self.order.replace("|", "=") + self.name)


class _ArrayType:
    """Stands for the class numpy.ndarray, which is named and never called."""


class _Array:
    """Stands for an array: made empty by ``_reconstruct``, filled by its state."""

    def __init__(self, *unused: Any) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, fortran, data = state
            data = data.encode("latin1") if isinstance(data, str) else data
            array = np.frombuffer(data, dtype=dtype.numpy())
            self.value = array.reshape(shape, order="F" if fortran else "C").copy()
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(f"a damaged array ({error})") from None


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Stands for numpy's _frombuffer, by which arrays are written since protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    """Stands for numpy's scalar: a Python number."""
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("a damaged number")
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype=dtype.numpy())[0].item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands for _codecs.encode, by which Python 3 writes bytes in old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("text in an unknown encoding")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
    **{
        (module, name): stand_in
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _scalar))
    },
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code") from None


def read_pickle(data: bytes) -> Any:
    """The content of a pickle of dicts, lists, strings, numbers and numpy arrays of numbers.

    Strings of Python 2 are taken for latin1, as Caffe2's are.

    Raises:
        pickle.UnpicklingError: anything else is in it; nothing of it was called.
        Exception: of many kinds, for damaged data.
    """
    return _plain(_Reader(io.BytesIO(data), encoding="latin1").load())


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` with stand-ins replaced by what they stand for."""
    if depth > 20:
        raise pickle.UnpicklingError("containers nested too deeply")
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without content")
        return value.value
    if isinstance(value, dict):
        return {_plain(key, depth + 1): _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value]
    return value
