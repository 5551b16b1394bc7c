"""Keypoint R-CNN (He et al., 2017): heat-map targets of keypoints, and keypoints from predicted heat maps.

``keypoint_targets`` is maskrcnn-benchmark's ``keypoints_to_heat_map``, torchvision's ``keypoints_to_heatmap`` and
detectron2's function of that name, which agree::

    x = floor((kx - x1) * (M / (x2 - x1))), M - 1 where kx == x2; y alike; target = y * M + x

``keypoints_from_heatmaps`` is their ``heatmaps_to_keypoints``: the map is resized to the box, bicubic (a = -0.75,
``align_corners=False``, borders repeated) to ceil(w) x ceil(h) pixels, and its highest pixel is the keypoint. No
implementation but the reference makes the resized map. Each operation is rounded, the four products along x are added
from left to right, then the four along y, so that all implementations find the same pixel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrcnn_kernels import _library

LARGEST_SIDE = 1 << 14  # pixels of a resized map along one axis; a larger box is sampled at so many points
_CUBIC = -0.75


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _bins(points: Tensor, low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Bin of each coordinate, float [K, J], and whether there is one, of ``points`` [K, J] in ``low``..``high`` [K]."""
    scale = size / (high - low)  # [K]
    place = ((points - low[:, None]) * scale[:, None]).floor()  # [K, J]
    place = torch.where(points == high[:, None], float(size - 1), place)
    return place, (place >= 0) & (place < size)


def _keypoint_targets_reference(
    keypoints: Tensor, boxes: Tensor, heatmap_size: int, visible_within: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(keypoints)
    x, y, visibility = keypoints.to(dtype).unbind(2)  # [K, J] each
    x1, y1, x2, y2 = boxes.to(dtype).unbind(1)  # [K] each
    column, has_column = _bins(x, x1, x2, heatmap_size)
    row, has_row = _bins(y, y1, y2, heatmap_size)
    valid = has_column & has_row & (visibility > 0)  # [K, J]
    if visible_within is not None:
        left, top, right, bottom = visible_within.to(dtype)[:, :, None].unbind(1)  # [K, 1] each
        seen = (x >= left) & (x <= right) & (y >= top) & (y <= bottom) & (visibility > 0)  # [K, J]
        valid = valid & seen.any(1, keepdim=True)
    index = torch.where(valid, row * heatmap_size + column, 0.0).long()  # [K, J]
    return index, valid


def _keypoint_targets_cpp(
    keypoints: Tensor, boxes: Tensor, heatmap_size: int, visible_within: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(keypoints)
    keypoints, boxes = keypoints.to(dtype).contiguous(), boxes.to(dtype).contiguous()
    within = None if visible_within is None else visible_within.to(dtype).contiguous()
    rows, points = keypoints.shape[:2]
    index = torch.empty((rows, points), dtype=torch.int64)
    valid = torch.empty((rows, points), dtype=torch.bool)
    _library.extension().keypoint_targets(
        keypoints.data_ptr(),
        boxes.data_ptr(),
        0 if within is None else within.data_ptr(),
        dtype == torch.float64,
        rows,
        points,
        heatmap_size,
        index.data_ptr(),
        valid.data_ptr(),
    )
    return index, valid


def _keypoint_targets_fake(
    keypoints: Tensor, boxes: Tensor, heatmap_size: int, visible_within: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = keypoints.shape[:2]
    return keypoints.new_empty(shape, dtype=torch.int64), keypoints.new_empty(shape, dtype=torch.bool)


_keypoint_targets = _library.define(
    "keypoint_targets(Tensor keypoints, Tensor boxes, SymInt heatmap_size, Tensor? visible_within) -> (Tensor, Tensor)",
    reference=_keypoint_targets_reference,
    fake=_keypoint_targets_fake,
    cpp=_keypoint_targets_cpp,
    triton="fastrcnn_kernels.triton.keypoints:keypoint_targets",
)


def keypoint_targets(
    keypoints: Tensor, boxes: Tensor, heatmap_size: int, *, visible_within: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cell of its box's heat map that each keypoint falls into.

    Args:
        keypoints: float [K, J, 3]: x, y in pixels of the image and visibility; above 0 is labelled.
        boxes: float [K, 4], (x1, y1, x2, y2): the proposals, in the same frame. Sizes are ``x2 - x1``, without + 1.
        heatmap_size: M, side of the heat map.
        visible_within: float [K, 4]: rows that have no labelled keypoint in this box, borders included, count for
            nothing. maskrcnn-benchmark gives the matched ground-truth boxes here, detectron2 the proposals; torchvision
            has no such rule.

    Returns:
        int64 [K, J], ``row * M + column``, 0 where there is none; and bool [K, J], whether there is one: the keypoint
        is labelled and inside its box, borders included. NaN is outside.

    Raises:
        ValueError: for wrong shapes or ``heatmap_size`` below 1.
    """
    if keypoints.dim() != 3 or keypoints.shape[2] != 3 or not keypoints.is_floating_point():
        raise ValueError(
            f"keypoint_targets: keypoints must be floating [K, J, 3], got {keypoints.dtype} {list(keypoints.shape)}"
        )
    for name, tensor in (("boxes", boxes), ("visible_within", visible_within)):
        if tensor is not None and list(tensor.shape) != [keypoints.shape[0], 4]:
            raise ValueError(
                f"keypoint_targets: {name} must be [{keypoints.shape[0]}, 4] as keypoints are "
                f"{list(keypoints.shape)}, got {list(tensor.shape)}"
            )
    if heatmap_size < 1:
        raise ValueError(f"keypoint_targets: heatmap_size must be at least 1, got {heatmap_size}")
    return _keypoint_targets(keypoints, boxes, heatmap_size, visible_within)


def _cubic_taps(size: int, wanted: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [4, wanted] source pixels and [4, wanted] weights of a bicubic resize along one axis."""
    scale = torch.tensor(float(size), dtype=dtype) / wanted
    real = (torch.arange(wanted, dtype=dtype) + 0.5) * scale - 0.5  # [wanted]
    first = real.floor()
    t = real - first
    a = _CUBIC

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far((1 - t) + 1)])  # [4, wanted]
    taps = first.long() + torch.arange(-1, 3)[:, None]  # [4, wanted]
    return taps.clamp_(0, size - 1).to(device), weights.to(device)


def _keypoints_from_heatmaps_reference(maps: Tensor, boxes: Tensor) -> Tensor:
    dtype = _compute_dtype(maps)
    maps, boxes = maps.to(dtype), boxes.to(dtype)
    found = maps.new_full((maps.shape[0], maps.shape[1], 3), math.nan)
    for heat, (x1, y1, x2, y2), out in zip(maps, boxes, found, strict=True):
        if not torch.isfinite(torch.stack([x1, y1, x2 - x1, y2 - y1])).all():
            continue
        width, height = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
        columns, rows = (min(int(side.ceil()), LARGEST_SIDE) for side in (width, height))
        at_x, by_x = _cubic_taps(heat.shape[2], columns, dtype, heat.device)
        at_y, by_y = _cubic_taps(heat.shape[1], rows, dtype, heat.device)
        across = heat[:, :, at_x[0]] * by_x[0]  # [J, H, columns]
        for tap in (1, 2, 3):
            across = across + heat[:, :, at_x[tap]] * by_x[tap]
        resized = across[:, at_y[0]] * by_y[0][:, None]  # [J, rows, columns]
        for tap in (1, 2, 3):
            resized = resized + across[:, at_y[tap]] * by_y[tap][:, None]
        peak = resized.flatten(1).argmax(1)  # [J]
        out[:, 0] = ((peak % columns).to(dtype) + 0.5) * (width / columns) + x1
        out[:, 1] = ((peak // columns).to(dtype) + 0.5) * (height / rows) + y1
        out[:, 2] = resized.flatten(1).gather(1, peak[:, None])[:, 0]
    return found


def _keypoints_from_heatmaps_cpp(maps: Tensor, boxes: Tensor) -> Tensor:
    dtype = _compute_dtype(maps)
    maps, boxes = maps.to(dtype).contiguous(), boxes.to(dtype).contiguous()
    rows, points, height, width = maps.shape
    out = torch.empty((rows, points, 3), dtype=dtype)
    _library.extension().keypoints_from_heatmaps(
        maps.data_ptr(),
        boxes.data_ptr(),
        dtype == torch.float64,
        rows,
        points,
        height,
        width,
        LARGEST_SIDE,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _keypoints_from_heatmaps_fake(maps: Tensor, boxes: Tensor) -> Tensor:
    return maps.new_empty((maps.shape[0], maps.shape[1], 3), dtype=_compute_dtype(maps))


_keypoints_from_heatmaps = _library.define(
    "keypoints_from_heatmaps(Tensor maps, Tensor boxes) -> Tensor",
    reference=_keypoints_from_heatmaps_reference,
    fake=_keypoints_from_heatmaps_fake,
    cpp=_keypoints_from_heatmaps_cpp,
    triton="fastrcnn_kernels.triton.keypoints:keypoints_from_heatmaps",
)


def keypoints_from_heatmaps(maps: Tensor, boxes: Tensor, *, score: str = "logit") -> Tensor:
    """The highest point of each heat map, resized to its box (``heatmaps_to_keypoints`` of the peers).

    Args:
        maps: floating [K, J, H, W] logits.
        boxes: [K, 4], (x1, y1, x2, y2) in pixels of the image; a side under 1 counts as 1, more than 16384 pixels are
            sampled at 16384 points.
        score: ``logit``: the value of the resized map (maskrcnn-benchmark, torchvision); ``probability``: its share
            ``exp(value) / sum(exp(maps))`` over the cells of the map that was predicted (detectron2).

    Returns:
        float32 [K, J, 3] (float64 for float64 maps): x, y in pixels of the image, the centre of the highest pixel of
        the resized map, the first in reading order on a tie, and the score. A NaN counts as the highest. A box that is
        not finite gives NaN.

    Raises:
        ValueError: for wrong shapes, an empty map or another ``score``.
    """
    if maps.dim() != 4 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise ValueError(
            f"keypoints_from_heatmaps: maps must be floating [K, J, H, W], got {maps.dtype} {list(maps.shape)}"
        )
    if list(boxes.shape) != [maps.shape[0], 4]:
        raise ValueError(f"keypoints_from_heatmaps: boxes must be [{maps.shape[0]}, 4], got {list(boxes.shape)}")
    if score not in ("logit", "probability"):
        raise ValueError(f"keypoints_from_heatmaps: score must be 'logit' or 'probability', got {score!r}")
    found = _keypoints_from_heatmaps(maps, boxes)
    if score == "logit":
        return found
    share = (found[..., 2] - maps.to(found.dtype).flatten(2).logsumexp(2)).exp()  # [K, J]
    return torch.cat([found[..., :2], share[..., None]], dim=2)
