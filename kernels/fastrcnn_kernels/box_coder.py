"""Boxes as regression targets relative to an anchor, and back (R-CNN's parametrisation, Girshick et al., 2014).

``t = (wx (gx - ax) / aw, wy (gy - ay) / ah, ww log(gw / aw), wh log(gh / ah))`` with (x, y) the centre, (w, h) the
size of the ground truth g and of the anchor a. With ``box_offset=1`` sizes are x2 - x1 + 1, centres x1 + w / 2, and
decoding ends with x2 = x + w / 2 - 1: maskrcnn-benchmark's BoxCoder.

What float32 results agree to: the reference equals maskrcnn-benchmark's BoxCoder to the last bit. The C++ and Triton
kernels equal each other to the last bit, on every processor. They differ from the reference in the logarithm and the
exponential alone, which are within 1 ulp of the true value (torch's are too, but not the same): tx, ty and decoded
centres are the reference's to the last bit, tw and th are within 2 ulp, and decoded sides within 2 ulp of the side, to
which the corner's own rounding adds. A NaN spoils only its own box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels import box_coder_reference as reference
from fastrcnn_kernels.boxes import _check_boxes, _check_offset

# Bounds dw and dh from above: a box grows at most from 16 to 1000 pixels, and exp() does not overflow.
BBOX_XFORM_CLIP = math.log(1000.0 / 16)


def _lead(a: Tensor, b: Tensor) -> torch.Size:
    """The leading dimensions of both together."""
    first, second = a.shape[:-1], b.shape[:-1]
    return first if first == second else torch.broadcast_shapes(first, second)


def _rows(tensor: Tensor, lead: torch.Size, dtype: torch.dtype) -> Tensor:
    """``tensor`` [..., C], contiguous, of ``dtype``: its rows, repeated in order, are those of ``lead``."""
    own = tensor.shape[:-1]
    if own != lead:
        while own and own[0] == 1:
            own = own[1:]
        if own != lead[len(lead) - len(own) :]:
            tensor = tensor.expand(*lead, tensor.shape[-1])
    return tensor.to(dtype).contiguous()


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _kernel_input(tensor: Tensor, lead: torch.Size, dtype: torch.dtype) -> Tensor:
    """For Triton, which casts half types as it loads them."""
    half = tensor.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    return _rows(tensor, lead, tensor.dtype if half else dtype)


def _call(weights: Sequence[float], box_offset: int, clip: float, dtype: torch.dtype) -> Any:
    return _library.extension().BoxCoderCall(
        weights, box_offset, clip, dtype == torch.float64, torch.get_num_threads()
    )  # fmt: skip


def _encode_fake(boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int) -> Tensor:
    return boxes.new_empty((*_lead(boxes, anchors), 4), dtype=_compute_dtype(boxes, anchors))


def _encode_cpp(boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int) -> Tensor:
    lead, dtype = _lead(boxes, anchors), _compute_dtype(boxes, anchors)
    out = torch.empty((*lead, 4), dtype=dtype)
    if out.numel():
        boxes, anchors = _rows(boxes, lead, dtype), _rows(anchors, lead, dtype)
        _library.extension().encode_boxes(
            _call(weights, box_offset, 0.0, dtype), boxes.data_ptr(), boxes.numel() // 4, anchors.data_ptr(),
            anchors.numel() // 4, out.numel() // 4, out.data_ptr(),
        )  # fmt: skip
    return out


def _encode_triton(boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int) -> Tensor:
    from fastrcnn_kernels.triton import box_coder as launcher

    lead, dtype = _lead(boxes, anchors), _compute_dtype(boxes, anchors)
    out = torch.empty((*lead, 4), dtype=dtype, device=boxes.device)
    if out.numel():
        boxes, anchors = _kernel_input(boxes, lead, dtype), _kernel_input(anchors, lead, dtype)
        launcher.encode(boxes, anchors, out, weights, box_offset)
    return out


def _two(grad: Tensor, lead: torch.Size, columns: int, first: bool, second: bool) -> tuple[Tensor, Tensor]:
    """Buffers of the two gradients; an empty one where a gradient is not asked for."""
    return (
        grad.new_empty((*lead, columns) if first else (0,)),
        grad.new_empty((*lead, 4) if second else (0,)),
    )


def _encode_backward_fake(
    grad: Tensor, boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, for_boxes: bool,
    for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _two(grad, grad.shape[:-1], 4, for_boxes, for_anchors)


def _encode_backward_cpp(
    grad: Tensor, boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, for_boxes: bool,
    for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead, dtype, grad = grad.shape[:-1], grad.dtype, grad.contiguous()
    outputs = _two(grad, lead, 4, for_boxes, for_anchors)
    if grad.numel():
        boxes, anchors = _rows(boxes, lead, dtype), _rows(anchors, lead, dtype)
        _library.extension().encode_boxes_backward(
            _call(weights, box_offset, 0.0, dtype), grad.data_ptr(), boxes.data_ptr(), boxes.numel() // 4,
            anchors.data_ptr(), anchors.numel() // 4, grad.numel() // 4, *(out.data_ptr() for out in outputs),
        )  # fmt: skip
    return outputs


def _encode_backward_triton(
    grad: Tensor, boxes: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, for_boxes: bool,
    for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastrcnn_kernels.triton import box_coder as launcher

    lead, dtype, grad = grad.shape[:-1], grad.dtype, grad.contiguous()
    outputs = _two(grad, lead, 4, for_boxes, for_anchors)
    if grad.numel():
        boxes, anchors = _kernel_input(boxes, lead, dtype), _kernel_input(anchors, lead, dtype)
        grad_boxes, grad_anchors = (out if out.numel() else None for out in outputs)
        launcher.encode_backward(grad, boxes, anchors, grad_boxes, grad_anchors, grad.numel() // 4, weights, box_offset)
    return outputs


def _decode_fake(deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float) -> Tensor:
    return deltas.new_empty((*_lead(deltas, anchors), deltas.shape[-1]), dtype=_compute_dtype(deltas, anchors))


def _decode_cpp(deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float) -> Tensor:
    lead, dtype, columns = _lead(deltas, anchors), _compute_dtype(deltas, anchors), deltas.shape[-1]
    out = torch.empty((*lead, columns), dtype=dtype)
    if out.numel():
        deltas, anchors = _rows(deltas, lead, dtype), _rows(anchors, lead, dtype)
        _library.extension().decode_boxes(
            _call(weights, box_offset, clip, dtype), deltas.data_ptr(), deltas.numel() // columns, anchors.data_ptr(),
            anchors.numel() // 4, out.numel() // columns, columns // 4, out.data_ptr(),
        )  # fmt: skip
    return out


def _decode_triton(deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float) -> Tensor:
    from fastrcnn_kernels.triton import box_coder as launcher

    lead, dtype = _lead(deltas, anchors), _compute_dtype(deltas, anchors)
    out = torch.empty((*lead, deltas.shape[-1]), dtype=dtype, device=deltas.device)
    if out.numel():
        deltas, anchors = _kernel_input(deltas, lead, dtype), _kernel_input(anchors, lead, dtype)
        launcher.decode(deltas, anchors, out, out.shape[-1] // 4, weights, box_offset, clip)
    return out


def _decode_backward_fake(
    grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    for_deltas: bool, for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _two(grad, grad.shape[:-1], grad.shape[-1], for_deltas, for_anchors)


def _decode_backward_cpp(
    grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    for_deltas: bool, for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead, dtype, columns, grad = grad.shape[:-1], grad.dtype, grad.shape[-1], grad.contiguous()
    outputs = _two(grad, lead, columns, for_deltas, for_anchors)
    if not grad.numel():
        return outputs[0], outputs[1].zero_()
    deltas, anchors = _rows(deltas, lead, dtype), _rows(anchors, lead, dtype)
    _library.extension().decode_boxes_backward(
        _call(weights, box_offset, clip, dtype), grad.data_ptr(), deltas.data_ptr(), deltas.numel() // columns,
        anchors.data_ptr(), anchors.numel() // 4, grad.numel() // columns, columns // 4,
        *(out.data_ptr() for out in outputs),
    )  # fmt: skip
    return outputs


def _decode_backward_triton(
    grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    for_deltas: bool, for_anchors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastrcnn_kernels.triton import box_coder as launcher

    lead, dtype, columns, grad = grad.shape[:-1], grad.dtype, grad.shape[-1], grad.contiguous()
    outputs = _two(grad, lead, columns, for_deltas, for_anchors)
    if not grad.numel():
        return outputs[0], outputs[1].zero_()
    deltas, anchors = _kernel_input(deltas, lead, dtype), _kernel_input(anchors, lead, dtype)
    grad_deltas, grad_anchors = (out if out.numel() else None for out in outputs)
    launcher.decode_backward(
        grad, deltas, anchors, grad_deltas, grad_anchors, grad.numel() // columns, columns // 4, weights, box_offset,
        clip,
    )  # fmt: skip
    return outputs


def _proposals_fake(
    deltas: Tensor, anchors: Tensor, image_sizes: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    min_size: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = _compute_dtype(deltas, anchors)
    return deltas.new_empty(deltas.shape, dtype=dtype), deltas.new_empty(deltas.shape[:-1], dtype=torch.bool)


def _proposals_cpp(
    deltas: Tensor, anchors: Tensor, image_sizes: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    min_size: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead, dtype = deltas.shape[:-1], _compute_dtype(deltas, anchors)
    out, valid = torch.empty((*lead, 4), dtype=dtype), torch.empty(lead, dtype=torch.bool)
    if valid.numel():
        deltas, anchors, image_sizes = _rows(deltas, lead, dtype), _rows(anchors, lead, dtype), image_sizes.contiguous()
        _library.extension().decode_proposals(
            _call(weights, box_offset, clip, dtype), deltas.data_ptr(), anchors.data_ptr(), anchors.numel() // 4,
            image_sizes.data_ptr(), *lead, min_size, out.data_ptr(), valid.data_ptr(),
        )  # fmt: skip
    return out, valid


def _proposals_triton(
    deltas: Tensor, anchors: Tensor, image_sizes: Tensor, weights: Sequence[float], box_offset: int, clip: float,
    min_size: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastrcnn_kernels.triton import box_coder as launcher

    lead, dtype = deltas.shape[:-1], _compute_dtype(deltas, anchors)
    out = torch.empty((*lead, 4), dtype=dtype, device=deltas.device)
    valid = torch.empty(lead, dtype=torch.bool, device=deltas.device)
    if valid.numel():
        deltas, anchors = _kernel_input(deltas, lead, dtype), _kernel_input(anchors, lead, dtype)
        sizes = image_sizes.contiguous()
        launcher.decode_proposals(deltas, anchors, sizes, out, valid, weights, box_offset, clip, min_size)
    return out, valid


_encode_op = _library.define(
    "encode_boxes(Tensor boxes, Tensor anchors, float[] weights, int box_offset) -> Tensor",
    reference=reference.encode,
    fake=_encode_fake,
    cpp=_encode_cpp,
    triton="fastrcnn_kernels.box_coder:_encode_triton",
)
_encode_backward_op = _library.define(
    "encode_boxes_backward(Tensor grad, Tensor boxes, Tensor anchors, float[] weights, int box_offset, "
    "bool for_boxes, bool for_anchors) -> (Tensor, Tensor)",
    reference=reference.encode_backward,
    fake=_encode_backward_fake,
    cpp=_encode_backward_cpp,
    triton="fastrcnn_kernels.box_coder:_encode_backward_triton",
)
_decode_op = _library.define(
    "decode_boxes(Tensor deltas, Tensor anchors, float[] weights, int box_offset, float clip) -> Tensor",
    reference=reference.decode,
    fake=_decode_fake,
    cpp=_decode_cpp,
    triton="fastrcnn_kernels.box_coder:_decode_triton",
)
_decode_backward_op = _library.define(
    "decode_boxes_backward(Tensor grad, Tensor deltas, Tensor anchors, float[] weights, int box_offset, float clip, "
    "bool for_deltas, bool for_anchors) -> (Tensor, Tensor)",
    reference=reference.decode_backward,
    fake=_decode_backward_fake,
    cpp=_decode_backward_cpp,
    triton="fastrcnn_kernels.box_coder:_decode_backward_triton",
)
_decode_proposals_op = _library.define(
    "decode_proposals(Tensor deltas, Tensor anchors, Tensor image_sizes, float[] weights, int box_offset, float clip, "
    "float min_size) -> (Tensor, Tensor)",
    reference=reference.decode_proposals,
    fake=_proposals_fake,
    cpp=_proposals_cpp,
    triton="fastrcnn_kernels.box_coder:_proposals_triton",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, anchors, *ctx.settings = inputs
    ctx.save_for_backward(first, anchors)


def _gradients(ctx: Any, grad: Tensor, operator: Any, specification: Any) -> tuple[Any, ...]:
    first, anchors = ctx.saved_tensors
    # A gradient that is itself differentiated is made of PyTorch's operators, which have one.
    backward = specification if torch.is_grad_enabled() else operator
    grads = backward(grad, first, anchors, *ctx.settings, *ctx.needs_input_grad[:2])
    # Where an input was repeated, its gradients add up.
    return *(
        g.sum_to_size(t.shape).to(t.dtype) if needed else None
        for g, t, needed in zip(grads, (first, anchors), ctx.needs_input_grad, strict=False)
    ), *(None for _ in ctx.settings)


def _encode_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad, _encode_backward_op, reference.encode_backward)


def _decode_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad, _decode_backward_op, reference.decode_backward)


_library.register_autograd("encode_boxes", _encode_gradient, _context)
_library.register_autograd("decode_boxes", _decode_gradient, _context)


def _check_weights(weights: Sequence[float]) -> None:
    if len(weights) != 4 or min(weights) <= 0:
        raise ValueError(f"weights must be four positive numbers (wx, wy, ww, wh), got {tuple(weights)}")


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), *, box_offset: int = 0
) -> Tensor:
    """Regression targets that take each anchor to its box. Differentiable in both.

    Args:
        boxes: [..., 4], the ground truths, (x1, y1, x2, y2) in pixels.
        anchors: [..., 4], anchors or proposals; broadcasts against ``boxes``.
        weights: (wx, wy, ww, wh); maskrcnn-benchmark uses (1, 1, 1, 1) in the RPN, (10, 10, 5, 5) in the box head.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        [..., 4] (tx, ty, tw, th), float32 (float64 if an input is float64), finite for every valid box where
        ``box_offset`` is 1, in particular for the zero boxes of padding. With ``box_offset=0`` a box of zero width
        gives tw = -inf, and an anchor of zero width an infinite or NaN tx and tw, as in torchvision and detectron2:
        replace padding (``torch.where``) before or after, never multiply it away.

    Raises:
        ValueError: for other shapes, weights that are not positive or another ``box_offset``.
    """
    _check_boxes(boxes)
    _check_boxes(anchors, "anchors")
    _check_offset(box_offset)
    _check_weights(weights)
    return _encode_op(boxes, anchors, weights, box_offset)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    *,
    box_offset: int = 0,
    clip: float = BBOX_XFORM_CLIP,
) -> Tensor:
    """Apply predicted deltas to anchors: the inverse of ``encode_boxes``. Differentiable in both.

    Args:
        deltas: [..., 4 * k], k boxes for each anchor (k classes, or 1).
        anchors: [..., 4]; leading dimensions broadcast against those of ``deltas``.
        weights: those of ``encode_boxes``.
        box_offset: 0, or 1 for inclusive pixels.
        clip: upper bound of dw / ww and dh / wh; nothing bounds them from below. Beyond it dw and dh have no
            gradient; at the bound itself they have.

    Returns:
        [..., 4 * k] boxes in pixels, not clipped to any image; float32 (float64 if an input is float64), also for
        half-precision deltas: their 8 to 11 bits cannot hold a coordinate.

    Raises:
        ValueError: for other shapes, weights that are not positive or another ``box_offset``.
    """
    if deltas.dim() == 0 or deltas.shape[-1] % 4:
        raise ValueError(f"deltas must have the shape [..., 4 * k], got {list(deltas.shape)}")
    _check_boxes(anchors, "anchors")
    _check_offset(box_offset)
    _check_weights(weights)
    return _decode_op(deltas, anchors, weights, box_offset, clip)


def decode_proposals(
    deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    *,
    box_offset: int = 0,
    clip: float = BBOX_XFORM_CLIP,
    min_size: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``decode_boxes``, ``clip_boxes_to_image`` and ``is_large_enough`` in one pass. Not differentiable.

    Args:
        deltas: [N, K, 4], of N images.
        anchors: [N, K, 4], or [K, 4] for all images.
        image_sizes: int64 [N, 2], (height, width) in pixels; not read on the host.
        weights: those of ``encode_boxes``.
        box_offset: 0, or 1 for inclusive pixels.
        clip: upper bound of dw / ww and dh / wh.
        min_size: shortest side of a valid box after clipping, in pixels.

    Returns:
        ``boxes`` [N, K, 4] inside their images, float32 (float64 if an input is float64), and ``valid`` bool [N, K]:
        both sides reach ``min_size``; False for a box with a NaN.

    Raises:
        ValueError: for other shapes, sizes that are not int64, weights that are not positive or another
            ``box_offset``.
    """
    if deltas.dim() != 3 or deltas.shape[-1] != 4:
        raise ValueError(f"deltas must have the shape [N, K, 4], got {list(deltas.shape)}")
    if anchors.shape != deltas.shape and anchors.shape != deltas.shape[1:]:
        raise ValueError(f"anchors must be [K, 4] or as deltas {list(deltas.shape)}, got {list(anchors.shape)}")
    if image_sizes.shape != (deltas.shape[0], 2) or image_sizes.dtype != torch.int64:
        raise ValueError(
            f"image_sizes must be int64 [{deltas.shape[0]}, 2], got {image_sizes.dtype} {list(image_sizes.shape)}"
        )
    _check_offset(box_offset)
    _check_weights(weights)
    return _decode_proposals_op(deltas.detach(), anchors.detach(), image_sizes, weights, box_offset, clip, min_size)
