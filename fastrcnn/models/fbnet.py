"""FBNet as the parts of a detector: body, head of the region proposal network, feature extractors of the heads.

Names are maskrcnn-benchmark's: ``backbone.body.first``, ``backbone.body.stages.xif0_0.pw.conv``, ``rpn.head.0.head``,
``rpn.head.1.cls_logits``, ``roi_heads.box.feature_extractor.head.blocks``. Which blocks a part is made of comes from
:meth:`fastrcnn.models.fbnet_archs.Architecture.part`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from fastrcnn.models.fbnet_archs import Block
from fastrcnn.models.fbnet_blocks import BlockStyle, ConvNorm, ConvNorms, make_blocks, side_behind
from fastrcnn.models.layers import Conv2d, normal_init
from fastrcnn.models.pooler import Pooler

Blocks = Sequence[tuple[int, int, Block]]


class FBNetBody(nn.Module):
    """The first convolution and the blocks of the body; gives one feature map.

    Args:
        first: (channels, stride, kernel size) of the first convolution.
    """

    def __init__(self, first: tuple[int, int, int], blocks: Blocks, style: BlockStyle) -> None:
        super().__init__()
        channels, stride, kernel = first
        channels = style.scaled(channels)
        self.first = ConvNorm(3, channels, kernel, stride=stride, norm=style.norm)
        self.stages, self.out_channels = make_blocks(blocks, channels, style)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stages(self.first(x))]


class FBNetRPNFeatures(nn.Module):
    """The blocks of the region proposal network, on each level."""

    def __init__(self, blocks: Blocks, in_channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.head, self.out_channels = make_blocks(blocks, in_channels, style)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [self.head(feature) for feature in features]


class RPNRegressor(nn.Module):
    """1x1 convolutions to one objectness and four deltas an anchor, on each level."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.cls_logits = Conv2d(in_channels, num_anchors, 1)
        self.bbox_pred = Conv2d(in_channels, num_anchors * 4, 1)
        for layer in (self.cls_logits, self.bbox_pred):
            normal_init(layer, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits [N, A, H, W] and deltas [N, 4A, H, W]."""
        return [self.cls_logits(f) for f in features], [self.bbox_pred(f) for f in features]


class FBNetFeatureExtractor(nn.Module):
    """Pooled features through blocks and, perhaps, a 1x1 convolution: the box, mask or keypoint head's.

    Args:
        last, last_scale: channels of that convolution: ``last * last_scale``; for a negative scale that many times the
            channels in front of it. Where this makes 0, as it does with every named architecture and a positive scale,
            there is none.

    Attributes:
        out_channels: channels of what it gives.
        out_resolution: its side.
    """

    def __init__(
        self, blocks: Blocks, in_channels: int, pooler: Pooler, style: BlockStyle, *, last: int, last_scale: float
    ) -> None:
        super().__init__()
        self.pooler = pooler
        stack, channels = make_blocks(blocks, in_channels, style)
        width = style.width(_last_width(last, last_scale, channels, style.scale))
        behind: nn.Module = ConvNorms()
        if width:
            behind, channels = ConvNorm(channels, width, 1, norm=style.norm), width
        self.head = ConvNorms(OrderedDict(blocks=stack, last=behind))
        self.out_channels = channels
        self.out_resolution = side_behind(blocks, pooler.resolution)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """[K, out_channels, out_resolution, out_resolution] for rois [K, 5]; absent ones do not count in statistics."""
        return self.head(self.pooler(features, rois), rois[:, 0] >= 0)


def _last_width(last: int, scale: float, channels: int, width_scale: float) -> int:
    if scale < 0:
        return int(channels * -scale)
    # the widths of an architecture are the smallest that its last layer has
    return int(int(last * max(1.0, width_scale)) * scale)
