"""Mask targets from polygons (Mask R-CNN, He et al., 2017).

``rasterize_polygons`` gives, bit for bit, the pixels that maskrcnn-benchmark gives by
``SegmentationMask.crop(box).resize((M, M))`` and pycocotools' ``frPyObjects``, ``merge`` and ``decode``.

How pycocotools fills a polygon (``rleFrPoly``): vertices are rounded to a grid five times finer than the pixels, and
each edge is walked in steps of one grid unit along its longer axis. Where the walk passes from u = 5c + 2 to 5c + 3,
column c is toggled from row ceil((v - 2) / 5) on, v being the smaller ordinate of the two steps. A walk is monotone in
u, so **one edge toggles one column at most once**, and that step is found in closed form::

    longer in x:  v = int(ys + s * t + 0.5)  at  t = 5c + 2 - xs, or at t + 1 where v falls
    longer in y:  v = ys + t,                t the last step with int(xs + s * t + 0.5) on the near side of the column

A pixel is set where the number of toggles above it in its column is odd. No walk, no sort, no list of points: a table
of toggles [edges, columns], a histogram over rows and a running sum. The slope products are made in float64 in the
order of pycocotools' C code, so that ties round as they do there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrcnn_kernels import _library

# Elements [rois, edges, columns] worked on at a time: a few float64 arrays of this size stay in the cache of a core.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
# Grid coordinates are saturated here; pycocotools overflows its ints at twice that.
_GRID_LIMIT = float(1 << 30)


def _edge_table(polygon_offsets: Tensor, num_vertices: int) -> tuple[Tensor, Tensor]:
    """The vertex that follows each vertex on its polygon, and the polygon of each vertex. int64 [V] each"""
    vertex = torch.arange(num_vertices, device=polygon_offsets.device)  # [V]
    polygon = torch.searchsorted(polygon_offsets, vertex, right=True) - 1  # [V]
    polygon = polygon.clamp(0, polygon_offsets.shape[0] - 2)  # vertices that belong to no polygon
    after = vertex + 1
    following = torch.where(after < polygon_offsets[polygon + 1], after, polygon_offsets[polygon])  # [V]
    return following, polygon


def _to_grid(coordinates: Tensor) -> Tensor:
    """Onto pycocotools' grid, five times finer than the pixels; the conversion to int truncates. float64"""
    grid = (coordinates.double() * 5.0 + 0.5).trunc()
    return grid.nan_to_num(nan=0.0).clamp(-_GRID_LIMIT, _GRID_LIMIT)


def _toggles(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, mask_size: int) -> tuple[Tensor, Tensor]:
    """Where each edge toggles each column.

    Args:
        x0, y0, x1, y1: float64 [k, E], ends of the edges on the grid.
        mask_size: M.

    Returns:
        row int64 [k, E, M] in 0..M, and whether there is a toggle, bool [k, E, M].
    """
    dx, dy = (x1 - x0).abs(), (y1 - y0).abs()
    flat = dx >= dy
    backward = torch.where(flat, x0 > x1, y0 > y1)
    xs, ys = torch.where(backward, x1, x0), torch.where(backward, y1, y0)
    xe, ye = torch.where(backward, x0, x1), torch.where(backward, y0, y1)
    slope = torch.where(flat, ye - ys, xe - xs) / torch.where(flat, dx, dy).clamp(min=1.0)  # [k, E]

    # The step: exact for flat edges. For steep ones the nearest to where the walk leaves the column; the true last step
    # before it is that one or the one before, as the rounded product tells.
    origin = torch.where(flat, xs - (slope < 0).double(), xs - 0.5)
    pace = torch.where(flat | (slope == 0), 1.0, slope).reciprocal_()
    base = torch.where(flat, ys, xs)

    column = torch.arange(mask_size, device=x0.device, dtype=torch.float64) * 5.0 + 2.0  # [M]
    step = ((column - origin[..., None]) * pace[..., None]).round_()  # [k, E, M]
    value = (step * slope[..., None]).add_(base[..., None]).add_(0.5)  # [k, E, M]
    near = (value < column + 1.0) == (slope > 0)[..., None]
    steep_v = step.add_((ys - 1.0)[..., None]).add_(near)
    v = torch.where(flat[..., None], value.floor_(), steep_v)
    # floor((v + 2) / 5) of integers; half a unit away from where the division could round across.
    row = v.add_(2.5).mul_(0.2).floor_().clamp_(0.0, float(mask_size)).long()  # [k, E, M]
    crossing = (torch.minimum(x0, x1)[..., None] <= column) & (column < torch.maximum(x0, x1)[..., None])
    return row, crossing


def _fill(row: Tensor, crossing: Tensor, part: Tensor, num_parts: int) -> Tensor:
    """Masks from toggles: parity along each column for each polygon, then the union of an instance's polygons.

    Args:
        row, crossing: [k, E, M] of :func:`_toggles`.
        part: int64 [k, E], which of its instance's polygons an edge belongs to, < ``num_parts``.

    Returns:
        uint8 [k, M, M], indexed [row, column].
    """
    k, _, size = row.shape
    column = torch.arange(size, device=row.device)
    bins = row.add_(((part[..., None] * size) + column) * (size + 1))  # [k, E, M]
    counts = torch.zeros((k, num_parts * size * (size + 1)), dtype=torch.uint8, device=row.device)
    # Counts wrap at 256, which keeps their parity.
    counts.scatter_add_(1, bins.flatten(1), crossing.flatten(1).to(torch.uint8))
    counts = counts.view(k, num_parts, size, size + 1)[..., :size]
    inside = counts.cumsum(dim=3, dtype=torch.uint8).bitwise_and_(1)  # [k, parts, column, row]
    return inside.amax(dim=1).transpose(1, 2)


def _rasterize_polygons_reference(
    vertices: Tensor,
    polygon_offsets: Tensor,
    instance_offsets: Tensor,
    instance_idxs: Tensor,
    boxes: Tensor,
    clip_size: Tensor | None,
    mask_size: int,
    max_vertices: int,
    max_polygons: int,
) -> Tensor:
    masks = torch.zeros((boxes.shape[0], mask_size, mask_size), dtype=torch.uint8, device=boxes.device)
    if 0 in (masks.numel(), max_vertices, max_polygons, vertices.numel()):
        return masks
    if polygon_offsets.shape[0] < 2 or instance_offsets.shape[0] < 2:
        return masks
    following, polygon = _edge_table(polygon_offsets, vertices.shape[0])

    extent = boxes[:, 2:] - boxes[:, :2]  # [K, 2]
    present = (instance_idxs >= 0) & torch.isfinite(boxes).all(dim=1) & (extent > 0).all(dim=1)  # [K]
    corner = boxes[:, :2].clamp(min=0.0)
    if clip_size is not None:
        corner = torch.minimum(corner, (clip_size.to(boxes.dtype) - 1.0))
    # Two tensors: a number divided by a tensor is a product with the reciprocal, which rounds twice.
    ratio = torch.full_like(extent, mask_size) / extent.masked_fill(~present[:, None], 1.0)  # [K, 2]

    instance = instance_idxs.clamp(0, instance_offsets.shape[0] - 2)
    first_polygon = instance_offsets[instance]  # [K]
    first = polygon_offsets[first_polygon]  # [K]
    # Without an instance: an empty range of vertices, which toggles nothing.
    end = torch.where(present, polygon_offsets[instance_offsets[instance + 1]], first)  # [K]
    offsets = torch.arange(max_vertices, device=boxes.device)

    limit = _CHUNK_ELEMENTS.get(boxes.device.type, 1 << 20)
    chunk = max(1, limit // (max_vertices * mask_size))
    for low in range(0, boxes.shape[0], chunk):
        here = slice(low, low + chunk)
        start = first[here, None] + offsets  # [k, E]
        inside = start < end[here, None]
        start = torch.where(inside, start, 0)
        points = torch.stack([vertices[start], vertices[following[start]]], dim=2)  # [k, E, 2, 2]
        grid = _to_grid((points - corner[here, None, None]) * ratio[here, None, None])
        x0, y0, x1, y1 = grid.flatten(2).unbind(2)  # [k, E] each
        row, crossing = _toggles(x0, y0, x1, y1, mask_size)
        part = (polygon[start] - first_polygon[here, None]).clamp(0, max_polygons - 1)
        masks[here] = _fill(row, crossing & inside[..., None], part, max_polygons)
    return masks


def _rasterize_polygons_cpp(
    vertices: Tensor,
    polygon_offsets: Tensor,
    instance_offsets: Tensor,
    instance_idxs: Tensor,
    boxes: Tensor,
    clip_size: Tensor | None,
    mask_size: int,
    max_vertices: int,
    max_polygons: int,
) -> Tensor:
    masks = torch.zeros((boxes.shape[0], mask_size, mask_size), dtype=torch.uint8)
    # The tensors are held by name until the call is over: it gets their addresses only.
    vertices, boxes = vertices.contiguous(), boxes.contiguous()
    tables = [t.to(torch.int64).contiguous() for t in (polygon_offsets, instance_offsets, instance_idxs)]
    clip = None if clip_size is None else clip_size.to(torch.float32).contiguous()
    _library.extension().rasterize_polygons(
        vertices=vertices.data_ptr(),
        num_vertices=vertices.shape[0],
        polygon_offsets=tables[0].data_ptr(),
        num_polygons=tables[0].shape[0] - 1,
        instance_offsets=tables[1].data_ptr(),
        num_instances=tables[1].shape[0] - 1,
        idxs=tables[2].data_ptr(),
        boxes=boxes.data_ptr(),
        clip=0 if clip is None else clip.data_ptr(),
        num_regions=boxes.shape[0],
        size=mask_size,
        masks=masks.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return masks


def _rasterize_polygons_fake(
    vertices: Tensor,
    polygon_offsets: Tensor,
    instance_offsets: Tensor,
    instance_idxs: Tensor,
    boxes: Tensor,
    clip_size: Tensor | None,
    mask_size: int,
    max_vertices: int,
    max_polygons: int,
) -> Tensor:
    return boxes.new_empty((boxes.shape[0], mask_size, mask_size), dtype=torch.uint8)


_rasterize_polygons = _library.define(
    "rasterize_polygons(Tensor vertices, Tensor polygon_offsets, Tensor instance_offsets, Tensor instance_idxs, "
    "Tensor boxes, Tensor? clip_size, SymInt mask_size, SymInt max_vertices, SymInt max_polygons) -> Tensor",
    reference=_rasterize_polygons_reference,
    cpp=_rasterize_polygons_cpp,
    triton="fastrcnn_kernels.triton.rasterize:rasterize_polygons",
    fake=_rasterize_polygons_fake,
)


def rasterize_polygons(
    vertices: Tensor,
    polygon_offsets: Tensor,
    instance_offsets: Tensor,
    instance_idxs: Tensor,
    boxes: Tensor,
    mask_size: int,
    *,
    max_vertices: int,
    max_polygons: int,
    clip_size: Tensor | None = None,
) -> Tensor:
    """What the mask head shall predict for each region: its instance's polygons, rasterised in the frame of its box.

    maskrcnn-benchmark's rule: vertices minus the box's first corner, **clamped to the image**, times
    ``mask_size / (x2 - x1)`` of the **raw** box (no + 1), all in float32; each polygon filled by the even-odd rule as
    pycocotools does; the union of the instance's polygons. Equal to it in every pixel. Not differentiable.

    Instances are ranges of polygons, and polygons ranges of vertices, as in ``fastrcnn.structures.Targets``; a region
    may take any instance of the batch. The output shape depends on host integers only, and the device is never waited
    for.

    Args:
        vertices: float32 [V, 2], (x, y) in pixels of the frame of ``boxes``. Coordinates that exceed 2^30 / 5 in the
            frame of the mask are clamped; a NaN counts as 0.
        polygon_offsets: int64 [Q + 1]; polygon q owns ``vertices[polygon_offsets[q]:polygon_offsets[q + 1]]``. Its last
            vertex is joined to its first. Fewer than three vertices enclose nothing.
        instance_offsets: int64 [I + 1]; instance i owns the polygons from ``instance_offsets[i]`` up to, but not with,
            ``instance_offsets[i + 1]``.
        instance_idxs: int64 [K], the instance of each region, < I; negative: none, which gives zeros.
        boxes: float32 [K, 4], (x1, y1, x2, y2) in pixels of the network's input image. A box without a positive extent
            (maskrcnn-benchmark divides by zero there) or with a NaN or an infinity gives zeros.
        mask_size: M, pixels a side.
        max_vertices: the most vertices of one instance, over all its polygons, on the host. It bounds the work; it must
            not be too small, which cannot be checked without waiting for the device.
        max_polygons: the most polygons of one instance; the same.
        clip_size: [K, 2], (width, height) of each region's image, to clamp corners at width - 1 and height - 1. Without
            it corners are clamped at 0 only, which is all that boxes already clipped to the image need.

    Returns:
        uint8 [K, M, M] of 0 and 1, indexed [row, column].

    Raises:
        ValueError: for wrong shapes or dtypes.
    """
    if vertices.dim() != 2 or vertices.shape[1] != 2 or vertices.dtype != torch.float32:
        raise ValueError(
            f"rasterize_polygons: vertices must be float32 [V, 2], got {vertices.dtype} {tuple(vertices.shape)}"
        )
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"rasterize_polygons: boxes must be [K, 4], got shape {tuple(boxes.shape)}")
    if instance_idxs.shape != boxes.shape[:1]:
        raise ValueError(f"rasterize_polygons: {tuple(instance_idxs.shape)} instance_idxs for {boxes.shape[0]} boxes")
    for name, value in (("polygon_offsets", polygon_offsets), ("instance_offsets", instance_offsets)):
        if value.dim() != 1 or value.shape[0] < 1:
            raise ValueError(f"rasterize_polygons: {name} must be [n + 1], got shape {tuple(value.shape)}")
    if clip_size is not None and clip_size.shape != (boxes.shape[0], 2):
        raise ValueError(f"rasterize_polygons: clip_size must be [K, 2], got shape {tuple(clip_size.shape)}")
    if mask_size < 1 or max_vertices < 0 or max_polygons < 0:
        raise ValueError(
            f"rasterize_polygons: needs mask_size >= 1 and counts >= 0, got {mask_size}, {max_vertices}, {max_polygons}"
        )
    return _rasterize_polygons(
        vertices,
        polygon_offsets,
        instance_offsets,
        instance_idxs,
        boxes.float(),
        clip_size,
        mask_size,
        max_vertices,
        max_polygons,
    )
