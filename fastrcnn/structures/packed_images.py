"""Images as they came from their files, in one buffer, with the way to the network's input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrcnn.structures.image_list import ImageList, Size
from fastrcnn_kernels import preprocess_arena


@dataclass(frozen=True)
class PackedImages:
    """A batch of images that are not resized, flipped, normalised or padded yet: the device does it.

    All that differs between two batches of one ``padded_size`` is in tensors, so a CUDA graph that holds
    :meth:`image_list` serves both.

    Attributes:
        arena: uint8 [bytes]: the pixels of all images, RGB.
        table: int64 [N, 6]: offset in the arena, height, width, height and width in the batch, flip; see
            :func:`fastrcnn_kernels.preprocess_arena`.
        ids: int64 [N], as of :class:`ImageList`.
        padded_size: (height, width) of the batch.
        pixel_mean, pixel_std, to_bgr255: normalisation.
    """

    arena: Tensor
    table: Tensor
    ids: Tensor
    padded_size: Size
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    to_bgr255: bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedImages:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(self, arena=move(self.arena), table=move(self.table), ids=move(self.ids))

    def image_list(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        channels: int = 3,
    ) -> DeviceImages:
        """The network's input, made on the device of the arena; the arguments are those of ``preprocess_arena``."""
        tensors = preprocess_arena(
            self.arena,
            self.table,
            size=self.padded_size,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            to_bgr255=self.to_bgr255,
            dtype=dtype,
            memory_format=memory_format,
            channels=channels,
        )
        return DeviceImages(tensors, self.table[:, 3:5].contiguous(), self.ids)

    def __len__(self) -> int:
        return len(self.table)


class DeviceImages(ImageList):
    """An ImageList whose sizes are on the device alone.

    ``image_sizes``, on the host, would be part of a graph for good; ``sizes`` has the same numbers.
    """

    def __init__(self, tensors: Tensor, sizes: Tensor, ids: Tensor) -> None:
        self.tensors, self.sizes, self.ids = tensors, sizes, ids

    @property
    def image_sizes(self) -> Any:  # type: ignore[override]
        raise RuntimeError("image_sizes are on the host and change with every batch: a step has to use sizes")

    def _map(self, function: Any) -> DeviceImages:
        return DeviceImages(function(self.tensors), function(self.sizes), function(self.ids))

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"DeviceImages(num_images={len(self)}, padded={self.padded_size})"
