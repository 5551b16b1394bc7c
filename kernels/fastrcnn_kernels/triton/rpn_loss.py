"""RPN losses on the sampled anchors; the rules are in ``fastrcnn_kernels/rpn_loss.py``.

The forward is one program an image: it reads the few hundred logits and deltas where they lie, and writes their slopes.
The dense gradient is zeros and one launch that stores the slopes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

MAX_LEVELS = 5
TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
LEVEL_SIZES = [f"{name}{i}" for name in ("height", "width") for i in range(MAX_LEVELS)]


@triton.jit
def level_of(
    index, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    LEVELS: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """Level, height, width and position (y * width + x) of anchors numbered over all levels; level -1: no anchor."""
    local = index
    level = index * 0 - 1
    height = index * 0 + 1
    width = index * 0 + 1
    position = index * 0
    for i in tl.static_range(LEVELS):
        if i == 0:
            h, w = height0, width0
        elif i == 1:
            h, w = height1, width1
        elif i == 2:
            h, w = height2, width2
        elif i == 3:
            h, w = height3, width3
        else:
            h, w = height4, width4
        count = h.to(tl.int64) * w * ANCHORS
        here = (level < 0) & (local >= 0) & (local < count)
        level = tl.where(here, i, level)
        height = tl.where(here, h, height)
        width = tl.where(here, w, width)
        position = tl.where(here, local // ANCHORS, position)
        local = tl.where(here, -1, local - count)
    return level, height, width, position


@triton.jit
def _place(image, channel, position, height, width, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    pixels = height.to(tl.int64) * width
    if CHANNELS_LAST:
        return (image * pixels + position) * CHANNELS + channel
    else:
        return (image * CHANNELS + channel) * pixels + position


@triton.jit
def _load_level(p0, p1, p2, p3, p4, level, offset, LEVELS: tl.constexpr, COMPUTE: tl.constexpr):
    value = tl.load(p0 + offset, mask=level == 0, other=0.0).to(COMPUTE)
    if LEVELS > 1:
        value += tl.load(p1 + offset, mask=level == 1, other=0.0).to(COMPUTE)
    if LEVELS > 2:
        value += tl.load(p2 + offset, mask=level == 2, other=0.0).to(COMPUTE)
    if LEVELS > 3:
        value += tl.load(p3 + offset, mask=level == 3, other=0.0).to(COMPUTE)
    if LEVELS > 4:
        value += tl.load(p4 + offset, mask=level == 4, other=0.0).to(COMPUTE)
    return value


@triton.jit
def _store_level(p0, p1, p2, p3, p4, level, offset, value, LEVELS: tl.constexpr):
    out = value.to(p0.dtype.element_ty)
    tl.store(p0 + offset, out, mask=level == 0)
    if LEVELS > 1:
        tl.store(p1 + offset, out, mask=level == 1)
    if LEVELS > 2:
        tl.store(p2 + offset, out, mask=level == 2)
    if LEVELS > 3:
        tl.store(p3 + offset, out, mask=level == 3)
    if LEVELS > 4:
        tl.store(p4 + offset, out, mask=level == 4)


@triton.jit
def _log1p(e, COMPUTE: tl.constexpr):
    """log(1 + e) for 0 <= e <= 1."""
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
def _smooth(difference, used, normaliser, BETA: tl.constexpr):
    """Smooth L1 and its slope; beta 0 is the L1 loss."""
    away = tl.abs(difference)
    near = away < BETA
    safe: tl.constexpr = BETA if BETA > 0.0 else 1.0
    loss = tl.where(near, 0.5 * difference * difference / safe, away - 0.5 * BETA)
    sign = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    slope = tl.where(near, difference / safe, sign) / normaliser
    return tl.where(used, loss, 0.0), tl.where(used, slope, 0.0)


@triton.jit(do_not_specialize=["slots", "total", "num_gt", "box_offset", *LEVEL_SIZES])
def _forward_kernel(
    o0, o1, o2, o3, o4, d0, d1, d2, d3, d4, anchors_ptr, indices_ptr, num_positive_ptr, num_sampled_ptr, matched_ptr,
    gt_ptr, normaliser_ptr, losses_ptr, slopes_ptr, slots, total, num_gt, box_offset,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    STRIDE0: tl.constexpr, STRIDE1: tl.constexpr, STRIDE2: tl.constexpr, STRIDE3: tl.constexpr, STRIDE4: tl.constexpr,
    LISTED: tl.constexpr, NORMALISED: tl.constexpr, BETA: tl.constexpr, LEVELS: tl.constexpr, ANCHORS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One image. Writes its two sums, divided, and the slopes of its slots."""
    image = tl.program_id(0).to(tl.int64)
    num_positive = tl.load(num_positive_ptr + image)
    num_sampled = tl.load(num_sampled_ptr + image)
    if NORMALISED:
        normaliser = tl.load(normaliser_ptr).to(COMPUTE)
    else:
        every = num_sampled * 0
        for other in range(tl.num_programs(0)):
            every += tl.load(num_sampled_ptr + other)
        normaliser = tl.maximum(every, 1).to(COMPUTE)
    objectness_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    box_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + image * slots + slot, mask=slot < slots, other=-1)
        level, height, width, position = level_of(
            index, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4, LEVELS, ANCHORS
        )
        sampled = (level >= 0) & (slot < num_sampled) & (slot < slots)
        positive = sampled & (slot < num_positive)
        level = tl.where(sampled, level, -1)
        anchor = tl.where(sampled, index % ANCHORS, 0)
        offset = _place(image, anchor, position, height, width, ANCHORS, CHANNELS_LAST)
        z = _load_level(o0, o1, o2, o3, o4, level, offset, LEVELS, COMPUTE)
        e = tl.exp(-tl.abs(z))
        label = positive.to(COMPUTE)
        loss = tl.where(z < 0.0, 0.0, z) - z * label + _log1p(e, COMPUTE)
        objectness_sum += tl.where(sampled, loss, 0.0)
        slope = (tl.where(z < 0.0, e, 1.0) / (1.0 + e) - label) / normaliser
        to = slopes_ptr + (image * slots + slot) * 5
        tl.store(to, tl.where(sampled, slope, 0.0), mask=slot < slots)

        used = positive & (num_gt > 0)
        if LISTED:
            row = index
            x = tl.zeros([BLOCK], dtype=COMPUTE)
            y = tl.zeros([BLOCK], dtype=COMPUTE)
        else:
            row = level * ANCHORS + anchor
            stride = tl.where(level == 1, STRIDE1, STRIDE0)
            stride = tl.where(level == 2, STRIDE2, stride)
            stride = tl.where(level == 3, STRIDE3, stride)
            stride = tl.where(level == 4, STRIDE4, stride)
            x = (position % width * stride).to(COMPUTE)
            y = (position // width * stride).to(COMPUTE)
        ax1 = tl.load(anchors_ptr + row * 4, mask=used, other=0.0).to(COMPUTE) + x
        ay1 = tl.load(anchors_ptr + row * 4 + 1, mask=used, other=0.0).to(COMPUTE) + y
        ax2 = tl.load(anchors_ptr + row * 4 + 2, mask=used, other=1.0).to(COMPUTE) + x
        ay2 = tl.load(anchors_ptr + row * 4 + 3, mask=used, other=1.0).to(COMPUTE) + y
        matched = tl.load(matched_ptr + image * total + index, mask=used, other=0)
        matched = tl.minimum(tl.maximum(matched, 0), num_gt - 1)
        gt = gt_ptr + (image * num_gt + matched) * 4
        gx1 = tl.load(gt, mask=used, other=0.0).to(COMPUTE)
        gy1 = tl.load(gt + 1, mask=used, other=0.0).to(COMPUTE)
        gx2 = tl.load(gt + 2, mask=used, other=1.0).to(COMPUTE)
        gy2 = tl.load(gt + 3, mask=used, other=1.0).to(COMPUTE)
        aw = ax2 - ax1 + box_offset
        ah = ay2 - ay1 + box_offset
        gw = gx2 - gx1 + box_offset
        gh = gy2 - gy1 + box_offset
        for i in tl.static_range(4):
            if i == 0:
                wanted = ((gx1 + 0.5 * gw) - (ax1 + 0.5 * aw)) / aw
            elif i == 1:
                wanted = ((gy1 + 0.5 * gh) - (ay1 + 0.5 * ah)) / ah
            elif i == 2:
                wanted = tl.log(gw / aw)
            else:
                wanted = tl.log(gh / ah)
            at = _place(image, 4 * anchor + i, position, height, width, 4 * ANCHORS, CHANNELS_LAST)
            delta = _load_level(d0, d1, d2, d3, d4, tl.where(used, level, -1), at, LEVELS, COMPUTE)
            box_loss, box_slope = _smooth(delta - wanted, used, normaliser, BETA)
            box_sum += box_loss
            tl.store(to + 1 + i, box_slope, mask=slot < slots)
    tl.store(losses_ptr + image * 2, tl.sum(objectness_sum, axis=0) / normaliser)
    tl.store(losses_ptr + image * 2 + 1, tl.sum(box_sum, axis=0) / normaliser)


@triton.jit(do_not_specialize=["slots", *LEVEL_SIZES])
def _backward_kernel(
    o0, o1, o2, o3, o4, d0, d1, d2, d3, d4, indices_ptr, slopes_ptr, grad_ptr, slots,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    LEVELS: tl.constexpr, ANCHORS: tl.constexpr, CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the slopes of one image's slots in the dense gradients, which are zero elsewhere."""
    image = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + image * slots + slot, mask=slot < slots, other=-1)
    level, height, width, position = level_of(
        index, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4, LEVELS, ANCHORS
    )
    anchor = tl.where(level >= 0, index % ANCHORS, 0)
    slopes = slopes_ptr + (image * slots + slot) * 5
    slope = tl.load(slopes, mask=level >= 0, other=0.0) * tl.load(grad_ptr).to(COMPUTE)
    offset = _place(image, anchor, position, height, width, ANCHORS, CHANNELS_LAST)
    _store_level(o0, o1, o2, o3, o4, level, offset, slope, LEVELS)
    scale = tl.load(grad_ptr + 1).to(COMPUTE)
    for i in tl.static_range(4):
        slope = tl.load(slopes + 1 + i, mask=level >= 0, other=0.0) * scale
        offset = _place(image, 4 * anchor + i, position, height, width, 4 * ANCHORS, CHANNELS_LAST)
        _store_level(d0, d1, d2, d3, d4, level, offset, slope, LEVELS)


def check_levels(count: int, dtype: torch.dtype) -> None:
    if count > MAX_LEVELS:
        raise ValueError(f"rpn_loss: the Triton kernels take up to {MAX_LEVELS} levels, got {count}")
    if dtype not in TYPE_NAMES:
        raise TypeError(f"rpn_loss: the Triton kernels take {', '.join(TYPE_NAMES.values())}, not {dtype}")


def pointers(name: str, maps: list[Tensor]) -> dict[str, Tensor]:
    """One argument a level; absent levels repeat the first."""
    return {f"{name}{i}": maps[i] if i < len(maps) else maps[0] for i in range(MAX_LEVELS)}


def level_sizes(shapes: list[tuple[int, int]]) -> dict[str, int]:
    padded = shapes + [(1, 1)] * (MAX_LEVELS - len(shapes))
    return {f"height{i}": h for i, (h, _) in enumerate(padded)} | {f"width{i}": w for i, (_, w) in enumerate(padded)}


def _dense(maps: list[Tensor]) -> tuple[list[Tensor], bool]:
    channels_last = any(m.is_contiguous(memory_format=torch.channels_last) and not m.is_contiguous() for m in maps)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [m.contiguous(memory_format=layout) for m in maps], channels_last


def _block(slots: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"BLOCK": min(256, triton.next_power_of_2(max(1, slots)))}, {"num_warps": 4}


def forward(
    objectness: list[Tensor], deltas: list[Tensor], anchors: Tensor, strides: list[int], indices: Tensor,
    num_positive: Tensor, num_sampled: Tensor, matched_idxs: Tensor, gt_boxes: Tensor, normaliser: Tensor | None,
    beta: float, box_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::rpn_loss``."""
    check_levels(len(objectness), objectness[0].dtype)
    maps, channels_last = _dense(objectness + deltas)
    count = len(objectness)
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    images, slots = indices.shape
    losses = torch.empty((images, 2), dtype=dtype, device=indices.device)
    slopes = torch.empty((images, slots, 5), dtype=dtype, device=indices.device)
    if images * slots == 0:
        return losses.new_zeros(2), slopes
    block, options = _block(slots)
    steps = [*strides, *[0] * (MAX_LEVELS - len(strides))]
    with device_guard(indices):
        _forward_kernel[(images,)](
            **pointers("o", maps[:count]), **pointers("d", maps[count:]), anchors_ptr=anchors.contiguous(),
            indices_ptr=indices.contiguous(), num_positive_ptr=num_positive, num_sampled_ptr=num_sampled,
            matched_ptr=matched_idxs.contiguous(), gt_ptr=gt_boxes.contiguous(),
            normaliser_ptr=losses if normaliser is None else normaliser.to(dtype), NORMALISED=normaliser is not None,
            losses_ptr=losses, slopes_ptr=slopes, slots=slots, total=matched_idxs.shape[1], num_gt=gt_boxes.shape[1],
            BETA=beta, box_offset=box_offset, **level_sizes([(o.shape[2], o.shape[3]) for o in objectness]),
            **{f"STRIDE{i}": step for i, step in enumerate(steps)}, LISTED=not strides, LEVELS=count,
            ANCHORS=maps[0].shape[1], CHANNELS_LAST=channels_last,
            COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32, **block, **options,
        )  # fmt: skip
    return losses.sum(0), slopes


def backward(
    grad_losses: Tensor, slopes: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Launcher of ``fastrcnn_kernels::rpn_loss_backward``. Each anchor is in at most one slot of its image."""
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    check_levels(len(shapes), dtype)
    images, slots = indices.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = [
        torch.empty(
            (images, num_anchors * values, h, w), dtype=dtype, device=indices.device, memory_format=layout
        ).zero_()
        for values in (1, 4)
        for h, w in shapes
    ]
    if images * slots == 0:
        return out
    block, options = _block(slots)
    with device_guard(indices):
        _backward_kernel[(images, triton.cdiv(slots, block["BLOCK"]))](
            **pointers("o", out[: len(shapes)]), **pointers("d", out[len(shapes) :]), indices_ptr=indices.contiguous(),
            slopes_ptr=slopes.contiguous(), grad_ptr=grad_losses.contiguous(), slots=slots, **level_sizes(shapes),
            LEVELS=len(shapes), ANCHORS=num_anchors, CHANNELS_LAST=channels_last,
            COMPUTE=tl.float64 if slopes.dtype == torch.float64 else tl.float32, **block, **options,
        )  # fmt: skip
    return out


def _cases() -> list[CompileCase]:
    cases = []
    for dtype, channels_last, listed in (
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
        (torch.float64, False, True),
    ):
        name, wide = TYPE_NAMES[dtype], "fp64" if dtype == torch.float64 else "fp32"
        maps = {f"{letter}{i}": f"*{name}" for letter in "od" for i in range(MAX_LEVELS)}
        sizes = dict.fromkeys(LEVEL_SIZES, "i32")
        block, options = _block(256)
        constants = {"LEVELS": 5, "ANCHORS": 3, "CHANNELS_LAST": channels_last, **block,
                     "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32}  # fmt: skip
        counted = dict.fromkeys(["indices_ptr", "num_positive_ptr", "num_sampled_ptr", "matched_ptr"], "*i64")
        floats = dict.fromkeys(["anchors_ptr", "gt_ptr", "normaliser_ptr", "losses_ptr", "slopes_ptr"], f"*{wide}")
        scalars = {"slots": "i32", "total": "i32", "num_gt": "i32", "box_offset": "i32"}
        steps = {f"STRIDE{i}": 0 if listed else 4 << i for i in range(MAX_LEVELS)}
        label = f"{name}-{'listed' if listed else 'cells'}"
        cases.append(
            CompileCase(
                f"forward-{label}", _forward_kernel, maps | counted | floats | scalars | sizes,
                {**constants, **steps, "LISTED": listed, "NORMALISED": listed, "BETA": 1.0 / 9}, options,
            )
        )  # fmt: skip
        if not listed:
            signature = maps | {"indices_ptr": "*i64", "slopes_ptr": f"*{wide}", "grad_ptr": f"*{wide}", "slots": "i32"}
            cases.append(CompileCase(f"backward-{label}", _backward_kernel, signature | sizes, constants, options))
    return cases


COMPILE_CASES = _cases()
