"""Anchors of a pyramid: the cell anchors are in the state dict (as in maskrcnn-benchmark), the grids are computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.structures import Targets


class AnchorGenerator(nn.Module):
    """Anchor boxes for every cell of every feature level.

    Args:
        sizes: for each level the anchor sizes in pixels of the input image.
        aspect_ratios: height / width.
        strides: input pixels a cell, for each level.
        straddle_thresh: anchors that leave the image by more than this many pixels take no part in training;
            negative: all do.
        style: rule of :func:`fastrcnn_kernels.cell_anchors`.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        strides: Sequence[int],
        *,
        straddle_thresh: float = 0,
        style: str = "maskrcnn_benchmark",
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"anchors: {len(sizes)} levels of sizes but {len(strides)} strides")
        self.strides = tuple(int(stride) for stride in strides)
        self.straddle_thresh = straddle_thresh
        self.cell_anchors = nn.Module()
        for level, (stride, level_sizes) in enumerate(zip(self.strides, sizes, strict=True)):
            cell = kernels.cell_anchors(stride, level_sizes, aspect_ratios, style)
            self.cell_anchors.register_buffer(str(level), cell)
        self._grids: dict[tuple[object, ...], list[Tensor]] = {}

    @property
    def num_anchors_per_cell(self) -> int:
        return len(self.cell_anchors.get_buffer("0"))

    @property
    def cells(self) -> list[Tensor]:
        """float [A, 4] for each level: the anchors of the pixel (0, 0)."""
        return [self.cell_anchors.get_buffer(str(level)) for level in range(len(self.strides))]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """float [H_l * W_l * A, 4] for each level, in the order y, x, anchor."""
        shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        cells = self.cells
        key = (*shapes, cells[0].device, cells[0].dtype)
        if key not in self._grids:
            if len(self._grids) >= 32:  # a few shape buckets recur; a run over odd sizes must not fill the memory
                self._grids.clear()
            self._grids[key] = kernels.grid_anchors(cells, shapes, self.strides)
        return self._grids[key]

    def match(
        self,
        targets: Targets,
        grid_sizes: Sequence[tuple[int, int]],
        image_sizes: Tensor,
        *,
        high_threshold: float,
        low_threshold: float,
        box_offset: int,
    ) -> Tensor:
        """int64 [N, A]: the ground truth of each anchor, -1 for background, -2 if it takes no part in training.

        Args:
            grid_sizes: (height, width) of each feature level.
            image_sizes: [N, 2], (height, width) before padding.
        """
        return kernels.match_anchors(
            targets.boxes,
            targets.count,
            self.cells,
            grid_sizes,
            self.strides,
            image_sizes,
            high_threshold=high_threshold,
            low_threshold=low_threshold,
            allow_low_quality_matches=True,
            straddle_thresh=self.straddle_thresh,
            box_offset=box_offset,
        )
