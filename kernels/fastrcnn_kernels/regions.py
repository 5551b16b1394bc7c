"""What the second stage trains on: the ground truth among the proposals, and everything about the sampled regions.

Between the proposals and the heads nothing is computed, but much is moved: boxes, labels and ground truths are gathered
by the sample, put beside the index of their image, masked where a slot is empty. In PyTorch that is some sixty
operators, each a launch on a GPU for a few kilobytes. Here it is one to append, one to gather, and one for the levels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.boxes import _check_offset

_CODES = {torch.float32: 0, torch.float64: 1}
Regions = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def append_boxes_reference(
    boxes: Tensor, scores: Tensor, count: Tensor, added: Tensor, added_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of :func:`append_boxes`."""
    room, more = boxes.shape[1], added.shape[1]
    slot = torch.arange(room + more, device=boxes.device)  # [P + G]
    first, last = count[:, None], (count + added_count)[:, None]  # [N, 1] each
    source = torch.where(slot < first, slot, slot - first + room)  # [N, P + G]
    present = slot < last  # [N, P + G]
    source = torch.where(present, source, 0)
    every_box = torch.cat([boxes, added.to(boxes.dtype)], dim=1)  # [N, P + G, 4]
    every_score = torch.cat([scores, torch.ones_like(added[..., 0], dtype=scores.dtype)], dim=1)  # [N, P + G]
    moved = every_box.gather(1, source[..., None].expand(-1, -1, 4))  # [N, P + G, 4]
    return (
        torch.where(present[..., None], moved, 0),
        torch.where(present, every_score.gather(1, source), -torch.inf),
        count + added_count,
    )


def gather_regions_reference(
    boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, matched: Tensor, indices: Tensor, num_positive: Tensor,
    num_sampled: Tensor, most_positives: int, ignore_label: int,
) -> Regions:  # fmt: skip
    """The specification of :func:`gather_regions`."""
    images, slots = indices.shape
    gt_capacity = gt_boxes.shape[1]
    if boxes.shape[1] == 0:  # every slot is empty, but it is gathered all the same
        boxes, matched = boxes.new_zeros((images, 1, 4)), matched.new_zeros((images, 1))
    if gt_capacity == 0:
        gt_boxes, gt_labels = gt_boxes.new_zeros((images, 1, 4)), gt_labels.new_zeros((images, 1))
    slot = torch.arange(slots, device=indices.device)  # [S]
    positive, valid = slot < num_positive[:, None], slot < num_sampled[:, None]  # [N, S] each
    image = torch.arange(images, device=indices.device)[:, None]  # [N, 1]
    safe = indices.clamp(min=0)  # [N, S]
    chosen = boxes.gather(1, safe[..., None].expand(-1, -1, 4))  # [N, S, 4]
    matched_idxs = torch.where(positive, matched.gather(1, safe), 0)  # [N, S]
    labels = torch.where(positive, gt_labels.gather(1, matched_idxs), 0)  # [N, S]
    labels = torch.where(valid, labels, ignore_label)  # [N, S]
    wanted = gt_boxes.to(boxes.dtype).gather(1, matched_idxs[..., None].expand(-1, -1, 4))  # [N, S, 4]

    def with_image(present: Tensor) -> Tensor:
        return torch.where(present, image, -1).to(boxes.dtype)[..., None]

    first = slice(0, most_positives)
    return (
        chosen,
        torch.cat([with_image(valid), chosen], dim=2),  # [N, S, 5]
        labels,
        matched_idxs,
        wanted,
        torch.cat([with_image(positive), chosen], dim=2)[:, first].contiguous(),  # [N, M, 5]
        torch.where(positive, labels, -1)[:, first].contiguous(),  # [N, M]
        torch.where(positive, image * gt_capacity + matched_idxs, -1)[:, first].contiguous(),  # [N, M]
        num_positive.sum().clamp(min=1),  # []
    )


def _level_of_area(
    area: Tensor, min_level: int, max_level: int, canonical_size: float, canonical_level: int, eps_inside: float,
    eps_outside: float,
) -> Tensor:  # fmt: skip
    level = (canonical_level + torch.log2(area.sqrt() / canonical_size + eps_inside) + eps_outside).floor()
    # A box of negative area has no square root: it goes to the finest level, as an empty one does.
    level = torch.nan_to_num(level, nan=min_level, posinf=max_level, neginf=min_level)
    return level.clamp(min_level, max_level).to(torch.int64) - min_level


def assign_levels_reference(
    boxes: Tensor, min_level: int, max_level: int, canonical_size: float, canonical_level: int, eps: float,
    eps_outside: float, box_offset: int,
) -> Tensor:  # fmt: skip
    """The specification of :func:`assign_levels`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    area = (x2 - x1 + box_offset) * (y2 - y1 + box_offset)
    return _level_of_area(area, min_level, max_level, canonical_size, canonical_level, eps, eps_outside)


@lru_cache(maxsize=64)
def level_areas(
    dtype: torch.dtype, min_level: int, max_level: int, canonical_size: float, canonical_level: int, eps: float,
    eps_outside: float,
) -> tuple[float, ...]:  # fmt: skip
    """The smallest area of each level but the first, as the reference computes levels in ``dtype`` on a CPU.

    A level grows with the area, so that comparisons with these give the reference's level to the last bit, without its
    logarithm, on which processors differ.
    """
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    level = torch.arange(1, max_level - min_level + 1)
    # Positive floating-point numbers are in the order of their bits.
    low = torch.zeros(len(level), dtype=bits)
    high = torch.full((len(level),), torch.inf, dtype=dtype).view(bits)
    rules = (min_level, max_level, canonical_size, canonical_level, eps, eps_outside)
    for _ in range(64):
        middle = low + (high - low) // 2
        reached = _level_of_area(middle.view(dtype), *rules) >= level
        low, high = torch.where(reached, low, torch.minimum(middle + 1, high)), torch.where(reached, middle, high)
    return tuple(high.view(dtype).tolist())


def _append_boxes_cpp(
    boxes: Tensor, scores: Tensor, count: Tensor, added: Tensor, added_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out = _append_boxes_fake(boxes, scores, count, added, added_count)
    dtype = boxes.dtype
    operands = (boxes, scores.to(dtype), count, added.to(dtype), added_count)
    held = [t.contiguous() for t in operands]
    _library.extension().append_boxes(
        [t.data_ptr() for t in (*held, *out)], _CODES[dtype], boxes.shape[0], boxes.shape[1], added.shape[1]
    )
    return out


def _gather_operands(
    boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, matched: Tensor, indices: Tensor, num_positive: Tensor,
    num_sampled: Tensor,
) -> list[Tensor]:  # fmt: skip
    """As the kernels read them."""
    operands = (boxes, gt_boxes.to(boxes.dtype), gt_labels, matched, indices, num_positive, num_sampled)
    return [t.contiguous() for t in operands]


def _gather_regions_cpp(
    boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, matched: Tensor, indices: Tensor, num_positive: Tensor,
    num_sampled: Tensor, most_positives: int, ignore_label: int,
) -> Regions:  # fmt: skip
    out = _gather_regions_fake(boxes, gt_boxes, gt_labels, matched, indices, num_positive, num_sampled, most_positives)
    held = _gather_operands(boxes, gt_boxes, gt_labels, matched, indices, num_positive, num_sampled)
    _library.extension().gather_regions(
        [t.data_ptr() for t in (*held, *out)], _CODES[boxes.dtype], *indices.shape, boxes.shape[1],
        gt_boxes.shape[1], most_positives, ignore_label,
    )  # fmt: skip
    return out


def _rows(boxes: Tensor) -> Tensor:
    """[..., 4] as [K, 4], whose rows may be apart."""
    rows = boxes.reshape(-1, 4)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _assign_levels_cpp(
    boxes: Tensor, min_level: int, max_level: int, canonical_size: float, canonical_level: int, eps: float,
    eps_outside: float, box_offset: int,
) -> Tensor:  # fmt: skip
    rules = (min_level, max_level, canonical_size, canonical_level, eps, eps_outside)
    if boxes.dtype not in _CODES:
        return assign_levels_reference(boxes, *rules, box_offset)
    levels = torch.empty(boxes.shape[:-1], dtype=torch.int64)
    rows = _rows(boxes)
    _library.extension().assign_levels(
        rows.data_ptr(), rows.stride(0), _CODES[boxes.dtype], len(rows), list(level_areas(boxes.dtype, *rules)),
        box_offset, levels.data_ptr(),
    )  # fmt: skip
    return levels


def _assign_levels_triton(
    boxes: Tensor, min_level: int, max_level: int, canonical_size: float, canonical_level: int, eps: float,
    eps_outside: float, box_offset: int,
) -> Tensor:  # fmt: skip
    from fastrcnn_kernels.triton import regions as launcher

    rules = (min_level, max_level, canonical_size, canonical_level, eps, eps_outside)
    if boxes.dtype not in _CODES or max_level - min_level >= launcher.MAX_LEVELS:
        return assign_levels_reference(boxes, *rules, box_offset)
    levels = torch.empty(boxes.shape[:-1], dtype=torch.int64, device=boxes.device)
    launcher.assign_levels(_rows(boxes), levels, level_areas(boxes.dtype, *rules), box_offset)
    return levels


def _append_boxes_triton(
    boxes: Tensor, scores: Tensor, count: Tensor, added: Tensor, added_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from fastrcnn_kernels.triton import regions as launcher

    out = _append_boxes_fake(boxes, scores, count, added, added_count)
    operands = (boxes, scores.to(boxes.dtype), count, added.to(boxes.dtype), added_count)
    launcher.append_boxes([t.contiguous() for t in operands], out)
    return out


def _gather_regions_triton(
    boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, matched: Tensor, indices: Tensor, num_positive: Tensor,
    num_sampled: Tensor, most_positives: int, ignore_label: int,
) -> Regions:  # fmt: skip
    from fastrcnn_kernels.triton import regions as launcher

    out = _gather_regions_fake(boxes, gt_boxes, gt_labels, matched, indices, num_positive, num_sampled, most_positives)
    held = _gather_operands(boxes, gt_boxes, gt_labels, matched, indices, num_positive, num_sampled)
    launcher.gather_regions(held, out, ignore_label)
    return out


def _append_boxes_fake(
    boxes: Tensor, scores: Tensor, count: Tensor, added: Tensor, added_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    images, capacity = boxes.shape[0], boxes.shape[1] + added.shape[1]
    return (
        boxes.new_empty((images, capacity, 4)),
        boxes.new_empty((images, capacity)),
        count.new_empty((images,)),
    )


def _gather_regions_fake(
    boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, matched: Tensor, indices: Tensor, num_positive: Tensor,
    num_sampled: Tensor, most_positives: int, *_: object,
) -> Regions:  # fmt: skip
    images, slots = indices.shape
    return (
        boxes.new_empty((images, slots, 4)),
        boxes.new_empty((images, slots, 5)),
        indices.new_empty((images, slots)),
        indices.new_empty((images, slots)),
        boxes.new_empty((images, slots, 4)),
        boxes.new_empty((images, most_positives, 5)),
        indices.new_empty((images, most_positives)),
        indices.new_empty((images, most_positives)),
        indices.new_empty(()),
    )


def _assign_levels_fake(boxes: Tensor, *_: object) -> Tensor:
    return boxes.new_empty(boxes.shape[:-1], dtype=torch.int64)


_append_boxes = _library.define(
    "append_boxes(Tensor boxes, Tensor scores, Tensor count, Tensor added, Tensor added_count) "
    "-> (Tensor, Tensor, Tensor)",
    reference=append_boxes_reference,
    fake=_append_boxes_fake,
    cpp=_append_boxes_cpp,
    triton="fastrcnn_kernels.regions:_append_boxes_triton",
)
_gather_regions = _library.define(
    "gather_regions(Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor matched, Tensor indices, "
    "Tensor num_positive, Tensor num_sampled, SymInt most_positives, int ignore_label) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    reference=gather_regions_reference,
    fake=_gather_regions_fake,
    cpp=_gather_regions_cpp,
    triton="fastrcnn_kernels.regions:_gather_regions_triton",
)
_assign_levels = _library.define(
    "assign_levels(Tensor boxes, int min_level, int max_level, float canonical_size, int canonical_level, float eps, "
    "float eps_outside, int box_offset) -> Tensor",
    reference=assign_levels_reference,
    fake=_assign_levels_fake,
    cpp=_assign_levels_cpp,
    triton="fastrcnn_kernels.regions:_assign_levels_triton",
)


def _check_padded(name: str, boxes: Tensor) -> None:
    if boxes.dim() != 3 or boxes.shape[2] != 4 or boxes.dtype not in _CODES:
        raise ValueError(f"{name} must be float32 or float64 [N, P, 4], got {boxes.dtype} {list(boxes.shape)}")


def _check_integers(expected: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def append_boxes(
    boxes: Tensor, scores: Tensor, count: Tensor, added: Tensor, added_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of score 1 behind the boxes of each image: the ground truth among the proposals of a training step.

    maskrcnn-benchmark's ``add_gt_proposals`` on padded batches. Not differentiable.

    Args:
        boxes: float32 or float64 [N, P, 4], of which the first ``count`` of each image are real.
        scores: floating [N, P].
        count: int64 [N], not read on the host.
        added: floating [N, G, 4]; added_count: int64 [N], likewise.

    Returns:
        Boxes [N, P + G, 4] and scores [N, P + G] of the type of ``boxes``, the real ones first, then zeros with scores
        of -inf; ``count`` int64 [N].

    Raises:
        ValueError: for shapes or types that do not fit.
    """
    _check_padded("boxes", boxes)
    images = boxes.shape[0]
    if scores.shape != boxes.shape[:2] or not scores.is_floating_point():
        raise ValueError(f"scores must be floating {list(boxes.shape[:2])}, got {scores.dtype} {list(scores.shape)}")
    if added.dim() != 3 or added.shape[0] != images or added.shape[2] != 4 or not added.is_floating_point():
        raise ValueError(f"added must be floating [{images}, G, 4], got {added.dtype} {list(added.shape)}")
    _check_integers({"count": (count, (images,)), "added_count": (added_count, (images,))})
    return _append_boxes(boxes, scores, count, added, added_count)


def gather_regions(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    matched: Tensor,
    indices: Tensor,
    num_positive: Tensor,
    num_sampled: Tensor,
    *,
    most_positives: int,
    ignore_label: int = -100,
) -> Regions:
    """All that the heads need to know about their sampled regions, in one pass.

    Args:
        boxes: float32 or float64 [N, P, 4], what was sampled from.
        gt_boxes: floating [N, G, 4]; gt_labels: int64 [N, G].
        matched: int64 [N, P], the ground truth of each box (``match_boxes``); looked at for positives only.
        indices: int64 [N, S], num_positive, num_sampled: int64 [N]: from ``sample_balanced``, positives first.
        most_positives: M, the most that an image can have, at most S.
        ignore_label: the label of an empty slot.

    Returns:
        ``boxes`` [N, S, 4]; ``rois`` [N, S, 5], the same with the index of the image in front, -1 in an empty slot;
        ``labels`` int64 [N, S], the class of the ground truth of a positive, 0 of a negative; ``matched_idxs`` int64
        [N, S], 0 where not positive; ``wanted`` [N, S, 4], the box of that ground truth; and of the first M slots
        ``positive_rois`` [N, M, 5], ``positive_labels`` and ``instances`` int64 [N, M], the latter ``image * G + ground
        truth``, with -1 for image, label and instance where not positive; ``total`` int64 [], the number of positives
        of the batch, at least 1. What else an empty slot has is not specified. Not differentiable.

    Raises:
        ValueError: for shapes or types that do not fit.
    """
    _check_padded("boxes", boxes)
    images = boxes.shape[0]
    if gt_boxes.dim() != 3 or gt_boxes.shape[0] != images or gt_boxes.shape[2] != 4:
        raise ValueError(f"gt_boxes must be [{images}, G, 4], got {list(gt_boxes.shape)}")
    if indices.dim() != 2:
        raise ValueError(f"indices must be int64 [{images}, S], got {indices.dtype} {list(indices.shape)}")
    _check_integers(
        {
            "gt_labels": (gt_labels, tuple(gt_boxes.shape[:2])),
            "matched": (matched, tuple(boxes.shape[:2])),
            "indices": (indices, (images, indices.shape[1])),
            "num_positive": (num_positive, (images,)),
            "num_sampled": (num_sampled, (images,)),
        }
    )
    if not 0 <= most_positives <= indices.shape[1]:
        raise ValueError(f"most_positives must be from 0 to {indices.shape[1]}, got {most_positives}")
    return _gather_regions(
        boxes, gt_boxes, gt_labels, matched, indices, num_positive, num_sampled, most_positives, ignore_label
    )


def assign_levels(
    boxes: Tensor,
    *,
    min_level: int = 2,
    max_level: int = 5,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    eps: float = 1e-6,
    eps_outside: float = 0.0,
    box_offset: int = 0,
) -> Tensor:
    """The pyramid level of each box (Lin et al., 2017, equation 1), as maskrcnn-benchmark computes it.

    ``floor(canonical_level + log2(sqrt(area) / canonical_size + eps) + eps_outside)`` clamped to the levels there are.
    maskrcnn-benchmark has 1e-6 inside the logarithm, detectron2 1e-8 there, torchvision 1e-6 outside.

    Args:
        boxes (Tensor[..., 4]): (x1, y1, x2, y2) in pixels of the network input, floating.
        min_level, max_level: the finest and the coarsest level (level l has stride 2**l).
        canonical_size, canonical_level: a square of this side lies on this level.
        eps, eps_outside: added to the argument of the logarithm, and to the logarithm.
        box_offset: 1 counts pixels inclusively, width = x2 - x1 + 1 (maskrcnn-benchmark); 0 does not.

    Returns:
        int64 Tensor[...], counted from ``min_level``. On every device what a CPU's logarithm gives.
    """
    _check_offset(box_offset)
    return _assign_levels(
        boxes, min_level, max_level, float(canonical_size), canonical_level, float(eps), float(eps_outside), box_offset
    )
