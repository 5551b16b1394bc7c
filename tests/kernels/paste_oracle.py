"""The peers' pasting written out, the definition in float64 loops, and masks and boxes to try them on."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH = 61, 83


def paste_by_maskrcnn_benchmark(mask: Tensor, box: Tensor, im_h: int, im_w: int, thresh: float, padding: int) -> Tensor:
    """``paste_mask_in_image`` of ``modeling/roi_heads/mask_head/inference.py``, written out for one mask."""
    size = mask.shape[-1]
    padded = torch.zeros(size + 2 * padding, size + 2 * padding)
    padded[padding : padding + size, padding : padding + size] = mask
    scale = float(size + 2 * padding) / size
    w_half, h_half = (box[2] - box[0]) * 0.5, (box[3] - box[1]) * 0.5
    x_c, y_c = (box[2] + box[0]) * 0.5, (box[3] + box[1]) * 0.5
    w_half, h_half = w_half * scale, h_half * scale
    b = torch.stack([x_c - w_half, y_c - h_half, x_c + w_half, y_c + h_half]).to(torch.int32).tolist()
    w, h = max(b[2] - b[0] + 1, 1), max(b[3] - b[1] + 1, 1)
    values = F.interpolate(padded[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
    values = values > thresh if thresh >= 0 else (values * 255).to(torch.uint8)
    out = torch.zeros((im_h, im_w), dtype=torch.uint8)
    x_0, x_1 = max(b[0], 0), min(b[2] + 1, im_w)
    y_0, y_1 = max(b[1], 0), min(b[3] + 1, im_h)
    if x_0 < x_1 and y_0 < y_1:
        out[y_0:y_1, x_0:x_1] = values[y_0 - b[1] : y_1 - b[1], x_0 - b[0] : x_1 - b[0]]
    return out


def paste_by_detectron2(mask: Tensor, box: Tensor, im_h: int, im_w: int, thresh: float) -> Tensor:
    """``_do_paste_mask`` of ``detectron2/layers/mask_ops.py`` for one mask on a CPU."""
    x0, y0, x1, y1 = box.tolist()
    left, top = max(math.floor(x0) - 1, 0), max(math.floor(y0) - 1, 0)
    right, bottom = min(math.ceil(x1) + 1, im_w), min(math.ceil(y1) + 1, im_h)
    out = torch.zeros((im_h, im_w), dtype=torch.uint8)
    if not (x1 > x0 and y1 > y0 and left < right and top < bottom):
        return out
    img_y = torch.arange(top, bottom, dtype=torch.float32) + 0.5
    img_x = torch.arange(left, right, dtype=torch.float32) + 0.5
    img_y = (img_y - box[1]) / (box[3] - box[1]) * 2 - 1
    img_x = (img_x - box[0]) / (box[2] - box[0]) * 2 - 1
    grid = torch.stack([img_x[None, :].expand(len(img_y), -1), img_y[:, None].expand(-1, len(img_x))], dim=2)
    values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
    out[top:bottom, left:right] = values >= thresh if thresh >= 0 else (values * 255).to(torch.uint8)
    return out


def paste_by_loops(mask: Tensor, box: list[float], im_h: int, im_w: int, padding: int) -> np.ndarray:
    """Resized probabilities in float64, pixel by pixel, from the definition; nothing of PyTorch's."""
    size = mask.shape[-1]
    source = np.pad(mask.double().numpy(), padding)
    scale = (size + 2 * padding) / size
    centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    half = [(box[2] - box[0]) / 2 * scale, (box[3] - box[1]) / 2 * scale]
    x1, y1, x2, y2 = (
        int(v) for v in (centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1])
    )

    def taps(position: int, length: int) -> list[tuple[int, float]]:
        at = max((position + 0.5) * len(source) / length - 0.5, 0.0)
        first = int(at)
        return [(first, 1 - (at - first)), (min(first + 1, len(source) - 1), at - first)]

    out = np.zeros((im_h, im_w))
    for y in range(max(y1, 0), min(y2 + 1, im_h)):
        for x in range(max(x1, 0), min(x2 + 1, im_w)):
            for row, weight_y in taps(y - y1, y2 - y1 + 1):
                for column, weight_x in taps(x - x1, x2 - x1 + 1):
                    out[y, x] += weight_y * weight_x * source[row, column]
    return out


def continuous_by_loops(mask: Tensor, box: list[float], im_h: int, im_w: int) -> np.ndarray:
    """detectron2's rule in float64, pixel by pixel; what lies more than a pixel outside the box is left out."""
    size = mask.shape[-1]
    source = np.pad(mask.double().numpy(), 1)
    x0, y0, x1, y1 = box

    def taps(pixel: int, low: float, high: float) -> list[tuple[int, float]]:
        at = (pixel + 0.5 - low) / (high - low) * size - 0.5
        first = math.floor(at)
        both = [(first, 1 - (at - first)), (first + 1, at - first)]
        return [(cell + 1, weight) for cell, weight in both if -1 <= cell <= size]

    out = np.zeros((im_h, im_w))
    if x1 > x0 and y1 > y0:
        for y in range(max(math.floor(y0) - 1, 0), min(math.ceil(y1) + 1, im_h)):
            for x in range(max(math.floor(x0) - 1, 0), min(math.ceil(x1) + 1, im_w)):
                for row, weight_y in taps(y, y0, y1):
                    for column, weight_x in taps(x, x0, x1):
                        out[y, x] += weight_y * weight_x * source[row, column]
    return out


def smooth_masks(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)[:, 0]


def random_boxes(count: int, seed: int) -> Tensor:
    """Of all sizes, inside and sticking out on every side, fractional and whole, of one pixel, inverted, far away."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH + 40.0, HEIGHT + 40.0]) - 20
    extent = torch.rand(count, 2, generator=generator) ** 2 * 70
    boxes = torch.cat([corner, corner + extent], dim=1)
    boxes[::4] = boxes[::4].round()
    boxes[1::10, 2:] = boxes[1::10, :2]
    boxes[3::20, 2:] = boxes[3::20, :2] - 1.5
    boxes[5::20] += 500
    return boxes
