"""Box geometry: area, IoU and its relatives, clipping and the small-box filter.

Boxes are ``(x1, y1, x2, y2)`` in absolute pixels of the network's input image. ``box_offset`` chooses the
convention: 0 is torchvision's and detectron2's (width = x2 - x1), 1 the inclusive pixels of Detectron and
maskrcnn-benchmark (width = x2 - x1 + 1). The order of the floating-point operations is maskrcnn-benchmark's, so
that float32 results are equal to the last bit. Everything here is elementwise: a NaN box spoils only itself.

The pairwise measures are operators with kernels; area, clipping and the filter are a few PyTorch operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels import boxes_reference as reference


def _check_boxes(boxes: Tensor, name: str = "boxes") -> None:
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must have the shape [..., 4], got {list(boxes.shape)}")


def _check_offset(box_offset: int) -> None:
    if box_offset not in (0, 1):
        raise ValueError(f"box_offset must be 0 (x2 - x1) or 1 (x2 - x1 + 1), got {box_offset}")


def _at_least_float32(tensor: Tensor) -> Tensor:
    """float32 for half precision and integers; float32 and float64 stay. Areas of half boxes would overflow."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def box_area(boxes: Tensor, *, box_offset: int = 0) -> Tensor:
    """Area of each box.

    Args:
        boxes: [..., 4], any dtype, (x1, y1, x2, y2) in pixels.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        [...]; float16 and bfloat16 boxes give float32 (as in torchvision), other dtypes their own. A box with
        x2 < x1 has a negative width; nothing is clamped.
    """
    _check_boxes(boxes)
    _check_offset(box_offset)
    if boxes.is_floating_point():
        boxes = _at_least_float32(boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    return (x2 - x1 + box_offset) * (y2 - y1 + box_offset)  # [...]


_CODES = {"box_iou": 0, "generalized_box_iou": 1, "distance_box_iou": 2, "complete_box_iou": 3}


def _batched(boxes: Tensor, lead: torch.Size) -> tuple[Tensor, int]:
    """``boxes`` [..., N, 4] as contiguous lists, and the boxes from one list of ``lead`` to the next, or 0."""
    own = boxes.shape[:-2]
    if own.numel() == 1:
        return boxes.contiguous(), 0
    if own != lead:
        boxes = boxes.expand(*lead, *boxes.shape[-2:])
    return boxes.contiguous(), boxes.shape[-2]


def _pairwise(
    name: str, boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float, run: Callable[..., None]
) -> Tensor:
    """Lay the inputs out as the kernels want them and ``run`` one, on ``boxes1`` and ``boxes2`` of one type."""
    lead = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    n, m = boxes1.shape[-2], boxes2.shape[-2]
    out = boxes1.new_empty((*lead, n, m))
    if out.numel() == 0:
        return out
    boxes1, stride1 = _batched(boxes1, lead)
    boxes2, stride2 = _batched(boxes2, lead)
    angles1 = angles2 = boxes1
    if name == "complete_box_iou":
        angles1, angles2 = (reference.diagonal_angle(boxes, box_offset) for boxes in (boxes1, boxes2))
    run(_CODES[name], boxes1, boxes2, angles1, angles2, out.view(-1, n, m), (stride1, stride2), box_offset, eps)
    return out


def _run_cpp(
    kind: int, boxes1: Tensor, boxes2: Tensor, angles1: Tensor, angles2: Tensor, out: Tensor, strides: tuple[int, int],
    box_offset: int, eps: float,
) -> None:  # fmt: skip
    addresses = (tensor.data_ptr() for tensor in (boxes1, boxes2, angles1, angles2))
    _library.extension().pairwise_iou(
        kind, *addresses, *out.shape, *strides, box_offset, eps, out.dtype == torch.float64, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def _run_triton(*arguments: Any) -> None:
    from fastrcnn_kernels.triton import boxes as launcher

    launcher.pairs(*arguments)


def _pairwise_fake(boxes1: Tensor, boxes2: Tensor, *_: object) -> Tensor:
    lead = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    return boxes1.new_empty((*lead, boxes1.shape[-2], boxes2.shape[-2]))


def _define_pairwise(name: str) -> Callable[..., Tensor]:
    """Register one of the measures. Those of a distance take an ``eps``."""
    arguments = "Tensor boxes1, Tensor boxes2, int box_offset" + (", float eps" if _CODES[name] > 1 else "")

    def cpp(boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float = 0.0) -> Tensor:
        return _pairwise(name, boxes1, boxes2, box_offset, eps, _run_cpp)

    return _library.define(
        f"{name}({arguments}) -> Tensor",
        reference=getattr(reference, name),
        fake=_pairwise_fake,
        cpp=cpp,
        triton=f"fastrcnn_kernels.boxes:_{name}_triton",
    )


def _box_iou_triton(boxes1: Tensor, boxes2: Tensor, box_offset: int) -> Tensor:
    return _pairwise("box_iou", boxes1, boxes2, box_offset, 0.0, _run_triton)


def _generalized_box_iou_triton(boxes1: Tensor, boxes2: Tensor, box_offset: int) -> Tensor:
    return _pairwise("generalized_box_iou", boxes1, boxes2, box_offset, 0.0, _run_triton)


def _distance_box_iou_triton(boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float) -> Tensor:
    return _pairwise("distance_box_iou", boxes1, boxes2, box_offset, eps, _run_triton)


def _complete_box_iou_triton(boxes1: Tensor, boxes2: Tensor, box_offset: int, eps: float) -> Tensor:
    return _pairwise("complete_box_iou", boxes1, boxes2, box_offset, eps, _run_triton)


_OPERATORS = {name: _define_pairwise(name) for name in _CODES}


def _measure(name: str, boxes1: Tensor, boxes2: Tensor, *settings: Any) -> Tensor:
    for boxes, argument in ((boxes1, "boxes1"), (boxes2, "boxes2")):
        if boxes.dim() < 2 or boxes.shape[-1] != 4:
            raise ValueError(f"{argument} must have the shape [..., N, 4], got {list(boxes.shape)}")
    _check_offset(settings[0])
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    if boxes1.dtype != boxes2.dtype:
        boxes1, boxes2 = boxes1.double(), boxes2.double()
    # Gradients are autograd's of the specification: losses take pairs one by one, so a matrix of them is rare.
    differentiable = torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad)
    function = getattr(reference, name) if differentiable else _OPERATORS[name]
    return function(boxes1, boxes2, *settings)


def box_iou(boxes1: Tensor, boxes2: Tensor, *, box_offset: int = 0) -> Tensor:
    """Intersection over union of every pair, torchvision's signature plus leading batch dimensions.

    Differentiable: where an input requires a gradient, the reference runs, in PyTorch's operators.

    Args:
        boxes1: [..., N, 4], (x1, y1, x2, y2) in pixels.
        boxes2: [..., M, 4]; leading dimensions broadcast against those of ``boxes1``.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        [..., N, M] in [0, 1], float32 (float64 for float64 boxes), the same bits from every back-end. Empty or
        inverted boxes have IoU 0 with everything, also with each other (torchvision: NaN). A box with a NaN gives NaN
        in its own row or column.

    Raises:
        ValueError: for other shapes or another ``box_offset``.
    """
    return _measure("box_iou", boxes1, boxes2, box_offset)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, *, box_offset: int = 0) -> Tensor:
    """GIoU of every pair (Rezatofighi et al., 2019): IoU minus the share of the hull that neither box covers.

    Args:
        boxes1, boxes2, box_offset: as in :func:`box_iou`; differentiable like it.

    Returns:
        [..., N, M] in [-1, 1], torchvision's numbers; two empty boxes at one place have 0 (torchvision: NaN).

    Raises:
        ValueError: as in :func:`box_iou`.
    """
    return _measure("generalized_box_iou", boxes1, boxes2, box_offset)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, box_offset: int = 0) -> Tensor:
    """DIoU of every pair (Zheng et al., 2020): IoU minus squared distance of the centres over the hull's diagonal's.

    Args:
        boxes1, boxes2, box_offset: as in :func:`box_iou`; differentiable like it.
        eps: added to the squared diagonal of the hull, in square pixels.

    Returns:
        [..., N, M] in [-1, 1], torchvision's numbers where it has any (boxes with an area).

    Raises:
        ValueError: as in :func:`box_iou`.
    """
    return _measure("distance_box_iou", boxes1, boxes2, box_offset, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, box_offset: int = 0) -> Tensor:
    """CIoU of every pair (Zheng et al., 2020): DIoU minus a term for different aspect ratios.

    Args:
        boxes1, boxes2, box_offset: as in :func:`box_iou`; differentiable like it, the weight of the term being a
            constant of the gradient, as in torchvision.
        eps: added to the squared diagonal of the hull and to the divisor of that weight.

    Returns:
        [..., N, M], torchvision's numbers where it has any. A box without a height has the ratio infinity, one
        without both sides 0 (torchvision: NaN).

    Raises:
        ValueError: as in :func:`box_iou`.
    """
    return _measure("complete_box_iou", boxes1, boxes2, box_offset, eps)


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int] | Tensor, *, box_offset: int = 0) -> Tensor:
    """Clamp boxes to the image: x to [0, width - box_offset], y to [0, height - box_offset].

    Args:
        boxes: [..., 4] of any dtype.
        size: (height, width) of one image for all boxes, or a tensor of sizes, one for each leading index: [N, 2]
            for boxes [N, P, 4], [2] for boxes [P, 4]. A tensor is not read on the host.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        New boxes of the same shape and dtype. NaN stays NaN.
    """
    _check_boxes(boxes)
    _check_offset(box_offset)
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    if isinstance(size, Tensor):
        if size.dim() == 0 or size.shape[-1] != 2 or boxes.dim() != size.dim() + 1:
            raise ValueError(
                f"size must be (height, width), or [N, 2] for boxes [N, P, 4]; got {list(size.shape)} "
                f"for boxes {list(boxes.shape)}"
            )
        limit = (size - box_offset).to(boxes.dtype).unsqueeze(-2)  # [..., 1, 2]
        height, width = limit.unbind(-1)  # [..., 1] each
        clipped = [
            torch.minimum(x1.clamp(min=0), width),
            torch.minimum(y1.clamp(min=0), height),
            torch.minimum(x2.clamp(min=0), width),
            torch.minimum(y2.clamp(min=0), height),
        ]
    else:
        right, bottom = size[1] - box_offset, size[0] - box_offset
        clipped = [x1.clamp(0, right), y1.clamp(0, bottom), x2.clamp(0, right), y2.clamp(0, bottom)]
    return torch.stack(clipped, dim=-1)  # [..., 4]


def is_large_enough(boxes: Tensor, min_size: float, *, box_offset: int = 0) -> Tensor:
    """Whether both sides of each box are at least ``min_size`` pixels: the static form of ``remove_small_boxes``.

    Args:
        boxes: [..., 4].
        min_size: smallest side that is kept, in pixels.
        box_offset: 0, or 1 for inclusive pixels (maskrcnn-benchmark's RPN.MIN_SIZE).

    Returns:
        bool [...]; False for a box with a NaN.
    """
    _check_boxes(boxes)
    _check_offset(box_offset)
    if boxes.is_floating_point():
        boxes = _at_least_float32(boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)  # [...] each
    return (x2 - x1 + box_offset >= min_size) & (y2 - y1 + box_offset >= min_size)  # [...]


def remove_small_boxes(boxes: Tensor, min_size: float, *, box_offset: int = 0) -> Tensor:
    """Indices of the boxes with both sides at least ``min_size`` pixels, torchvision's signature.

    The length of the result depends on the data, so this synchronises with the device; the training path uses
    ``is_large_enough``.

    Args:
        boxes: [N, 4].
        min_size: smallest side that is kept, in pixels.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        int64 [K], ascending.
    """
    if boxes.dim() != 2:
        raise ValueError(f"boxes must have the shape [N, 4], got {list(boxes.shape)}")
    return is_large_enough(boxes, min_size, box_offset=box_offset).nonzero().squeeze(1)  # [K]
