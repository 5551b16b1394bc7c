"""From samples to batches, in the worker: normalise and pad the pixels, pack the targets for the way home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrcnn.data.buckets import ShapeBuckets
from fastrcnn.data.dataset import Sample
from fastrcnn.structures import BoxList, ImageList, Keypoints, SegmentationMask, Skeleton, Views
from fastrcnn_kernels import preprocess_images


@dataclass(frozen=True)
class Normalization:
    """How pixels become the network's input.

    Args:
        pixel_mean, pixel_std: of the three channels, in the order and range that ``to_bgr255`` says.
        to_bgr255: BGR channels in 0..255 (the Caffe2 weights) instead of RGB in 0..1.
        size_divisible: height and width of a batch are padded to a multiple of this; 0 is no constraint.
        buckets: the sizes that batches are padded to; None pads a batch to its largest image.
    """

    pixel_mean: Sequence[float] = (102.9801, 115.9465, 122.7717)
    pixel_std: Sequence[float] = (1.0, 1.0, 1.0)
    to_bgr255: bool = True
    size_divisible: int = 0
    buckets: ShapeBuckets | None = None

    def __call__(self, images: Sequence[Tensor], ids: Sequence[int]) -> ImageList:
        """uint8 [H, W, 3] images to an ImageList; ``ids`` are the images' identities."""
        tensors, sizes = preprocess_images(
            list(images),
            pixel_mean=tuple(self.pixel_mean),
            pixel_std=tuple(self.pixel_std),
            to_bgr255=self.to_bgr255,
            size_divisible=self.size_divisible,
            pad_to=None if self.buckets is None else self.buckets.fit((i.shape[0], i.shape[1]) for i in images),
        )
        return ImageList(tensors, [(h, w) for h, w in sizes.tolist()], torch.tensor(ids, dtype=torch.int64))


@dataclass(frozen=True)
class Batch:
    """A training batch.

    Attributes:
        images: float32, normalised and padded; ``images.ids`` are the ids of the annotation file.
        targets: ground truth of each image, in the frame of the network's input.
        indices: the images' positions in the data set.
        epoch: which pass over the data the batch is part of, from 0.
    """

    images: ImageList
    targets: list[BoxList]
    indices: list[int]
    epoch: int


@dataclass(frozen=True)
class TestBatch:
    """A batch to run detection on.

    Attributes:
        images: float32, normalised and padded; Views of them for test-time augmentation.
        image_ids: ids of the annotation file.
        indices: the images' positions in the data set.
        original_sizes: (height, width) of each image before it was resized.
    """

    __test__ = False

    images: ImageList | Views
    image_ids: list[int]
    indices: list[int]
    original_sizes: list[tuple[int, int]]

    def pin_memory(self) -> TestBatch:
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class PackedTargets:
    """The targets of a batch in six tensors.

    Each tensor that leaves a worker costs a file descriptor and a system call on both sides; the polygons of a batch
    are hundreds of tensors, enough to reach the usual limit of 1024 descriptors.
    """

    boxes: Tensor
    labels: Tensor
    sizes: list[tuple[int, int]]
    counts: list[int]
    vertices: Tensor
    polygon_lengths: Tensor
    polygons_per_instance: Tensor
    has_masks: bool
    keypoints: Tensor | None = None
    skeleton: Skeleton | None = None
    offset: int = 1

    @classmethod
    def pack(cls, targets: Sequence[BoxList]) -> PackedTargets:
        """Every target is in mode xyxy, with labels and, all or none, a SegmentationMask and Keypoints."""
        instances = [one for t in targets if isinstance(t.masks, SegmentationMask) for one in t.masks.polygons]
        polygons = [polygon for instance in instances for polygon in instance]
        keypoints = [t.keypoints for t in targets if t.keypoints is not None]
        has_keypoints = bool(keypoints) and len(keypoints) == len(targets)
        return cls(
            boxes=torch.cat([t.boxes for t in targets]),
            labels=torch.cat([t.labels for t in targets if t.labels is not None]),
            sizes=[t.size for t in targets],
            counts=[len(t) for t in targets],
            vertices=torch.cat(polygons) if polygons else torch.zeros((0, 2)),
            polygon_lengths=torch.tensor([len(p) for p in polygons], dtype=torch.int64),
            polygons_per_instance=torch.tensor([len(i) for i in instances], dtype=torch.int64),
            has_masks=all(isinstance(t.masks, SegmentationMask) for t in targets),
            keypoints=torch.cat([k.points for k in keypoints]) if has_keypoints else None,
            skeleton=keypoints[0].skeleton if has_keypoints else None,
            offset=targets[0].offset,
        )

    def unpack(self) -> list[BoxList]:
        """The BoxLists that were packed, as views into the packed tensors."""
        polygons = list(self.vertices.split(self.polygon_lengths.tolist()))
        per_instance = self.polygons_per_instance.tolist()
        targets, instance, polygon = [], 0, 0
        boxes, labels = self.boxes.split(self.counts), self.labels.split(self.counts)
        points = None if self.keypoints is None else self.keypoints.split(self.counts)
        for i, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            masks = None
            if self.has_masks:
                shapes = []
                for number in per_instance[instance : instance + count]:
                    shapes.append(polygons[polygon : polygon + number])
                    polygon += number
                instance += count
                masks = SegmentationMask(shapes, size)
            keypoints = None if points is None else Keypoints(points[i], size, self.skeleton)
            targets.append(
                BoxList(boxes[i], size, labels=labels[i], masks=masks, keypoints=keypoints, offset=self.offset)
            )
        return targets


@dataclass(frozen=True)
class PackedBatch:
    """What a worker sends; :meth:`unpack` makes the :class:`Batch`."""

    images: ImageList
    targets: PackedTargets
    indices: list[int]
    epoch: int

    def pin_memory(self) -> PackedBatch:
        # The targets stay pageable: they are packed once more, for the device, by Targets.from_boxlists.
        return replace(self, images=self.images.pin_memory())

    def unpack(self) -> Batch:
        return Batch(self.images, self.targets.unpack(), self.indices, self.epoch)


def collate_train(samples: Sequence[Sample], normalization: Normalization, epoch: int) -> PackedBatch:
    """Normalise, pad and pack transformed samples."""
    return PackedBatch(
        images=normalization([s.image for s in samples], [s.image_id for s in samples]),
        targets=PackedTargets.pack([s.target.convert("xyxy") for s in samples]),
        indices=[s.index for s in samples],
        epoch=epoch,
    )


def collate_test(
    samples: Sequence[Sample],
    original_sizes: Sequence[tuple[int, int]],
    make_images: Callable[[Sequence[Tensor], Sequence[int]], ImageList | Views],
) -> TestBatch:
    """Normalise and pad samples: ``make_images`` takes the pixels and the ids."""
    return TestBatch(
        images=make_images([s.image for s in samples], [s.image_id for s in samples]),
        image_ids=[s.image_id for s in samples],
        indices=[s.index for s in samples],
        original_sizes=list(original_sizes),
    )
