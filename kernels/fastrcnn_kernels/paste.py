"""Masks pasted into images (Mask R-CNN, He et al., 2017), by the rules of maskrcnn-benchmark and of detectron2.

Both are a bilinear resize and a comparison, so that the last bit of a sum decides pixels that lie on the threshold.
The sums are therefore pinned to what PyTorch's CPU kernels compute on a processor with fused multiply-add, with
``p00 .. p11`` the four cells around a pixel, ``a0, a1`` their weights in y and ``b0, b1`` in x, in float32::

    source coordinate   fma(scale, pixel + 0.5, -0.5)         detectron2: fma(at + 1, M / 2, -0.5)
    height + width > 128    fma(fma(p00, b0, p01 * b1), a0, fma(p10, b0, p11 * b1) * a1)
    height + width <= 128   fma(p11, a1 * b1, fma(p10, a1 * b0, fma(p00, a0 * b0, p01 * (a0 * b1))))
    detectron2              fma(p11, a1 * b1, fma(p10, a1 * b0, fma(p01, a0 * b1, p00 * (a0 * b0))))

(``F.interpolate`` has two kernels; ``F.grid_sample`` is detectron2's.) Every implementation here gives the same
pixels on every device. The peers' own GPU kernels, and PyTorch without fused multiply-add, differ from this in the last
bit, that is in pixels whose value is within 1e-7 of the threshold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import _library

CONVENTIONS = ("maskrcnn_benchmark", "torchvision", "detectron2")
# F.interpolate takes another kernel up to this height + width of its result.
SMALL_SIDES = 128
# Whole-pixel boxes are saturated here, so that sizes stay integers of 32 bits.
PIXEL_LIMIT = float(1 << 30)


class _Axis(NamedTuple):
    """Where the pixels of one axis lie in a mask: the cells before and behind, and the weights of the two."""

    first: Tensor
    second: Tensor
    near: Tensor
    far: Tensor


class _Region(NamedTuple):
    """The pixels of the image that a box covers: rows ``top`` up to ``bottom``, columns ``left`` up to ``right``."""

    top: int
    bottom: int
    left: int
    right: int


def is_continuous(convention: str) -> bool:
    """Whether masks are pasted by detectron2's rule."""
    return convention == "detectron2"


def margin_of(padding: int, convention: str) -> int:
    """Cells of zeros around a mask: detectron2 samples zeros outside it, which is a margin of one."""
    return 1 if is_continuous(convention) else padding


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """``a * b + c`` rounded once: the product is exact in float64. (The sum is rounded there first, and so off by one
    in the last place once in some 5e8 times.) float32"""
    return (a.double() * b.double() + c).float()


def whole_pixel_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Boxes grown about their centres and truncated toward zero to whole pixels. float32 [K, 4] -> int64 [K, 4]"""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    grown = torch.cat([centre - half, centre + half], dim=1)
    return grown.clamp(-PIXEL_LIMIT, PIXEL_LIMIT).trunc().long()


def _whole_pixel_axis(cells: int, length: int, start: int, stop: int, device: torch.device) -> _Axis:
    """Pixels ``start`` up to ``stop`` of ``cells`` resized to ``length`` pixels (``align_corners=False``)."""
    pixel = torch.arange(start, stop, device=device)  # [n]
    if cells == length:
        one = torch.ones_like(pixel, dtype=torch.float32)
        return _Axis(pixel, pixel, one, one - 1)
    centre = pixel.float() + 0.5
    scale = torch.full_like(centre, cells) / torch.full_like(centre, length)
    source = _fma(scale, centre, -0.5).clamp(min=0.0)  # [n]
    first = source.long().clamp(max=cells - 1)
    far = (source - first.float()).clamp(0.0, 1.0)
    return _Axis(first, (first + 1).clamp(max=cells - 1), 1.0 - far, far)


def _continuous_axis(size: int, low: Tensor, high: Tensor, start: int, stop: int) -> _Axis:
    """Pixels ``start`` up to ``stop`` in a mask of ``size`` cells, with a margin of one, from ``low`` to ``high``."""
    pixel = torch.arange(start, stop, device=low.device).float() + 0.5  # [n]
    at = (pixel - low) / (high - low) * 2.0 - 1.0
    source = _fma(at + 1.0, torch.full_like(at, size / 2), -0.5)
    first = source.floor()
    inside = (first >= -1) & (first <= size - 1)
    far = torch.where(inside, source - first, 0.0)
    # Outside both cells are the margin's corner, which is zero.
    first = torch.where(inside, first + 1.0, 0.0).long()
    return _Axis(first, first + inside.long(), 1.0 - far, far)


def _blend(mask: Tensor, y: _Axis, x: _Axis, *, separable: bool, continuous: bool) -> Tensor:
    """Bilinear values of ``mask`` [P, P] at the pixels of two axes, in the pinned order. float32 [rows, columns]"""
    if separable:
        across = _fma(mask[:, x.first], x.near, (mask[:, x.second] * x.far).double())  # [P, columns]
        return _fma(across[y.first], y.near[:, None], (across[y.second] * y.far[:, None]).double())
    near = (y.near[:, None] * x.near, y.near[:, None] * x.far)  # [rows, columns] each
    far = (y.far[:, None] * x.near, y.far[:, None] * x.far)
    upper, lower = mask[y.first], mask[y.second]  # [rows, P]
    corners = [(upper[:, x.first], near[0]), (upper[:, x.second], near[1])]
    (p, a), (q, b) = corners if continuous else corners[::-1]
    value = _fma(q, b, (p * a).double())
    value = _fma(lower[:, x.first], far[0], value.double())
    return _fma(lower[:, x.second], far[1], value.double())


def _paste_one(
    mask: Tensor, box: Tensor, corners: list[int], height: int, width: int, continuous: bool
) -> tuple[_Region, Tensor] | None:
    """The region of the image that one mask [P, P], with its margin, covers, and its values there; None if none."""
    cells = mask.shape[0]
    if continuous:
        low, high = box[:2], box[2:]
        if not bool((high > low).all()):
            return None
        left, top = (low.floor() - 1).clamp(min=0).tolist()
        right, bottom = torch.minimum(high.ceil() + 1, box.new_tensor([width, height])).tolist()
        if top >= bottom or left >= right:
            return None
        region = _Region(int(top), int(bottom), int(left), int(right))
        y = _continuous_axis(cells - 2, low[1], high[1], region.top, region.bottom)
        x = _continuous_axis(cells - 2, low[0], high[0], region.left, region.right)
        return region, _blend(mask, y, x, separable=False, continuous=True)
    x1, y1, x2, y2 = corners
    region = _Region(max(y1, 0), min(y2 + 1, height), max(x1, 0), min(x2 + 1, width))
    if region.top >= region.bottom or region.left >= region.right:
        return None
    h, w = y2 - y1 + 1, x2 - x1 + 1
    y = _whole_pixel_axis(cells, h, region.top - y1, region.bottom - y1, mask.device)
    x = _whole_pixel_axis(cells, w, region.left - x1, region.right - x1, mask.device)
    return region, _blend(mask, y, x, separable=h + w > SMALL_SIDES, continuous=False)


def _paste_masks_reference(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> Tensor:
    canvas = torch.zeros((masks.shape[0], height, width), dtype=torch.uint8, device=masks.device)
    if canvas.numel() == 0:
        return canvas
    continuous, size = is_continuous(convention), masks.shape[-1]
    padded = F.pad(masks.float(), (margin_of(padding, convention),) * 4)  # [K, P, P]
    boxes = boxes.float()
    finite = torch.isfinite(boxes).all(dim=1).tolist()
    corners = whole_pixel_boxes(boxes.nan_to_num(), (size + 2 * padding) / size).tolist()
    for mask, image, box, corner, drawable in zip(padded, canvas, boxes, corners, finite, strict=True):
        found = _paste_one(mask, box, corner, height, width, continuous) if drawable else None
        if found is None:
            continue
        region, values = found
        if threshold < 0:
            pixels = (values * 255).nan_to_num(nan=0.0).clamp(0, 255).to(torch.uint8)
        else:
            pixels = (values >= threshold if continuous else values > threshold).to(torch.uint8)
        image[region.top : region.bottom, region.left : region.right] = pixels
    return canvas


def zero_pages(shape: tuple[int, ...]) -> Tensor:
    """uint8 zeros on the CPU in memory that the operating system hands out as zeros: what is never written costs
    nothing, where ``torch.zeros`` writes all of it."""
    return torch.from_numpy(np.zeros(shape, dtype=np.uint8))


def _paste_masks_cpp(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> Tensor:
    canvas = zero_pages((masks.shape[0], height, width))
    if canvas.numel() == 0:
        return canvas
    # Held by name until the call is over: it gets their addresses only.
    masks, boxes = masks.float().contiguous(), boxes.float().contiguous()
    _library.extension().paste_masks(
        masks.data_ptr(),
        boxes.data_ptr(),
        masks.shape[0],
        masks.shape[-1],
        padding,
        is_continuous(convention),
        height,
        width,
        threshold,
        canvas.data_ptr(),
        torch.get_num_threads(),
    )
    return canvas


def _paste_masks_fake(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> Tensor:
    return masks.new_empty((masks.shape[0], height, width), dtype=torch.uint8)


_paste_masks = _library.define(
    "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold, SymInt padding, "
    "str convention) -> Tensor",
    reference=_paste_masks_reference,
    cpp=_paste_masks_cpp,
    triton="fastrcnn_kernels.triton.paste:paste_masks",
    fake=_paste_masks_fake,
)


def check_paste(
    name: str,
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float,
    padding: int,
    convention: str,
) -> None:
    """The arguments that :func:`paste_masks` and ``paste_masks_rle`` have in common, or a ValueError."""
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2] or masks.shape[2] == 0 or not masks.is_floating_point():
        raise ValueError(f"{name}: masks must be floating [K, M, M], got {masks.dtype} {tuple(masks.shape)}")
    if boxes.shape != (masks.shape[0], 4):
        raise ValueError(f"{name}: boxes must be [{masks.shape[0]}, 4], got shape {tuple(boxes.shape)}")
    if boxes.device != masks.device:
        raise ValueError(f"{name}: masks are on {masks.device} but boxes on {boxes.device}")
    if padding < 0 or min(image_size) < 0:
        raise ValueError(f"{name}: padding and image_size must not be negative, got {padding}, {image_size}")
    if math.isnan(threshold):
        raise ValueError(f"{name}: threshold is NaN")
    if convention not in CONVENTIONS:
        raise ValueError(f"{name}: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    padding: int = 1,
    convention: str = "maskrcnn_benchmark",
) -> Tensor:
    """Draw masks, each predicted in the frame of its box, into images.

    ``maskrcnn_benchmark`` (its ``Masker``) and ``torchvision`` (``paste_masks_in_image``, compared with the threshold)
    are one rule: the mask gets a margin of ``padding`` zeros, its box grows about its centre by
    ``(M + 2 * padding) / M`` and is truncated toward zero to whole pixels x1 .. x2, y1 .. y2 (both inclusive); the mask
    is resized to that many pixels (bilinear, ``align_corners=False``); a pixel is set where it **exceeds** the
    threshold.

    ``detectron2`` (``paste_masks_in_image``): a pixel's centre is taken into the box as it is, and the mask sampled
    there, zeros around it; no margin, no whole pixels; a pixel is set where it **reaches** the threshold. As on its
    CPU path, what lies more than a pixel outside the box is never set.

    Memory: on a CPU the pixels of the boxes, on a GPU the result. The kernels never wait for the device. Not
    differentiable.

    Args:
        masks: probabilities, floating [K, M, M]. Computed in float32.
        boxes: [K, 4], (x1, y1, x2, y2) in pixels of the image. One with a NaN or an infinity draws nothing, nor does
            one outside the image, nor one whose x2 or y2 lies a pixel or more before x1 or y1 (``detectron2``: one
            without a positive extent).
        image_size: (height, width) of the image.
        threshold: see above. Negative: no comparison; pixels are probabilities times 255, truncated.
        padding: margin in mask pixels; ``detectron2`` has none, whatever is given.
        convention: ``maskrcnn_benchmark``, ``torchvision`` or ``detectron2``.

    Returns:
        uint8 [K, height, width] of 0 and 1 (0 to 255 for a negative threshold).

    Raises:
        ValueError: for wrong shapes, a NaN threshold or another convention.
    """
    check_paste("paste_masks", masks, boxes, image_size, threshold, padding, convention)
    height, width = int(image_size[0]), int(image_size[1])
    return _paste_masks(masks, boxes, height, width, float(threshold), padding, convention)
