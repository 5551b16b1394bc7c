"""What the sides train on: the same images and ground truth, in our form and in torchvision's.

Synthetic batches are noise with rectangles on it. Padded ones are all of one size; bucketed ones have the widths that
COCO's images take when their shorter side becomes 800, a batch holding images of one size, as aspect-grouped sampling
with width buckets gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrcnn.build import build_dataset, build_train_loader
from fastrcnn.config import Config
from fastrcnn.structures import BoxList, ImageList, SegmentationMask, to_image_list

Size = tuple[int, int]

# (width, height) as shares of 800 pixels, and in how many of ten batches: 640x480, 640x427 and their upright forms
# are the most frequent sizes of COCO.
COCO_SIZES: tuple[tuple[float, float, int], ...] = (
    (1066 / 800, 1.0, 5),
    (1199 / 800, 1.0, 3),
    (1.0, 1066 / 800, 1),
    (1.0, 1199 / 800, 1),
)


@dataclass(frozen=True)
class StepBatch:
    """A batch as :class:`fastrcnn.engine.step.TrainStep` takes it.

    Attributes:
        images: float32, normalised and padded, on the host.
        targets: the ground truth of each image, with labels and polygons.
    """

    images: ImageList
    targets: list[BoxList]

    @property
    def mean_ground_truths(self) -> float:
        return sum(map(len, self.targets)) / len(self.targets)


def random_target(boxes: int, size: Size, num_classes: int, generator: torch.Generator) -> BoxList:
    """``boxes`` rectangles in an image of ``size`` (width, height), sides from 1/50 to 1/4 of the image's."""
    width, height = size
    sides = torch.tensor([width, height], dtype=torch.float32)
    corner = torch.rand(boxes, 2, generator=generator) * sides * 0.7
    extent = torch.rand(boxes, 2, generator=generator) * sides * 0.23 + sides * 0.02
    found = torch.cat([corner, corner + extent], dim=1)
    polygons = [[torch.stack([b[[0, 1]], b[[2, 1]], b[[2, 3]], b[[0, 3]]])] for b in found]
    labels = torch.randint(1, num_classes, (boxes,), generator=generator)
    return BoxList(found, size, labels=labels, masks=SegmentationMask(polygons, size))


def synthetic_batch(
    images: int, size: Size, *, boxes: int, num_classes: int, seed: int = 0, size_divisible: int = 32
) -> StepBatch:
    """Noise of standard deviation 50 (what images have after their mean is taken off) and ``boxes`` rectangles each.

    ``seed`` is that of the noise: batches of one size have the same rectangles, which the calibrated RPN proposes.
    """
    width, height = size
    generator = torch.Generator().manual_seed(0)
    targets = [random_target(boxes, size, num_classes, generator) for _ in range(images)]
    generator.manual_seed(seed)
    pixels = [torch.randn(3, height, width, generator=generator) * 50 for _ in range(images)]
    return StepBatch(to_image_list(pixels, size_divisible), targets)


def padded_batches(images: int, size: Size, *, boxes: int, num_classes: int, count: int = 1) -> list[StepBatch]:
    """``count`` batches of ``size`` (width, height), which differ in their pixels."""
    return [
        synthetic_batch(images, size, boxes=boxes, num_classes=num_classes, seed=seed, size_divisible=1)
        for seed in range(count)
    ]


def bucketed_batches(images: int, shortest: int, *, boxes: int, num_classes: int) -> list[StepBatch]:
    """One batch for each of COCO's usual sizes with the shorter side ``shortest``; :func:`bucket_order` orders them."""
    return [
        synthetic_batch(
            images, (round(w * shortest), round(h * shortest)), boxes=boxes, num_classes=num_classes, seed=seed
        )
        for seed, (w, h, _) in enumerate(COCO_SIZES)
    ]


def bucket_order() -> list[int]:
    """The batch of each of ten steps: every size in proportion to its share, spread out."""
    places = [(turn / share, index) for index, (_, _, share) in enumerate(COCO_SIZES) for turn in range(share)]
    return [index for _, index in sorted(places)]


def loader_config(config: dict[str, Any]) -> list[str]:
    """``KEY VALUE ...`` from a dict, as ``load_config`` takes it."""
    return list(itertools.chain.from_iterable((key, str(value)) for key, value in config.items()))


def real_batches(cfg: Config, count: int) -> list[StepBatch]:
    """The first ``count`` batches of the training loader of ``cfg``.

    Raises:
        DataError: the data set cannot be read.
        ValueError: it has no masks.
    """
    dataset = build_dataset(cfg, cfg.DATASETS.TRAIN, is_train=True)
    if cfg.MODEL.MASK_ON and not dataset.has_masks:
        raise ValueError(f"{', '.join(cfg.DATASETS.TRAIN)} has no masks: pass MODEL.MASK_ON False")
    loader = build_train_loader(cfg, dataset, on_device=False)
    return [StepBatch(batch.images, list(batch.targets)) for batch in itertools.islice(loader, count)]


def source_overrides(images: str) -> list[str]:
    """The overrides that name the data set of ``--images annotations.json@folder``.

    Raises:
        ValueError: it is neither ``synthetic`` nor of this form, or a part is absent.
    """
    annotations, at, folder = images.rpartition("@")
    if not at or not Path(annotations).is_file() or not Path(folder).is_dir():
        raise ValueError(f"--images {images}: neither 'synthetic' nor ANNOTATIONS.json@FOLDER with both present")
    return ["DATASETS.TRAIN", repr((images,))]


def to_torchvision(batch: StepBatch, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The same batch as torchvision's detectors take it: images [3, H, W] without padding, and per image ``boxes``
    float32 [G, 4], ``labels`` int64 [G], ``masks`` uint8 [G, H, W], all on ``device``."""
    images, targets = [], []
    for pixels, (height, width), target in zip(
        batch.images.tensors, batch.images.image_sizes, batch.targets, strict=True
    ):
        images.append(pixels[:, :height, :width].contiguous().to(device))
        targets.append(
            {
                "boxes": target.convert("xyxy").boxes.float().to(device),
                "labels": _labels(target).to(device),
                "masks": _bitmaps(target, height, width).to(device),
            }
        )
    return images, targets


def _labels(target: BoxList) -> Tensor:
    if target.labels is None:
        raise ValueError("the ground truth has no labels")
    return target.labels


def _bitmaps(target: BoxList, height: int, width: int) -> Tensor:
    """uint8 [G, height, width]."""
    if isinstance(target.masks, SegmentationMask):
        return target.masks.decode().to(torch.uint8).reshape(len(target), height, width)
    return torch.zeros((len(target), height, width), dtype=torch.uint8)


def mean_ground_truths(batches: Sequence[StepBatch]) -> float:
    return sum(batch.mean_ground_truths for batch in batches) / len(batches)
