"""The same images several times, each time resized or mirrored in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastrcnn.structures.image_list import ImageList


@dataclass(frozen=True)
class Views:
    """A batch for test-time augmentation.

    Attributes:
        images: the batch in each view; the first is neither mirrored nor of another size than without augmentation.
        flipped: which views are mirrored left and right (within the image, before the padding).
    """

    images: Sequence[ImageList]
    flipped: Sequence[bool]

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.flipped) or self.flipped[0]:
            raise ValueError("Views: needs one or more views, the first of which is not mirrored")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Views:
        return Views([images.to(device, non_blocking=non_blocking) for images in self.images], self.flipped)

    def pin_memory(self) -> Views:
        return Views([images.pin_memory() for images in self.images], self.flipped)

    def __len__(self) -> int:
        """The number of images, not of views."""
        return len(self.images[0])
