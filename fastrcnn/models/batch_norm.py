"""Batch normalisation that is trained, also on batches of regions of which only some are real."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrcnn.models.layers import at_least_float32


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics can leave out rows of the batch.

    The heads run on a fixed number of regions an image; those behind an image's real ones are padding, and a mean over
    them would depend on how much there is. With ``valid`` the statistics in training, and the running ones, are those
    of the real rows alone: what maskrcnn-benchmark, which has no padding, computes. An empty batch, and one without a
    real row, changes no statistics.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise [N, C, H, W]; ``valid`` is bool [N], None for all. What padded rows become is finite, no more."""
        if not self.training or (valid is None and x.numel()):
            return super().forward(x)
        if valid is None or not x.numel():
            return x * self.weight[:, None, None] + self.bias[:, None, None]
        values = at_least_float32(x)
        real = valid.to(values.dtype)[:, None, None, None]
        count = real.sum() * (x.shape[2] * x.shape[3])
        divisor = count.clamp(min=1)
        mean = (values * real).sum(dim=(0, 2, 3)) / divisor
        centred = values - mean[:, None, None]
        variance = (centred.square() * real).sum(dim=(0, 2, 3)) / divisor
        self._track(mean.detach(), variance.detach() * (divisor / (count - 1).clamp(min=1)), count > 0)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, present: Tensor) -> None:
        """Move the running statistics towards these, where any row was ``present``."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        step = self.momentum * present.to(mean.dtype)
        self.running_mean += step * (mean - self.running_mean)
        self.running_var += step * (variance - self.running_var)
        self.num_batches_tracked += present
