"""Box geometry: area, IoU, clipping and the small-box filter.

Boxes are ``(x1, y1, x2, y2)`` in absolute pixels of the network's input image. ``box_offset`` chooses the
convention: 0 is torchvision's and detectron2's (width = x2 - x1), 1 the inclusive pixels of Detectron and
maskrcnn-benchmark (width = x2 - x1 + 1). The order of the floating-point operations is maskrcnn-benchmark's, so
that float32 results are equal to the last bit. Everything here is elementwise: a NaN box spoils only itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def _positive_area(boxes: Tensor, box_offset: int) -> Tensor:
    """Area, at least the smallest normal number: keeps the IoU of two empty boxes from being 0 / 0."""
    area = box_area(boxes, box_offset=box_offset)
    return area.clamp(min=torch.finfo(area.dtype).tiny)


def box_iou(boxes1: Tensor, boxes2: Tensor, *, box_offset: int = 0) -> Tensor:
    """Intersection over union of every pair, torchvision's signature plus leading batch dimensions.

    Args:
        boxes1: [..., N, 4].
        boxes2: [..., M, 4]; leading dimensions broadcast against those of ``boxes1``.
        box_offset: 0, or 1 for inclusive pixels.

    Returns:
        [..., N, M] in [0, 1], float32 (float64 for float64 boxes). Empty or inverted boxes have IoU 0 with
        everything, also with each other (torchvision: NaN). A box with a NaN gives NaN in its own row or column.
    """
    _check_boxes(boxes1, "boxes1")
    _check_boxes(boxes2, "boxes2")
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    area1 = _positive_area(boxes1, box_offset).unsqueeze(-1)  # [..., N, 1]
    area2 = _positive_area(boxes2, box_offset).unsqueeze(-2)  # [..., 1, M]
    left1, top1, right1, bottom1 = boxes1.unsqueeze(-2).unbind(-1)  # [..., N, 1] each
    left2, top2, right2, bottom2 = boxes2.unsqueeze(-3).unbind(-1)  # [..., 1, M] each
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2) + box_offset).clamp(min=0)  # [..., N, M]
    height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2) + box_offset).clamp(min=0)  # [..., N, M]
    intersection = width * height  # [..., N, M]
    return intersection / (area1 + area2 - intersection)  # [..., N, M]


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
