"""Boxes to regression targets and back, one program for a block of boxes; the formulas are in ``box_coder.py``.

A box is one 16-byte load; the kernels are bound by memory (by their launch, at the sizes of a step). ``exponential``
and ``logarithm`` are the polynomials of ``csrc/box_coder.h`` without fused multiply-add: under
``enable_fp_fusion=False``, which every launch here sets, results are equal to the C++ kernels' bit for bit. In float64
they are Triton's own.

Weights and clip are constants of the compiled kernel: a model has two sets of weights, and a run-time float argument
would be cut to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

_BLOCK = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_COUNTS = ["first_rows", "anchor_rows", "rows", "k"]


@triton.jit
def divide(a, b, COMPUTE: tl.constexpr):
    """A rounded quotient: Triton's ``/`` is not, in float32."""
    if COMPUTE == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def divide_by(a, WEIGHT: tl.constexpr, COMPUTE: tl.constexpr):
    if WEIGHT == 1.0:
        return a
    else:
        return divide(a, tl.zeros_like(a) + WEIGHT, COMPUTE)


@triton.jit
def exponential(x, COMPUTE: tl.constexpr):
    """e^x; saturates to 0 and infinity, NaN stays NaN."""
    if COMPUTE == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x > 89.0, 89.0, x)
        x = tl.where(x < -104.0, -104.0, x)
        shifted = x * 1.44269504088896341 + 12582912.0
        n = shifted - 12582912.0
        r = (x - n * 0.693359375) - n * -2.12194440e-4
        p = 1.9875691500e-4 * r + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
        p = p * r + 5.0000001201e-1
        y = (p * (r * r) + r) + 1.0
        power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        half = power >> 1
        y = y * ((half + 127) << 23).to(tl.float32, bitcast=True)
        return y * ((power - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def logarithm(x, COMPUTE: tl.constexpr):
    """ln x; -infinity at 0, NaN below."""
    if COMPUTE == tl.float64:
        return tl.log(x)
    else:
        subnormal = x < 1.17549435e-38
        bits = tl.where(subnormal, x * 8388608.0, x).to(tl.int32, bitcast=True)
        power = (bits - 0x3F3504F3) >> 23
        f = (bits - power * 8388608).to(tl.float32, bitcast=True) - 1.0
        e = (power - tl.where(subnormal, 23, 0)).to(tl.float32)
        z = f * f
        p = 7.0376836292e-2 * f - 1.1514610310e-1
        p = p * f + 1.1676998740e-1
        p = p * f - 1.2420140846e-1
        p = p * f + 1.4249322787e-1
        p = p * f - 1.6668057665e-1
        p = p * f + 2.0000714765e-1
        p = p * f - 2.4999993993e-1
        p = p * f + 3.3333331174e-1
        y = (f + ((p * f * z + e * -2.12194440e-4) - 0.5 * z)) + e * 0.693359375
        special = tl.where(x == 0.0, float("-inf"), tl.where(x > 0.0, x, float("nan")))
        return tl.where((x > 0.0) & (x < float("inf")), y, special)


@triton.jit
def load_corners(ptr, index, mask, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """x1, y1, x2, y2 of the boxes ``index`` (int32 [BLOCK]) of ``ptr`` [.., 4]."""
    offset = index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tile = tl.load(ptr + offset, mask=mask[:, None], other=0.0).to(COMPUTE)
    x, y = tl.split(tl.reshape(tile, (BLOCK, 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def store_corners(ptr, index, mask, x1, y1, x2, y2, BLOCK: tl.constexpr):
    tile = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (BLOCK, 4))
    offset = index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(ptr + offset, tile, mask=mask[:, None])


@triton.jit
def decode_box(
    dx, dy, dw, dh, x1, y1, x2, y2,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    CLIP: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The box that (dx, dy, dw, dh) makes of the anchor (x1, y1, x2, y2): its four corners. All in COMPUTE."""
    width = x2 - x1 + BOX_OFFSET
    height = y2 - y1 + BOX_OFFSET
    x = divide_by(dx, WX, COMPUTE) * width + (x1 + 0.5 * width)
    y = divide_by(dy, WY, COMPUTE) * height + (y1 + 0.5 * height)
    dw = divide_by(dw, WW, COMPUTE)
    dh = divide_by(dh, WH, COMPUTE)
    half_width = 0.5 * (exponential(tl.where(dw > CLIP, CLIP, dw), COMPUTE) * width)
    half_height = 0.5 * (exponential(tl.where(dh > CLIP, CLIP, dh), COMPUTE) * height)
    return x - half_width, y - half_height, x + half_width - BOX_OFFSET, y + half_height - BOX_OFFSET


@triton.jit
def clip_coordinate(x, limit):
    """x within [0, limit]; NaN stays."""
    x = tl.where(x < 0.0, 0.0, x)
    return tl.where(x > limit, limit, x)


@triton.jit
def encode_box(
    gx1, gy1, gx2, gy2, x1, y1, x2, y2,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The deltas that make the box (gx1, gy1, gx2, gy2) of the anchor: the inverse of ``decode_box``."""
    anchor_width = x2 - x1 + BOX_OFFSET
    anchor_height = y2 - y1 + BOX_OFFSET
    width = gx2 - gx1 + BOX_OFFSET
    height = gy2 - gy1 + BOX_OFFSET
    x = (gx1 + 0.5 * width) - (x1 + 0.5 * anchor_width)
    y = (gy1 + 0.5 * height) - (y1 + 0.5 * anchor_height)
    tx = divide(WX * x, anchor_width, COMPUTE)
    ty = divide(WY * y, anchor_height, COMPUTE)
    tw = WW * logarithm(divide(width, anchor_width, COMPUTE), COMPUTE)
    th = WH * logarithm(divide(height, anchor_height, COMPUTE), COMPUTE)
    return tx, ty, tw, th


@triton.jit(do_not_specialize=_COUNTS)
def _decode_kernel(
    deltas_ptr, anchors_ptr, out_ptr, first_rows, anchor_rows, rows, k,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    CLIP: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of boxes, k for each row. Grid: blocks of rows * k."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < rows * k
    row = index // k
    delta = (row % first_rows) * k + (index - row * k)
    dx, dy, dw, dh = load_corners(deltas_ptr, delta, mask, COMPUTE, BLOCK)
    x1, y1, x2, y2 = load_corners(anchors_ptr, row % anchor_rows, mask, COMPUTE, BLOCK)
    x1, y1, x2, y2 = decode_box(dx, dy, dw, dh, x1, y1, x2, y2, WX, WY, WW, WH, CLIP, BOX_OFFSET, COMPUTE)
    store_corners(out_ptr, index, mask, x1, y1, x2, y2, BLOCK)


@triton.jit(do_not_specialize=["per_image", "anchor_rows", "rows", "min_size"])
def _proposals_kernel(
    deltas_ptr, anchors_ptr, sizes_ptr, out_ptr, valid_ptr, per_image, anchor_rows, rows, min_size,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    CLIP: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode, clip and flag a block of boxes. Grid: blocks of rows = images * per_image. float32 sizes in pixels."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < rows
    dx, dy, dw, dh = load_corners(deltas_ptr, index, mask, COMPUTE, BLOCK)
    x1, y1, x2, y2 = load_corners(anchors_ptr, index % anchor_rows, mask, COMPUTE, BLOCK)
    x1, y1, x2, y2 = decode_box(dx, dy, dw, dh, x1, y1, x2, y2, WX, WY, WW, WH, CLIP, BOX_OFFSET, COMPUTE)
    image = sizes_ptr + (index // per_image) * 2
    bottom = (tl.load(image, mask=mask, other=0) - BOX_OFFSET).to(COMPUTE)
    right = (tl.load(image + 1, mask=mask, other=0) - BOX_OFFSET).to(COMPUTE)
    x1, y1 = clip_coordinate(x1, right), clip_coordinate(y1, bottom)
    x2, y2 = clip_coordinate(x2, right), clip_coordinate(y2, bottom)
    if COMPUTE == tl.float64:
        smallest = tl.load(min_size)
    else:
        smallest = min_size
    large = (x2 - x1 + BOX_OFFSET >= smallest) & (y2 - y1 + BOX_OFFSET >= smallest)
    store_corners(out_ptr, index, mask, x1, y1, x2, y2, BLOCK)
    tl.store(valid_ptr + index, large.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _encode_kernel(
    boxes_ptr, anchors_ptr, out_ptr, first_rows, anchor_rows, rows,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of boxes. Grid: blocks of rows."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < rows
    gx1, gy1, gx2, gy2 = load_corners(boxes_ptr, index % first_rows, mask, COMPUTE, BLOCK)
    x1, y1, x2, y2 = load_corners(anchors_ptr, index % anchor_rows, mask, COMPUTE, BLOCK)
    tx, ty, tw, th = encode_box(gx1, gy1, gx2, gy2, x1, y1, x2, y2, WX, WY, WW, WH, BOX_OFFSET, COMPUTE)
    store_corners(out_ptr, index, mask, tx, ty, tw, th, BLOCK)


@triton.jit
def _store_corner_gradient(ptr, index, mask, width, height, x, y, BLOCK: tl.constexpr):
    """From the gradients of width, height and centre to those of the corners."""
    right = width + 0.5 * x
    bottom = height + 0.5 * y
    store_corners(ptr, index, mask, x - right, y - bottom, right, bottom, BLOCK)


@triton.jit(do_not_specialize=_COUNTS)
def _decode_backward_kernel(
    grad_ptr, deltas_ptr, anchors_ptr, grad_deltas_ptr, grad_anchors_ptr, first_rows, anchor_rows, rows, k,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    CLIP: tl.constexpr, BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    FOR_DELTAS: tl.constexpr, FOR_ANCHORS: tl.constexpr,
):  # fmt: skip
    """A block of rows, their k boxes one after the other. Grid: blocks of rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    x1, y1, x2, y2 = load_corners(anchors_ptr, row % anchor_rows, mask, COMPUTE, BLOCK)
    width = x2 - x1 + BOX_OFFSET
    height = y2 - y1 + BOX_OFFSET
    sum_width = tl.zeros_like(width)
    sum_height = tl.zeros_like(width)
    sum_x = tl.zeros_like(width)
    sum_y = tl.zeros_like(width)
    for j in range(k):
        index = row * k + j
        g1, g2, g3, g4 = load_corners(grad_ptr, index, mask, COMPUTE, BLOCK)
        dx, dy, dw, dh = load_corners(deltas_ptr, (row % first_rows) * k + j, mask, COMPUTE, BLOCK)
        dw = divide_by(dw, WW, COMPUTE)
        dh = divide_by(dh, WH, COMPUTE)
        grown_x = 0.5 * (g3 - g1) * exponential(tl.where(dw > CLIP, CLIP, dw), COMPUTE)
        grown_y = 0.5 * (g4 - g2) * exponential(tl.where(dh > CLIP, CLIP, dh), COMPUTE)
        if FOR_DELTAS:
            grad_x = divide_by((g1 + g3) * width, WX, COMPUTE)
            grad_y = divide_by((g2 + g4) * height, WY, COMPUTE)
            grad_w = tl.where(dw <= CLIP, divide_by(grown_x * width, WW, COMPUTE), 0.0)
            grad_h = tl.where(dh <= CLIP, divide_by(grown_y * height, WH, COMPUTE), 0.0)
            store_corners(grad_deltas_ptr, index, mask, grad_x, grad_y, grad_w, grad_h, BLOCK)
        if FOR_ANCHORS:
            sum_width += (g1 + g3) * divide_by(dx, WX, COMPUTE) + grown_x
            sum_height += (g2 + g4) * divide_by(dy, WY, COMPUTE) + grown_y
            sum_x += g1 + g3
            sum_y += g2 + g4
    if FOR_ANCHORS:
        _store_corner_gradient(grad_anchors_ptr, row, mask, sum_width, sum_height, sum_x, sum_y, BLOCK)


@triton.jit(do_not_specialize=_COUNTS)
def _encode_backward_kernel(
    grad_ptr, boxes_ptr, anchors_ptr, grad_boxes_ptr, grad_anchors_ptr, first_rows, anchor_rows, rows,
    WX: tl.constexpr, WY: tl.constexpr, WW: tl.constexpr, WH: tl.constexpr,
    BOX_OFFSET: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    FOR_BOXES: tl.constexpr, FOR_ANCHORS: tl.constexpr,
):  # fmt: skip
    """A block of boxes. Grid: blocks of rows."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < rows
    g1, g2, g3, g4 = load_corners(grad_ptr, index, mask, COMPUTE, BLOCK)
    gx1, gy1, gx2, gy2 = load_corners(boxes_ptr, index % first_rows, mask, COMPUTE, BLOCK)
    x1, y1, x2, y2 = load_corners(anchors_ptr, index % anchor_rows, mask, COMPUTE, BLOCK)
    anchor_width = x2 - x1 + BOX_OFFSET
    anchor_height = y2 - y1 + BOX_OFFSET
    width = gx2 - gx1 + BOX_OFFSET
    height = gy2 - gy1 + BOX_OFFSET
    grad_x = divide(g1 * WX, anchor_width, COMPUTE)
    grad_y = divide(g2 * WY, anchor_height, COMPUTE)
    log_x = g3 * WW
    log_y = g4 * WH
    if FOR_BOXES:
        grad_width = divide(log_x, width, COMPUTE)
        grad_height = divide(log_y, height, COMPUTE)
        _store_corner_gradient(grad_boxes_ptr, index, mask, grad_width, grad_height, grad_x, grad_y, BLOCK)
    if FOR_ANCHORS:
        x = (gx1 + 0.5 * width) - (x1 + 0.5 * anchor_width)
        y = (gy1 + 0.5 * height) - (y1 + 0.5 * anchor_height)
        grad_width = divide(-(grad_x * x + log_x), anchor_width, COMPUTE)
        grad_height = divide(-(grad_y * y + log_y), anchor_height, COMPUTE)
        _store_corner_gradient(grad_anchors_ptr, index, mask, grad_width, grad_height, -grad_x, -grad_y, BLOCK)


def coder_constants(
    weights: Sequence[float], box_offset: int, dtype: torch.dtype, clip: float | None = None
) -> dict[str, Any]:
    """The constants that all kernels share; those that decode have a clip too."""
    constants: dict[str, Any] = dict(zip(("WX", "WY", "WW", "WH"), map(float, weights), strict=True))
    if clip is not None:
        constants["CLIP"] = float(clip)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return {**constants, "BOX_OFFSET": box_offset, "COMPUTE": compute, "BLOCK": _BLOCK}


def _grid(boxes: int) -> tuple[int]:
    if boxes >= 2**31 - _BLOCK:
        raise ValueError(f"the Triton box coder takes fewer than 2**31 boxes, got {boxes}")
    return (triton.cdiv(boxes, _BLOCK),)


def decode(
    deltas: Tensor, anchors: Tensor, out: Tensor, k: int, weights: Sequence[float], box_offset: int, clip: float
) -> None:
    """Fill ``out`` [rows, k, 4] from contiguous deltas [.., k, 4] and anchors [.., 4], repeated to rows."""
    rows = out.numel() // (4 * k)
    with device_guard(out):
        _decode_kernel[_grid(rows * k)](
            deltas, anchors, out, deltas.numel() // (4 * k), anchors.numel() // 4, rows, k,
            **coder_constants(weights, box_offset, out.dtype, clip), **OPTIONS,
        )  # fmt: skip


def decode_proposals(
    deltas: Tensor, anchors: Tensor, sizes: Tensor, out: Tensor, valid: Tensor, weights: Sequence[float],
    box_offset: int, clip: float, min_size: float,
) -> None:  # fmt: skip
    """Fill ``out`` [N, K, 4] and ``valid`` bool [N, K]; sizes int64 [N, 2]."""
    rows = valid.numel()
    # Triton passes a float argument as float32: a double goes through memory.
    smallest = out.new_full((1,), min_size) if out.dtype == torch.float64 else min_size
    with device_guard(out):
        _proposals_kernel[_grid(rows)](
            deltas, anchors, sizes, out, valid.view(torch.uint8), valid.shape[1], anchors.numel() // 4, rows, smallest,
            **coder_constants(weights, box_offset, out.dtype, clip), **OPTIONS,
        )  # fmt: skip


def encode(boxes: Tensor, anchors: Tensor, out: Tensor, weights: Sequence[float], box_offset: int) -> None:
    """Fill ``out`` [rows, 4] from contiguous boxes and anchors [.., 4], repeated to rows."""
    rows = out.numel() // 4
    with device_guard(out):
        _encode_kernel[_grid(rows)](
            boxes, anchors, out, boxes.numel() // 4, anchors.numel() // 4, rows,
            **coder_constants(weights, box_offset, out.dtype), **OPTIONS,
        )  # fmt: skip


def decode_backward(
    grad: Tensor, deltas: Tensor, anchors: Tensor, grad_deltas: Tensor | None, grad_anchors: Tensor | None, rows: int,
    k: int, weights: Sequence[float], box_offset: int, clip: float,
) -> None:  # fmt: skip
    """Fill ``grad_deltas`` [rows, k, 4] and ``grad_anchors`` [rows, 4], those that are asked for."""
    delta_rows = deltas.numel() // (4 * k) if k else rows
    with device_guard(grad):
        _decode_backward_kernel[_grid(rows)](
            grad, deltas, anchors, grad if grad_deltas is None else grad_deltas,
            grad if grad_anchors is None else grad_anchors, delta_rows, anchors.numel() // 4, rows, k,
            FOR_DELTAS=grad_deltas is not None, FOR_ANCHORS=grad_anchors is not None,
            **coder_constants(weights, box_offset, grad.dtype, clip), **OPTIONS,
        )  # fmt: skip


def encode_backward(
    grad: Tensor, boxes: Tensor, anchors: Tensor, grad_boxes: Tensor | None, grad_anchors: Tensor | None, rows: int,
    weights: Sequence[float], box_offset: int,
) -> None:  # fmt: skip
    """Fill ``grad_boxes`` and ``grad_anchors`` [rows, 4], those that are asked for."""
    with device_guard(grad):
        _encode_backward_kernel[_grid(rows)](
            grad, boxes, anchors, grad if grad_boxes is None else grad_boxes,
            grad if grad_anchors is None else grad_anchors, boxes.numel() // 4, anchors.numel() // 4, rows,
            FOR_BOXES=grad_boxes is not None, FOR_ANCHORS=grad_anchors is not None,
            **coder_constants(weights, box_offset, grad.dtype), **OPTIONS,
        )  # fmt: skip


_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
_INPUTS = ("grad_ptr", "deltas_ptr", "boxes_ptr")


def _case(label: str, kernel: Any, dtype: torch.dtype, weights: Sequence[float], **flags: bool) -> CompileCase:
    wide = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {
        "deltas_ptr": f"*{_NAMES[dtype]}",
        "sizes_ptr": "*i64",
        "valid_ptr": "*u8",
        "min_size": "*fp64" if dtype == torch.float64 else "fp32",
    }
    clip = math.log(1000 / 16) if "CLIP" in kernel.arg_names else None
    constants = {**coder_constants(weights, 1, dtype, clip), **flags}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, wide if name.endswith("_ptr") else "i32") for name in names}
    return CompileCase(label, kernel, signature, constants, OPTIONS)


_RPN, _HEAD = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
COMPILE_CASES = [
    _case("decode-bf16", _decode_kernel, torch.bfloat16, _RPN),
    _case("decode-fp32-weights", _decode_kernel, torch.float32, _HEAD),
    _case("decode-fp64", _decode_kernel, torch.float64, _HEAD),
    _case("proposals-bf16", _proposals_kernel, torch.bfloat16, _RPN),
    _case("proposals-fp32", _proposals_kernel, torch.float32, _RPN),
    _case("encode-fp32", _encode_kernel, torch.float32, _RPN),
    _case("encode-fp64-weights", _encode_kernel, torch.float64, _HEAD),
    _case("decode-backward-fp32", _decode_backward_kernel, torch.float32, _HEAD, FOR_DELTAS=True, FOR_ANCHORS=False),
    _case("decode-backward-fp64", _decode_backward_kernel, torch.float64, _HEAD, FOR_DELTAS=True, FOR_ANCHORS=True),
    _case("encode-backward-fp32", _encode_backward_kernel, torch.float32, _HEAD, FOR_BOXES=True, FOR_ANCHORS=True),
]
