"""Loss of a mask head with its last 1x1 convolution; the rules are in ``fastrcnn_kernels/mask_loss.py``.

Both directions are bound by reading the features once (and writing their gradient once). The forward has a program for
each region and block of pixels, which walks the channels; the backward one for each region and block of channels, which
walks the pixels and therefore owns its share of the weight's gradient. The shares are added by class in a third kernel,
in the order of the regions: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _log1p(e, COMPUTE: tl.constexpr):
    """log(1 + e) for 0 <= e <= 1: 2 atanh(e / (2 + e)); eight terms give float32 its last bit."""
    if COMPUTE == tl.float64:
        return tl.log(1.0 + e)
    else:
        s = e / (2.0 + e)
        q = s * s
        y = q * (2.0 / 15) + 2.0 / 13
        y = y * q + 2.0 / 11
        y = y * q + 2.0 / 9
        y = y * q + 2.0 / 7
        y = y * q + 2.0 / 5
        y = y * q + 2.0 / 3
        return (y * q + 2.0) * s


@triton.jit
def _locate(base, pixel, channel, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Places, from ``base`` on, and mask of a [pixels, channels] block of one region."""
    if CHANNELS_LAST:
        offset = pixel[:, None] * CHANNELS + channel[None, :]
    else:
        offset = channel[None, :] * pixels + pixel[:, None]
    return base + offset, (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]


@triton.jit(do_not_specialize=["classes"])
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, targets_ptr, logits_ptr, losses_ptr, pixels, classes,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RELU: tl.constexpr, LOSS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits, and with LOSS their cross entropy, of a block of pixels. Grid: regions, blocks of pixels."""
    region = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    label = tl.load(labels_ptr + region).to(tl.int64)
    present = (label >= 0) & (label < classes)
    inside = pixel < pixels
    z = tl.zeros([BLOCK_P], dtype=COMPUTE)
    loss = tl.zeros([BLOCK_P], dtype=COMPUTE)
    if present:
        acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=COMPUTE)
        for start in range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            at, mask = _locate(hidden_ptr + region * pixels * CHANNELS, pixel, channel, pixels, CHANNELS, CHANNELS_LAST)
            h = tl.load(at, mask=mask, other=0.0).to(COMPUTE)
            w = tl.load(weight_ptr + label * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(COMPUTE)
            if RELU:
                h = tl.where(h < 0.0, 0.0, h)  # a NaN stays one
            acc += h * w[None, :]
        z = tl.sum(acc, axis=1) + tl.load(bias_ptr + label).to(COMPUTE)
        if LOSS:
            y = tl.load(targets_ptr + region * pixels + pixel, mask=inside, other=0).to(COMPUTE)
            loss = tl.where(z < 0.0, 0.0, z) - z * y + _log1p(tl.exp(-tl.abs(z)), COMPUTE)
            loss = tl.where(inside, loss, 0.0)
    tl.store(logits_ptr + region * pixels + pixel, z, mask=inside)
    if LOSS:
        tl.store(losses_ptr + region * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0))


@triton.jit(do_not_specialize=["classes"])
def _backward_kernel(
    hidden_ptr, weight_ptr, labels_ptr, targets_ptr, scale_ptr, logits_ptr, grad_ptr, by_region_ptr, bias_by_region_ptr,
    pixels, classes, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RELU: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of channels of one region. Grid: regions, blocks of channels."""
    region = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    label = tl.load(labels_ptr + region).to(tl.int64)
    present = (label >= 0) & (label < classes)
    label = tl.where(present, label, 0)
    scale = tl.load(scale_ptr).to(COMPUTE)
    w = tl.load(weight_ptr + label * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(COMPUTE)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=COMPUTE)
    total = tl.zeros([BLOCK_P], dtype=COMPUTE)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        used = (pixel < pixels) & present
        z = tl.load(logits_ptr + region * pixels + pixel, mask=used, other=0.0)
        y = tl.load(targets_ptr + region * pixels + pixel, mask=used, other=0).to(COMPUTE)
        e = tl.exp(-tl.abs(z))
        g = tl.where(used, (tl.where(z < 0.0, e, 1.0) / (1.0 + e) - y) * scale, 0.0)
        at, mask = _locate(region * pixels * CHANNELS, pixel, channel, pixels, CHANNELS, CHANNELS_LAST)
        h = tl.load(hidden_ptr + at, mask=mask & present, other=0.0).to(COMPUTE)
        grad = g[:, None] * w[None, :]
        if RELU:
            grad = tl.where(h <= 0.0, 0.0, grad)
            h = tl.where(h < 0.0, 0.0, h)
        # Selected, not multiplied: the weights of an absent region may be anything.
        tl.store(grad_ptr + at, tl.where(present, grad, 0.0).to(grad_ptr.dtype.element_ty), mask=mask)
        acc += g[:, None] * h
        total += g
    tl.store(by_region_ptr + region * CHANNELS + channel, tl.sum(acc, axis=0), mask=channel < CHANNELS)
    if tl.program_id(1) == 0:
        tl.store(bias_by_region_ptr + region, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["regions"])
def _by_class_kernel(
    by_region_ptr, bias_by_region_ptr, labels_ptr, grad_weight_ptr, grad_bias_ptr, regions,
    CHANNELS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the shares of the regions of one class. Grid: classes, blocks of channels."""
    label = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_K, BLOCK_C], dtype=COMPUTE)
    total = tl.zeros([BLOCK_K], dtype=COMPUTE)
    for start in range(0, regions, BLOCK_K):
        region = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mine = tl.load(labels_ptr + region, mask=region < regions, other=-1) == label
        mask = mine[:, None] & (channel < CHANNELS)[None, :]
        acc += tl.load(by_region_ptr + region[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        total += tl.load(bias_by_region_ptr + region, mask=mine, other=0.0)
    out = tl.sum(acc, axis=0).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + label.to(tl.int64) * CHANNELS + channel, out, mask=channel < CHANNELS)
    if tl.program_id(1) == 0:
        tl.store(grad_bias_ptr + label, tl.sum(total, axis=0).to(grad_bias_ptr.dtype.element_ty))


def _constants(dtype: torch.dtype, channels: int, channels_last: bool, relu: bool) -> dict[str, Any]:
    return {
        "CHANNELS": channels,
        "CHANNELS_LAST": channels_last,
        "RELU": relu,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _blocks(
    dtype: torch.dtype, pixels: int, channels: int, channels_last: bool, backward: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """4096 sums a program, half of that in the backward and in float64; the longer side is the contiguous one."""
    longer, shorter = 128 // (1 + backward) // (1 + (dtype == torch.float64)), 32
    block_p, block_c = (shorter, longer) if channels_last else (longer, shorter)
    return {
        "BLOCK_P": min(block_p, triton.next_power_of_2(pixels)),
        "BLOCK_C": min(block_c, triton.next_power_of_2(channels)),
    }, {"num_warps": 4}


def _prepared(hidden: Tensor) -> tuple[Tensor, bool]:
    """The features, dense in one of the two memory formats, and whether that is channels_last."""
    if hidden.dtype not in TYPE_NAMES:
        raise TypeError(f"mask_loss: the Triton kernels take {', '.join(TYPE_NAMES.values())}, not {hidden.dtype}")
    channels_last = hidden.is_contiguous(memory_format=torch.channels_last) and not hidden.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return hidden.contiguous(memory_format=layout), channels_last


def _run_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Logits [K, M, M] and the losses [K, blocks] of blocks of pixels (None: no targets, no losses)."""
    hidden, channels_last = _prepared(hidden)
    regions, channels, height, width = hidden.shape
    pixels = height * width
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = torch.empty((regions, height, width), dtype=dtype, device=hidden.device)
    if channels == 0:
        raise ValueError("mask_loss: hidden has no channels")
    if regions * pixels == 0:
        return logits, logits.new_zeros((1, 1))
    blocks, options = _blocks(hidden.dtype, pixels, channels, channels_last, False)
    count = triton.cdiv(pixels, blocks["BLOCK_P"])
    losses = torch.empty((regions, count if targets is not None else 0), dtype=dtype, device=hidden.device)
    with device_guard(hidden):
        _forward_kernel[(regions, count)](
            hidden, weight.contiguous(), bias.contiguous(), labels.contiguous(),
            logits if targets is None else targets.contiguous(), logits, losses, pixels, weight.shape[0],
            **_constants(hidden.dtype, channels, channels_last, relu), LOSS=targets is not None, **blocks, **options,
        )  # fmt: skip
    return logits, losses


def class_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool) -> Tensor:
    """Launcher of ``fastrcnn_kernels::mask_class_logits``. A label that is no class is absent."""
    return _run_forward(hidden, weight, bias, labels, None, relu)[0]


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor, normaliser: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::mask_loss``. A label that is no class is absent."""
    logits, losses = _run_forward(hidden, weight, bias, labels, targets, relu)
    return losses.sum() / normaliser.to(logits.dtype), logits


def backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor,
    normaliser: Tensor, logits: Tensor, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::mask_loss_backward``. Deterministic."""
    hidden, channels_last = _prepared(hidden)
    regions, channels, height, width = hidden.shape
    pixels = height * width
    grad_hidden = torch.empty_like(hidden)
    if regions * pixels == 0:
        return grad_hidden, torch.zeros_like(weight), torch.zeros_like(bias)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    labels = labels.contiguous()
    by_region = torch.empty((regions, channels), dtype=logits.dtype, device=hidden.device)
    bias_by_region = torch.empty((regions,), dtype=logits.dtype, device=hidden.device)
    blocks, options = _blocks(hidden.dtype, pixels, channels, channels_last, True)
    with device_guard(hidden):
        _backward_kernel[(regions, triton.cdiv(channels, blocks["BLOCK_C"]))](
            hidden, weight.contiguous(), labels, targets.contiguous(),
            grad_loss.to(logits.dtype) / normaliser.to(logits.dtype), logits.contiguous(), grad_hidden, by_region,
            bias_by_region, pixels, weight.shape[0], **_constants(hidden.dtype, channels, channels_last, relu),
            **blocks, **options,
        )  # fmt: skip
        sums, options = _class_blocks(channels)
        _by_class_kernel[(weight.shape[0], triton.cdiv(channels, sums["BLOCK_C"]))](
            by_region, bias_by_region, labels, grad_weight, grad_bias, regions, CHANNELS=channels,
            COMPUTE=tl.float64 if logits.dtype == torch.float64 else tl.float32, **sums, **options,
        )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias


def _class_blocks(channels: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"BLOCK_K": 16, "BLOCK_C": min(256, triton.next_power_of_2(channels))}, {"num_warps": 4}


def _cases() -> list[CompileCase]:
    cases = []
    # The weights are float32 parameters beside half-precision features (autocast), or of the features' type.
    for dtype, channels_last, relu in (
        (torch.bfloat16, True, True),
        (torch.float16, False, True),
        (torch.float32, False, True),
        (torch.float64, False, False),
    ):
        name = TYPE_NAMES[dtype]
        wide = "fp64" if dtype == torch.float64 else "fp32"
        label = f"{name}-{'nhwc' if channels_last else 'nchw'}"
        constants = _constants(dtype, 256, channels_last, relu)
        shared = {"hidden_ptr": f"*{name}", "weight_ptr": f"*{wide}", "labels_ptr": "*i64", "targets_ptr": "*u8",
                  "logits_ptr": f"*{wide}", "pixels": "i32", "classes": "i32"}  # fmt: skip
        forward_only = {"bias_ptr": f"*{wide}", "losses_ptr": f"*{wide}"}
        backward_only = {"scale_ptr": f"*{wide}", "grad_ptr": f"*{name}", "by_region_ptr": f"*{wide}",
                         "bias_by_region_ptr": f"*{wide}"}  # fmt: skip
        blocks, options = _blocks(dtype, 784, 256, channels_last, False)
        forward_constants = {**constants, **blocks, "LOSS": True}
        cases.append(
            CompileCase(f"forward-{label}", _forward_kernel, shared | forward_only, forward_constants, options)
        )
        blocks, options = _blocks(dtype, 784, 256, channels_last, True)
        cases.append(
            CompileCase(f"backward-{label}", _backward_kernel, shared | backward_only, constants | blocks, options)
        )
    sums, options = _class_blocks(256)
    signature = {"by_region_ptr": "*fp32", "bias_by_region_ptr": "*fp32", "labels_ptr": "*i64",
                 "grad_weight_ptr": "*fp32", "grad_bias_ptr": "*fp32", "regions": "i32"}  # fmt: skip
    constants = {"CHANNELS": 256, "COMPUTE": tl.float32, **sums}
    cases.append(CompileCase("by-class-fp32", _by_class_kernel, signature, constants, options))
    return cases


COMPILE_CASES = _cases()
