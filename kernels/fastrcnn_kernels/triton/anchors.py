"""The anchors of all levels in one launch: an anchor is computed from its index and written once.

A program is a block of anchors of one level, so that its level is a scalar. Bound by the memory that is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard
from fastrcnn_kernels.triton.box_coder import load_corners, store_corners

MAX_LEVELS = 6  # P2 to P7; more levels take another launch

_BLOCK = 256
# The product of a column and the stride is exact, and is not to become one rounding with the sum.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_FIELDS = [
    f"{name}{i}" for name in ("block", "first", "count", "width", "per_cell", "stride") for i in range(MAX_LEVELS)
]


@triton.jit
def _pick(level, v0, v1, v2, v3, v4, v5):
    v = tl.where(level == 1, v1, v0)
    v = tl.where(level == 2, v2, v)
    v = tl.where(level == 3, v3, v)
    v = tl.where(level == 4, v4, v)
    return tl.where(level == 5, v5, v)


@triton.jit(do_not_specialize=_FIELDS)
def _grid_kernel(
    c0, c1, c2, c3, c4, c5, out_ptr,
    block0, block1, block2, block3, block4, block5, first0, first1, first2, first3, first4, first5,
    count0, count1, count2, count3, count4, count5, width0, width1, width2, width3, width4, width5,
    per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of anchors of one level: ``block`` and ``first`` are the level's first block and first anchor."""
    pid = tl.program_id(0)
    level = (pid >= block1).to(tl.int32) + (pid >= block2).to(tl.int32) + (pid >= block3).to(tl.int32)
    level += (pid >= block4).to(tl.int32) + (pid >= block5).to(tl.int32)
    cell_ptr = _pick(level, c0, c1, c2, c3, c4, c5)
    block = _pick(level, block0, block1, block2, block3, block4, block5)
    first = _pick(level, first0, first1, first2, first3, first4, first5)
    count = _pick(level, count0, count1, count2, count3, count4, count5)
    width = _pick(level, width0, width1, width2, width3, width4, width5)
    per_cell = _pick(level, per_cell0, per_cell1, per_cell2, per_cell3, per_cell4, per_cell5)
    stride = _pick(level, stride0, stride1, stride2, stride3, stride4, stride5)
    index = (pid - block) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    pixel = index // per_cell
    y = pixel // width
    shift_x = (pixel - y * width).to(COMPUTE) * stride.to(COMPUTE)
    shift_y = y.to(COMPUTE) * stride.to(COMPUTE)
    x1, y1, x2, y2 = load_corners(cell_ptr, index - pixel * per_cell, mask, COMPUTE, BLOCK)
    store_corners(
        out_ptr, first + index, mask, shift_x + x1, shift_y + y1, shift_x + x2, shift_y + y2, BLOCK
    )  # fmt: skip


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32, "BLOCK": _BLOCK}


def grid_anchors(
    cells: Sequence[Tensor], counts: Sequence[int], widths: Sequence[int], strides: Sequence[int], out: Tensor
) -> None:
    """Fill ``out`` [sum of counts, 4] from contiguous cells [A_l, 4] of its type."""
    if out.shape[0] >= 2**31 - _BLOCK:
        raise ValueError(f"grid_anchors: the Triton kernel writes fewer than 2**31 anchors, got {out.shape[0]}")
    # A level without anchors has nothing to divide by.
    levels = [level for level in zip(cells, counts, widths, strides, strict=True) if level[1]]
    first = 0
    for start in range(0, len(levels), MAX_LEVELS):
        some = levels[start : start + MAX_LEVELS]
        arguments: dict[str, Any] = {}
        block = 0
        for i in range(MAX_LEVELS):
            # A level that is not there starts behind the last block.
            cell, count, width, stride = some[i] if i < len(some) else (some[0][0], 0, 1, 1)
            values = {"c": cell, "block": block, "first": first, "count": count, "width": width, "stride": stride}
            arguments.update({f"{name}{i}": value for name, value in values.items()}, **{f"per_cell{i}": cell.shape[0]})
            block += triton.cdiv(count, _BLOCK)
            first += count
        with device_guard(out):
            _grid_kernel[(block,)](**arguments, out_ptr=out, **_constants(out.dtype), **_OPTIONS)


def _case(label: str, dtype: torch.dtype) -> CompileCase:
    pointers = [*(f"c{i}" for i in range(MAX_LEVELS)), "out_ptr"]
    signature = {**dict.fromkeys(pointers, f"*{label}"), **dict.fromkeys(_FIELDS, "i32")}
    return CompileCase(label, _grid_kernel, signature, _constants(dtype), _OPTIONS)


COMPILE_CASES = [_case("fp32", torch.float32), _case("fp64", torch.float64)]
