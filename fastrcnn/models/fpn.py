"""Feature Pyramid Network (Lin et al., 2017), with maskrcnn-benchmark's names and its extra levels on top."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.layers import Conv2d, NormFactory, conv_kaiming_uniform


class LastLevelP6P7(nn.Module):
    """Levels 6 and 7 of RetinaNet: 3x3 convolutions of stride 2, the second on the ReLU of the first.

    Args:
        in_channels: of the map that level 6 is made from.
        out_channels: of both levels.
        from_c5: make level 6 from the body's last output (``RETINANET.USE_C5``), else from the pyramid's.
    """

    def __init__(self, in_channels: int, out_channels: int, *, from_c5: bool) -> None:
        super().__init__()
        self.from_c5 = from_c5
        self.p6 = conv_kaiming_uniform(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = conv_kaiming_uniform(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5 if self.from_c5 else p5)
        return [p6, self.p7(F.relu(p6))]


class FPN(nn.Module):
    """Top-down pyramid over the stages of a body, and coarser levels on top of it.

    Args:
        in_channels: channels of the body's outputs, finest first.
        out_channels: channels of every level.
        norm: with a norm, convolutions have no bias and are followed by it (``FPN.USE_GN``).
        relu: apply ReLU after each convolution (``FPN.USE_RELU``).
        first_level: number of the finest level in the names of the parameters: 1 for stage 2 of a ResNet
            (``fpn_inner1``), 2 for a pyramid that starts at stage 3.
        top_blocks: makes the coarser levels; None: one, every second pixel of the last.

    Input: feature maps of strides s, 2s, 4s ... whose sides divide exactly (pad images to 32). Output: one map of
    ``out_channels`` for each input and those of ``top_blocks``, [N, C, ceil(H/2), ceil(W/2)] of the level before.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        norm: NormFactory | None = None,
        relu: bool = False,
        first_level: int = 1,
        top_blocks: LastLevelP6P7 | None = None,
    ) -> None:
        super().__init__()
        self.levels = range(first_level, first_level + len(in_channels))
        self.out_channels = out_channels
        for level, channels in zip(self.levels, in_channels, strict=True):
            self.add_module(f"fpn_inner{level}", _conv(channels, out_channels, 1, norm, relu))
            self.add_module(f"fpn_layer{level}", _conv(out_channels, out_channels, 3, norm, relu))
        self.top_blocks = top_blocks

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        inner: Tensor | None = None
        maps: list[Tensor] = []
        for level, feature in zip(reversed(self.levels), reversed(features), strict=True):
            above = None if inner is None else F.interpolate(inner, scale_factor=2, mode="nearest")
            lateral = self.get_submodule(f"fpn_inner{level}")
            if isinstance(lateral, Conv2d):
                inner = lateral(feature, above)
            else:
                inner = lateral(feature) if above is None else lateral(feature) + above
            maps.append(self.get_submodule(f"fpn_layer{level}")(inner))
        maps.reverse()
        if self.top_blocks is not None:
            return [*maps, *self.top_blocks(features[-1], maps[-1])]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


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
