"""Anchors of a pyramid: the cell anchors are in the state dict (as in maskrcnn-benchmark), the grids are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.structures import Targets

Size = tuple[int, int]


class AnchorGenerator(nn.Module):
    """Anchor boxes for every cell of every feature level.

    Args:
        sizes: for each level the anchor sizes in pixels of the input image.
        aspect_ratios: height / width.
        strides: input pixels a cell, for each level.
        straddle_thresh: anchors that leave the image by more than this many pixels take no part in training;
            negative: all do.
        style: rule of :func:`fastrcnn_kernels.cell_anchors`.
        stride_from_image: torchvision's grids, whose strides are the padded image's sides divided by the map's,
            rounded down: not what ``strides`` says where a map was rounded up. The kernels take one whole stride a
            level, so the grid stays nominal and the deltas move by the difference (:meth:`move_deltas`); that gives the
            same boxes and the same losses.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        strides: Sequence[int],
        *,
        straddle_thresh: float = 0,
        style: str = "maskrcnn_benchmark",
        stride_from_image: bool = False,
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"anchors: {len(sizes)} levels of sizes but {len(strides)} strides")
        self.strides = tuple(int(stride) for stride in strides)
        self.straddle_thresh = straddle_thresh
        self.stride_from_image = stride_from_image
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

    def forward(self, features: Sequence[Tensor], padded_size: Size | None = None) -> list[Tensor]:
        """float [H_l * W_l * A, 4] for each level, in the order y, x, anchor.

        With ``padded_size``, the (height, width) of the batch, on the image's own grid (``stride_from_image``), else on
        the nominal one.
        """
        shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        cells = self.cells
        excess = self._excess(shapes, padded_size) if padded_size is not None else []
        key = (*shapes, *excess, cells[0].device, cells[0].dtype)
        if key not in self._grids:
            if len(self._grids) >= 32:  # a few shape buckets recur; a run over odd sizes must not fill the memory
                self._grids.clear()
            grids = kernels.grid_anchors(cells, shapes, self.strides)
            self._grids[key] = self._moved(grids, shapes, excess) if any(map(any, excess)) else grids
        return self._grids[key]

    def _excess(self, grid_sizes: Sequence[Size], padded_size: Size) -> list[tuple[int, int]]:
        """(y, x) for each level: what the image's stride has over the nominal one."""
        if not self.stride_from_image:
            return [(0, 0)] * len(grid_sizes)
        return [
            (padded_size[0] // h - stride, padded_size[1] // w - stride)
            for (h, w), stride in zip(grid_sizes, self.strides, strict=True)
        ]

    def move_deltas(
        self,
        deltas: Sequence[Tensor],
        padded_size: Size,
        weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
    ) -> list[Tensor]:
        """Deltas of the image's own grid as deltas of the nominal one; the same tensors where the two are one.

        Args:
            deltas: [N, 4A, H, W] of each level.
            padded_size: (height, width) of the batch.
            weights: of the box encoding.
        """
        grid_sizes = [(int(level.shape[-2]), int(level.shape[-1])) for level in deltas]
        moved = []
        for level, cell, excess in zip(deltas, self.cells, self._excess(grid_sizes, padded_size), strict=True):
            moved.append(level + _displacement(level, cell, excess, weights) if any(excess) else level)
        return moved

    def match(
        self,
        targets: Targets,
        grid_sizes: Sequence[Size],
        image_sizes: Tensor,
        padded_size: Size,
        *,
        high_threshold: float,
        low_threshold: float,
        box_offset: int,
    ) -> Tensor:
        """int64 [N, A]: the ground truth of each anchor, -1 for background, -2 if it takes no part in training.

        Args:
            grid_sizes: (height, width) of each feature level.
            image_sizes: [N, 2], (height, width) before padding.
            padded_size: (height, width) of the batch.
        """
        excess = self._excess(grid_sizes, padded_size)
        if any(map(any, excess)):
            nominal = kernels.grid_anchors(self.cells, grid_sizes, self.strides)
            anchors = torch.cat(self._moved(nominal, grid_sizes, excess))  # [A, 4]
            matched = kernels.match_boxes(
                targets.boxes,
                targets.count,
                anchors.to(targets.boxes.dtype),
                high_threshold=high_threshold,
                low_threshold=low_threshold,
                allow_low_quality_matches=True,
                box_offset=box_offset,
            )
            return torch.where(kernels.anchors_inside_image(anchors, image_sizes, self.straddle_thresh), matched, -2)
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

    @staticmethod
    def _moved(
        nominal: Sequence[Tensor], grid_sizes: Sequence[Size], excess: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The anchors of each level on grids whose strides are larger by ``excess`` (y, x)."""
        levels = []
        for anchors, (h, w), (dy, dx) in zip(nominal, grid_sizes, excess, strict=True):
            y = torch.arange(h, device=anchors.device, dtype=anchors.dtype)[:, None, None] * dy
            x = torch.arange(w, device=anchors.device, dtype=anchors.dtype)[:, None] * dx
            shift = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # [H, W, 1, 2]
            levels.append((anchors.view(h, w, -1, 4) + shift.repeat(1, 1, 1, 2)).view(-1, 4))
        return levels


def _displacement(
    level: Tensor, cell: Tensor, excess: tuple[int, int], weights: tuple[float, float, float, float]
) -> Tensor:
    """[4A, H, W]: by how much dx and dy of each anchor grow from the corner; 0 for dw and dh."""
    height, width = level.shape[-2:]
    sides = cell[:, 2:] - cell[:, :2]  # [A, 2], of edges: no convention with inclusive pixels has such grids
    x = torch.arange(width, device=level.device, dtype=cell.dtype) * (excess[1] * weights[0])
    y = torch.arange(height, device=level.device, dtype=cell.dtype) * (excess[0] * weights[1])
    dx, dy = torch.broadcast_tensors(x / sides[:, :1, None], y[:, None] / sides[:, 1:, None])  # [A, H, W] each
    zero = torch.zeros_like(dx)
    return torch.stack([dx, dy, zero, zero], dim=1).flatten(0, 1).to(level.dtype)
