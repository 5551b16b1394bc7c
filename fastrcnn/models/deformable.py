"""Deformable convolution as a layer of the residual blocks, with maskrcnn-benchmark's names and initial values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from fastrcnn.models.layers import conv_kaiming_uniform
from fastrcnn_kernels import DeformConv2d


@dataclass(frozen=True)
class Deformable:
    """How the 3x3 convolutions of a stage deform.

    Attributes:
        modulated: each sample is weighted by a mask (Deformable ConvNets v2), else it is only displaced (v1).
        groups: the input channels are divided into as many groups, each with displacements of its own.
    """

    modulated: bool = False
    groups: int = 1


class DeformableConv3x3(nn.Module):
    """A 3x3 convolution whose samples are displaced by what a convolution beside it predicts from the same input.

    ``offset`` gives, for each of the ``deformable.groups``, 18 displacements in pixels (y before x for each of the nine
    taps, row by row), and behind all of those, where the convolution is modulated, nine logits a group whose sigmoid
    weights the samples. ``conv`` holds the weight and no bias. Names, channel order and initial values are those of
    maskrcnn-benchmark's ``DFConv2d``, which is right for one group alone; more follow the same order.

    Raises:
        ValueError: where the channels do not divide into the groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        deformable: Deformable,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if in_channels % deformable.groups:
            raise ValueError(
                f"deformable convolution: {in_channels} channels do not divide into {deformable.groups} groups; "
                "choose MODEL.RESNETS.DEFORMABLE_GROUPS to fit"
            )
        self.deformable = deformable
        per_group = 27 if deformable.modulated else 18
        self.offset = conv_kaiming_uniform(
            in_channels, per_group * deformable.groups, 3, stride=stride, padding=dilation, dilation=dilation
        )
        self.conv = DeformConv2d(
            in_channels,
            out_channels,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        bound = 1 / math.sqrt(in_channels * 9)
        nn.init.uniform_(self.conv.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[N, out_channels, H', W'] for [N, in_channels, H, W]."""
        offset = self.offset(x)
        if not self.deformable.modulated:
            return self.conv(x, offset)
        displacements = 18 * self.deformable.groups
        return self.conv(x, offset[:, :displacements], offset[:, displacements:].sigmoid())
