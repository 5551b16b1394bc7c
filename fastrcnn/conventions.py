"""Every numeric choice in which detection systems differ, by name.

A :class:`Convention` says how wide a box is, where anchors lie, how a region finds its pyramid level, and so on.
Weights trained under one convention give the detections they gave at home only under the same one. ``MODEL.CONVENTION``
selects it; ``docs/conventions.md`` explains each choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """Numeric choices of one system.

    Attributes:
        name: the system.
        box_offset: 1 where boxes are inclusive pixels (width = x2 - x1 + 1), 0 where they are edges.
        anchor_style: rule of :func:`fastrcnn_kernels.cell_anchors`.
        delta_clip: upper bound of the width and height deltas before exp.
        rpn_box_beta: beta of the RPN's smooth-L1 box loss.
        box_beta: beta of the box head's smooth-L1 box loss.
        canonical_size, canonical_level: a region of this side (pixels) pools from this pyramid level.
        level_eps: added inside the logarithm of the level rule.
        roi_align_aligned: whether RoIAlign shifts regions by half a pixel (``aligned=True``).
        frozen_bn_eps: epsilon of frozen batch normalisation.
    """

    name: str
    box_offset: int
    anchor_style: str
    delta_clip: float
    rpn_box_beta: float
    box_beta: float
    canonical_size: float
    canonical_level: int
    level_eps: float
    roi_align_aligned: bool
    frozen_bn_eps: float


MASKRCNN_BENCHMARK = Convention(
    name="maskrcnn_benchmark",
    box_offset=1,
    anchor_style="maskrcnn_benchmark",
    delta_clip=math.log(1000.0 / 16),
    rpn_box_beta=1.0 / 9,
    box_beta=1.0,
    canonical_size=224.0,
    canonical_level=4,
    level_eps=1e-6,
    roi_align_aligned=False,
    frozen_bn_eps=0.0,
)

CONVENTIONS = {convention.name: convention for convention in (MASKRCNN_BENCHMARK,)}
