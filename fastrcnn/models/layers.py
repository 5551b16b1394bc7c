"""Layers that the backbone and the heads share: normalisation, initialised convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn_kernels import conv2d, frozen_batch_norm

NormFactory = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are fixed buffers.

    scale = weight / sqrt(running_var + eps). maskrcnn-benchmark uses eps 0 (Caffe2 weights have the statistics folded
    in and a variance of 1); detectron2 uses 1e-5.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self._folded: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def scale_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """This layer as x * scale + shift, [C] each in ``dtype``; kept until one of the buffers changes."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        state = (dtype, *((b.device, b.data_ptr(), b._version) for b in buffers))
        if self._folded is None or self._folded[0] != state:
            with torch.no_grad():
                weight, bias, mean, var = (b.to(dtype) for b in buffers)
                scale = weight * (var + self.eps).rsqrt()
                self._folded = (state, scale, bias - mean * scale)
        return self._folded[1:]

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise; then add ``residual`` and clamp at 0 if asked to, in the same pass."""
        return frozen_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, residual=residual, relu=relu
        )

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that takes what follows it into the same operator.

    Attributes:
        fused: run :func:`fastrcnn_kernels.conv2d`; False: torch's convolution, and what follows it by itself.
    """

    fused = False

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        norm: FrozenBatchNorm2d | None = None,
    ) -> Tensor:
        """relu(norm(conv(x)) + residual)."""
        if not self.fused:
            out = super().forward(x)
            return _add_relu(out, residual, relu) if norm is None else norm(out, residual, relu)
        scale, bias = None, self.bias
        if norm is not None:
            scale, shift = norm.scale_shift(self.weight.dtype)
            bias = shift if bias is None else shift + bias * scale
        geometry: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d(x, self.weight, bias, *geometry, scale=scale, residual=residual, relu=relu)


def conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """relu(norm(conv(x)) + residual), in one operator where both layers can."""
    if isinstance(norm, FrozenBatchNorm2d):
        return conv(x, residual, relu, norm) if isinstance(conv, Conv2d) else norm(conv(x), residual, relu)
    return _add_relu(norm(conv(x)), residual, relu)


def _add_relu(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        out += residual
    return F.relu_(out) if relu else out


def group_norm_factory(num_groups: int = 32, dim_per_group: int = -1, eps: float = 1e-5) -> NormFactory:
    """GroupNorm (Wu & He, 2018) for a channel count: ``num_groups`` groups, or groups of ``dim_per_group`` channels."""

    def make(channels: int) -> nn.Module:
        groups = channels // dim_per_group if dim_per_group > 0 else num_groups
        if groups < 1 or channels % groups:
            raise ValueError(
                f"GroupNorm: {channels} channels do not divide into {groups} groups; "
                "choose MODEL.GROUP_NORM.NUM_GROUPS or DIM_PER_GP to fit"
            )
        return nn.GroupNorm(groups, channels, eps)

    return make


def frozen_batch_norm_factory(eps: float = 0.0) -> NormFactory:
    return lambda channels: FrozenBatchNorm2d(channels, eps)


def conv_kaiming_uniform(in_channels: int, out_channels: int, kernel_size: int, **kwargs: int | bool) -> Conv2d:
    """A convolution initialised as Caffe2's XavierFill: kaiming_uniform(a=1), zero bias."""
    conv = Conv2d(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def conv_kaiming_normal(in_channels: int, out_channels: int, kernel_size: int, **kwargs: int | bool) -> Conv2d:
    """A convolution initialised as Caffe2's MSRAFill: kaiming_normal(fan_out, relu), zero bias."""
    conv = Conv2d(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def make_fc(in_features: int, out_features: int, norm: NormFactory | None = None) -> nn.Module:
    """A linear layer initialised with kaiming_uniform(a=1); with a norm: no bias, then the norm."""
    fc = nn.Linear(in_features, out_features, bias=norm is None)
    nn.init.kaiming_uniform_(fc.weight, a=1)
    if norm is None:
        nn.init.zeros_(fc.bias)
        return fc
    return nn.Sequential(fc, norm(out_features))


def normal_init(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def at_least_float32(x: Tensor) -> Tensor:
    """Losses and boxes are computed in float32, or in float64 where the model runs in it."""
    return x if x.dtype == torch.float64 else x.float()
