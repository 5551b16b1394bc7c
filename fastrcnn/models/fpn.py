"""Feature Pyramid Network (Lin et al., 2017), with maskrcnn-benchmark's names and its extra level for the RPN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.layers import NormFactory, conv_kaiming_uniform


class FPN(nn.Module):
    """Top-down pyramid over the stages of a body, and a coarsest level that subsamples the last by two.

    Args:
        in_channels: channels of the body's outputs, finest first.
        out_channels: channels of every level.
        norm: with a norm, convolutions have no bias and are followed by it (``FPN.USE_GN``).
        relu: apply ReLU after each convolution (``FPN.USE_RELU``).

    Input: feature maps of strides s, 2s, 4s ... whose sides divide exactly (pad images to 32). Output: one map of
    ``out_channels`` for each input and one more, [N, C, ceil(H/2), ceil(W/2)] of the last.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, *, norm: NormFactory | None = None, relu: bool = False
    ) -> None:
        super().__init__()
        self.num_levels = len(in_channels)
        self.out_channels = out_channels
        for level, channels in enumerate(in_channels, start=1):
            self.add_module(f"fpn_inner{level}", _conv(channels, out_channels, 1, norm, relu))
            self.add_module(f"fpn_layer{level}", _conv(out_channels, out_channels, 3, norm, relu))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        inner: Tensor | None = None
        levels: list[Tensor] = []
        for level in range(self.num_levels, 0, -1):
            lateral = self.get_submodule(f"fpn_inner{level}")(features[level - 1])
            inner = lateral if inner is None else lateral + F.interpolate(inner, scale_factor=2, mode="nearest")
            levels.append(self.get_submodule(f"fpn_layer{level}")(inner))
        levels.reverse()
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: NormFactory | None, relu: bool) -> nn.Module:
    conv = conv_kaiming_uniform(
        in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=norm is None
    )
    tail = [*([norm(out_channels)] if norm else []), *([nn.ReLU(inplace=True)] if relu else [])]
    return nn.Sequential(conv, *tail) if tail else conv


class Backbone(nn.Sequential):
    """A body and, where there is one, its pyramid: ``body`` and ``fpn`` in the state dict."""

    def __init__(self, body: nn.Module, fpn: FPN | None, out_channels: int) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict(body=body)
        if fpn is not None:
            parts["fpn"] = fpn
        super().__init__(parts)
        self.out_channels = out_channels
