"""Polygons to mask targets in one launch: a program a region, no sort, no scratch, no atomics.

The rule and the closed form are in ``fastrcnn_kernels/rasterize.py``. An edge toggles a column at most once, from some
row on. Here a column is a word of bits, one a row: a toggle at row r flips the bits from r up, ``-1 << r``, so that the
exclusive or of the words of all edges is the parity that a running sum would give. A polygon's edges are combined
element by element in registers, [edges, columns], and across the edges once a polygon; polygons are united by or.

Products that decide a tie are made in float64, in pycocotools' order, and not fused (``enable_fp_fusion=False``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_EDGES = 32
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _to_grid(coordinate):
    """Onto pycocotools' grid, five times finer than the pixels: truncated, NaN as 0, saturated at 2^30."""
    scaled = coordinate.to(tl.float64) * 5.0 + 0.5
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -1073741824.0), 1073741824.0)
    return tl.where(scaled < 0.0, tl.ceil(scaled), tl.floor(scaled))


@triton.jit
def _toggle_rows(x0, y0, x1, y1, columns, SIZE: tl.constexpr):
    """For edges [E] on the grid and columns [C]: the row from which the column toggles, SIZE where it does not."""
    dx = tl.abs(x1 - x0)
    dy = tl.abs(y1 - y0)
    flat = dx >= dy
    backward = tl.where(flat, x0 > x1, y0 > y1)
    xs = tl.where(backward, x1, x0)
    ys = tl.where(backward, y1, y0)
    xe = tl.where(backward, x0, x1)
    ye = tl.where(backward, y0, y1)
    longer = tl.maximum(tl.where(flat, dx, dy), 1.0)
    slope = tl.where(flat, ye - ys, xe - xs) / longer
    low = tl.minimum(x0, x1)[:, None]
    high = tl.maximum(x0, x1)[:, None]

    at = columns.to(tl.float64)[None, :] * 5.0 + 2.0
    rises = slope[:, None]
    # Longer in x: the step is exact. Longer in y: the nearest to where the walk leaves the column, put right below.
    flat_step = at - xs[:, None] + tl.where(rises < 0.0, 1.0, 0.0)
    steep_step = tl.floor((at + 0.5 - xs[:, None]) / tl.where(rises == 0.0, 1.0, rises) + 0.5)
    step = tl.where(flat[:, None], flat_step, steep_step)
    value = tl.where(flat, ys, xs)[:, None] + rises * step + 0.5
    near = (value < at + 1.0) == (rises > 0.0)
    steep_v = ys[:, None] - 1.0 + step + tl.where(near, 1.0, 0.0)
    v = tl.where(flat[:, None], tl.floor(value), steep_v)
    # ceil((v - 2) / 5) of integers, by integers: bounded first, and shifted so that the division truncates downwards.
    v = tl.minimum(tl.maximum(v, -5.0), 5.0 * SIZE).to(tl.int32)
    row = (v + 7) // 5 - 1
    row = tl.minimum(tl.maximum(row, 0), SIZE)
    return tl.where((low <= at) & (at < high), row, SIZE)


@triton.jit(do_not_specialize=["num_vertices", "num_polygons", "num_instances"])
def _rasterize_kernel(
    vertices_ptr,
    polygon_offsets_ptr,
    instance_offsets_ptr,
    instance_idxs_ptr,
    boxes_ptr,
    clip_ptr,
    masks_ptr,
    num_vertices,
    num_polygons,
    num_instances,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_CLIP: tl.constexpr,
):
    """One region. Grid: (regions, words of 32 rows)."""
    region = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * 32
    x1 = tl.load(boxes_ptr + region * 4)
    y1 = tl.load(boxes_ptr + region * 4 + 1)
    width = tl.load(boxes_ptr + region * 4 + 2) - x1
    height = tl.load(boxes_ptr + region * 4 + 3) - y1
    corner_x = tl.maximum(x1, 0.0)
    corner_y = tl.maximum(y1, 0.0)
    if HAS_CLIP:
        corner_x = tl.minimum(corner_x, tl.load(clip_ptr + region * 2) - 1.0)
        corner_y = tl.minimum(corner_y, tl.load(clip_ptr + region * 2 + 1) - 1.0)
    instance = tl.load(instance_idxs_ptr + region)
    # Of an infinite corner the side is infinite or NaN; so it is where finite corners are too far apart.
    finite = (width < float("inf")) & (height < float("inf"))
    present = (instance >= 0) & finite & (width > 0.0) & (height > 0.0)
    ratio_x = tl.div_rn(tl.full([], SIZE, tl.float32), tl.where(present, width, 1.0))
    ratio_y = tl.div_rn(tl.full([], SIZE, tl.float32), tl.where(present, height, 1.0))

    instance = tl.minimum(tl.maximum(instance, 0), num_instances - 1)
    polygon = tl.maximum(tl.load(instance_offsets_ptr + instance), 0)
    last = tl.minimum(tl.load(instance_offsets_ptr + instance + 1), num_polygons)
    last = tl.where(present, last, polygon)

    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, EDGES)
    filled = tl.zeros([COLUMNS], dtype=tl.int32)
    while polygon < last:
        begin = tl.maximum(tl.load(polygon_offsets_ptr + polygon), 0)
        end = tl.minimum(tl.load(polygon_offsets_ptr + polygon + 1), num_vertices)
        toggled = tl.zeros([EDGES, COLUMNS], dtype=tl.int32)
        start = begin
        while start < end:
            vertex = start + lanes
            inside = vertex < end
            following = tl.where(vertex + 1 < end, vertex + 1, begin)
            ax = tl.load(vertices_ptr + vertex * 2, mask=inside, other=0.0)
            ay = tl.load(vertices_ptr + vertex * 2 + 1, mask=inside, other=0.0)
            bx = tl.load(vertices_ptr + following * 2, mask=inside, other=0.0)
            by = tl.load(vertices_ptr + following * 2 + 1, mask=inside, other=0.0)
            row = _toggle_rows(
                _to_grid((ax - corner_x) * ratio_x),
                _to_grid((ay - corner_y) * ratio_y),
                _to_grid((bx - corner_x) * ratio_x),
                _to_grid((by - corner_y) * ratio_y),
                columns,
                SIZE,
            )
            shift = tl.minimum(tl.maximum(row - word, 0), 32)
            # A shift by 32 is undefined: the last bit goes in a step of its own.
            bits = tl.where(shift < 32, -1 << tl.minimum(shift, 31), 0)
            toggled = toggled ^ tl.where(inside[:, None] & (row < SIZE), bits, 0)
            start += EDGES
        filled = filled | tl.reduce(toggled, 0, _xor)
        polygon += 1

    rows = tl.arange(0, 32)
    pixels = (filled[None, :] >> rows[:, None]) & 1
    at = masks_ptr + region * SIZE * SIZE + (word + rows)[:, None] * SIZE + columns[None, :]
    tl.store(at, pixels.to(tl.uint8), mask=(word + rows < SIZE)[:, None] & (columns < SIZE)[None, :])


def _constants(size: int, has_clip: bool) -> dict[str, Any]:
    return {
        "SIZE": size,
        "COLUMNS": max(16, triton.next_power_of_2(size)),
        "EDGES": _EDGES if size <= 32 else max(1, _EDGES * 32 // triton.next_power_of_2(size)),
        "HAS_CLIP": has_clip,
    }


def rasterize_polygons(
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
    """Launcher of ``fastrcnn_kernels::rasterize_polygons``."""
    shape = (boxes.shape[0], mask_size, mask_size)
    if 0 in (boxes.shape[0], max_vertices, max_polygons, vertices.numel()) or (
        polygon_offsets.shape[0] < 2 or instance_offsets.shape[0] < 2
    ):
        return torch.zeros(shape, dtype=torch.uint8, device=boxes.device)
    masks = torch.empty(shape, dtype=torch.uint8, device=boxes.device)
    clip = None if clip_size is None else clip_size.float().contiguous()
    boxes = boxes.contiguous()
    with device_guard(boxes):
        _rasterize_kernel[(boxes.shape[0], -(-mask_size // 32))](
            vertices_ptr=vertices.contiguous(),
            polygon_offsets_ptr=polygon_offsets.long().contiguous(),
            instance_offsets_ptr=instance_offsets.long().contiguous(),
            instance_idxs_ptr=instance_idxs.long().contiguous(),
            boxes_ptr=boxes,
            clip_ptr=boxes if clip is None else clip,
            masks_ptr=masks,
            num_vertices=vertices.shape[0],
            num_polygons=polygon_offsets.shape[0] - 1,
            num_instances=instance_offsets.shape[0] - 1,
            **_constants(mask_size, clip is not None),
            **_OPTIONS,
        )
    return masks


def _case(size: int, has_clip: bool) -> CompileCase:
    signature = {
        "vertices_ptr": "*fp32",
        "polygon_offsets_ptr": "*i64",
        "instance_offsets_ptr": "*i64",
        "instance_idxs_ptr": "*i64",
        "boxes_ptr": "*fp32",
        "clip_ptr": "*fp32",
        "masks_ptr": "*u8",
        "num_vertices": "i32",
        "num_polygons": "i32",
        "num_instances": "i32",
    }
    label = f"polygons-{size}{'-clip' if has_clip else ''}"
    return CompileCase(label, _rasterize_kernel, signature, _constants(size, has_clip), dict(_OPTIONS))


COMPILE_CASES = [_case(28, False), _case(28, True), _case(14, False), _case(112, False)]
