"""Neighbourhoods at the sampled positions, gathered and added back; rules in ``fastrcnn_kernels/rpn_head_loss.py``.

Gather: a program for each slot and block of channels. Scatter: the nine pixels of each slot are numbered, sorted
(stable, on the device), and the program at the head of each run of one pixel adds the run's rows in their order and
writes the pixel once: no atomics, the same bits every time. Beside zeroing the maps this touches nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.rpn_loss import (
    LEVEL_SIZES,
    MAX_LEVELS,
    TYPE_NAMES,
    check_levels,
    level_of,
    level_sizes,
    pointers,
)

_NO_PIXEL = tl.constexpr(1 << 62)


@triton.jit
def _pick(p0, p1, p2, p3, p4, level, LEVELS: tl.constexpr):
    p = p0
    if LEVELS > 1:
        p = tl.where(level == 1, p1, p)
    if LEVELS > 2:
        p = tl.where(level == 2, p2, p)
    if LEVELS > 3:
        p = tl.where(level == 3, p3, p)
    if LEVELS > 4:
        p = tl.where(level == 4, p4, p)
    return p


@triton.jit(do_not_specialize=["slots", *LEVEL_SIZES])
def _gather_kernel(
    f0, f1, f2, f3, f4, indices_ptr, out_ptr, slots,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    LEVELS: tl.constexpr, ANCHORS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The neighbourhood of one slot. Grid: slots of all images, blocks of channels."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.load(indices_ptr + row)
    level, height, width, position = level_of(
        index, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4, LEVELS, ANCHORS
    )
    f = _pick(f0, f1, f2, f3, f4, level, LEVELS)
    pixels = height.to(tl.int64) * width
    base = f + row // slots * pixels * CHANNELS
    in_channels = channel < CHANNELS
    for tap in tl.static_range(9):
        y = position // width + (tap // 3 - 1)
        x = position % width + (tap % 3 - 1)
        inside = (level >= 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        spot = y * width + x
        if CHANNELS_LAST:
            value = tl.load(base + spot * CHANNELS + channel, mask=in_channels & inside, other=0.0)
            tl.store(out_ptr + row * (9 * CHANNELS) + tap * CHANNELS + channel, value, mask=in_channels)
        else:
            value = tl.load(base + channel * pixels + spot, mask=in_channels & inside, other=0.0)
            tl.store(out_ptr + row * (9 * CHANNELS) + channel * 9 + tap, value, mask=in_channels)


@triton.jit(do_not_specialize=["rows"])
def _outputs_kernel(
    slopes_ptr, grad_ptr, indices_ptr, out_ptr, rows, ANCHORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The five numbers of each slot, in the columns of its anchor. Grid: blocks of slots of all images."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    index = tl.load(indices_ptr + row, mask=row < rows, other=-1)
    of_logit = column < ANCHORS
    owner = tl.where(of_logit, column, (column - ANCHORS) // 4)
    number = tl.where(of_logit, 0, 1 + (column - ANCHORS) % 4)
    mine = (index >= 0)[:, None] & ((index % ANCHORS)[:, None] == owner[None, :])
    slope = tl.load(slopes_ptr + row[:, None] * 5 + number[None, :], mask=mine, other=0.0)
    grad = tl.load(grad_ptr + tl.where(of_logit, 0, 1))
    inside = (row < rows)[:, None] & (column < 5 * ANCHORS)[None, :]
    # An empty slot is zero whatever the gradient is: infinite where a float16 loss is scaled too much.
    value = tl.where(mine, slope * grad[None, :], 0.0)
    tl.store(out_ptr + row[:, None] * (5 * ANCHORS) + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["slots", "count", *LEVEL_SIZES])
def _keys_kernel(
    indices_ptr, keys_ptr, slots, count,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    LEVELS: tl.constexpr, ANCHORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Number the pixel of each (slot, tap): level in the highest bits, then image, y, x."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = entry // 9
    tap = entry % 9
    index = tl.load(indices_ptr + row, mask=entry < count, other=-1)
    level, height, width, position = level_of(
        index, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4, LEVELS, ANCHORS
    )
    y = position // width + (tap // 3 - 1)
    x = position % width + (tap % 3 - 1)
    inside = (level >= 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    key = (level << 48) + (row // slots * height + y) * width + x
    tl.store(keys_ptr + entry, tl.where(inside, key, _NO_PIXEL), mask=entry < count)


@triton.jit(do_not_specialize=["count", *LEVEL_SIZES])
def _scatter_kernel(
    f0, f1, f2, f3, f4, keys_ptr, order_ptr, rows_ptr, count,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add a run of rows that reach one pixel. Grid: sorted entries (most are no head of a run), blocks of channels."""
    entry = tl.program_id(0)
    key = tl.load(keys_ptr + entry)
    before = tl.load(keys_ptr + entry - 1, mask=entry > 0, other=-1)
    if (key != before) & (key != _NO_PIXEL):
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = tl.zeros([BLOCK_C], dtype=COMPUTE)
        same = key
        while same == key:
            source = tl.load(order_ptr + entry)
            row = rows_ptr + source // 9 * (9 * CHANNELS)
            if CHANNELS_LAST:
                at = source % 9 * CHANNELS + channel
            else:
                at = channel * 9 + source % 9
            acc += tl.load(row + at, mask=channel < CHANNELS, other=0.0).to(COMPUTE)
            entry += 1
            same = tl.load(keys_ptr + entry, mask=entry < count, other=-1)
        level = key >> 48
        pixel = key & ((1 << 48) - 1)
        f = _pick(f0, f1, f2, f3, f4, level, LEVELS)
        if CHANNELS_LAST:
            to = f + pixel * CHANNELS + channel
        else:
            height = _pick(height0, height1, height2, height3, height4, level, LEVELS)
            width = _pick(width0, width1, width2, width3, width4, level, LEVELS)
            pixels = height.to(tl.int64) * width
            to = f + pixel // pixels * pixels * CHANNELS + channel * pixels + pixel % pixels
        tl.store(to, acc.to(f0.dtype.element_ty), mask=channel < CHANNELS)


def _block_c(channels: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"BLOCK_C": min(256, triton.next_power_of_2(channels))}, {"num_warps": 2}


def patches(features: list[Tensor], indices: Tensor, num_anchors: int, channels_last: bool) -> Tensor:
    """Launcher of ``fastrcnn_kernels::rpn_patches``."""
    first = features[0]
    check_levels(len(features), first.dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [f.contiguous(memory_format=layout) for f in features]
    channels = first.shape[1]
    out = torch.empty((indices.numel(), 9 * channels), dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out
    block, options = _block_c(channels)
    with device_guard(first):
        _gather_kernel[(indices.numel(), triton.cdiv(channels, block["BLOCK_C"]))](
            **pointers("f", maps), indices_ptr=indices.contiguous(), out_ptr=out, slots=indices.shape[1],
            **level_sizes([(f.shape[2], f.shape[3]) for f in maps]), LEVELS=len(maps), ANCHORS=num_anchors,
            CHANNELS=channels, CHANNELS_LAST=channels_last, **block, **options,
        )  # fmt: skip
    return out


def scatter_patches(
    rows: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool
) -> list[Tensor]:
    """Launcher of ``fastrcnn_kernels::rpn_scatter_patches``. Deterministic."""
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    check_levels(len(shapes), rows.dtype)
    channels = rows.shape[1] // 9
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = [
        torch.empty((indices.shape[0], channels, h, w), dtype=rows.dtype, device=rows.device, memory_format=layout)
        for h, w in shapes
    ]
    torch._foreach_zero_(out)  # one launch
    count = indices.numel() * 9
    if count * channels == 0:
        return out
    keys = torch.empty(count, dtype=torch.int64, device=rows.device)
    block, options = _block_c(channels)
    level = level_sizes(shapes)
    with device_guard(rows):
        _keys_kernel[(triton.cdiv(count, _KEYS),)](
            indices_ptr=indices.contiguous(), keys_ptr=keys, slots=indices.shape[1], count=count, **level,
            LEVELS=len(shapes), ANCHORS=num_anchors, BLOCK=_KEYS, num_warps=4,
        )  # fmt: skip
        keys, order = keys.sort(stable=True)
        _scatter_kernel[(count, triton.cdiv(channels, block["BLOCK_C"]))](
            **pointers("f", out), keys_ptr=keys, order_ptr=order, rows_ptr=rows.contiguous(), count=count, **level,
            LEVELS=len(shapes), CHANNELS=channels, CHANNELS_LAST=channels_last,
            COMPUTE=tl.float64 if rows.dtype == torch.float64 else tl.float32, **block, **options,
        )  # fmt: skip
    return out


_KEYS = 256
_OUTPUT_ROWS = 32


def _output_constants(num_anchors: int) -> dict[str, int]:
    return {"ANCHORS": num_anchors, "ROWS": _OUTPUT_ROWS, "COLUMNS": triton.next_power_of_2(5 * num_anchors)}


def output_gradients(slopes: Tensor, grad_losses: Tensor, indices: Tensor, num_anchors: int) -> Tensor:
    """Launcher of ``fastrcnn_kernels::rpn_output_gradients``."""
    rows = indices.numel()
    out = torch.empty((rows, 5 * num_anchors), dtype=slopes.dtype, device=slopes.device)
    if rows:
        with device_guard(slopes):
            _outputs_kernel[(triton.cdiv(rows, _OUTPUT_ROWS),)](
                slopes.contiguous(), grad_losses.to(slopes.dtype).contiguous(), indices.contiguous(), out, rows,
                **_output_constants(num_anchors), num_warps=4,
            )  # fmt: skip
    return out


def _cases() -> list[CompileCase]:
    sizes = dict.fromkeys(LEVEL_SIZES, "i32")
    block, options = _block_c(256)
    keys = {"indices_ptr": "*i64", "keys_ptr": "*i64", "slots": "i32", "count": "i32", **sizes}
    constants: dict[str, Any] = {"LEVELS": 5, "ANCHORS": 3, "BLOCK": _KEYS}
    cases = [CompileCase("keys", _keys_kernel, keys, constants, {"num_warps": 4})]
    for name in ("fp32", "fp64"):
        outputs = {"slopes_ptr": f"*{name}", "grad_ptr": f"*{name}", "indices_ptr": "*i64", "out_ptr": f"*{name}",
                   "rows": "i32"}  # fmt: skip
        cases.append(
            CompileCase(f"outputs-{name}", _outputs_kernel, outputs, dict(_output_constants(3)), {"num_warps": 4})
        )
    for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False)):
        name = TYPE_NAMES[dtype]
        maps = {f"f{i}": f"*{name}" for i in range(MAX_LEVELS)}
        constants = {"LEVELS": 5, "CHANNELS": 256, "CHANNELS_LAST": channels_last, **block}
        gather = maps | {"indices_ptr": "*i64", "out_ptr": f"*{name}", "slots": "i32"} | sizes
        scatter = maps | {"keys_ptr": "*i64", "order_ptr": "*i64", "rows_ptr": f"*{name}", "count": "i32"} | sizes
        cases.append(CompileCase(f"gather-{name}", _gather_kernel, gather, constants | {"ANCHORS": 3}, options))
        cases.append(
            CompileCase(f"scatter-{name}", _scatter_kernel, scatter, constants | {"COMPUTE": tl.float32}, options)
        )
    return cases


COMPILE_CASES = _cases()
