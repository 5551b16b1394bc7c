"""A whole training step, forward, backward and update, on random images; img/s is 1 / time x images.

Without a GPU a small model runs, so that the benchmark itself is tested; its figures compare nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrcnn.build import build_model
from fastrcnn.config import load_config
from fastrcnn.engine.solver import make_optimizer
from fastrcnn.engine.step import autocast
from fastrcnn.structures import BoxList, SegmentationMask, Targets, to_image_list

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
CASES = (
    [(2, "float32", False), (2, "bfloat16", True), (16, "bfloat16", False), (16, "bfloat16", True)]
    if GPU
    else [(2, "float32", False), (2, "float32", True)]
)


def make_batch(images: int, width: int, height: int, num_classes: int, device: str) -> tuple[Any, Targets]:
    """Noise with eight rectangles an image, about COCO's mean number."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(3, height, width, generator=generator) * 50 for _ in range(images)]
    boxlists = []
    for _ in range(images):
        size = torch.tensor([width, height])
        corner = torch.rand(8, 2, generator=generator) * size * 0.7
        extent = torch.rand(8, 2, generator=generator) * size * 0.25 + 16
        boxes = torch.cat([corner, corner + extent], dim=1)
        polygons = [[torch.stack([b[[0, 1]], b[[2, 1]], b[[2, 3]], b[[0, 3]]])] for b in boxes]
        labels = torch.randint(1, num_classes, (8,), generator=generator)
        masks = SegmentationMask(polygons, (width, height))
        boxlists.append(BoxList(boxes, (width, height), labels=labels, masks=masks))
    return to_image_list(pixels, 32).to(device), Targets.from_boxlists(boxlists).to(device)


@pytest.mark.parametrize(("images", "dtype", "channels_last"), CASES)
def bench_train_step(benchmark: Any, images: int, dtype: str, channels_last: bool) -> None:
    config = "e2e_mask_rcnn_R_50_FPN_1x.yaml" if GPU else "demo_shapes.yaml"
    device = "cuda" if GPU else "cpu"
    width, height = (1333, 800) if GPU else (128, 128)
    overrides = ["MODEL.DEVICE", device, "MODEL.WEIGHT", "", "MODEL.CHANNELS_LAST", str(channels_last)]
    cfg = load_config(ROOT / "configs" / config, overrides)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = make_optimizer(model, base_lr=1e-4, momentum=0.9, weight_decay=1e-4)
    batch, targets = make_batch(images, width, height, cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES, device)

    def step() -> dict[str, torch.Tensor]:
        with autocast(torch.device(device), getattr(torch, dtype)):
            losses = model(batch, targets)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return losses

    for _ in range(3):
        losses = step()
    assert all(loss.isfinite() for loss in losses.values())
    benchmark.group = f"train step, {config}, {images} images {width}x{height}"
    benchmark.extra_info.update(images=images, dtype=dtype, channels_last=channels_last, size=[width, height])
    benchmark(step)
