"""Mask targets from bitmaps: the crop of an instance's bitmap by a box, at M x M pixels.

Two rules, in float32 with a pinned order of roundings, so that every implementation gives the same bits:

- ``maskrcnn_benchmark``, ``BinaryMaskList.crop(box).resize((M, M))``: the box rounded to whole pixels (half to even),
  clamped to the image and at least one pixel wide; ``F.interpolate`` (bilinear, ``align_corners=False``) to M x M;
  converted to uint8, which truncates: a pixel is set where the sum reaches 1. Its sums are those of
  ``fastrcnn_kernels/paste.py``, fused multiply-adds included.
- ``detectron2``, ``BitMasks.crop_and_resize``: RoIAlign of the bitmap (``aligned=True``, as many samples as a bin has
  pixels, rounded up) reaches 0.5. No multiplication is fused into a sum: torchvision's CPU kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.paste import SMALL_SIDES, _blend, _whole_pixel_axis

CONVENTIONS = ("maskrcnn_benchmark", "detectron2")
# RoIAlign takes a sample for each pixel of a box: boxes beyond this would take minutes.
COORDINATE_LIMIT = 32768.0


def _crop_and_resize(bitmap: Tensor, box: Tensor, mask_size: int) -> Tensor:
    """maskrcnn-benchmark's rule for one region: bitmap [H, W], float32 [4] -> bool [M, M]."""
    height, width = bitmap.shape
    x1, y1, x2, y2 = (int(v) for v in box.round().tolist())
    left, top = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    right = max(min(max(x2, 0), width), left + 1)
    bottom = max(min(max(y2, 0), height), top + 1)
    crop = (bitmap[top:bottom, left:right] != 0).float()  # [h, w]
    y = _whole_pixel_axis(bottom - top, mask_size, 0, mask_size, bitmap.device)
    x = _whole_pixel_axis(right - left, mask_size, 0, mask_size, bitmap.device)
    return _blend(crop, y, x, separable=2 * mask_size > SMALL_SIDES, continuous=False) >= 1.0


def _sample_axis(start: Tensor, bin_size: Tensor, samples: int, size: int, extent: int) -> tuple[Tensor, ...]:
    """The samples of M bins along one axis: cells before and behind int64 [M, samples], the weights of the two."""
    bins = torch.arange(size, device=start.device, dtype=torch.float32)[:, None]  # [M, 1]
    inside = torch.arange(samples, device=start.device, dtype=torch.float32) + 0.5  # [samples]
    at = (start + bins * bin_size) + inside * bin_size / float(samples)  # [M, samples]
    present = (at >= -1.0) & (at <= extent)
    at = at.clamp(min=0.0)
    first = at.clamp(max=float(extent)).long()
    last = first >= extent - 1
    first = first.clamp(max=extent - 1)
    far = torch.where(last, 0.0, at - first.float())
    # A sample outside has no weight at all; one on the last cell has all of it there.
    second = torch.where(last, first, first + 1)
    return first, second, torch.where(present, 1.0 - far, 0.0), torch.where(present, far, 0.0)


def _roi_align(bitmap: Tensor, box: Tensor, mask_size: int) -> Tensor:
    """detectron2's rule for one region: bitmap [H, W], float32 [4] -> bool [M, M]. Bounded memory: a bin row a time."""
    height, width = bitmap.shape
    start = box[:2] - 0.5
    bin_size = ((box[2:] - 0.5) - start) / torch.full_like(start, mask_size)  # [2]
    columns, rows = (int(v) for v in bin_size.ceil().tolist())
    values = (bitmap != 0).float()
    y0, y1, a0, a1 = _sample_axis(start[1], bin_size[1], rows, mask_size, height)
    x0, x1, b0, b1 = _sample_axis(start[0], bin_size[0], columns, mask_size, width)
    total = torch.zeros((mask_size, mask_size), device=bitmap.device)
    for i in range(rows):  # in this order, sample by sample
        upper, lower = values[y0[:, i]], values[y1[:, i]]  # [M, W] each
        near, far = a0[:, i, None], a1[:, i, None]
        for j in range(columns):
            value = near * b0[:, j] * upper[:, x0[:, j]] + near * b1[:, j] * upper[:, x1[:, j]]
            value = value + far * b0[:, j] * lower[:, x0[:, j]]
            total = total + (value + far * b1[:, j] * lower[:, x1[:, j]])
    return total / float(max(rows * columns, 1)) >= 0.5


def _rasterize_bitmaps_reference(
    bitmaps: Tensor, instance_idxs: Tensor, boxes: Tensor, mask_size: int, convention: str
) -> Tensor:
    masks = torch.zeros((boxes.shape[0], mask_size, mask_size), dtype=torch.uint8, device=boxes.device)
    if bitmaps.numel() == 0:
        return masks
    present = _present(instance_idxs, boxes).tolist()
    rule = _roi_align if convention == "detectron2" else _crop_and_resize
    for mask, instance, box, here in zip(masks, instance_idxs.tolist(), boxes, present, strict=True):
        if here:
            mask.copy_(rule(bitmaps[min(instance, bitmaps.shape[0] - 1)], box, mask_size))
    return masks


def _present(instance_idxs: Tensor, boxes: Tensor) -> Tensor:
    """Regions that have an instance and a finite box of positive, bounded extent. bool [K]"""
    extent = boxes[:, 2:] - boxes[:, :2]
    bounded = (boxes.abs() < COORDINATE_LIMIT).all(dim=1)  # a NaN is not
    return (instance_idxs >= 0) & bounded & (extent > 0).all(dim=1)


def _rasterize_bitmaps_cpp(
    bitmaps: Tensor, instance_idxs: Tensor, boxes: Tensor, mask_size: int, convention: str
) -> Tensor:
    masks = torch.empty((boxes.shape[0], mask_size, mask_size), dtype=torch.uint8)
    # Held by name until the call is over: it gets their addresses only.
    bitmaps, boxes = bitmaps.contiguous(), boxes.contiguous()
    instance_idxs = instance_idxs.to(torch.int64).contiguous()
    _library.extension().rasterize_bitmaps(
        bitmaps.data_ptr(),
        bitmaps.shape[0],
        bitmaps.shape[1],
        bitmaps.shape[2],
        instance_idxs.data_ptr(),
        boxes.data_ptr(),
        boxes.shape[0],
        mask_size,
        convention == "detectron2",
        masks.data_ptr(),
        torch.get_num_threads(),
    )
    return masks


def _rasterize_bitmaps_fake(
    bitmaps: Tensor, instance_idxs: Tensor, boxes: Tensor, mask_size: int, convention: str
) -> Tensor:
    return boxes.new_empty((boxes.shape[0], mask_size, mask_size), dtype=torch.uint8)


_rasterize_bitmaps = _library.define(
    "rasterize_bitmaps(Tensor bitmaps, Tensor instance_idxs, Tensor boxes, SymInt mask_size, str convention) -> Tensor",
    reference=_rasterize_bitmaps_reference,
    cpp=_rasterize_bitmaps_cpp,
    triton="fastrcnn_kernels.triton.rasterize_bitmaps:rasterize_bitmaps",
    fake=_rasterize_bitmaps_fake,
)


def rasterize_bitmaps(
    bitmaps: Tensor,
    instance_idxs: Tensor,
    boxes: Tensor,
    mask_size: int,
    *,
    convention: str = "maskrcnn_benchmark",
) -> Tensor:
    """What the mask head shall predict for each region, of ground truth that is given as bitmaps.

    ``maskrcnn_benchmark``: ``BinaryMaskList.crop(box).resize((M, M))``, in every pixel: the crop is of whole pixels,
    the resize bilinear without antialiasing, and a pixel is set only where all that it is mixed from is set. (There the
    sum of the weights decides, which may round to just below one: single pixels inside a shape can be missing, as they
    are in its own targets.)
    ``detectron2``: ``BitMasks.crop_and_resize``: the average of the bitmap over the pixel reaches a half.
    The kernels never wait for the device. Not differentiable.

    Args:
        bitmaps: uint8 or bool [I, H, W], what is not 0 belongs to the instance; in the frame of ``boxes``.
        instance_idxs: int64 [K], the instance of each region, < I; negative: none, which gives zeros.
        boxes: float32 [K, 4], (x1, y1, x2, y2) in pixels. One without a positive extent, with a NaN or with a
            coordinate of 2^15 or more, to either side, gives zeros.
        mask_size: M, pixels a side.
        convention: ``maskrcnn_benchmark`` or ``detectron2``.

    Returns:
        uint8 [K, M, M] of 0 and 1, indexed [row, column].

    Raises:
        ValueError: for wrong shapes, dtypes, sizes or another convention.
    """
    if bitmaps.dim() != 3 or bitmaps.dtype not in (torch.uint8, torch.bool):
        raise ValueError(
            f"rasterize_bitmaps: bitmaps must be uint8 or bool [I, H, W], got {bitmaps.dtype} {tuple(bitmaps.shape)}"
        )
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"rasterize_bitmaps: boxes must be [K, 4], got shape {tuple(boxes.shape)}")
    if instance_idxs.shape != boxes.shape[:1]:
        raise ValueError(f"rasterize_bitmaps: {tuple(instance_idxs.shape)} instance_idxs for {boxes.shape[0]} boxes")
    if mask_size < 1:
        raise ValueError(f"rasterize_bitmaps: mask_size must be at least 1, got {mask_size}")
    if convention not in CONVENTIONS:
        raise ValueError(f"rasterize_bitmaps: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return _rasterize_bitmaps(bitmaps.view(torch.uint8), instance_idxs, boxes.float(), mask_size, convention)
