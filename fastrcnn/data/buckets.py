"""Few sizes to pad batches to, so that a recording of the training step for each of them suffices.

Upstream pads a batch to the largest of its images, rounded up: up to a hundred sizes. Where a step is recorded, each
size costs a recording; one size for all (800 x 1344 and 1344 x 1344 for mixed batches) wastes a sixth of the pixels of
COCO. A handful made from the shapes that photographs have wastes little and is met by every batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastrcnn.data.sampler import _HasImageInfo
from fastrcnn.data.transforms import get_size

Size = tuple[int, int]

# Long side / short side of most photographs; what is longer is bounded by the longest side that is allowed.
ASPECT_RATIOS = (4 / 3, 3 / 2)


@dataclass(frozen=True)
class ShapeBuckets:
    """The sizes that batches are padded to.

    Attributes:
        sizes: (height, width) of each, by area.
        divisor: a batch that fits none is padded to the next multiple of this.
    """

    sizes: tuple[Size, ...]
    divisor: int = 1

    def __post_init__(self) -> None:
        step = max(1, self.divisor)
        for height, width in self.sizes:
            if height < 1 or width < 1 or height % step or width % step:
                raise ValueError(f"ShapeBuckets: {height}x{width} is not a multiple of {step} in both directions")
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes), key=lambda s: (s[0] * s[1], s))))

    @classmethod
    def of(cls, min_sizes: Sequence[int], max_size: int | None, divisor: int) -> ShapeBuckets:
        """The buckets of images whose short side is ``min_size`` and whose long side is at most ``max_size``.

        For 800, 1333 and 32: 800x1088, 800x1216, 800x1344, and the same upright. Of several ``min_sizes`` the largest
        alone makes buckets: each image draws its own, so that in most batches one is near the largest, and a set for
        each would be as many recordings. Without ``max_size`` there is no bucket for panoramas.
        """
        short, step = max(min_sizes), max(1, divisor)
        longest = [short * ratio if max_size is None else min(short * ratio, max_size) for ratio in ASPECT_RATIOS]
        if max_size is not None:
            longest.append(max(short, max_size))
        rounded = [_round_up(short, step), *(_round_up(side, step) for side in longest)]
        pairs = [(rounded[0], side) for side in rounded[1:]]
        return cls((*pairs, *((width, height) for height, width in pairs)), step)

    def index(self, height: int, width: int) -> int:
        """Which is the smallest that holds ``height`` x ``width``; ``len(sizes)`` if none does."""
        fits = (i for i, (h, w) in enumerate(self.sizes) if height <= h and width <= w)
        return next(fits, len(self.sizes))

    def fit(self, sizes: Iterable[Size]) -> Size:
        """The size to pad a batch of images of ``sizes`` (height, width) to."""
        rows = list(sizes)
        height, width = max(h for h, _ in rows), max(w for _, w in rows)
        index = self.index(height, width)
        if index < len(self.sizes):
            return self.sizes[index]
        return _round_up(height, self.divisor), _round_up(width, self.divisor)

    def groups(
        self,
        dataset: _HasImageInfo,
        min_sizes: Sequence[int],
        max_size: int | None,
        rounding: str = "maskrcnn_benchmark",
    ) -> np.ndarray:
        """int64 [n]: the bucket of each image of ``dataset``, resized to the largest of ``min_sizes``.

        Batches of one group are padded to its bucket, or, where all images drew a smaller size, to a smaller one.
        """
        found = np.empty(len(dataset), dtype=np.int64)
        for index in range(len(dataset)):
            info = dataset.image_info(index)
            found[index] = self.index(*get_size(info["height"], info["width"], max(min_sizes), max_size, rounding))
        return found


def _round_up(side: float, step: int) -> int:
    step = max(1, step)
    whole = int(np.ceil(side))
    return -(-whole // step) * step


def capacity(needed: int, images: int, unit: int = 1 << 20) -> int:
    """Bytes of an arena for ``needed`` bytes of pixels: ``images`` times 1, 2, 4, ... MiB.

    Few sizes, because each is a recording of its own; photographs of 640 x 480 are 0.9 MiB.
    """
    doublings = bisect_left(range(64), needed, key=lambda k: images * unit << k)
    return images * unit << doublings
