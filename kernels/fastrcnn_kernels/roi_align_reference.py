"""The specification of RoIAlign in PyTorch: what every other implementation is compared with.

Rules and conventions are in ``roi_align.py``. The grid of samples is separable, so each bin reads T = 2 * grid pixel
rows and T pixel columns with weights wy and wx. Memory is bounded: regions are taken in chunks (fixed grid) or one
at a time (adaptive grid, whose sizes are read on the host).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_GRID = 65536
# Elements of one gathered block of the reference: 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(features: Sequence[Tensor]) -> bool:
    # A map of one channel or of one pixel is both; any level that is channels_last only decides for all.
    return any(f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous() for f in features)


def empty(shape: Sequence[int], like: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _per_roi(levels: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """values[levels] without moving a table to the device. [K]"""
    out = torch.zeros_like(levels, dtype=dtype)
    for level, value in enumerate(values):
        out = torch.where(levels == level, value, out)
    return out


def _live(rois: Tensor, levels: Tensor, num_images: int, num_levels: int) -> Tensor:
    """Whether each region is present: image index >= 0 and finite coordinates. [K]"""
    present = (rois[:, 0] >= 0) & torch.isfinite(rois).all(dim=1)
    known = (rois[:, 0] < num_images) & (levels >= 0) & (levels < num_levels)
    if rois.device.type == "cpu":
        torch._assert_async(
            (known | ~present).all(),
            f"roi_align: a roi names an image outside 0..{num_images - 1} or a level outside 0..{num_levels - 1}",
        )
    return present & known


def _bins(
    rois: Tensor, scale: Tensor, axis: int, pooled: int, ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Start, bin size and grid count along x (axis 0) or y (axis 1). [K] each"""
    offset = 0.5 if aligned else 0.0
    start = rois[:, 1 + axis] * scale - offset
    extent = rois[:, 3 + axis] * scale - offset - start
    if not aligned:
        extent = extent.clamp(min=1.0)
    size = extent / pooled
    grid = torch.full_like(size, ratio) if ratio > 0 else size.ceil().clamp(min=0.0, max=float(MAX_GRID))
    return start, size, grid


def _taps(
    start: Tensor, size: Tensor, grid: Tensor, extent: Tensor, pooled: int, sample: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each sample touches along one axis, and their weights.

    Args:
        start, size, grid, extent: [K]; extent is the height or width of the feature map.
        sample: numbers of the samples within a bin. [S] or [K, PH, S]

    Returns:
        pixel int64[K, PH, 2 S], weight [K, PH, 2 S], inside bool[K, PH, 2 S].
    """
    bin_index = torch.arange(pooled, dtype=size.dtype, device=size.device)[None, :, None]
    start, size, grid, extent = (t[:, None, None] for t in (start, size, grid, extent))
    y = start + bin_index * size + (sample + 0.5) * size / grid  # [K, PH, S]
    inside = (y >= -1) & (y <= extent) & (sample < grid)
    y = torch.where(inside, y, 0.0).clamp(min=0.0)
    low = torch.minimum(y.floor(), extent - 1)
    high = torch.minimum(low + 1, extent - 1)
    fraction = torch.where(low >= extent - 1, 0.0, y - low)
    pixel = torch.cat([low, high], dim=2).long()  # [K, PH, 2 S]
    weight = torch.cat([1 - fraction, fraction], dim=2)
    # A pixel of weight zero is not read: were it NaN, it would spoil the sum.
    return pixel, weight, torch.cat([inside, inside], dim=2) & (weight > 0)


def _fixed_grid(
    rois: Tensor, levels: Tensor, live: Tensor, shapes: Sequence[tuple[int, int, int]], scales: Sequence[float],
    ph: int, pw: int, ratio: int, aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of the flattened pyramid that each bin reads, with separable weights.

    Returns:
        row int64[K, PH, T, PW, T] (the row after the last, where nothing is read), wy [K, PH, T], wx [K, PW, T];
        T = 2 * ratio, and the weights include the mean over the grid.
    """
    dtype = rois.dtype
    heights = _per_roi(levels, [h for _, h, _ in shapes], dtype)
    widths = _per_roi(levels, [w for _, _, w in shapes], dtype)
    scale = _per_roi(levels, scales, dtype)
    bases, total = [], 0
    for n, h, w in shapes:
        bases.append(total)
        total += n * h * w
    sample = torch.arange(ratio, dtype=dtype, device=rois.device)
    y, wy, y_inside = _taps(*_bins(rois, scale, 1, ph, ratio, aligned), heights, ph, sample)
    x, wx, x_inside = _taps(*_bins(rois, scale, 0, pw, ratio, aligned), widths, pw, sample)
    height, width = heights.long()[:, None, None], widths.long()[:, None, None]
    image = torch.where(live, rois[:, 0], 0.0).long()[:, None, None]
    base = _per_roi(levels, bases, torch.int64)[:, None, None]
    row_y = base + (image * height + y) * width  # [K, PH, T]
    row = row_y[:, :, :, None, None] + x[:, None, None, :, :]  # [K, PH, T, PW, T]
    read = y_inside[:, :, :, None, None] & x_inside[:, None, None, :, :] & live[:, None, None, None, None]
    return torch.where(read, row, total), wy / ratio, wx / ratio


def _dense_weights(
    roi: Tensor, scale: float, axis: int, extent: int, pooled: int, ratio: int, aligned: bool
) -> tuple[Tensor, int, int]:
    """The non-zero columns of Wy (or Wx) of one region: weights [PH, stop - first], first, stop."""
    start, size, grid = _bins(roi, torch.full_like(roi[:, 0], scale), axis, pooled, ratio, aligned)
    # Samples of a bin lie at most one pixel apart, at least half a pixel if there are several: only those numbers
    # that can fall on the map are visited, however large the region.
    bin_index = torch.arange(pooled, dtype=size.dtype, device=size.device)
    before = (-1 - start - bin_index * size) / size * grid - 2
    first_sample = torch.nan_to_num(before, nan=0.0).clamp(min=0.0, max=float(MAX_GRID)).floor()
    count = int(min(float(grid), 2 * extent + 8))
    sample = first_sample[None, :, None] + torch.arange(count, dtype=size.dtype, device=size.device)  # [1, PH, S]
    pixel, weight, inside = _taps(start, size, grid, torch.full_like(size, extent), pooled, sample)
    dense = weight.new_zeros(pooled, extent)
    dense.scatter_add_(1, pixel[0], torch.where(inside, weight, 0.0)[0] / grid.clamp(min=1.0))  # [PH, H]
    used = (dense != 0).any(dim=0).nonzero().flatten().tolist()
    first, stop = (used[0], used[-1] + 1) if used else (0, 0)
    return dense[:, first:stop], first, stop


def _adaptive_windows(
    rois: Tensor, levels: Tensor, live: Tensor, shapes: Sequence[tuple[int, int, int]], scales: Sequence[float],
    ph: int, pw: int, aligned: bool,
) -> list[tuple[int, int, int, slice, slice, Tensor, Tensor]]:  # fmt: skip
    """For each live region: number, level, image, rows, columns, Wy, Wx. Reads the regions on the host."""
    windows = []
    for k, (alive, level, image) in enumerate(zip(live.tolist(), levels.tolist(), rois[:, 0].tolist(), strict=True)):
        if not alive:
            continue
        _, height, width = shapes[level]
        wy, y0, y1 = _dense_weights(rois[k : k + 1], scales[level], 1, height, ph, 0, aligned)
        wx, x0, x1 = _dense_weights(rois[k : k + 1], scales[level], 0, width, pw, 0, aligned)
        windows.append((k, level, int(image), slice(y0, y1), slice(x0, x1), wy, wx))
    return windows


def forward(
    features: list[Tensor], rois: Tensor, levels: Tensor, spatial_scales: list[float],
    pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """The specification. Static shapes and no host read for sampling_ratio > 0; otherwise one region at a time."""
    like = features[0]
    compute = compute_dtype(like.dtype)
    num_rois, channels = rois.shape[0], like.shape[1]
    shapes = [(f.shape[0], f.shape[2], f.shape[3]) for f in features]
    out = torch.zeros(num_rois, pooled_height, pooled_width, channels, dtype=compute, device=like.device)
    rois = rois.to(compute)
    live = _live(rois, levels, like.shape[0], len(features))
    if sampling_ratio > 0:
        rows = [f.permute(0, 2, 3, 1).flatten(0, 2) for f in features]
        flat = torch.cat([*rows, like.new_zeros(1, channels)])  # [sum N H W + 1, C]
        step = _rois_per_chunk(channels, pooled_height, pooled_width, sampling_ratio)
        for k in range(0, num_rois, step):
            part = slice(k, k + step)
            row, wy, wx = _fixed_grid(
                rois[part], levels[part], live[part], shapes, spatial_scales,
                pooled_height, pooled_width, sampling_ratio, aligned,
            )  # fmt: skip
            values = flat[row].to(compute)  # [k, PH, T, PW, T, C]
            values = values * wx[:, None, None, :, :, None]
            out[part] = (values.sum(4) * wy[:, :, :, None, None]).sum(2)  # [k, PH, PW, C]
    else:
        for k, level, image, ys, xs, wy, wx in _adaptive_windows(
            rois, levels, live, shapes, spatial_scales, pooled_height, pooled_width, aligned
        ):
            window = features[level][image, :, ys, xs].to(compute)  # [C, h, w]
            out[k] = (wy @ (window @ wx.T)).permute(1, 2, 0)  # [PH, PW, C]
    result = empty((num_rois, channels, pooled_height, pooled_width), like, is_channels_last(features))
    return result.copy_(out.permute(0, 3, 1, 2))


def backward(
    grad_output: Tensor, rois: Tensor, levels: Tensor, sizes: list[int], spatial_scales: list[float],
    sampling_ratio: int, aligned: bool, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    """Transpose of the forward: every output gradient, times its weights, is added to the pixels it was read from."""
    compute = compute_dtype(grad_output.dtype)
    num_images, channels = sizes[0], sizes[1]
    shapes = [(num_images, h, w) for h, w in zip(sizes[2::2], sizes[3::2], strict=True)]
    num_rois, _, ph, pw = grad_output.shape
    grad = grad_output.permute(0, 2, 3, 1).to(compute)  # [K, PH, PW, C]
    rois = rois.to(compute)
    live = _live(rois, levels, num_images, len(shapes))
    total = sum(n * h * w for n, h, w in shapes)
    flat = torch.zeros(total + 1, channels, dtype=compute, device=grad.device)
    parts = flat[:total].split([n * h * w for n, h, w in shapes])
    maps = [part.view(n, h, w, channels) for part, (n, h, w) in zip(parts, shapes, strict=True)]
    if sampling_ratio > 0:
        step = _rois_per_chunk(channels, ph, pw, sampling_ratio)
        for k in range(0, num_rois, step):
            part = slice(k, k + step)
            row, wy, wx = _fixed_grid(
                rois[part], levels[part], live[part], shapes, spatial_scales, ph, pw, sampling_ratio, aligned
            )
            weight = wy[:, :, :, None, None] * wx[:, None, None, :, :]  # [k, PH, T, PW, T]
            values = grad[part][:, :, None, :, None, :] * weight[..., None]  # [k, PH, T, PW, T, C]
            flat.index_add_(0, row.flatten(), values.flatten(0, 4))
    else:
        for k, level, image, ys, xs, wy, wx in _adaptive_windows(
            rois, levels, live, shapes, spatial_scales, ph, pw, aligned
        ):
            window = wy.T @ (grad[k].permute(2, 0, 1) @ wx)  # [C, h, w]
            maps[level][image, ys, xs] += window.permute(1, 2, 0)
    out = []
    for grads in maps:
        n, h, w, _ = grads.shape
        result = empty((n, channels, h, w), grad_output, channels_last)
        out.append(result.copy_(grads.permute(0, 3, 1, 2)))
    return out


def _rois_per_chunk(channels: int, ph: int, pw: int, ratio: int) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, channels * ph * pw * 4 * ratio * ratio))
