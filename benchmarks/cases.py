"""The inputs that the operator benchmarks share: the shapes of an R50-FPN step at 800 x 1333, and small ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import SMALL

WIDTH, HEIGHT = 1333, 800


@dataclass(frozen=True)
class NmsCase:
    """One call of an NMS function.

    Attributes:
        function: ``nms``, ``batched_nms`` or ``nms_padded``.
        boxes: boxes in a list (a segment for ``nms_padded``).
        groups: groups of ``batched_nms``, segments of ``nms_padded``, 1 for ``nms``.
        threshold: IoU threshold.
        max_output: of ``nms_padded``.
        layout: ``uniform``: centres anywhere; ``clustered``: ten boxes an object, as an RPN proposes them.
    """

    function: str
    boxes: int
    groups: int
    threshold: float
    max_output: int
    layout: str

    @property
    def label(self) -> str:
        shape = f"{self.groups}x{self.boxes}" if self.function == "nms_padded" else f"{self.boxes}"
        groups = f"-G{self.groups}" if self.function == "batched_nms" else ""
        return f"{self.function}-{shape}{groups}-t{self.threshold}-{self.layout}"


NMS_CASES = (
    [NmsCase("nms", 100, 1, 0.7, 0, "clustered"), NmsCase("batched_nms", 100, 5, 0.7, 0, "clustered"),
     NmsCase("nms_padded", 60, 4, 0.7, 30, "clustered")]
    if SMALL
    else [
        NmsCase("nms", 2000, 1, 0.7, 0, "uniform"),
        NmsCase("nms", 2000, 1, 0.7, 0, "clustered"),
        NmsCase("batched_nms", 10_000, 5, 0.7, 0, "uniform"),
        NmsCase("batched_nms", 10_000, 5, 0.7, 0, "clustered"),
        NmsCase("batched_nms", 10_000, 80, 0.5, 0, "clustered"),
        NmsCase("nms_padded", 2000, 10, 0.7, 2000, "clustered"),
        NmsCase("nms_padded", 2000, 80, 0.7, 1000, "clustered"),
    ]
)  # fmt: skip


def random_boxes(count: int, layout: str, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes of an 800 x 1333 image, about 55 pixels a side, and scores without ties."""
    random = torch.Generator().manual_seed(seed)
    objects = count if layout == "uniform" else max(1, count // 10)
    centre = torch.rand(objects, 2, generator=random) * torch.tensor([WIDTH, HEIGHT])
    sides = torch.exp(torch.randn(objects, 2, generator=random) * 0.6 + 4)
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], 1)
    if layout == "clustered":
        boxes = boxes.repeat(-(-count // objects), 1)[:count] + torch.randn(count, 4, generator=random) * 6
    scores = torch.randperm(count, generator=random).float() / max(1, count)
    return boxes.to(device), scores.to(device)
