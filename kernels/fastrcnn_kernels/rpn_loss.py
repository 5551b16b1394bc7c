"""The losses of a region proposal network (Ren et al., 2015) on its sampled anchors, in one pass over nothing else.

Per image a few hundred of some 250,000 anchors carry the loss. From the head's outputs in their own layout the operator
reads those, encodes the boxes matched to them, and gives both losses and their slopes::

    loss_objectness = sum over sampled anchors of BCEWithLogits(z, positive) / normaliser
    loss_box        = sum over positives and 4 deltas of SmoothL1(delta - encode(gt, anchor), beta) / normaliser

with the rules of maskrcnn-benchmark (beta 1/9, ``normaliser`` the sampled anchors of the batch); see
``encode_boxes`` and ``smooth_l1_loss`` for the two formulas. Anchors are numbered over all levels in the order level,
y, x, anchor of a cell; they come as a list of boxes or as the cells of each level, from whose index they follow.

The gradient in the dense outputs is zero but for the sampled anchors. ``rpn_head_loss`` goes further: it takes the
gradient through the head's convolutions at the sampled positions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastrcnn_kernels import _library
from fastrcnn_kernels.box_coder import encode_boxes

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of losses and slopes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(maps: Sequence[Tensor]) -> bool:
    """Whether any map is channels_last and not contiguous as well: it decides for all."""
    return any(m.is_contiguous(memory_format=torch.channels_last) and not m.is_contiguous() for m in maps)


def _in_anchor_order(maps: Sequence[Tensor], values: int) -> Tensor:
    """[N, A * values, H, W] a level -> [N, anchors of all levels, values]."""
    flat = []
    for m in maps:
        n, channels, height, width = m.shape
        split = m.reshape(n, channels // values, values, height, width)
        flat.append(split.permute(0, 3, 4, 1, 2).reshape(n, -1, values))
    return torch.cat(flat, dim=1)


def _anchors_at(anchors: Tensor, strides: Sequence[int], sizes: Sequence[tuple[int, int]], indices: Tensor) -> Tensor:
    """The boxes [N, B, 4] of the anchors ``indices`` [N, B], which are not negative."""
    if not strides:
        return anchors[indices]
    cell = anchors.shape[1]
    first, found = 0, anchors.new_zeros((*indices.shape, 4))
    for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        local = indices - first  # [N, B]
        inside = (local >= 0) & (local < height * width * cell)
        local = torch.where(inside, local, 0)
        position = local // cell
        shift = torch.stack([position % width, position // width], dim=-1).repeat(1, 1, 2) * stride  # [N, B, 4]
        found = torch.where(inside[..., None], anchors[level][local % cell] + shift.to(anchors.dtype), found)
        first += height * width * cell
    return found


def forward_reference(
    objectness: list[Tensor], deltas: list[Tensor], anchors: Tensor, strides: list[int], indices: Tensor,
    num_positive: Tensor, num_sampled: Tensor, matched_idxs: Tensor, gt_boxes: Tensor, normaliser: Tensor | None,
    beta: float, box_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The specification: both losses [2], and their slopes [N, B, 5] in the logit and the deltas of each slot."""
    dtype = compute_dtype(objectness[0].dtype)
    slot = torch.arange(indices.shape[1], device=indices.device)  # [B]
    present = indices >= 0  # [N, B]
    sampled = (slot < num_sampled[:, None]) & present  # [N, B]
    positive = (slot < num_positive[:, None]) & sampled  # [N, B]
    safe = indices.clamp(min=0)  # [N, B]
    logits = _in_anchor_order(objectness, 1)[..., 0].gather(1, safe).to(dtype)  # [N, B]
    index = safe[..., None].expand(-1, -1, 4)  # [N, B, 4]
    predicted = _in_anchor_order(deltas, 4).gather(1, index).to(dtype)  # [N, B, 4]
    if gt_boxes.shape[1] == 0:
        gt_boxes = gt_boxes.new_zeros((gt_boxes.shape[0], 1, 4))
    matched = matched_idxs.gather(1, safe).clamp(0, gt_boxes.shape[1] - 1)  # [N, B]
    wanted = gt_boxes.to(dtype).gather(1, matched[..., None].expand(-1, -1, 4))  # [N, B, 4]
    sizes = [(o.shape[2], o.shape[3]) for o in objectness]
    boxes = _anchors_at(anchors.to(dtype), strides, sizes, safe)  # [N, B, 4]
    difference = predicted - encode_boxes(wanted, boxes, box_offset=box_offset)  # [N, B, 4]
    away = difference.abs()
    near = away < beta
    box_loss = torch.where(near, 0.5 * difference * difference / (beta or 1.0), away - 0.5 * beta)  # [N, B, 4]
    box_slope = torch.where(near, difference / (beta or 1.0), difference.sign())  # [N, B, 4]
    label = positive.to(dtype)
    loss = functional.binary_cross_entropy_with_logits(logits, label, reduction="none")  # [N, B]
    divisor = (num_sampled.sum().clamp(min=1) if normaliser is None else normaliser).to(dtype)
    # where(), not multiplication: an unused slot must not turn an infinity into a NaN
    losses = torch.stack([torch.where(sampled, loss, 0).sum(), torch.where(positive[..., None], box_loss, 0).sum()])
    slopes = torch.cat(
        [
            torch.where(sampled, logits.sigmoid() - label, 0)[..., None],
            torch.where(positive[..., None], box_slope, 0),
        ],
        dim=-1,
    )  # [N, B, 5]
    return losses / divisor, slopes / divisor


def backward_reference(
    grad_losses: Tensor, slopes: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The gradient in the dense outputs: objectness of all levels, then deltas of all levels."""
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    total = sum(h * w for h, w in shapes) * num_anchors
    # A slot without an anchor writes to one more row that is cut off again.
    index = torch.where(indices >= 0, indices, total)  # [N, B]
    dense = slopes.new_zeros((indices.shape[0], total + 1, 5))
    scale = torch.cat([grad_losses[:1], grad_losses[1:].expand(4)]).to(slopes.dtype)  # [5]
    dense.scatter_(1, index[..., None].expand(-1, -1, 5), slopes * scale)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    levels = dense[:, :total].to(dtype).split([h * w * num_anchors for h, w in shapes], dim=1)
    out = []
    for first, values in ((0, 1), (1, 4)):
        for (h, w), level in zip(shapes, levels, strict=True):
            part = level[..., first : first + values].reshape(-1, h, w, num_anchors * values)  # [N, H, W, A * values]
            out.append(part.permute(0, 3, 1, 2).clone(memory_format=layout))
    return out


def _forward_cpp(
    objectness: list[Tensor], deltas: list[Tensor], anchors: Tensor, strides: list[int], indices: Tensor,
    num_positive: Tensor, num_sampled: Tensor, matched_idxs: Tensor, gt_boxes: Tensor, normaliser: Tensor | None,
    beta: float, box_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    first = objectness[0]
    if first.dtype not in _DTYPE_CODES:
        raise TypeError(f"rpn_loss: the C++ kernels take float16, bfloat16, float32 and float64, not {first.dtype}")
    dtype = compute_dtype(first.dtype)
    images, slots = indices.shape
    held = [t.to(dtype).contiguous() for t in (anchors, gt_boxes)]
    held += [t.contiguous() for t in (indices, num_positive, num_sampled, matched_idxs)]
    held.append((num_sampled.sum().clamp(min=1) if normaliser is None else normaliser).to(dtype))
    losses = torch.empty(2, dtype=dtype)
    slopes = torch.empty((images, slots, 5), dtype=dtype)
    levels = [
        (o.data_ptr(), d.data_ptr(), o.shape[2], o.shape[3], o.stride(), d.stride())
        for o, d in zip(objectness, deltas, strict=True)
    ]
    _library.extension().rpn_loss_forward(
        levels, _DTYPE_CODES[first.dtype], first.shape[1], strides, [t.data_ptr() for t in held], images, slots,
        matched_idxs.shape[1], gt_boxes.shape[1], beta, box_offset, losses.data_ptr(), slopes.data_ptr(),
    )  # fmt: skip
    return losses, slopes


def _backward_cpp(
    grad_losses: Tensor, slopes: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    out = _backward_fake(grad_losses, slopes, indices, sizes, num_anchors, channels_last, dtype)
    count = len(sizes) // 2
    indices, slopes, grad_losses = indices.contiguous(), slopes.contiguous(), grad_losses.to(slopes.dtype).contiguous()
    images, slots = indices.shape
    levels = [
        (o.data_ptr(), d.data_ptr(), o.shape[2], o.shape[3], o.stride(), d.stride())
        for o, d in zip(out[:count], out[count:], strict=True)
    ]
    _library.extension().rpn_loss_backward(
        levels, _DTYPE_CODES[dtype], num_anchors, indices.data_ptr(), slopes.data_ptr(), grad_losses.data_ptr(),
        images, slots, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _forward_fake(objectness: list[Tensor], deltas: list[Tensor], anchors: Tensor, strides: list[int], indices: Tensor,
                  *_: object) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(objectness[0].dtype)
    return indices.new_empty(2, dtype=dtype), indices.new_empty((*indices.shape, 5), dtype=dtype)


def _backward_fake(
    grad_losses: Tensor, slopes: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty(
            (indices.shape[0], num_anchors * values, height, width),
            dtype=dtype, device=indices.device, memory_format=layout,
        )
        for values in (1, 4)
        for height, width in zip(sizes[::2], sizes[1::2], strict=True)
    ]  # fmt: skip


# What the losses need beside the head's outputs; `rpn_head_loss` has the same arguments.
SAMPLE_SCHEMA = (
    "Tensor anchors, int[] strides, Tensor indices, Tensor num_positive, Tensor num_sampled, Tensor matched_idxs, "
    "Tensor gt_boxes, Tensor? normaliser, float beta, int box_offset"
)
_forward_op = _library.define(
    f"rpn_loss(Tensor[] objectness, Tensor[] deltas, {SAMPLE_SCHEMA}) -> (Tensor, Tensor)",
    reference=forward_reference,
    fake=_forward_fake,
    cpp=_forward_cpp,
    triton="fastrcnn_kernels.triton.rpn_loss:forward",
)
_backward_op = _library.define(
    "rpn_loss_backward(Tensor grad_losses, Tensor slopes, Tensor indices, SymInt[] sizes, SymInt num_anchors, "
    "bool channels_last, ScalarType dtype) -> Tensor[]",
    reference=backward_reference,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.rpn_loss:backward",
)


def no_gradient_of_sample(strides: list[int]) -> list[Any]:
    """What a backward returns for the arguments of ``SAMPLE_SCHEMA``; torch takes an empty list for one of tensors."""
    return [None, None if strides else [], *[None] * 8]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    objectness, _, _, strides, indices, *_ = inputs
    ctx.save_for_backward(output[1], indices)
    ctx.no_gradient_of_sample = no_gradient_of_sample(strides)
    ctx.mark_non_differentiable(output[1])
    ctx.sizes = [extent for o in objectness for extent in o.shape[2:]]
    ctx.num_anchors, ctx.dtype = objectness[0].shape[1], objectness[0].dtype
    ctx.channels_last = is_channels_last(objectness)


def _gradient(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Any, ...]:
    grads = _backward_op(grad_losses, *ctx.saved_tensors, ctx.sizes, ctx.num_anchors, ctx.channels_last, ctx.dtype)
    count = len(grads) // 2
    return (list(grads[:count]), list(grads[count:]), *ctx.no_gradient_of_sample)


_library.register_autograd("rpn_loss", _gradient, _context)


def check_sample(
    name: str, objectness: Sequence[Tensor], deltas: Sequence[Tensor], indices: Tensor, num_positive: Tensor,
    num_sampled: Tensor, matched_idxs: Tensor, gt_boxes: Tensor, anchors: Tensor | None,
    cells: Sequence[Tensor] | None, strides: Sequence[int] | None, normaliser: Tensor | None,
) -> tuple[Tensor, list[int], Tensor | None]:  # fmt: skip
    """Raise for what does not fit; anchors [A, 4] or cells [L, A, 4], the strides (none: anchors), the normaliser."""
    if not objectness or len(objectness) != len(deltas):
        raise ValueError(f"{name}: {len(objectness)} levels of objectness but {len(deltas)} of deltas")
    first = objectness[0]
    total = 0
    for level, (o, d) in enumerate(zip(objectness, deltas, strict=True)):
        if o.dim() != 4 or o.dtype != first.dtype or not o.is_floating_point() or o.shape[:2] != first.shape[:2]:
            raise ValueError(f"{name}: objectness must be [N, A, H, W] of one float type, got {o.dtype}{list(o.shape)} "
                             f"at level {level}")  # fmt: skip
        if d.shape != (o.shape[0], 4 * o.shape[1], *o.shape[2:]) or d.dtype != first.dtype:
            raise ValueError(f"{name}: deltas must be [N, 4 A, H, W] as objectness {o.dtype}{list(o.shape)} is, got "
                             f"{d.dtype}{list(d.shape)} at level {level}")  # fmt: skip
        total += o.shape[1] * o.shape[2] * o.shape[3]
    images = first.shape[0]
    if indices.dim() != 2 or indices.shape[0] != images or indices.dtype != torch.int64:
        raise ValueError(f"{name}: indices must be int64 [{images}, B], got {indices.dtype}{list(indices.shape)}")
    for argument, count in (("num_positive", num_positive), ("num_sampled", num_sampled)):
        if count.shape != (images,) or count.dtype != torch.int64:
            raise ValueError(f"{name}: {argument} must be int64 [{images}], got {count.dtype}{list(count.shape)}")
    if matched_idxs.shape != (images, total) or matched_idxs.dtype != torch.int64:
        raise ValueError(
            f"{name}: matched_idxs must be int64 [{images}, {total}], one for each anchor, got "
            f"{matched_idxs.dtype}{list(matched_idxs.shape)}"
        )
    if gt_boxes.dim() != 3 or gt_boxes.shape[0] != images or gt_boxes.shape[2] != 4:
        raise ValueError(f"{name}: gt_boxes must be [{images}, G, 4], got {list(gt_boxes.shape)}")
    if (anchors is None) == (cells is None):
        raise ValueError(f"{name}: give either anchors, or cells and strides")
    if anchors is not None:
        if anchors.shape != (total, 4):
            raise ValueError(f"{name}: anchors must be [{total}, 4], got {list(anchors.shape)}")
        steps: list[int] = []
    else:
        if cells is None or strides is None or len(cells) != len(objectness) or len(strides) != len(objectness):
            raise ValueError(f"{name}: cells and strides must have one entry for each of {len(objectness)} levels")
        if any(cell.shape != (first.shape[1], 4) for cell in cells):
            raise ValueError(f"{name}: each cell must be [{first.shape[1]}, 4], got {[list(c.shape) for c in cells]}")
        anchors, steps = torch.stack(list(cells)), [int(stride) for stride in strides]
    if normaliser is not None and normaliser.numel() != 1:
        raise ValueError(f"{name}: normaliser must have one element, got {list(normaliser.shape)}")
    return anchors, steps, None if normaliser is None else normaliser.reshape(())


def rpn_loss(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    indices: Tensor,
    num_positive: Tensor,
    num_sampled: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Tensor,
    *,
    anchors: Tensor | None = None,
    cells: Sequence[Tensor] | None = None,
    strides: Sequence[int] | None = None,
    beta: float = 1.0 / 9,
    box_offset: int = 0,
    normaliser: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss of an RPN over its sampled anchors.

    Args:
        objectness: for each level logits [N, A, H, W], NCHW or channels_last, any float type.
        deltas: for each level [N, 4 A, H, W] of that type; an anchor's four are neighbours.
        indices: int64 [N, B], the sampled anchors of each image, positives first, as ``sample_balanced`` gives them:
            each at most once; negative: an empty slot.
        num_positive, num_sampled: int64 [N].
        matched_idxs: int64 [N, anchors of all levels], the ground truth of each anchor; looked at for positives only.
        gt_boxes: [N, G, 4] (x1, y1, x2, y2).
        anchors: [anchors of all levels, 4]; or instead
        cells, strides: for each level the anchors [A, 4] of the pixel at (0, 0), and input pixels a feature pixel.
        beta: of the smooth L1 loss, >= 0 (torchvision, maskrcnn-benchmark 1/9; detectron2 0).
        box_offset: 0, or 1 for inclusive pixels.
        normaliser: what the sums are divided by, a tensor of one element on the device; None for the number of sampled
            anchors of the batch, at least 1 (detectron2: 256 N).

    Returns:
        Two scalars, float32 (float64 for float64 logits): objectness loss, box loss. Differentiable once, in objectness
        and deltas.

    Raises:
        ValueError: for shapes or types that do not fit.
    """
    anchors, steps, normaliser = check_sample(
        "rpn_loss", objectness, deltas, indices, num_positive, num_sampled, matched_idxs, gt_boxes, anchors, cells,
        strides, normaliser,
    )  # fmt: skip
    if beta < 0:
        raise ValueError(f"rpn_loss: beta must not be negative, got {beta}")
    losses, _ = _forward_op(
        list(objectness), list(deltas), anchors, steps, indices, num_positive, num_sampled, matched_idxs, gt_boxes,
        normaliser, float(beta), box_offset,
    )  # fmt: skip
    objectness_loss, box_loss = losses.unbind()
    return objectness_loss, box_loss
