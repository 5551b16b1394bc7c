"""RoIAlign over a pyramid for the heads: one launch for all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.conventions import Convention


class Pooler(nn.Module):
    """Pools each region from the level that fits its size.

    Args:
        resolution: side of the pooled square.
        scales: feature pixels an input pixel of each level, powers of two, finest first.
        sampling_ratio: samples along each side of a bin; 0: as many as the bin has pixels.
    """

    def __init__(self, resolution: int, scales: Sequence[float], sampling_ratio: int, convention: Convention) -> None:
        super().__init__()
        self.resolution, self.sampling_ratio = resolution, sampling_ratio
        self.scales = [float(scale) for scale in scales]
        self.convention = convention
        # A scale of 1 / 2^k is level k.
        levels = torch.tensor(self.scales, dtype=torch.float64).log2().neg().round().long().tolist()
        self.min_level, self.max_level = levels[0], levels[-1]

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, C, resolution, resolution] for rois [K, 5] (image, x1, y1, x2, y2); zeros where image is negative.

        ``features``: the levels that ``scales`` names, each [N, C, H_l, W_l]; later ones are not used.
        """
        levels = kernels.assign_levels(
            rois[:, 1:],
            min_level=self.min_level,
            max_level=self.max_level,
            canonical_size=self.convention.canonical_size,
            canonical_level=self.convention.canonical_level,
            eps=self.convention.level_eps,
            eps_outside=self.convention.level_eps_outside,
            box_offset=self.convention.box_offset,
        )
        return kernels.multiscale_roi_align(
            list(features[: len(self.scales)]),
            rois,
            levels,
            self.resolution,
            self.scales,
            self.sampling_ratio,
            self.convention.roi_align_aligned,
        )

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, scales={self.scales}, sampling_ratio={self.sampling_ratio}"


def to_rois(boxes: Tensor, valid: Tensor) -> Tensor:
    """Boxes [N, R, 4] as rois [N * R, 5] with the image's index in front; -1 where not ``valid`` [N, R]."""
    image = torch.arange(len(boxes), device=boxes.device)[:, None]
    image = torch.where(valid, image, -1).to(boxes.dtype)
    return torch.cat([image[..., None], boxes], dim=-1).flatten(0, 1)
