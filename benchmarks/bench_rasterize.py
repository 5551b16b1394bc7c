"""Mask targets: polygons against the loop over pycocotools, bitmaps against RoIAlign and the loop over interpolate.

pytest benchmarks/bench_rasterize.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import OURS, SMALL, assert_equal, measure, provider_call, torchvision
from benchmarks.mask_cases import HEIGHT, WIDTH, coco_instances, outline
from fastrcnn_kernels import rasterize, rasterize_bitmaps, rasterize_polygons
from tests.kernels.polygon_cases import packed, target_by_pycocotools

# regions, vertices of an instance (0: as many as COCO's), polygons of an instance
POLYGON_CASES = {"K20-coco": (20, 0, 0)} if SMALL else {
    "K128-coco": (128, 0, 0),
    "K128-40-vertices": (128, 40, 1),
    "K128-300-vertices": (128, 300, 1),
    "K1024-60-vertices-3-polygons": (1024, 60, 3),
}  # fmt: skip
BITMAP_CASES = {"K20-I4": (20, 4)} if SMALL else {"K128-I20": (128, 20), "K512-I60": (512, 60)}


def _polygons(case: str) -> tuple[list[Any], Tensor]:
    count, vertices, polygons = POLYGON_CASES[case]
    rng = np.random.default_rng(0)
    boxes, sizes = coco_instances(count, 0)
    if vertices:
        sizes = [(polygons, vertices)] * count
    instances = [
        [outline(rng, max(3, total // parts), box) for _ in range(parts)]
        for (parts, total), box in zip(sizes, boxes.numpy(), strict=True)
    ]
    # Proposals lie about their instances, not on them.
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return instances, boxes + torch.from_numpy(rng.normal(size=(count, 4)).astype(np.float32)) * side * 0.08


@pytest.mark.parametrize("provider", [*OURS, "pycocotools"])
@pytest.mark.parametrize("case", POLYGON_CASES)
def bench_rasterize_polygons(benchmark: Any, device: torch.device, case: str, provider: str) -> None:
    instances, boxes = _polygons(case)
    arguments: dict[str, Any] = packed(instances) | {"instance_idxs": torch.arange(len(boxes)), "boxes": boxes}
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    rows = boxes.tolist()

    def ours() -> Tensor:
        return rasterize_polygons(mask_size=28, **moved)

    def pycocotools() -> Tensor:
        masks = [target_by_pycocotools(i, b, 28) for i, b in zip(instances, rows, strict=True)]
        return torch.from_numpy(np.stack(masks)).to(device)

    compiled = torch.compile(rasterize._rasterize_polygons_reference)
    call = provider_call(
        provider,
        "rasterize_polygons",
        device,
        ours=ours,
        compiled=lambda: compiled(clip_size=None, mask_size=28, **moved),
        pycocotools=pycocotools,
    )
    measure(
        benchmark,
        call,
        truth=ours,
        equal=assert_equal,
        group=f"rasterize_polygons-{case}",
        provider=provider,
        device=device,
        bytes=moved["vertices"].nbytes + moved["boxes"].nbytes + len(boxes) * 28 * 28,
        target=("pycocotools", 5),
    )


@pytest.mark.parametrize("provider", ["reference", "cpp", "triton", "torchvision"])
@pytest.mark.parametrize("convention", ["maskrcnn_benchmark", "detectron2"])
@pytest.mark.parametrize("case", BITMAP_CASES)
def bench_rasterize_bitmaps(benchmark: Any, device: torch.device, case: str, convention: str, provider: str) -> None:
    count, instances = BITMAP_CASES[case]
    coarse = torch.rand(instances, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    bitmaps = (F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[:, 0] > 0.5).to(device)
    boxes, idxs = coco_instances(count, 1)[0].to(device), torch.arange(count, device=device) % instances

    def ours() -> Tensor:
        return rasterize_bitmaps(bitmaps, idxs, boxes, 28, convention=convention)

    def peer() -> Tensor:
        """What the two systems call: RoIAlign on all bitmaps as float, or crop and interpolate for each region."""
        if convention == "detectron2":
            rois = torch.cat([idxs[:, None].float(), boxes], dim=1)
            align = torchvision().ops.roi_align
            return (align(bitmaps[:, None].float(), rois, (28, 28), 1.0, 0, True)[:, 0] >= 0.5).byte()
        masks = []
        for i, box in zip(idxs.tolist(), boxes.tolist(), strict=True):
            x1, y1, x2, y2 = (round(v) for v in box)
            x1, y1 = min(max(x1, 0), WIDTH - 1), min(max(y1, 0), HEIGHT - 1)
            x2, y2 = max(min(max(x2, 0), WIDTH), x1 + 1), max(min(max(y2, 0), HEIGHT), y1 + 1)
            crop = bitmaps[i : i + 1, y1:y2, x1:x2][None].float()
            masks.append(F.interpolate(crop, size=(28, 28), mode="bilinear", align_corners=False)[0, 0].byte())
        return torch.stack(masks)

    area = ((boxes[:, 2:] - boxes[:, :2]).prod(1)).sum().item()
    measure(
        benchmark,
        provider_call(provider, "rasterize_bitmaps", device, ours=ours, torchvision=peer),
        truth=ours,
        equal=assert_equal,
        group=f"rasterize_bitmaps-{case}-{convention}",
        provider=provider,
        device=device,
        bytes=int(area) + count * 28 * 28,
        target=("torchvision", 5),
    )
