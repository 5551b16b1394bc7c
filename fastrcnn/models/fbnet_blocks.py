"""The blocks that FBNet architectures are made of; maskrcnn-benchmark's names: ``pw``, ``dw``, ``pwl``, ``se4``."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.batch_norm import BatchNorm2d
from fastrcnn.models.fbnet_archs import Block, Stride
from fastrcnn.models.layers import NormFactory, conv_kaiming_normal


@dataclass(frozen=True)
class BlockKind:
    """What a name of an inverted residual block stands for.

    Attributes:
        kernel: side of the depthwise convolution; 1: there is none.
        expansion: replaces the one that the architecture gives.
        groups: of both 1x1 convolutions; above 1 the channels are shuffled between them.
        squeeze_excitation: the output is weighted by channel.
        twice: two depthwise convolutions.
    """

    kernel: int = 3
    expansion: int | None = None
    groups: int = 1
    squeeze_excitation: bool = False
    twice: bool = False


_SEARCHED = {
    **{f"ir_k{k}_e{e}": BlockKind(k, e) for k in (3, 5) for e in (1, 3, 6)},
    **{f"ir_k{k}_s4": BlockKind(k, 4, groups=4) for k in (3, 5)},
    **{f"ir_k{k}_s2": BlockKind(k, 1, groups=2) for k in (3, 5)},
}
BLOCK_KINDS = {
    **{f"ir_k{k}": BlockKind(k) for k in (1, 3, 5, 7)},
    "shuffle": BlockKind(groups=4),
    **_SEARCHED,
    **{f"{name}_se": BlockKind(k.kernel, k.expansion, k.groups, True) for name, k in _SEARCHED.items()},
    **{f"ir_k{k}_sep": BlockKind(k, twice=True) for k in (3, 7)},
    **{f"ir_k33_e{e}": BlockKind(3, e, twice=True) for e in (1, 3, 6)},
    **{f"ir_k7_e{e}": BlockKind(7, e) for e in (1, 3, 6)},
    **{f"ir_k7_sep_e{e}": BlockKind(7, e, twice=True) for e in (1, 3, 6)},
}


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of a part have in common (``MODEL.FBNET.*``).

    Attributes:
        norm: makes the normalisation of a channel count.
        scale: factor on all widths (``SCALE_FACTOR``).
        width_divisor: widths are multiples of it.
        depthwise_norm, depthwise_relu: whether they follow the (last) depthwise convolution.
    """

    norm: NormFactory
    scale: float = 1.0
    width_divisor: int = 1
    depthwise_norm: bool = False
    depthwise_relu: bool = False

    def width(self, channels: float) -> int:
        """``channels`` to the nearest multiple of the divisor, halves upwards; the divisor's square if that is 0."""
        whole = int(channels)
        if whole % self.width_divisor == 0:
            return whole
        return (math.floor(whole / self.width_divisor + 0.5) or self.width_divisor) * self.width_divisor

    def scaled(self, channels: int) -> int:
        return self.width(int(channels * self.scale))


class ConvNorm(nn.Module):
    """Convolution without bias, norm (``bn``), ReLU; either of the last two may be absent."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: NormFactory | None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = conv_kaiming_normal(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = norm(out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid``, bool [N]: the rows that count for the statistics of a trained norm; None: all."""
        x = self.conv(x)
        if isinstance(self.bn, BatchNorm2d):
            x = self.bn(x, valid)
        elif self.bn is not None:
            x = self.bn(x)
        return F.relu_(x) if self.relu else x


class ConvNorms(nn.Sequential):
    """Layers that take the real rows beside their input, one after the other; none is the identity."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        for module in self:
            x = module(x, valid)
        return x


class SqueezeExcitation(nn.Module):
    """Weights each channel by what a small network makes of the channels' means (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 4, 8)
        self.op = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.op(x)


class InvertedResidual(nn.Module):
    """1x1 to many channels, depthwise, 1x1 back (without ReLU), and a residual where the shape stays the same.

    A negative stride enlarges the map, nearest neighbour, before the depthwise convolution.

    Raises:
        ValueError: a kind of block or a stride that there is none of, or channels that do not divide into the groups.
    """

    def __init__(self, in_channels: int, block: Block, style: BlockStyle) -> None:
        super().__init__()
        if block.kind not in BLOCK_KINDS:
            raise ValueError(f"FBNet: unknown block {block.kind!r}; the blocks are {', '.join(BLOCK_KINDS)}")
        kind = BLOCK_KINDS[block.kind]
        self.enlarge, stride = _split_stride(block.stride)
        self.out_channels = style.scaled(block.channels)
        hidden = style.width(in_channels * (kind.expansion or block.expansion))
        for channels in (in_channels, hidden, self.out_channels):
            if channels % kind.groups:
                raise ValueError(f"FBNet: block {block.kind} cannot divide {channels} channels into {kind.groups}")
        self.groups = kind.groups
        self.has_residual = block.stride == 1 and in_channels == self.out_channels
        self.pw = ConvNorm(in_channels, hidden, 1, groups=kind.groups, norm=style.norm)
        self.dw = _depthwise(hidden, kind, stride, style)
        self.pwl = ConvNorm(hidden, self.out_channels, 1, groups=kind.groups, norm=style.norm, relu=False)
        self.se4 = SqueezeExcitation(self.out_channels) if kind.squeeze_excitation else nn.Sequential()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        out = self.pw(x, valid)
        if self.groups > 1:
            out = F.channel_shuffle(out, self.groups)
        if self.enlarge != (1, 1):
            out = F.interpolate(out, scale_factor=tuple(float(factor) for factor in self.enlarge), mode="nearest")
        out = self.pwl(self.dw(out, valid), valid)
        if self.has_residual:
            out = out + x
        return self.se4(out)


def _depthwise(channels: int, kind: BlockKind, stride: int, style: BlockStyle) -> nn.Module:
    if kind.kernel == 1:
        return ConvNorms()
    last = {"norm": style.norm if style.depthwise_norm else None, "relu": style.depthwise_relu}
    if not kind.twice:
        return ConvNorm(channels, channels, kind.kernel, stride=stride, groups=channels, **last)  # type: ignore[arg-type]
    first = ConvNorm(channels, channels, kind.kernel, stride=stride, groups=channels, norm=style.norm)
    second = ConvNorm(channels, channels, kind.kernel, groups=channels, **last)  # type: ignore[arg-type]
    return ConvNorms(OrderedDict(dw1=first, dw2=second))


def _split_stride(stride: Stride) -> tuple[tuple[int, int], int]:
    """(factors that the height and width are enlarged by, stride of the convolution behind)."""
    sides = stride if isinstance(stride, tuple) else (stride, stride)
    if all(side in (-1, -2, -4) for side in sides):
        return (-sides[0], -sides[1]), 1
    if isinstance(stride, tuple) or stride not in (1, 2, 4):
        raise ValueError(f"FBNet: stride {stride} is none of 1, 2, 4, -1, -2, -4")
    return (1, 1), stride


def make_blocks(blocks: Sequence[tuple[int, int, Block]], in_channels: int, style: BlockStyle) -> tuple[ConvNorms, int]:
    """The blocks of a part as ``xif<stage>_<index>``, and their number of output channels."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, index, block in blocks:
        module = InvertedResidual(in_channels, block, style)
        modules[f"xif{stage}_{index}"] = module
        in_channels = module.out_channels
    return ConvNorms(modules), in_channels


def side_behind(blocks: Sequence[tuple[int, int, Block]], side: int) -> int:
    """What the blocks make of the side of a square map."""
    for _, _, block in blocks:
        (factor, _), stride = _split_stride(block.stride)
        kernel = BLOCK_KINDS[block.kind].kernel if block.kind in BLOCK_KINDS else 3
        side = side * factor if kernel == 1 else (side * factor - 1) // stride + 1
    return side
