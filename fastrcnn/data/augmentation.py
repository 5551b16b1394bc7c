"""Test-time augmentation: each image in several sizes, as it is and mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastrcnn.data.collate import Normalization
from fastrcnn.data.transforms import get_size
from fastrcnn.structures import Views
from fastrcnn_kernels import resize_image


@dataclass(frozen=True)
class TestAugmentation:
    """The views of ``TEST.BBOX_AUG``, in maskrcnn-benchmark's order.

    Args:
        min_size, max_size: of the view without augmentation (``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``).
        h_flip: that view mirrored, too.
        scales: shorter sides of further views, whose longer side is at most ``scale_max_size``.
        scale_h_flip: those mirrored, too.
        rounding: see :func:`fastrcnn.data.transforms.get_size`.
    """

    __test__ = False  # pytest would take the class for tests

    min_size: int = 800
    max_size: int = 1333
    h_flip: bool = False
    scales: Sequence[int] = ()
    scale_max_size: int = 4000
    scale_h_flip: bool = False
    rounding: str = "maskrcnn_benchmark"

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        """(shorter side, longest side, mirrored) of each view."""
        yield self.min_size, self.max_size, False
        if self.h_flip:
            yield self.min_size, self.max_size, True
        for scale in self.scales:
            yield scale, self.scale_max_size, False
            if self.scale_h_flip:
                yield scale, self.scale_max_size, True

    def __call__(self, images: Sequence[Tensor], ids: Sequence[int], normalization: Normalization) -> Views:
        """The views of uint8 [H, W, 3] images as they are in their files."""
        views, flipped = [], []
        for min_size, max_size, flip in self:
            batch = []
            for image in images:
                height, width = int(image.shape[0]), int(image.shape[1])
                size = get_size(height, width, min_size, max_size, self.rounding)
                resized = image if size == (height, width) else resize_image(image, size)
                batch.append(resized.flip(1) if flip else resized)
            views.append(normalization(batch, ids))
            flipped.append(flip)
        return Views(views, flipped)
