"""Ground truth padded to few shapes, so that a recording of the training step can be used again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastrcnn.structures.padded import Targets

# Capacities (boxes an image, polygons an image, vertices an image) of the ground truth. Few, because each one is a
# graph of its own, and generous, because room that is not used costs next to nothing.
CAPACITIES = ((16, 32, 2048), (64, 128, 8192), (256, 512, 32768))


def pad_targets(targets: Targets) -> Targets:
    """``targets`` padded to the smallest of CAPACITIES that holds them, so that few shapes occur.

    The losses stay the same: what is added belongs to no image. Ground truth beyond the largest capacity gets the next
    multiple of it. Works on the host.
    """
    images, boxes = targets.labels.shape
    polygons, vertices = len(targets.polygon_offsets) - 1, len(targets.vertices)
    # One polygon more than there are: the one that owns the vertices that are no one's.
    needed = (boxes, -(-(polygons + 1) // max(1, images)), -(-vertices // max(1, images)))
    fitting = (c for c in CAPACITIES if all(n <= room for n, room in zip(needed, c, strict=True)))
    largest = CAPACITIES[-1]
    times = max(-(-n // room) for n, room in zip(needed, largest, strict=True))
    capacity = next(fitting, tuple(times * room for room in largest))
    room_boxes, room_polygons, room_vertices = capacity[0], capacity[1] * images, capacity[2] * images

    def pad(tensor: Tensor) -> Tensor:
        more = tensor.new_zeros((images, room_boxes - boxes, *tensor.shape[2:]))
        return torch.cat([tensor, more], dim=1)

    polygon_offsets = targets.polygon_offsets.new_full((room_polygons + 1,), vertices)
    polygon_offsets[: polygons + 1] = targets.polygon_offsets
    polygon_offsets[-1] = room_vertices
    counts = pad(targets.instance_offsets.diff().view(images, boxes)).flatten()
    instance_offsets = torch.cat([targets.instance_offsets[:1], counts.cumsum(0)])
    return replace(
        targets,
        boxes=pad(targets.boxes),
        labels=pad(targets.labels),
        vertices=torch.cat([targets.vertices, targets.vertices.new_zeros((room_vertices - vertices, 2))]),
        polygon_offsets=polygon_offsets,
        instance_offsets=instance_offsets,
        # Bounds of loops, which an instance may not exceed.
        max_vertices=room_vertices,
        max_polygons=room_polygons,
        keypoints=None if targets.keypoints is None else pad(targets.keypoints),
    )
