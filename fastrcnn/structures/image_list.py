"""A batch of images of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]


class ImageList:
    """A batch of images of different sizes, padded with zeros at the bottom and the right.

    Attributes:
        tensors: float [N, 3, H, W].
        image_sizes: (height, width) of each image before padding, on the host.
        sizes: the same as int64 [N, 2], on the device of ``tensors``.
        ids: int64 [N], an identity of each image (its id in the data set): random choices made for an image depend
            on it, so that they do not depend on which worker or rank the image is on. Default: 0, 1, ... N-1.
    """

    def __init__(self, tensors: Tensor, image_sizes: Sequence[Size], ids: Tensor | None = None) -> None:
        if tensors.dim() != 4:
            raise ValueError(f"ImageList: tensors must be [N, C, H, W], got shape {tuple(tensors.shape)}")
        if len(image_sizes) != len(tensors):
            raise ValueError(f"ImageList: {len(image_sizes)} sizes for {len(tensors)} images")
        self.tensors = tensors
        self.image_sizes: list[Size] = [(int(h), int(w)) for h, w in image_sizes]
        self.sizes = torch.tensor(self.image_sizes, dtype=torch.int64).reshape(-1, 2).to(tensors.device)
        self.ids = ids if ids is not None else torch.arange(len(tensors), device=tensors.device)

    def _map(self, function: Any) -> ImageList:
        new = object.__new__(ImageList)
        new.image_sizes = self.image_sizes
        new.tensors, new.sizes, new.ids = function(self.tensors), function(self.sizes), function(self.ids)
        return new

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageList:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageList:
        return self._map(lambda t: t.pin_memory())

    def __len__(self) -> int:
        return len(self.image_sizes)

    @property
    def padded_size(self) -> Size:
        """(height, width) of ``tensors``."""
        return int(self.tensors.shape[-2]), int(self.tensors.shape[-1])

    def __repr__(self) -> str:
        return f"ImageList(num_images={len(self)}, padded={tuple(self.tensors.shape[-2:])}, sizes={self.image_sizes})"


def to_image_list(images: Tensor | Sequence[Tensor] | ImageList, size_divisible: int = 0) -> ImageList:
    """Batch images, padding with zeros to the largest height and width, rounded up to ``size_divisible``.

    Args:
        images: float [C, H, W] tensors of one dtype and device; or a batch [N, C, H, W]; or an ImageList, returned as
            it is.
        size_divisible: 0 or 1 pads to the largest image only; FPN models need 32.
    """
    if isinstance(images, ImageList):
        return images
    if isinstance(images, Tensor):
        images = list(images) if images.dim() == 4 else [images]
    if len(images) == 0:
        raise ValueError("to_image_list: needs at least one image")
    step = max(1, size_divisible)
    height = max(-(-int(image.shape[-2]) // step) * step for image in images)
    width = max(-(-int(image.shape[-1]) // step) * step for image in images)
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[-2], : image.shape[-1]].copy_(image)
    return ImageList(batch, [(int(i.shape[-2]), int(i.shape[-1])) for i in images])
