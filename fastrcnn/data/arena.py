"""Batches for a device that does the preprocessing: all of a batch in one buffer, which travels in one copy.

A worker decodes, draws the random numbers, moves the ground truth, and leaves the pixels as they are. What the batch
consists of, images and ground truth, lies in one uint8 buffer, the pixels last: one file descriptor between the
processes, one copy to pinned memory, one asynchronous copy to the device (:mod:`fastrcnn.data.prefetch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrcnn.data.buckets import ShapeBuckets, capacity
from fastrcnn.data.collate import Normalization
from fastrcnn.data.transforms import Prepared
from fastrcnn.structures import PackedImages, Targets
from fastrcnn_kernels import resize_image

ALIGNMENT = 256  # bytes, of CUDA's allocator: kernels are compiled for the alignment of what they are given


@dataclass(frozen=True)
class Piece:
    """Where a tensor lies in a buffer."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.offset + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class ArenaBatch:
    """A training batch in one buffer.

    Attributes:
        images: views of ``buffer``.
        targets: ground truth in the frame of the network's input, padded; views of ``buffer``.
        indices: the images' positions in the data set.
        epoch: which pass over the data the batch is part of, from 0.
        buffer: uint8 [bytes].
        used: so many bytes of it, the first ones, hold something; the rest is room of the arena.
        pieces: what lies where; the last is the arena.
    """

    images: PackedImages
    targets: Targets
    indices: list[int]
    epoch: int
    buffer: Tensor
    used: int
    pieces: tuple[Piece, ...]

    def over(self, buffer: Tensor) -> ArenaBatch:
        """The same batch with its tensors in ``buffer``, a copy of this one's on any device."""
        views: dict[str, Any] = {piece.name: piece.view(buffer) for piece in self.pieces}
        images = {name: views.pop(name) for name in ("arena", "table", "ids")}
        return replace(
            self,
            images=replace(self.images, **images),
            targets=replace(self.targets, **views),
            buffer=buffer,
        )


@dataclass(frozen=True)
class PackedArena:
    """What a worker sends: one tensor; :meth:`unpack` makes the :class:`ArenaBatch`."""

    batch: ArenaBatch

    @classmethod
    def pack(
        cls,
        tensors: dict[str, Tensor],
        pixels: Sequence[Tensor],
        room: int,
        images: PackedImages,
        targets: Targets,
        indices: list[int],
        epoch: int,
    ) -> PackedArena:
        """``tensors`` and then ``pixels`` in a buffer; ``images`` and ``targets`` have the fields beside them."""
        pieces, end = [], 0
        for name, tensor in tensors.items():
            pieces.append(Piece(name, end, tuple(tensor.shape), tensor.dtype))
            end += -(-pieces[-1].size // ALIGNMENT) * ALIGNMENT
        pieces.append(Piece("arena", end, (room,), torch.uint8))
        buffer = _new_buffer(end + room)
        for piece, tensor in zip(pieces, tensors.values(), strict=False):
            piece.view(buffer).copy_(tensor)
        for image in pixels:
            buffer[end : end + image.numel()].view(image.shape).copy_(image)
            end += image.numel()
        empty = torch.empty(0)
        # Only the buffer is to travel: a tensor costs a file descriptor and a system call on both sides.
        bare_images = replace(images, arena=empty, table=empty, ids=empty)
        fields: dict[str, Any] = {name: empty for name in tensors if name not in ("table", "ids")}
        bare_targets = replace(targets, **fields)
        return cls(ArenaBatch(bare_images, bare_targets, indices, epoch, buffer, end, tuple(pieces)))

    def __getstate__(self) -> dict[str, object]:
        """Without the empty tensors, each of which would be shared memory of its own."""
        batch = self.batch
        images = {name: value for name, value in vars(batch.images).items() if not isinstance(value, Tensor)}
        targets = {name: value for name, value in vars(batch.targets).items() if not isinstance(value, Tensor)}
        return {
            "images": images,
            "targets": targets,
            "rest": (batch.indices, batch.epoch, batch.buffer, batch.used, batch.pieces),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        empty = torch.empty(0)
        images = PackedImages(arena=empty, table=empty, ids=empty, **state["images"])
        fields = dict.fromkeys(Targets.__dataclass_fields__, empty) | state["targets"]
        object.__setattr__(self, "batch", ArenaBatch(images, Targets(**fields), *state["rest"]))

    def unpack(self) -> ArenaBatch:
        return self.batch.over(self.batch.buffer)


def _new_buffer(size: int) -> Tensor:
    """uint8 [size]; in a worker already in the shared memory that it would else be copied to.

    Pages that are not written cost nothing.
    """
    empty = torch.empty(0, dtype=torch.uint8)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    return empty.set_(torch.UntypedStorage._new_shared(size), 0, (size,), (1,))  # as torch's default_collate does


@dataclass(frozen=True)
class ArenaCollate:
    """Makes batches of prepared samples.

    Args:
        normalization: what the device is to do, and the size to pad to.
        pad_targets: gives the ground truth of a batch a shape that repeats; None leaves it.
    """

    normalization: Normalization
    pad_targets: Callable[[Targets], Targets] | None = None

    def __call__(self, samples: Sequence[Prepared], epoch: int) -> PackedArena:
        by = self.normalization
        buckets = by.buckets or ShapeBuckets((), max(1, by.size_divisible))
        rows, pixels, offset = [], [], 0
        for sample in samples:
            (height, width), image = sample.size, sample.image
            if height * width < image.shape[0] * image.shape[1]:
                # The same grey levels, and less to send.
                image = resize_image(image, sample.size)
            rows.append([offset, image.shape[0], image.shape[1], height, width, sample.flip])
            pixels.append(image)
            offset += image.numel()
        targets = Targets.from_boxlists([sample.target.convert("xyxy") for sample in samples])
        if self.pad_targets is not None:
            targets = self.pad_targets(targets)
        tensors = {
            "table": torch.tensor(rows, dtype=torch.int64),
            "ids": torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
            **{name: value for name, value in vars(targets).items() if isinstance(value, Tensor)},
        }
        images = PackedImages(
            arena=tensors["table"],
            table=tensors["table"],
            ids=tensors["ids"],
            padded_size=buckets.fit(sample.size for sample in samples),
            pixel_mean=tuple(by.pixel_mean),
            pixel_std=tuple(by.pixel_std),
            to_bgr255=by.to_bgr255,
        )
        room = capacity(offset, len(samples))
        return PackedArena.pack(tensors, pixels, room, images, targets, [s.index for s in samples], epoch)
