"""The balanced draw in three launches without the host; the draw is specified in ``fastrcnn_kernels/sampler.py``.

1. ``_count_kernel``: positives and negatives of each image.
2. ``_gather_kernel``: keys at random, and the entries whose key is below a limit, in no order. The limit is chosen from
   the counts so that at least as many as are wanted, and at most as many as there is room for, are expected by six
   standard deviations and more.
3. ``_draw_kernel``: one program for each image puts what was gathered in order of key and index. Should
   the gathered entries be too few or too many, it finds the key that separates the wanted entries by bisection: slow,
   exact, and still without the host.

The result depends neither on the order in which entries were gathered nor on the limit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard

MOST_DRAWN = 512  # of an image: one program sorts them

_BLOCK = 1024
_ROOM = 1024
_SEARCH_BLOCK = 128
_SEEDS_BLOCK = 32
_OPTIONS = {"num_warps": 4}
# Of k wanted entries k + 6 sqrt(k) + 16 are expected to be gathered, 664 for the most drawn.
_MARGIN = 6.0
_SLACK = 16.0


@triton.jit
def _kinds(labels, first_positive):
    return labels >= first_positive, labels == first_positive - 1


@triton.jit
def _present(counts_ptr, image, entries, COUNTED: tl.constexpr):
    """How many entries of the image there are; those behind are padding."""
    if COUNTED:
        return tl.minimum(tl.load(counts_ptr + image), entries).to(tl.int32)
    else:
        return entries


@triton.jit
def _wanted(total_ptr, image, size, most_positives):
    """How many positives and negatives there are, and how many are drawn."""
    positives = tl.load(total_ptr + image * 2)
    negatives = tl.load(total_ptr + image * 2 + 1)
    drawn = tl.minimum(positives, most_positives)
    return positives, negatives, drawn, tl.minimum(negatives, size - drawn)


@triton.jit
def _item(words, counter, part: tl.constexpr):
    """Key and index of the entries ``4 * counter + part`` in one number: its order is total."""
    key = words[part].to(tl.uint32, bitcast=True).to(tl.int64)
    return (key << 31) | (counter * 4 + part).to(tl.int64)


@triton.jit(do_not_specialize=["entries", "first_positive"])
def _count_kernel(
    labels_ptr, counts_ptr, total_ptr, entries, first_positive, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """``total_ptr`` int32 [N, 2], zero before. Grid: blocks of entries, images."""
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < _present(counts_ptr, image, entries, COUNTED)
    labels = tl.load(labels_ptr + image * entries + at, mask=inside, other=0)
    positive, negative = _kinds(labels, first_positive)
    tl.atomic_add(total_ptr + image * 2, tl.sum((positive & inside).to(tl.int32), 0))
    tl.atomic_add(total_ptr + image * 2 + 1, tl.sum((negative & inside).to(tl.int32), 0))


@triton.jit
def _limit(wanted, total, MARGIN: tl.constexpr, SLACK: tl.constexpr):
    """The largest item to gather. Any limit is right: this one makes the number that is gathered likely to fit."""
    expected = wanted.to(tl.float32)
    expected = expected + MARGIN * tl.sqrt(expected) + SLACK
    share = tl.minimum(expected / tl.maximum(total, 1).to(tl.float32), 1.0)
    # 2**63 does not fit: the largest float32 below it does.
    limit = tl.minimum(share * 9223372036854775808.0, 9223371487098961920.0).to(tl.int64)
    limit = tl.where(share >= 1.0, 9223372036854775807, limit)
    return tl.where(wanted > 0, limit, -1)


@triton.jit(do_not_specialize=["entries", "size", "most_positives", "first_positive"])
def _gather_kernel(
    labels_ptr, counts_ptr, seeds_ptr, total_ptr, cursor_ptr, items_ptr, entries, size, most_positives, first_positive,
    MARGIN: tl.constexpr, SLACK: tl.constexpr, ROOM: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``cursor_ptr`` int32 [N, 2], zero before; ``items_ptr`` int64 [N, 2, ROOM]. Grid: blocks of counters, images."""
    image = tl.program_id(1).to(tl.int64)
    present = _present(counts_ptr, image, entries, COUNTED)
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds_ptr + image)
    positives, negatives, draw_pos, draw_neg = _wanted(total_ptr, image, size, most_positives)
    positive_limit = _limit(draw_pos, positives, MARGIN, SLACK)
    negative_limit = _limit(draw_neg, negatives, MARGIN, SLACK)
    words = tl.randint4x(seed, counter)
    for part in tl.static_range(4):
        at = counter * 4 + part
        labels = tl.load(labels_ptr + image * entries + at, mask=at < present, other=0)
        item = _item(words, counter, part)
        positive, negative = _kinds(labels, first_positive)
        gathered = (at < present) & ((positive & (item <= positive_limit)) | (negative & (item <= negative_limit)))
        row = image * 2 + negative.to(tl.int64)
        # One addition an entry: only some hundred of an image get here.
        slot = tl.atomic_add(cursor_ptr + row, tl.full([BLOCK], 1, tl.int32), mask=gathered)
        tl.store(items_ptr + row * ROOM + slot, item, mask=gathered & (slot < ROOM))


@triton.jit
def _count_up_to(labels_ptr, seed, entries, first_positive, limit, NEGATIVE: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries of one kind have an item up to ``limit``."""
    count = entries * 0
    for start in range(0, entries, BLOCK * 4):
        counter = start // 4 + tl.arange(0, BLOCK)
        words = tl.randint4x(seed, counter)
        for part in tl.static_range(4):
            at = counter * 4 + part
            labels = tl.load(labels_ptr + at, mask=at < entries, other=0)
            positive, negative = _kinds(labels, first_positive)
            kind = negative if NEGATIVE else positive
            up_to = tl.where(kind & (at < entries) & (_item(words, counter, part) <= limit), 1, 0)
            # A sum in each step: LLVM puts the bits of a sum over all four on the stack.
            count += tl.sum(up_to.to(tl.int32), 0)
    return count


@triton.jit
def _gather_exactly(
    labels_ptr, seed, entries, first_positive, wanted, items_ptr, NEGATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """Put the ``wanted`` smallest items of one kind into ``items_ptr``; the largest of them is found bit by bit."""
    limit = tl.load(items_ptr) * 0
    for step in range(63):
        higher = limit + (tl.full([], 1, tl.int64) << (62 - step))
        below = _count_up_to(labels_ptr, seed, entries, first_positive, higher - 1, NEGATIVE, BLOCK)
        limit = tl.where(below < wanted, higher, limit)
    found = wanted * 0
    for start in range(0, entries, BLOCK * 4):
        counter = start // 4 + tl.arange(0, BLOCK)
        words = tl.randint4x(seed, counter)
        for part in tl.static_range(4):
            at = counter * 4 + part
            labels = tl.load(labels_ptr + at, mask=at < entries, other=0)
            positive, negative = _kinds(labels, first_positive)
            kind = negative if NEGATIVE else positive
            item = _item(words, counter, part)
            chosen = (kind & (at < entries) & (item <= limit)).to(tl.int32)
            tl.store(items_ptr + found + tl.cumsum(chosen, 0) - chosen, item, mask=chosen != 0)
            found += tl.sum(chosen, 0)


@triton.jit
def _write_drawn(
    labels_ptr, seed, cursor_ptr, items_ptr, out_ptr, entries, first_positive, wanted,
    NEGATIVE: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The indices of the ``wanted`` smallest items in ascending order of the item."""
    gathered = tl.load(cursor_ptr)
    if (gathered < wanted) | (gathered > ROOM):
        _gather_exactly(labels_ptr, seed, entries, first_positive, wanted, items_ptr, NEGATIVE, BLOCK)
        tl.debug_barrier()
        gathered = wanted
    slot = tl.arange(0, ROOM)
    item = tl.load(items_ptr + slot, mask=slot < gathered, other=9223372036854775807)
    # The place of an item is the number of those below it: fewer steps than a sort of so few in one program.
    place = tl.zeros([ROOM], tl.int32)
    for other in range(gathered):
        place += (tl.load(items_ptr + other) < item).to(tl.int32)
    tl.store(out_ptr + place, item & 0x7FFFFFFF, mask=(slot < gathered) & (place < wanted))


@triton.jit(do_not_specialize=["entries", "size", "most_positives", "first_positive"])
def _draw_kernel(
    labels_ptr, counts_ptr, seeds_ptr, total_ptr, cursor_ptr, items_ptr, indices_ptr, num_pos_ptr, num_sampled_ptr,
    entries, size, most_positives, first_positive, ROOM: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``indices_ptr`` int64 [N, size]. Grid: images."""
    image = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds_ptr + image)
    labels = labels_ptr + image * entries
    present = _present(counts_ptr, image, entries, COUNTED)
    _positives, _negatives, draw_pos, draw_neg = _wanted(total_ptr, image, size, most_positives)
    items = items_ptr + image * 2 * ROOM
    cursor = cursor_ptr + image * 2
    slot = tl.arange(0, ROOM)
    row = indices_ptr + image * size
    _write_drawn(labels, seed, cursor, items, row, present, first_positive, draw_pos, False, ROOM, BLOCK)
    _write_drawn(
        labels, seed, cursor + 1, items + ROOM, row + draw_pos, present, first_positive, draw_neg, True, ROOM, BLOCK,
    )  # fmt: skip
    sampled = draw_pos + draw_neg
    tl.store(row + slot, tl.full([ROOM], -1, tl.int64), mask=(slot >= sampled) & (slot < size))
    tl.store(num_pos_ptr + image, draw_pos.to(tl.int64))
    tl.store(num_sampled_ptr + image, sampled.to(tl.int64))


@triton.jit(do_not_specialize=["stream", "count"])
def _seeds_kernel(ids_ptr, seed_ptr, step_ptr, out_ptr, stream, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < count, other=0)
    step = (tl.load(step_ptr) & 0xFFFFFFFF).to(tl.uint32)
    low = (ids & 0xFFFFFFFF).to(tl.uint32)
    high = ((ids >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    a, b, _c, _d = tl.philox(tl.load(seed_ptr), low, high, zero + step, zero + stream.to(tl.uint32))
    out = a.to(tl.int64) & 0xFFFFFFFF | (b.to(tl.int64) & 0xFFFFFFFF) << 32
    tl.store(out_ptr + at, out, mask=at < count)


def sample_balanced(
    labels: Tensor, seeds: Tensor, size: int, most_positives: int, first_positive: int, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::sample_balanced``; ``size`` up to ``MOST_DRAWN``."""
    num_images, entries = labels.shape
    device = labels.device
    indices = torch.empty((num_images, size), dtype=torch.int64, device=device)
    num_pos = torch.empty((num_images,), dtype=torch.int64, device=device)
    num_sampled = torch.empty((num_images,), dtype=torch.int64, device=device)
    if num_images == 0 or entries == 0:
        return indices.fill_(-1), num_pos.zero_(), num_sampled.zero_()
    total, cursor = torch.zeros((2, num_images, 2), dtype=torch.int32, device=device)
    items = torch.empty((num_images, 2, _ROOM), dtype=torch.int64, device=device)
    shared = {
        "labels_ptr": labels,
        "counts_ptr": seeds if count is None else count,
        "total_ptr": total,
        "entries": entries,
        "first_positive": first_positive,
        "COUNTED": count is not None,
    }
    drawing = {
        **shared,
        "seeds_ptr": seeds,
        "cursor_ptr": cursor,
        "items_ptr": items,
        "size": size,
        "most_positives": most_positives,
        "ROOM": _ROOM,
    }
    with device_guard(labels):
        _count_kernel[(triton.cdiv(entries, _BLOCK), num_images)](**shared, BLOCK=_BLOCK, **_OPTIONS)
        grid = (triton.cdiv(entries, 4 * _BLOCK), num_images)
        _gather_kernel[grid](**drawing, MARGIN=_MARGIN, SLACK=_SLACK, BLOCK=_BLOCK, **_OPTIONS)
        outputs = {"indices_ptr": indices, "num_pos_ptr": num_pos, "num_sampled_ptr": num_sampled}
        _draw_kernel[(num_images,)](**drawing, **outputs, BLOCK=_SEARCH_BLOCK, **_OPTIONS)
    return indices, num_pos, num_sampled


def image_seeds(image_ids: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Launcher of ``fastrcnn_kernels::image_seeds``."""
    image_ids = image_ids.to(torch.int64).contiguous()
    seeds = torch.empty_like(image_ids)
    count = image_ids.numel()
    if count:
        with device_guard(image_ids):
            _seeds_kernel[(triton.cdiv(count, _SEEDS_BLOCK),)](
                ids_ptr=image_ids, seed_ptr=seed, step_ptr=step, out_ptr=seeds, stream=(stream + 2**31) % 2**32 - 2**31,
                count=count, BLOCK=_SEEDS_BLOCK, num_warps=1,
            )  # fmt: skip
    return seeds


def _case(label: str, kernel: Any, labels: str, constants: dict[str, Any]) -> CompileCase:
    types = {
        "labels_ptr": labels,
        **dict.fromkeys(["total_ptr", "cursor_ptr"], "*i32"),
        **dict.fromkeys(
            ["counts_ptr", "seeds_ptr", "items_ptr", "indices_ptr", "num_pos_ptr", "num_sampled_ptr"], "*i64"
        ),
        **dict.fromkeys(["entries", "size", "most_positives", "first_positive"], "i32"),
    }
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return CompileCase(label, kernel, signature, constants, _OPTIONS)


COMPILE_CASES = [
    _case("count-i8", _count_kernel, "*i8", {"COUNTED": False, "BLOCK": _BLOCK}),
    *[
        _case(f"{label}{'-counted' if counted else ''}", kernel, "*i64", {**constants, "COUNTED": counted})
        for counted in (False, True)
        for label, kernel, constants in (
            ("count-i64", _count_kernel, {"BLOCK": _BLOCK}),
            ("gather", _gather_kernel, {"ROOM": _ROOM, "MARGIN": _MARGIN, "SLACK": _SLACK, "BLOCK": _BLOCK}),
            ("draw", _draw_kernel, {"ROOM": _ROOM, "BLOCK": _SEARCH_BLOCK}),
        )
    ],
    CompileCase(
        "seeds",
        _seeds_kernel,
        {"ids_ptr": "*i64", "seed_ptr": "*i64", "step_ptr": "*i64", "out_ptr": "*i64", "stream": "i32", "count": "i32"},
        {"BLOCK": _SEEDS_BLOCK},
        {"num_warps": 1},
    ),
]
