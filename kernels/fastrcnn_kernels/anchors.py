"""Anchors: the cell of one feature-map pixel, the grids of all levels, and the visibility test of training.

Coordinates are pixels of the padded network input. Anchors are ordered (y, x, anchor of the cell), the order in
which a [N, A, H, W] head output permuted to [N, H, W, A] is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.boxes import _check_boxes

STYLES = ("maskrcnn_benchmark", "detectron2", "torchvision")


def _cells_maskrcnn_benchmark(stride: int, sizes: tuple[float, ...], ratios: tuple[float, ...]) -> np.ndarray:
    """Inclusive-pixel windows in the pixel (0, 0, stride - 1, stride - 1). Sides are rounded half to even (22.5 -> 22),
    and at the size of the stride, before scaling: both decide golden values."""
    ratio = np.asarray(ratios, dtype=np.float64)  # [R]
    scale = np.asarray(sizes, dtype=np.float64) / stride  # [S]
    widths = np.round(np.sqrt(stride * stride / ratio))  # [R]
    heights = np.round(widths * ratio)  # [R]
    half_width = 0.5 * (widths[:, None] * scale - 1).reshape(-1)  # [R * S]
    half_height = 0.5 * (heights[:, None] * scale - 1).reshape(-1)  # [R * S]
    centre = 0.5 * (stride - 1)
    sides = [centre - half_width, centre - half_height, centre + half_width, centre + half_height]
    return np.stack(sides, axis=1)  # [R * S, 4]


def _cells_detectron2(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> np.ndarray:
    size = np.asarray(sizes, dtype=np.float64)[:, None]  # [S, 1]
    ratio = np.asarray(ratios, dtype=np.float64)  # [R]
    width = np.sqrt(size * size / ratio)  # [S, R]
    half = np.stack([width, ratio * width], axis=-1).reshape(-1, 2) / 2  # [S * R, 2]
    return np.concatenate([-half, half], axis=1)  # [S * R, 4]


def _cells_torchvision(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> np.ndarray:
    # float32 throughout: torchvision rounds float32 products, and a tie may fall otherwise in float64.
    size = np.asarray(sizes, dtype=np.float32)  # [S]
    height_ratio = np.sqrt(np.asarray(ratios, dtype=np.float32))  # [R]
    width_ratio = np.float32(1) / height_ratio  # [R]
    width = (width_ratio[:, None] * size).reshape(-1)  # [R * S]
    height = (height_ratio[:, None] * size).reshape(-1)  # [R * S]
    return np.round(np.stack([-width, -height, width, height], axis=1) / np.float32(2))  # [R * S, 4]


@lru_cache(maxsize=256)
def _cells(stride: int, sizes: tuple[float, ...], ratios: tuple[float, ...], style: str) -> np.ndarray:
    if style == "maskrcnn_benchmark":
        cells = _cells_maskrcnn_benchmark(stride, sizes, ratios)
    elif style == "detectron2":
        cells = _cells_detectron2(sizes, ratios)
    else:
        cells = _cells_torchvision(sizes, ratios)
    return cells.astype(np.float32)


def cell_anchors(
    stride: int, sizes: Sequence[float], aspect_ratios: Sequence[float], style: str = "maskrcnn_benchmark"
) -> Tensor:
    """The anchors of the feature-map pixel at (0, 0).

    Args:
        stride: pixels between neighbouring feature-map pixels.
        sizes: square root of the area of the anchors, in pixels.
        aspect_ratios: height / width.
        style: ``maskrcnn_benchmark`` (inclusive pixels, centred on (stride - 1) / 2, rounded half to even before
            scaling; ratio outer, size inner), ``detectron2`` (unrounded, centred on 0; size outer, ratio inner) or
            ``torchvision`` (rounded after scaling, centred on 0; ratio outer, size inner). The last two do not
            depend on the stride.

    Returns:
        float32 [len(sizes) * len(aspect_ratios), 4] on the CPU, (x1, y1, x2, y2). A new tensor at each call.

    Raises:
        ValueError: for an unknown style or a stride, size or ratio that is not positive.
    """
    if style not in STYLES:
        raise ValueError(f"unknown anchor style {style!r}: choose one of {', '.join(STYLES)}")
    if stride <= 0 or any(size <= 0 for size in sizes) or any(ratio <= 0 for ratio in aspect_ratios):
        raise ValueError(
            f"stride, sizes and aspect_ratios must be positive, got {stride}, {list(sizes)}, {list(aspect_ratios)}"
        )
    cells = _cells(stride, tuple(float(size) for size in sizes), tuple(float(ratio) for ratio in aspect_ratios), style)
    return torch.from_numpy(cells.copy())


def _compute_dtype(cells: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(cell.dtype == torch.float64 for cell in cells) else torch.float32


def _counts(cells: Sequence[Tensor], grid_sizes: Sequence[int]) -> list[int]:
    return [
        height * width * cell.shape[0]
        for cell, height, width in zip(cells, grid_sizes[::2], grid_sizes[1::2], strict=True)
    ]


def grid_anchors_reference(cells: Sequence[Tensor], grid_sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The specification of :func:`grid_anchors`: the anchors of all levels [A, 4], ``grid_sizes`` flat."""
    dtype = _compute_dtype(cells)
    levels = []
    for cell, height, width, stride in zip(cells, grid_sizes[::2], grid_sizes[1::2], strides, strict=True):
        x = torch.arange(width, device=cell.device, dtype=dtype) * stride  # [W]
        y = torch.arange(height, device=cell.device, dtype=dtype) * stride  # [H]
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")  # [H, W]
        shift = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1)  # [H, W, 4]
        levels.append((shift.unsqueeze(2) + cell.to(dtype)).reshape(-1, 4))  # [H * W * A_l, 4]
    return torch.cat(levels)  # [A, 4]


def _grid_anchors_fake(cells: Sequence[Tensor], grid_sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    return cells[0].new_empty((sum(_counts(cells, grid_sizes)), 4), dtype=_compute_dtype(cells))


def _grid_anchors_cpp(cells: Sequence[Tensor], grid_sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    dtype = _compute_dtype(cells)
    cells = [cell.to(dtype).contiguous() for cell in cells]
    out = torch.empty((sum(_counts(cells, grid_sizes)), 4), dtype=dtype)
    table = [
        (cell.data_ptr(), cell.shape[0], height, width, stride)
        for cell, height, width, stride in zip(cells, grid_sizes[::2], grid_sizes[1::2], strides, strict=True)
    ]
    _library.extension().grid_anchors(table, dtype == torch.float64, out.data_ptr(), torch.get_num_threads())
    return out


def _grid_anchors_triton(cells: Sequence[Tensor], grid_sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    from fastrcnn_kernels.triton import anchors as launcher

    dtype = _compute_dtype(cells)
    cells = [cell.to(dtype).contiguous() for cell in cells]
    counts = _counts(cells, grid_sizes)
    out = torch.empty((sum(counts), 4), dtype=dtype, device=cells[0].device)
    launcher.grid_anchors(cells, counts, grid_sizes[1::2], strides, out)
    return out


_grid_anchors = _library.define(
    "grid_anchors(Tensor[] cells, SymInt[] grid_sizes, int[] strides) -> Tensor",
    reference=grid_anchors_reference,
    fake=_grid_anchors_fake,
    cpp=_grid_anchors_cpp,
    triton="fastrcnn_kernels.anchors:_grid_anchors_triton",
)


def grid_anchors(
    cells: Sequence[Tensor], grid_sizes: Sequence[tuple[int, int]], strides: Sequence[int]
) -> list[Tensor]:
    """The anchors of all levels of a pyramid in one launch (torchvision's ``AnchorGenerator.grid_anchors``).

    Args:
        cells: for each level [A_l, 4], from ``cell_anchors``. Not differentiable in them.
        grid_sizes: for each level (height, width) of the feature map, in feature-map pixels.
        strides: for each level the pixels between neighbouring feature-map pixels.

    Returns:
        For each level [height * width * A_l, 4] in the order (y, x, anchor of the cell), on the device of the cells,
        float32 (float64 if a cell is). They are views of one buffer in the order of the levels, so none of them is a
        copy; write to none of them.

    Raises:
        ValueError: for no levels, lists of different lengths, wrong shapes, or a cell on another device.
    """
    if not len(cells) == len(grid_sizes) == len(strides) or not cells:
        raise ValueError(
            f"cells, grid_sizes and strides must have one entry a level, got {len(cells)}, {len(grid_sizes)} and "
            f"{len(strides)}"
        )
    for cell in cells:
        if cell.dim() != 2 or cell.shape[1] != 4:
            raise ValueError(f"cells must have the shape [A, 4], got {list(cell.shape)}")
        if cell.device != cells[0].device:
            raise ValueError(f"cells must be on one device, got {cells[0].device} and {cell.device}")
    flat = [side for size in grid_sizes for side in size]
    anchors = _grid_anchors([cell.detach() for cell in cells], flat, list(strides))
    return list(anchors.split(_counts(cells, flat)))


def anchors_inside_image(anchors: Tensor, image_sizes: Tensor, straddle_thresh: float) -> Tensor:
    """Which anchors may be used for training on which image (maskrcnn-benchmark's visibility).

    An anchor counts if x1 >= -t, y1 >= -t, x2 < width + t and y2 < height + t, where t is the threshold and the
    size is that of the image before padding.

    Args:
        anchors: [A, 4].
        image_sizes: int64 [N, 2], (height, width) before padding; not read on the host.
        straddle_thresh: pixels by which an anchor may stick out; a negative value lets every anchor count.

    Returns:
        bool [N, A]. A NaN anchor is outside, unless the test is off.
    """
    _check_boxes(anchors, "anchors")
    if image_sizes.dim() != 2 or image_sizes.shape[1] != 2:
        raise ValueError(f"image_sizes must have the shape [N, 2], got {list(image_sizes.shape)}")
    if straddle_thresh < 0:
        shape = (image_sizes.shape[0], anchors.shape[0])
        return torch.ones(shape, dtype=torch.bool, device=anchors.device)  # [N, A]
    x1, y1, x2, y2 = anchors.unbind(-1)  # [A] each
    height, width = (image_sizes + straddle_thresh).unsqueeze(-1).unbind(1)  # [N, 1] each
    inside = (x1 >= -straddle_thresh) & (y1 >= -straddle_thresh)  # [A]
    return inside & (x2 < width) & (y2 < height)  # [N, A]
