"""Inputs of a training step at fixed addresses: what a CUDA graph reads again in every replay.

:func:`flatten` takes a batch apart into tensors and a key: two batches with equal keys run the same operators on the
same shapes, so they can share a graph. :class:`StaticInputs` holds the tensors of one key on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrcnn.structures import DeviceImages, ImageList, PackedImages, Targets

Rebuild = Callable[[Sequence[Tensor]], Any]

ALIGNMENT = 256  # bytes, of CUDA's allocator: kernels are compiled for the alignment of what they are given
PACKED = 1 << 20  # tensors of up to so many bytes travel together


def flatten(value: Any) -> tuple[list[Tensor], Hashable, Rebuild]:
    """Take a batch apart.

    Args:
        value: tensors in dataclasses, ImageLists, tuples and lists, with anything hashable beside them.

    Returns:
        The tensors; a key of the structure, of the shapes, dtypes and strides, and of all that is not a tensor; and a
        function that makes the same structure around other tensors. An ImageList becomes :class:`DeviceImages`.

    Raises:
        TypeError: for a value that is neither a tensor nor hashable.
    """
    if isinstance(value, Tensor):
        return [value], (tuple(value.shape), tuple(value.stride()), value.dtype), lambda tensors: tensors[0]
    if isinstance(value, ImageList):
        tensors, key, rebuild = flatten((value.tensors, value.sizes, value.ids))
        return tensors, ("images", key), lambda new: DeviceImages(*rebuild(new))
    if isinstance(value, tuple | list):
        parts, make = list(value), type(value)
        return _join(parts, (make.__name__,), lambda members: make(members))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        kind = type(value)

        def build(members: list[Any]) -> Any:
            # Not through __init__, whose checks may look at the data.
            made = object.__new__(kind)
            for name, member in zip(names, members, strict=True):
                object.__setattr__(made, name, member)
            return made

        return _join([getattr(value, name) for name in names], (kind.__qualname__, *names), build)
    hash(value)
    return [], value, lambda _: value


def _join(parts: list[Any], name: tuple[Any, ...], build: Callable[[list[Any]], Any]) -> Any:
    tensors: list[Tensor] = []
    keys: list[Hashable] = []
    rebuilds: list[tuple[slice, Rebuild]] = []
    for part in parts:
        inside, key, rebuild = flatten(part)
        rebuilds.append((slice(len(tensors), len(tensors) + len(inside)), rebuild))
        tensors += inside
        keys.append(key)
    return tensors, (*name, *keys), lambda new: build([rebuild(new[where]) for where, rebuild in rebuilds])


class StaticInputs:
    """The tensors of one key on the device, and the structure around them.

    Args:
        tensors, rebuild: of :func:`flatten`, of a batch whose key this is.

    Attributes:
        value: the structure with the tensors that :meth:`load` fills.
    """

    def __init__(self, tensors: Sequence[Tensor], rebuild: Rebuild, device: torch.device) -> None:
        self.device = device
        sizes = [t.numel() * t.element_size() for t in tensors]
        # Strided tensors with gaps are no use to anyone here.
        self.small = [i for i, t in enumerate(tensors) if sizes[i] <= PACKED and t.is_contiguous()]
        self.offsets: dict[int, int] = {}
        end = 0
        for index in self.small:
            self.offsets[index] = end
            end += -(-sizes[index] // ALIGNMENT) * ALIGNMENT
        self.packed = torch.zeros(end, dtype=torch.uint8, device=device)
        packed = self._views(self.packed, tensors)
        self.tensors = [packed[i] if i in packed else torch.empty_like(t, device=device) for i, t in enumerate(tensors)]
        self.value = rebuild(self.tensors)

    def _views(self, buffer: Tensor, like: Sequence[Tensor]) -> dict[int, Tensor]:
        return {
            index: buffer[begin : begin + like[index].numel() * like[index].element_size()]
            .view(like[index].dtype)
            .view(like[index].shape)
            for index, begin in self.offsets.items()
        }

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Copy a batch of this key in. Waits for nothing: small host tensors travel in one pinned buffer."""
        on_host = [i for i in self.small if tensors[i].device.type == "cpu"]
        if self.device.type == "cuda" and len(on_host) == len(self.small) > 0:
            # Memory of its own for each step: the copy of the step before may not have happened yet.
            staging = torch.empty(self.packed.shape, dtype=torch.uint8, pin_memory=True)
            for index, view in self._views(staging, self.tensors).items():
                view.copy_(tensors[index])
            self.packed.copy_(staging, non_blocking=True)
        else:
            for index in self.small:
                self.tensors[index].copy_(tensors[index], non_blocking=True)
        for index, (static, tensor) in enumerate(zip(self.tensors, tensors, strict=True)):
            if index not in self.offsets:
                static.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class StepInputs:
    """What a step computes on: the images, ready or as they came from their files, and their ground truth."""

    images: ImageList | PackedImages
    targets: Targets
