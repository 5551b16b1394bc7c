"""Region proposals from the outputs of an RPN head, in their own layout, in one operator.

For each image and level the best anchors by objectness are decoded, clipped and thinned by NMS; then the best over the
levels, of an image or of the batch. All ranks are by the *logit* in the type of the head, ties by lower index::

    candidates of a level   decreasing logit; equal logits by lower anchor index, (y * W + x) * A + a
    NMS in a level          in that order
    over the levels         decreasing logit; equal logits by lower image (of a batch), level, rank in the level

so that a sigmoid that saturates, or rounds one way here and another there, decides nothing. A NaN logit ranks first, as
in ``torch.sort(descending=True)``; a box with a NaN is not large enough and is left out. Boxes and scores are computed
in float32 (float64 for float64).

Detectron's GenerateProposals and CollectFpnRpnProposals; the numbers are maskrcnn-benchmark's, which ranks by sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.anchors import grid_anchors_reference
from fastrcnn_kernels.box_coder import BBOX_XFORM_CLIP, _check_weights, decode_boxes
from fastrcnn_kernels.boxes import _check_offset, clip_boxes_to_image, is_large_enough
from fastrcnn_kernels.nms import comparison_threshold, nms_padded_reference

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of boxes and scores for a head of type ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capacities(
    objectness: Sequence[Tensor], pre_nms_top_n: int, post_nms_top_n: int, top_n: int
) -> tuple[int, int, int]:
    """Candidates of a level K, survivors of a level, and proposals of an image P, all padded; host numbers."""
    candidates = min(pre_nms_top_n, max(level.shape[1] * level.shape[2] * level.shape[3] for level in objectness))
    survivors = min(post_nms_top_n, candidates)
    proposals = len(objectness) * survivors
    return candidates, survivors, min(proposals, top_n) if top_n else proposals


def _candidates(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor, candidates: int, min_size: float, weights: Sequence[float], box_offset: int, clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best anchors of each level: boxes [N, L, K, 4], logits [N, L, K], and whether there is one, large enough."""
    dtype = compute_dtype(objectness[0].dtype)
    all_boxes, all_logits, all_large = [], [], []
    for logits, offsets, cell, stride in zip(objectness, deltas, cells, strides, strict=True):
        n, a, h, w = logits.shape
        flat = logits.permute(0, 2, 3, 1).reshape(n, h * w * a)  # [N, A_l], in the order of the anchors
        order = flat.sort(dim=1, descending=True, stable=True).indices[:, :candidates]  # [N, k]
        by_anchor = offsets.reshape(n, a, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, h * w * a, 4)  # [N, A_l, 4]
        chosen = by_anchor.gather(1, order[..., None].expand(-1, -1, 4)).to(dtype)  # [N, k, 4]
        anchors = grid_anchors_reference([cell.to(dtype)], [h, w], [stride])[order]  # [N, k, 4]
        boxes = decode_boxes(chosen, anchors, weights, box_offset=box_offset, clip=clip)  # [N, k, 4]
        boxes = clip_boxes_to_image(boxes, image_sizes, box_offset=box_offset)  # [N, k, 4]
        missing = candidates - order.shape[1]
        all_boxes.append(F.pad(boxes, (0, 0, 0, missing)))
        all_logits.append(F.pad(flat.gather(1, order).to(dtype), (0, missing)))
        all_large.append(F.pad(is_large_enough(boxes, min_size, box_offset=box_offset), (0, missing)))
    return torch.stack(all_boxes, 1), torch.stack(all_logits, 1), torch.stack(all_large, 1)


def _best_first(logits: Tensor, present: Tensor) -> Tensor:
    """Indices along the last dimension: those present by decreasing logit, stable; then the absent ones."""
    by_logit = logits.sort(dim=-1, descending=True, stable=True).indices
    absent = present.logical_not().gather(-1, by_logit).to(torch.int8)
    return by_logit.gather(-1, absent.sort(dim=-1, stable=True).indices)


def generate_proposals_reference(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor, pre_nms_top_n: int, post_nms_top_n: int, top_n: int, per_batch: bool, iou_threshold: float,
    min_size: float, weights: Sequence[float], box_offset: int, clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The specification of :func:`generate_proposals`. Static shapes, no host sync."""
    candidates, survivors, capacity = capacities(objectness, pre_nms_top_n, post_nms_top_n, top_n)
    boxes, logits, large = _candidates(
        objectness, deltas, cells, strides, image_sizes, candidates, min_size, weights, box_offset, clip
    )  # [N, L, K, 4], [N, L, K], [N, L, K]
    # NMS in the order of the candidates, which is that of the logits whatever their ties.
    rank = -torch.arange(candidates, device=boxes.device, dtype=boxes.dtype)  # [K]
    rank = torch.where(large, rank, -math.inf)  # [N, L, K]
    keep, _ = nms_padded_reference(boxes.flatten(0, 1), rank.flatten(0, 1), iou_threshold, survivors, box_offset)
    keep = keep.view(*boxes.shape[:2], survivors)  # [N, L, M]
    index = keep.clamp(min=0)  # [N, L, M]
    boxes = boxes.gather(2, index[..., None].expand(-1, -1, -1, 4)).flatten(1, 2)  # [N, L * M, 4]
    logits = logits.gather(2, index).flatten(1)  # [N, L * M]
    chosen = (keep >= 0).flatten(1)  # [N, L * M]
    if top_n and not per_batch:
        order = _best_first(logits, chosen)[:, :capacity]  # [N, P]
    else:
        if top_n and capacity * boxes.shape[0] > 0:
            best = _best_first(logits.flatten(), chosen.flatten())[:top_n]  # [top_n]
            among = torch.zeros_like(chosen.flatten()).scatter(0, best, True)  # [N * L * M]
            chosen = chosen & among.view_as(chosen)  # [N, L * M]
        order = chosen.logical_not().to(torch.int8).sort(dim=1, stable=True).indices[:, :capacity]  # [N, P]
    count = chosen.sum(1).clamp(max=capacity)  # [N]
    valid = torch.arange(capacity, device=boxes.device) < count[:, None]  # [N, P]
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))  # [N, P, 4]
    return (
        torch.where(valid[..., None], boxes, 0),
        torch.where(valid, logits.gather(1, order).sigmoid(), -math.inf),
        count,
    )


def _layout(level: Tensor) -> tuple[Tensor, bool]:
    """A level that the kernels can read, and whether it is channels_last."""
    if level.is_contiguous():
        return level, False
    if level.is_contiguous(memory_format=torch.channels_last):
        return level, True
    return level.contiguous(), False


def _generate_proposals_cpp(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor, pre_nms_top_n: int, post_nms_top_n: int, top_n: int, per_batch: bool, iou_threshold: float,
    min_size: float, weights: Sequence[float], box_offset: int, clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(objectness[0].dtype)
    _, survivors, capacity = capacities(objectness, pre_nms_top_n, post_nms_top_n, top_n)
    images = image_sizes.shape[0]
    held, rows = [], []  # tensors made here live until the kernel is done
    for logits, offsets, cell, stride in zip(objectness, deltas, cells, strides, strict=True):
        logits, logits_last = _layout(logits)
        offsets, deltas_last = _layout(offsets)
        cell = cell.to(dtype).contiguous()
        held += [logits, offsets, cell]
        _, a, h, w = logits.shape
        rows += [logits.data_ptr(), offsets.data_ptr(), cell.data_ptr(), a, h, w, stride, logits_last + 2 * deltas_last]
    sizes = image_sizes.to(torch.int64).contiguous()
    boxes = torch.empty((images, capacity, 4), dtype=dtype)
    scores = torch.empty((images, capacity), dtype=dtype)
    count = torch.empty((images,), dtype=torch.int64)
    _library.extension().generate_proposals(
        rows,
        _DTYPE_CODES[objectness[0].dtype],
        sizes.data_ptr(),
        images,
        capacity,
        pre_nms_top_n,
        survivors,
        top_n,
        per_batch,
        comparison_threshold(iou_threshold, dtype),
        min_size,
        list(weights),
        box_offset,
        clip,
        boxes.data_ptr(),
        scores.data_ptr(),
        count.data_ptr(),
        torch.get_num_threads(),
    )
    return boxes, scores, count


def _generate_proposals_triton(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor, pre_nms_top_n: int, post_nms_top_n: int, top_n: int, per_batch: bool, iou_threshold: float,
    min_size: float, weights: Sequence[float], box_offset: int, clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrcnn_kernels.triton import proposals as launcher

    return launcher.generate_proposals(
        objectness, deltas, cells, strides, image_sizes,
        capacities(objectness, pre_nms_top_n, post_nms_top_n, top_n), top_n, per_batch,
        comparison_threshold(iou_threshold, compute_dtype(objectness[0].dtype)), min_size, weights, box_offset, clip,
    )  # fmt: skip


def _fake(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor, pre_nms_top_n: int, post_nms_top_n: int, top_n: int, *_: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    images, first = image_sizes.shape[0], objectness[0]
    capacity = capacities(objectness, pre_nms_top_n, post_nms_top_n, top_n)[2]
    dtype = compute_dtype(first.dtype)
    return (
        first.new_empty((images, capacity, 4), dtype=dtype),
        first.new_empty((images, capacity), dtype=dtype),
        first.new_empty((images,), dtype=torch.int64),
    )


_generate_proposals = _library.define(
    "generate_proposals(Tensor[] objectness, Tensor[] deltas, Tensor[] cells, int[] strides, Tensor image_sizes, "
    "int pre_nms_top_n, int post_nms_top_n, int top_n, bool per_batch, float iou_threshold, float min_size, "
    "float[] weights, int box_offset, float clip) -> (Tensor, Tensor, Tensor)",
    reference=generate_proposals_reference,
    fake=_fake,
    cpp=_generate_proposals_cpp,
    triton="fastrcnn_kernels.proposals:_generate_proposals_triton",
)


def _check(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], cells: Sequence[Tensor], strides: Sequence[int],
    image_sizes: Tensor,
) -> None:  # fmt: skip
    if not objectness or not len(objectness) == len(deltas) == len(cells) == len(strides):
        raise ValueError(
            "generate_proposals: objectness, deltas, cells and strides must have an entry a level, got "
            f"{len(objectness)}, {len(deltas)}, {len(cells)} and {len(strides)}"
        )
    if image_sizes.dim() != 2 or image_sizes.shape[1] != 2 or image_sizes.is_floating_point():
        raise ValueError("generate_proposals: image_sizes must be integers [N, 2], (height, width), got "
                         f"{image_sizes.dtype}{list(image_sizes.shape)}")  # fmt: skip
    images, first = image_sizes.shape[0], objectness[0]
    if first.dtype not in _DTYPE_CODES:
        raise TypeError(f"generate_proposals: objectness must be floating point, got {first.dtype}")
    for i, (logits, offsets, cell) in enumerate(zip(objectness, deltas, cells, strict=True)):
        if logits.dim() != 4 or logits.shape[0] != images:
            raise ValueError(f"generate_proposals: objectness[{i}] must be [{images}, A, H, W], got "
                             f"{list(logits.shape)}")  # fmt: skip
        n, a, h, w = logits.shape
        if offsets.shape != (n, 4 * a, h, w):
            raise ValueError(f"generate_proposals: deltas[{i}] must be {[n, 4 * a, h, w]}, got {list(offsets.shape)}")
        if cell.shape != (a, 4):
            raise ValueError(f"generate_proposals: cells[{i}] must be {[a, 4]}, got {list(cell.shape)}")
        if logits.dtype != first.dtype or offsets.dtype != first.dtype:
            raise TypeError(f"generate_proposals: all levels must have one dtype, got {first.dtype} and at level {i} "
                            f"{logits.dtype}, {offsets.dtype}")  # fmt: skip
        if not logits.device == offsets.device == cell.device == image_sizes.device:
            raise ValueError(f"generate_proposals: everything must be on one device, got at level {i} {logits.device}, "
                             f"{offsets.device}, {cell.device}, and image_sizes on {image_sizes.device}")  # fmt: skip


def generate_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cells: Sequence[Tensor],
    strides: Sequence[int],
    image_sizes: Tensor,
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    top_n: int | None = None,
    per_batch: bool = False,
    iou_threshold: float = 0.7,
    min_size: float = 0.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    box_offset: int = 0,
    clip: float = BBOX_XFORM_CLIP,
) -> tuple[Tensor, Tensor, Tensor]:
    """The proposals of a region proposal network (Ren et al., 2015; Caffe2's ``GenerateProposals``), padded.

    Shapes do not depend on the data and the host never waits. Not differentiable, as in every implementation of it.

    Args:
        objectness: for each level logits [N, A, H, W], NCHW or channels_last (other layouts are copied).
        deltas: for each level [N, 4 * A, H, W], (dx, dy, dw, dh) of each anchor of the cell. One dtype with objectness:
            float32, float64, float16 or bfloat16.
        cells: for each level the anchors of the pixel (0, 0), float [A, 4] (:func:`cell_anchors`); the others are moved
            by the stride. Pixels of the network's input image.
        strides: for each level the pixels between neighbouring cells.
        image_sizes: integers [N, 2], (height, width) that boxes are clipped to; not read on the host.
        pre_nms_top_n, post_nms_top_n: how many anchors of a level enter NMS, and how many at most leave it.
        top_n: how many of all levels are kept; None: all.
        per_batch: ``top_n`` counts over the whole batch (maskrcnn-benchmark's training), not for each image.
        iou_threshold: a box is dropped if its IoU with a better one of its image and level is greater.
        min_size: the shortest side of a proposal after clipping, in pixels.
        weights, clip: of the deltas, as in :func:`decode_boxes`.
        box_offset: 0 for width x2 - x1; 1 for inclusive pixels.

    Returns:
        ``boxes`` [N, P, 4], ``scores`` [N, P] (sigmoid of the logits), ``count`` int64 [N]; the real ones first, then
        zeros (scores: -inf). With ``top_n`` for each image they are in decreasing objectness; else level by level, in
        each in decreasing objectness. P = L * min(post_nms_top_n, pre_nms_top_n, most anchors of a level), at most
        ``top_n``. float32 (float64 for float64).

    Raises:
        ValueError: for shapes, devices or numbers that do not fit.
        TypeError: for dtypes that are not floating point or not all the same.
    """
    _check(objectness, deltas, cells, strides, image_sizes)
    _check_offset(box_offset)
    _check_weights(weights)
    for name, number in (("pre_nms_top_n", pre_nms_top_n), ("post_nms_top_n", post_nms_top_n), ("top_n", top_n)):
        if number is not None and number < 1:
            raise ValueError(f"generate_proposals: {name} must be positive, got {number}")
    if math.isnan(iou_threshold):
        raise ValueError("generate_proposals: iou_threshold is NaN")
    return _generate_proposals(
        [level.detach() for level in objectness], [level.detach() for level in deltas], list(cells), list(strides),
        image_sizes, pre_nms_top_n, post_nms_top_n, top_n or 0, per_batch, iou_threshold, float(min_size),
        [float(weight) for weight in weights], box_offset, float(clip),
    )  # fmt: skip
