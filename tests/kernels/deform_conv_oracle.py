"""An oracle for the deformable convolution that shares nothing with the package: one sample after the other, float64.

Written from torchvision's kernels: ``bilinear_interpolate`` for the value, ``get_coordinate_weight`` for the offsets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def _pixel(image: np.ndarray, y: int, x: int) -> np.ndarray:
    inside = 0 <= y < image.shape[1] and 0 <= x < image.shape[2]
    return image[:, y, x] if inside else np.zeros(len(image))


def _interpolate(image: np.ndarray, y: float, x: float) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    """The sample of all channels, and (row, column, weight) of the pixels that it reads."""
    _, height, width = image.shape
    if y <= -1 or y >= height or x <= -1 or x >= width:
        return np.zeros(len(image)), []
    top, left = math.floor(y), math.floor(x)
    ly, lx = y - top, x - left
    taps = [
        (top, left, (1 - ly) * (1 - lx)),
        (top, left + 1, (1 - ly) * lx),
        (top + 1, left, ly * (1 - lx)),
        (top + 1, left + 1, ly * lx),
    ]
    return sum(w * _pixel(image, r, c) for r, c, w in taps), [
        tap for tap in taps if 0 <= tap[0] < height and 0 <= tap[1] < width
    ]


def _slopes(image: np.ndarray, y: float, x: float) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the sample with respect to y and x, all channels."""
    if not (abs(y) < 1e9 and abs(x) < 1e9):
        return np.zeros(len(image)), np.zeros(len(image))
    top, left = math.floor(y), math.floor(x)
    ly, lx = y - top, x - left
    a, b = _pixel(image, top, left), _pixel(image, top, left + 1)
    c, d = _pixel(image, top + 1, left), _pixel(image, top + 1, left + 1)
    return lx * (d - b) + (1 - lx) * (c - a), ly * (d - c) + (1 - ly) * (b - a)


def oracle(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, grad: Tensor,
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> list[Tensor]:  # fmt: skip
    """Output and gradients of input, offset, weight, then of mask and bias where there are such."""
    images, moved, kernels = (t.double().numpy() for t in (input, offset, weight))
    factor = None if mask is None else mask.double().numpy()
    upstream = grad.double().numpy()
    n, channels = images.shape[:2]
    out_channels, group_channels, kh, kw = kernels.shape
    oh, ow = moved.shape[2:]
    groups, offset_groups = channels // group_channels, moved.shape[1] // (2 * kh * kw)
    group_out, offset_channels = out_channels // groups, channels // offset_groups
    out = np.zeros((n, out_channels, oh, ow))
    grad_input, grad_offset, grad_weight = np.zeros(images.shape), np.zeros(moved.shape), np.zeros(kernels.shape)
    grad_mask = np.zeros((n, offset_groups * kh * kw, oh, ow))
    for b in range(n):
        for oy in range(oh):
            for ox in range(ow):
                for tap in range(kh * kw):
                    i, j = divmod(tap, kw)
                    columns, back = np.zeros(channels), np.zeros(channels)
                    for g in range(groups):
                        part = kernels[g * group_out : (g + 1) * group_out, :, i, j]
                        back[g * group_channels : (g + 1) * group_channels] = (
                            part.T @ upstream[b, g * group_out : (g + 1) * group_out, oy, ox]
                        )
                    for og in range(offset_groups):
                        own = slice(og * offset_channels, (og + 1) * offset_channels)
                        plane = og * kh * kw + tap
                        y = oy * stride[0] - padding[0] + i * dilation[0] + moved[b, 2 * plane, oy, ox]
                        x = ox * stride[1] - padding[1] + j * dilation[1] + moved[b, 2 * plane + 1, oy, ox]
                        m = 1.0 if factor is None else factor[b, plane, oy, ox]
                        value, taps = _interpolate(images[b, own], y, x)
                        columns[own] = m * value
                        for row, column, w in taps:
                            grad_input[b, own, row, column] += m * w * back[own]
                        along_y, along_x = _slopes(images[b, own], y, x)
                        grad_offset[b, 2 * plane, oy, ox] = m * (along_y * back[own]).sum()
                        grad_offset[b, 2 * plane + 1, oy, ox] = m * (along_x * back[own]).sum()
                        grad_mask[b, plane, oy, ox] = (value * back[own]).sum()
                    for g in range(groups):
                        rows = slice(g * group_out, (g + 1) * group_out)
                        part = columns[g * group_channels : (g + 1) * group_channels]
                        out[b, rows, oy, ox] += kernels[rows, :, i, j] @ part
                        grad_weight[rows, :, i, j] += np.outer(upstream[b, rows, oy, ox], part)
    if bias is not None:
        out += bias.double().numpy()[:, None, None]
    results = [out, grad_input, grad_offset, grad_weight]
    if mask is not None:
        results.append(grad_mask)
    if bias is not None:
        results.append(upstream.sum((0, 2, 3)))
    return [torch.from_numpy(np.ascontiguousarray(r)) for r in results]


@dataclass(frozen=True)
class Case:
    """One call: everything but the dtype. ``kind`` says where the offsets lead."""

    images: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int
    masked: bool
    biased: bool
    channels_last: bool
    kind: str
    seed: int

    @property
    def label(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        kernel = f"k{self.kernel[0]}x{self.kernel[1]}s{self.stride[0]}p{self.padding[0]}d{self.dilation[0]}"
        groups = f"g{self.groups}og{self.offset_groups}{'-mask' if self.masked else ''}"
        return f"{self.seed}-C{self.channels}-{self.size[0]}x{self.size[1]}-{kernel}-{groups}-{layout}-{self.kind}"

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = (
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return height, width

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Tensors in ``dtype``; offsets are such that every type holds them exactly."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        taps, (oh, ow) = self.kernel[0] * self.kernel[1], self.output_size
        spread = {"near": 1.5, "far": 8.0, "whole": 2.0, "zero": 0.0}[self.kind]
        offset = torch.randn(self.images, self.offset_groups * 2 * taps, oh, ow, generator=random, dtype=torch.float64)
        step = 1.0 if self.kind == "whole" else 16.0
        offset = (offset * spread * step).round() / step
        return {
            "input": normal(self.images, self.channels, *self.size).contiguous(memory_format=layout),
            "offset": offset.to(dtype),
            "weight": normal(self.out_channels, self.channels // self.groups, *self.kernel),
            "mask": normal(self.images, self.offset_groups * taps, oh, ow) if self.masked else None,
            "bias": normal(self.out_channels) if self.biased else None,
            "grad": normal(self.images, self.out_channels, oh, ow),
        }


def _cases() -> list[Case]:
    kinds = ["near", "far", "whole", "near", "zero"]
    kernels = [(3, 3), (1, 1), (3, 2), (2, 3)]
    sizes = [(5, 6), (4, 9), (7, 3), (1, 1), (6, 6), (2, 11)]
    groupings = [(4, 6, 1, 1), (6, 4, 2, 1), (4, 4, 1, 2), (6, 6, 2, 3), (12, 4, 4, 2), (1, 1, 1, 1), (8, 8, 4, 1)]
    cases = []
    for i in range(32):
        channels, out_channels, groups, offset_groups = groupings[i % 7]
        kernel, size = kernels[i % 4], sizes[i % 6]
        cases.append(
            Case(
                images=1 + i % 2,
                channels=channels,
                size=size,
                out_channels=out_channels,
                kernel=kernel,
                stride=(1, 1) if i % 3 else (2, 1),
                padding=(2, 1) if i % 5 == 4 else (1, 1),
                dilation=(2, 1) if i % 8 == 5 and size[0] > 2 else (1, 1),
                groups=groups,
                offset_groups=offset_groups,
                masked=i % 2 == 0,
                biased=i % 3 == 1,
                channels_last=i % 4 >= 2,
                kind=kinds[i % 5],
                seed=i,
            )
        )
    # More channels than one block of every kernel, and none of a power of two.
    cases.append(Case(1, 70, (3, 5), 35, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True, False, "near", 32))
    cases.append(Case(2, 96, (2, 3), 12, (1, 2), (1, 1), (0, 0), (1, 1), 3, 2, True, False, True, "near", 33))
    cases.append(Case(1, 3, (9, 10), 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, 1, False, False, True, "far", 34))
    return cases


CASES = _cases()
