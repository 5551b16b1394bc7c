"""An oracle for RoIAlign that shares nothing with the package: one sample after the other, in double precision.

Written from the published operator (maskrcnn-benchmark, torchvision), not from ours: samples are neither merged nor
factored over the axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def sample_taps(y: float, x: float, height: int, width: int) -> list[tuple[int, int, float]]:
    """(row, column, weight) of the four pixels of one bilinear sample; none if it lies outside."""
    if y < -1 or y > height or x < -1 or x > width:
        return []
    y, x = max(y, 0.0), max(x, 0.0)
    y_low, x_low = int(y), int(x)
    if y_low >= height - 1:
        y_low = y_high = height - 1
        y = float(y_low)
    else:
        y_high = y_low + 1
    if x_low >= width - 1:
        x_low = x_high = width - 1
        x = float(x_low)
    else:
        x_high = x_low + 1
    ly, lx = y - y_low, x - x_low
    hy, hx = 1 - ly, 1 - lx
    return [(y_low, x_low, hy * hx), (y_low, x_high, hy * lx), (y_high, x_low, ly * hx), (y_high, x_high, ly * lx)]


def bin_taps(
    box: list[float], scale: float, height: int, width: int, ph: int, pw: int, ratio: int, aligned: bool
) -> dict[tuple[int, int], list[tuple[int, int, float]]]:
    """What each bin of one region reads, weights divided by the number of samples."""
    offset = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (value * scale - offset for value in box)
    roi_width, roi_height = x2 - x1, y2 - y1
    if not aligned:
        roi_width, roi_height = max(roi_width, 1.0), max(roi_height, 1.0)
    bin_height, bin_width = roi_height / ph, roi_width / pw
    grid_h = ratio if ratio > 0 else math.ceil(bin_height)
    grid_w = ratio if ratio > 0 else math.ceil(bin_width)
    count = max(grid_h * grid_w, 1)
    bins: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for i in range(ph):
        for j in range(pw):
            taps = []
            for iy in range(grid_h):
                y = y1 + i * bin_height + (iy + 0.5) * bin_height / grid_h
                for ix in range(grid_w):
                    x = x1 + j * bin_width + (ix + 0.5) * bin_width / grid_w
                    taps += [(r, c, w / count) for r, c, w in sample_taps(y, x, height, width)]
            bins[i, j] = taps
    return bins


def oracle(
    features: list[Tensor], rois: Tensor, levels: Tensor, size: tuple[int, int], scales: list[float], ratio: int,
    aligned: bool, grad: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The pooled regions and the gradient of each feature map, in float64."""
    maps = [f.detach().double().numpy() for f in features]
    upstream = grad.double().numpy()
    pooled = np.zeros((len(rois), maps[0].shape[1], *size))
    grads = [np.zeros(m.shape) for m in maps]
    for k, (roi, level) in enumerate(zip(rois.double().tolist(), levels.tolist(), strict=True)):
        if roi[0] < 0 or not all(math.isfinite(value) for value in roi):
            continue
        image = int(roi[0])
        height, width = maps[level].shape[2:]
        for (i, j), taps in bin_taps(roi[1:], scales[level], height, width, *size, ratio, aligned).items():
            for row, column, weight in taps:
                if weight:
                    pooled[k, :, i, j] += weight * maps[level][image, :, row, column]
                    grads[level][image, :, row, column] += weight * upstream[k, :, i, j]
    return [torch.from_numpy(pooled), *(torch.from_numpy(g) for g in grads)]


@dataclass(frozen=True)
class Case:
    """One call: everything but the dtype. ``boxes`` names what is added to the random boxes."""

    images: int
    channels: int
    maps: tuple[tuple[int, int], ...]
    rois: int
    size: tuple[int, int]
    ratio: int
    aligned: bool
    channels_last: bool
    boxes: str
    seed: int

    @property
    def label(self) -> str:
        maps = "+".join(f"{h}x{w}" for h, w in self.maps)
        layout = "nhwc" if self.channels_last else "nchw"
        aligned = "aligned" if self.aligned else "legacy"
        return (
            f"N{self.images}-C{self.channels}-{maps}-K{self.rois}-{self.size[0]}x{self.size[1]}-r{self.ratio}-{aligned}-"
            f"{layout}-{self.boxes}"
        )

    @property
    def output_is_channels_last(self) -> bool:
        """Maps of one pixel, one channel or none at all are of both formats: then NCHW."""
        return self.channels_last and self.images > 0 and self.channels > 1 and any(h * w > 1 for h, w in self.maps)

    def inputs(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, list[float], Tensor]:
        """Features, rois, levels, scales and an upstream gradient. Rois are float32, double for double features."""
        random = torch.Generator().manual_seed(self.seed)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        features = [
            torch.randn(self.images, self.channels, h, w, generator=random, dtype=torch.float64)
            .to(dtype)
            .contiguous(memory_format=layout)
            for h, w in self.maps
        ]
        scales = [0.5 / 2**level for level in range(len(self.maps))]
        levels = torch.randint(len(self.maps), (self.rois,), generator=random)
        boxes = random_boxes(self.boxes, self.rois, levels, self.maps, scales, random)
        image = torch.arange(self.rois) % max(1, self.images)
        if self.boxes == "padding":
            image = torch.where(torch.arange(self.rois) % 2 == 0, -1, image)
        rois = torch.cat([image[:, None].double(), boxes], 1)
        if self.boxes == "not-finite" and self.rois:
            rois[0, 1], rois[self.rois // 2, 4] = math.nan, math.inf
        grad = torch.randn(self.rois, self.channels, *self.size, generator=random, dtype=torch.float64).to(dtype)
        # Coordinates that float32 holds, so that the oracle's are the same.
        rois = rois.float().to(torch.float64 if dtype == torch.float64 else torch.float32)
        return features, rois, levels, scales, grad


def random_boxes(
    kind: str,
    count: int,
    levels: Tensor,
    maps: tuple[tuple[int, int], ...],
    scales: list[float],
    random: torch.Generator,
) -> Tensor:
    """Boxes in input pixels about the map of their level."""
    extent = torch.tensor([[w / s, h / s] for (h, w), s in zip(maps, scales, strict=True)])[levels].double()
    centre = torch.rand(count, 2, generator=random, dtype=torch.float64) * extent
    side = torch.exp(torch.randn(count, 2, generator=random, dtype=torch.float64) * 0.6 - 1) * extent
    if kind == "outside":
        centre = centre * 3 - extent
    elif kind == "large":
        side = side * 4 + extent
    elif kind == "tiny":
        side = side * 0.01
    elif kind == "negative":
        side = -side
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
    if kind == "integer":  # samples exactly on pixels, edges exactly on the border
        boxes = (boxes / 4).round() * 4
    return boxes


def _cases() -> list[Case]:
    kinds = ["random", "outside", "large", "tiny", "negative", "integer", "padding", "not-finite"]
    maps: list[tuple[tuple[int, int], ...]] = [
        ((16, 16),),
        ((9, 23),),
        ((13, 7), (5, 4)),
        ((1, 1),),
        ((17, 19), (9, 10), (5, 5), (3, 3)),
        ((2, 30), (1, 16)),
        ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1)),
    ]
    sizes = [(7, 7), (3, 2), (1, 1), (2, 9), (8, 4), (14, 14)]
    channels = [3, 16, 1, 33, 5]
    rois = [4, 7, 1, 5, 2]
    cases = []
    for i in range(36):
        size = sizes[i % 6]
        cases.append(
            Case(
                images=1 + i % 2,
                channels=channels[i % 5],
                maps=maps[i % 7],
                # No more than 64 programs in the interpreter.
                rois=min(rois[i % 5], 56 // size[0]),
                size=size,
                ratio=(2, 0, 1, 2, 3)[i % 5],
                aligned=i % 3 == 1,
                channels_last=i % 4 >= 2,
                boxes=kinds[i % 8],
                seed=i,
            )
        )
    base = cases[0]
    cases.append(Case(2, 4, base.maps, 0, (7, 7), 2, False, False, "random", 100))
    cases.append(Case(2, 0, base.maps, 3, (7, 7), 2, False, False, "random", 101))
    cases.append(Case(0, 4, base.maps, 0, (7, 7), 0, True, True, "random", 102))
    # More channels than one block, a map wider than the vectors of the C++ kernels, and many regions of one image.
    cases.append(Case(1, 70, ((6, 40),), 3, (2, 2), 2, False, True, "random", 103))
    cases.append(Case(1, 2, ((8, 50),), 8, (5, 7), 2, False, False, "large", 104))
    return cases


CASES = _cases()
