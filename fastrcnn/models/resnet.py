"""ResNet (He et al., 2016) as the body of a detector.

Names of parameters are maskrcnn-benchmark's: ``stem.conv1``, ``stem.bn1``, ``layer1.0.conv1`` ... ``layer4.2.bn3``,
``layerN.0.downsample.0``. Depths 50, 101 and 152 are built of bottlenecks; 18 and 34, which maskrcnn-benchmark does not
have, of basic blocks with torchvision's names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.deformable import Deformable, DeformableConv3x3
from fastrcnn.models.layers import NormFactory, conv_kaiming_uniform, conv_norm

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BASIC_DEPTHS = (18, 34)


class Stem(nn.Module):
    """7x7 convolution of stride 2, norm, ReLU, 3x3 max pooling of stride 2."""

    def __init__(self, out_channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = conv_kaiming_uniform(3, out_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(conv_norm(self.conv1, self.bn1, x, relu=True), kernel_size=3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual. ``stride_in_1x1``: the first 1x1 strides (MSRA), else the 3x3.

    With ``deformable`` the 3x3 deforms: ``conv2.offset`` and ``conv2.conv`` in the state dict.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        stride: int,
        num_groups: int,
        stride_in_1x1: bool,
        dilation: int,
        norm: NormFactory,
        deformable: Deformable | None = None,
    ) -> None:
        super().__init__()
        self.downsample = _downsample(in_channels, out_channels, stride, norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv_kaiming_uniform(in_channels, width, 1, stride=stride_1x1, bias=False)
        self.bn1 = norm(width)
        self.conv2: nn.Module
        if deformable is None:
            self.conv2 = conv_kaiming_uniform(
                width, width, 3, stride=stride_3x3, padding=dilation, dilation=dilation, groups=num_groups, bias=False
            )
        else:
            self.conv2 = DeformableConv3x3(
                width, width, deformable=deformable, stride=stride_3x3, dilation=dilation, groups=num_groups
            )
        self.bn2 = norm(width)
        self.conv3 = conv_kaiming_uniform(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, relu=True)
        out = conv_norm(self.conv2, self.bn2, out, relu=True)
        return conv_norm(self.conv3, self.bn3, out, _shortcut(self.downsample, x), relu=True)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int, norm: NormFactory) -> None:
        super().__init__()
        self.downsample = _downsample(in_channels, out_channels, stride, norm)
        self.conv1 = conv_kaiming_uniform(
            in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn1 = norm(out_channels)
        self.conv2 = conv_kaiming_uniform(
            out_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, relu=True)
        return conv_norm(self.conv2, self.bn2, out, _shortcut(self.downsample, x), relu=True)


def _downsample(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Sequential | None:
    if in_channels == out_channels and stride == 1:
        return None
    return nn.Sequential(
        conv_kaiming_uniform(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels)
    )


def _shortcut(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    return x if downsample is None else conv_norm(downsample[0], downsample[1], x)


def make_stage(
    depth: int,
    stage: int,
    in_channels: int,
    *,
    norm: NormFactory,
    num_groups: int = 1,
    width_per_group: int = 64,
    res2_out_channels: int = 256,
    stride_in_1x1: bool = True,
    dilation: int = 1,
    deformable: Deformable | None = None,
) -> tuple[nn.Sequential, int]:
    """Stage 2 to 5 of a ResNet (``layer1`` to ``layer4``) and its number of output channels.

    Basic blocks have num_groups * width_per_group output channels in stage 2, bottlenecks ``res2_out_channels``; each
    later stage doubles them. ``dilation`` 2 replaces the stride of the stage (``RES5_DILATION``). ``deformable``, for
    bottlenecks: how their 3x3 convolutions deform.

    Raises:
        ValueError: for basic blocks with ``deformable``, and where ``num_groups`` does not divide the width.
    """
    if depth in BASIC_DEPTHS and deformable is not None:
        raise ValueError(f"ResNet-{depth}: basic blocks have no deformable convolution")
    factor = 2 ** (stage - 2)
    stride = 1 if stage == 2 or dilation > 1 else 2
    width = num_groups * width_per_group * factor
    out_channels = width if depth in BASIC_DEPTHS else res2_out_channels * factor
    blocks: list[nn.Module] = []
    for index in range(BLOCKS[depth][stage - 2]):
        block_stride = stride if index == 0 else 1
        if depth in BASIC_DEPTHS:
            block: nn.Module = BasicBlock(in_channels, out_channels, stride=block_stride, dilation=dilation, norm=norm)
        else:
            block = Bottleneck(
                in_channels,
                width,
                out_channels,
                stride=block_stride,
                num_groups=num_groups,
                stride_in_1x1=stride_in_1x1,
                dilation=dilation,
                norm=norm,
                deformable=deformable,
            )
        blocks.append(block)
        in_channels = out_channels
    return nn.Sequential(*blocks), out_channels


class ResNet(nn.Module):
    """Stem and stages 2 to ``last_stage``; gives the output of each stage in ``out_stages``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        norm: makes the normalisation layer for a channel count; ``stem_norm`` that of the stem, if it is another.
        freeze_at: the stem (1) and the stages up to this number (2: also ``layer1`` ...) take no gradient; 0 or less:
            none.
        out_stages: stages 2..5 whose output is returned, in order.
        stem_out_channels, num_groups, width_per_group, res2_out_channels, stride_in_1x1, res5_dilation: as
            ``MODEL.RESNETS.*``.
        deformable, deformable_stages: the 3x3 convolutions of these stages (2 to 5) deform.

    Attributes:
        out_channels: channels of each returned feature map.
    """

    def __init__(
        self,
        depth: int,
        *,
        norm: NormFactory,
        stem_norm: NormFactory | None = None,
        freeze_at: int = 2,
        out_stages: Sequence[int] = (2, 3, 4, 5),
        stem_out_channels: int = 64,
        num_groups: int = 1,
        width_per_group: int = 64,
        res2_out_channels: int = 256,
        stride_in_1x1: bool = True,
        res5_dilation: int = 1,
        deformable: Deformable | None = None,
        deformable_stages: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.out_stages = tuple(out_stages)
        self.stages: list[int] = list(range(2, max(out_stages) + 1))
        self.stem = Stem(stem_out_channels, stem_norm or norm)
        channels, all_channels = stem_out_channels, {}
        for stage in self.stages:
            module, channels = make_stage(
                depth,
                stage,
                channels,
                norm=norm,
                num_groups=num_groups,
                width_per_group=width_per_group,
                res2_out_channels=res2_out_channels,
                stride_in_1x1=stride_in_1x1,
                dilation=res5_dilation if stage == 5 else 1,
                deformable=deformable if stage in deformable_stages else None,
            )
            all_channels[stage] = channels
            self.add_module(f"layer{stage - 1}", module)
        self.out_channels = [all_channels[stage] for stage in self.out_stages]
        self._freeze(freeze_at)

    def _freeze(self, freeze_at: int) -> None:
        names = ["stem", *(f"layer{stage - 1}" for stage in self.stages)]
        for name in names[: max(0, freeze_at)]:
            for parameter in self.get_submodule(name).parameters():
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        x = self.stem(x)
        for stage in self.stages:
            x = self.get_submodule(f"layer{stage - 1}")(x)
            if stage in self.out_stages:
                outputs.append(x)
        return outputs
