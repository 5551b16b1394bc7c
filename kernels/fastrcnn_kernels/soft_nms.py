"""Soft-NMS (Bodla et al., 2017): a selected box lowers the scores of those that it overlaps instead of dropping them.

Repeatedly the box of highest score is selected, equal scores by lower index, and every other score is multiplied by::

    linear     1 - iou where iou > iou_threshold, else 1
    gaussian   exp(-(iou * iou) / sigma) where iou > 0, else 1

A box whose score is not at least ``min_score`` is out, from the start or as soon as it falls below; NaN scores are. A
NaN IoU changes nothing. The IoU is that of ``nms.py``; each operation is rounded to float32 and the float32 exponential
is the polynomial of the box coder, so that all implementations select the same boxes in the same order. (In float64 the
exponential is the platform's.) mmcv's ``soft_nms``, with the paper's ``>`` where mmcv has ``>=``, and ties decided.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.nms import comparison_threshold

METHODS = ("linear", "gaussian")


def compute_dtype(boxes: Tensor, scores: Tensor) -> torch.dtype:
    """float64 if boxes or scores are, else float32."""
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def _exponential(x: Tensor) -> Tensor:
    """e^x for x <= 0 by the operations of ``csrc/box_coder.h``, each rounded to float32."""
    if x.dtype == torch.float64:
        return x.exp()
    x = torch.where(x < -104.0, -104.0, x)
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    y = (p * (r * r) + r) + 1.0
    power = shifted.view(torch.int32) - 0x4B400000
    half = power >> 1
    return y * ((half + 127) << 23).view(torch.float32) * ((power - half + 127) << 23).view(torch.float32)


def soft_nms_reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool, box_offset: int
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`soft_nms`."""
    dtype = compute_dtype(boxes, scores)
    x1, y1, x2, y2 = boxes.to(dtype).unbind(-1)  # [N] each
    left = scores.to(dtype)  # [N]
    left = torch.where(left >= min_score, left, -math.inf)  # [N]
    area = (x2 - x1 + box_offset) * (y2 - y1 + box_offset)  # [N]
    threshold = comparison_threshold(iou_threshold, dtype)
    # Tensors: a quotient by a number may be computed as a product with its reciprocal.
    width_of_decay = left.new_full((), sigma)
    keep, rescored = [], []
    for _ in range(len(scores)):
        best = left.argmax()
        if left[best] == -math.inf:
            break
        # argmax may give any of equal scores.
        best = (left == left[best]).to(torch.int8).argmax()
        keep.append(best)
        rescored.append(left[best])
        width = torch.minimum(x2[best], x2) - torch.maximum(x1[best], x1) + box_offset  # [N]
        height = torch.minimum(y2[best], y2) - torch.maximum(y1[best], y1) + box_offset  # [N]
        inter = width.clamp(min=0) * height.clamp(min=0)  # [N]
        iou = inter / (area[best] + area - inter)  # [N]
        if gaussian:
            decay = _exponential(-(iou * iou) / width_of_decay)  # [N]
            weight = torch.where(iou > 0, decay, 1)  # [N]
        else:
            weight = torch.where(iou > threshold, 1 - iou, 1)  # [N]
        left = left.index_fill(0, best, -math.inf) * weight  # [N]
        left = torch.where(left >= min_score, left, -math.inf)  # [N]
    if not keep:
        return scores.new_empty((0,), dtype=torch.int64), scores.new_empty((0,), dtype=dtype)
    return torch.stack(keep), torch.stack(rescored)


def _soft_nms_cpp(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool, box_offset: int
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(boxes, scores)
    boxes, scores = boxes.to(dtype).contiguous(), scores.to(dtype).contiguous()
    keep = torch.empty((scores.shape[0],), dtype=torch.int64)
    rescored = torch.empty((scores.shape[0],), dtype=dtype)
    number = _library.extension().soft_nms(
        boxes.data_ptr(),
        dtype == torch.float64,
        scores.data_ptr(),
        scores.shape[0],
        comparison_threshold(iou_threshold, dtype),
        sigma,
        min_score,
        gaussian,
        box_offset,
        keep.data_ptr(),
        rescored.data_ptr(),
    )
    return keep[:number].clone(), rescored[:number].clone()


def _soft_nms_triton(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, gaussian: bool, box_offset: int
) -> tuple[Tensor, Tensor]:
    from fastrcnn_kernels.triton import soft_nms as launcher

    dtype = compute_dtype(boxes, scores)
    threshold = comparison_threshold(iou_threshold, dtype)
    return launcher.soft_nms(boxes.to(dtype), scores.to(dtype), threshold, sigma, min_score, gaussian, box_offset)


def _fake(boxes: Tensor, scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    number = torch.library.get_ctx().new_dynamic_size()
    return (
        scores.new_empty((number,), dtype=torch.int64),
        scores.new_empty((number,), dtype=compute_dtype(boxes, scores)),
    )


_soft_nms = _library.define(
    "soft_nms(Tensor boxes, Tensor scores, float iou_threshold, float sigma, float min_score, bool gaussian, "
    "int box_offset) -> (Tensor, Tensor)",
    reference=soft_nms_reference,
    fake=_fake,
    cpp=_soft_nms_cpp,
    triton="fastrcnn_kernels.soft_nms:_soft_nms_triton",
)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    *,
    box_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS of one list; mmcv's signature.

    Args:
        boxes: float [N, 4], (x1, y1, x2, y2) in any unit and frame.
        scores: float [N], not negative.
        iou_threshold: of ``linear``: overlaps up to this change nothing.
        sigma: of ``gaussian``: positive; the smaller, the nearer to dropping.
        min_score: boxes whose score falls below are dropped.
        method: ``linear`` or ``gaussian``.
        box_offset: 0 for width x2 - x1; 1 for inclusive pixels.

    Returns:
        ``keep`` int64 [K]: indices in order of selection, and their lowered ``scores`` [K], which do not increase;
        float32, float64 if boxes or scores are. Waits for the GPU.

    Raises:
        ValueError: for wrong shapes, devices, NaN thresholds, a sigma that is not positive, an unknown method.
        TypeError: for boxes or scores that are not floating point.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"soft_nms: boxes must be [N, 4] and scores [N], got {list(boxes.shape)} and "
                         f"{list(scores.shape)}")  # fmt: skip
    for argument, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"soft_nms: {argument} must be floating point, got {tensor.dtype}")
    if scores.device != boxes.device:
        raise ValueError(f"soft_nms: boxes are on {boxes.device} but scores on {scores.device}")
    if method not in METHODS:
        raise ValueError(f"soft_nms: unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if math.isnan(iou_threshold) or math.isnan(min_score) or not sigma > 0:
        raise ValueError(f"soft_nms: iou_threshold and min_score must not be NaN and sigma must be positive, got "
                         f"{iou_threshold}, {min_score} and {sigma}")  # fmt: skip
    if box_offset not in (0, 1):
        raise ValueError(f"soft_nms: box_offset must be 0 (width x2 - x1) or 1 (inclusive pixels), got {box_offset}")
    return _soft_nms(boxes, scores, iou_threshold, sigma, min_score, method == "gaussian", box_offset)
