"""What the mask head shall predict for a region: two rules, by ``Convention.mask_target``."""

from __future__ import annotations

import torch
from torch import Tensor

import fastrcnn_kernels as kernels
from fastrcnn.structures import ImageList, Targets


def polygon_targets(targets: Targets, instance: Tensor, boxes: Tensor, resolution: int, images: ImageList) -> Tensor:
    """The instance's polygons drawn at the mask's resolution in the frame of the box (maskrcnn-benchmark, detectron2).

    Args:
        instance: int64 [K], ``image * G + ground truth``; negative: none, which gives zeros.
        boxes: [K, 4], pixels of the network input.
        resolution: M.
        images: not looked at.

    Returns:
        uint8 [K, M, M] of 0 and 1.
    """
    return kernels.rasterize_polygons(
        targets.vertices,
        targets.polygon_offsets,
        targets.instance_offsets,
        instance,
        boxes.to(targets.vertices.dtype),
        resolution,
        max_vertices=targets.max_vertices,
        max_polygons=targets.max_polygons,
    )


def bitmap_targets(targets: Targets, instance: Tensor, boxes: Tensor, resolution: int, images: ImageList) -> Tensor:
    """RoIAlign of the instance's bitmap (torchvision's ``project_masks_on_boxes``): shares of a pixel, not 0 or 1.

    The bitmaps of one image are made at a time, at the size of the network input.

    Args:
        instance, boxes, resolution: as in :func:`polygon_targets`.
        images: beyond the bottom and the right of an image, before padding, its last row and column go on.

    Returns:
        floating [K, M, M] in [0, 1], of the type of ``boxes``.
    """
    count = targets.labels.shape[1]
    side = max(int(images.tensors.shape[-2]), int(images.tensors.shape[-1]))
    whole = torch.full((count, 4), side, dtype=targets.vertices.dtype, device=boxes.device)
    whole[:, :2] = 0
    pixel = torch.arange(side, device=boxes.device)
    shares = boxes.new_zeros((len(boxes), resolution, resolution))
    for image, size in enumerate(images.sizes):
        first = image * count
        one = torch.arange(first, first + count, device=boxes.device)
        bitmaps = polygon_targets(targets, one, whole, side, images)  # [G, side, side]
        for dim, last in enumerate(size - 1, start=1):
            bitmaps = bitmaps.index_select(dim, torch.minimum(pixel, last))
        here = (instance >= first) & (instance < first + count)
        rows = torch.where(here, instance - first, -1).to(boxes.dtype)
        regions = torch.cat([rows[:, None], boxes], dim=1)
        shares += kernels.roi_align(bitmaps[:, None].to(boxes.dtype), regions, resolution, 1.0, 0, False)[:, 0]
    return shares
