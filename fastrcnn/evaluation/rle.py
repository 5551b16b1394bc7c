"""Masks as COCO run lengths: from the mask head's probabilities, and back to bitmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from fastrcnn_kernels import paste_masks_rle


def masks_to_rle(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    padding: int = 1,
    convention: str = "maskrcnn_benchmark",
) -> list[dict[str, Any]]:
    """Paste mask probabilities into the image and encode each as COCO RLE.

    maskrcnn-benchmark's ``Masker(threshold=0.5, padding=1)`` followed by pycocotools' ``encode``. No image is made, so
    that memory is the result's, however many detections there are.

    Args:
        mask_probs: float [n, 1, M, M] or [n, M, M] in [0, 1], in the frame of the box. Or bool: bitmaps of the image in
            some size, which are resized (nearest pixel) and encoded; boxes, threshold and padding then do not count.
        boxes: float [n, 4], (x1, y1, x2, y2) in pixels of the image; they may stick out of it.
        image_size: (height, width) of the image.
        threshold: a pixel belongs to the mask where the pasted probability is above it.
        padding: cells of zeros around the mask before it is resized.
        convention: rule of :func:`fastrcnn_kernels.paste_masks`.

    Returns:
        ``[{"size": [height, width], "counts": str}]``, ready for json.
    """
    mask_probs = mask_probs.detach().reshape(len(boxes), *mask_probs.shape[-2:])
    if mask_probs.dtype == torch.bool:
        return [encode_mask(_resize_bitmap(mask, image_size)) for mask in mask_probs]
    encoded = paste_masks_rle(
        mask_probs.float(), boxes.detach(), image_size, threshold=threshold, padding=padding, convention=convention
    )
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _resize_bitmap(mask: Tensor, image_size: tuple[int, int]) -> Tensor:
    """[H, W] to ``image_size``, one at a time: all in one tensor would fill the memory."""
    if tuple(mask.shape) == tuple(image_size):
        return mask
    return F.interpolate(mask[None, None].to(torch.uint8), size=image_size, mode="nearest-exact")[0, 0]


def encode_mask(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """A bitmap [height, width] as COCO RLE with ``counts`` as str, so that json takes it.

    Equal to pycocotools' ``encode``, which needs a column-major copy of the whole image; this one looks only at the
    rows and columns between the first and the last set pixel.
    """
    if isinstance(mask, Tensor):
        mask = mask.to(device="cpu", dtype=torch.uint8).numpy()
    height, width = mask.shape
    counts = _run_lengths(mask.astype(bool, copy=False), height, width)
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _run_lengths(mask: np.ndarray, height: int, width: int) -> list[int]:
    """Lengths of the alternating runs of zeros and ones, down the columns, beginning with zeros."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return [height * width]
    top, bottom = rows[0], rows[-1] + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = columns[0], columns[-1] + 1
    padded = np.zeros((right - left, bottom - top + 2), dtype=np.int8)  # a column of the image is a row here
    padded[:, 1:-1] = mask[top:bottom, left:right].T
    edges = np.diff(padded, axis=1)
    starts, ends = (
        (column + left) * height + row + top for column, row in (np.nonzero(edges == 1), np.nonzero(edges == -1))
    )
    # A run down to the last row goes on in the first row of the next column.
    joined = ends[:-1] == starts[1:]
    starts, ends = starts[np.append(True, ~joined)], ends[np.append(~joined, True)]
    borders = np.concatenate([[0], np.stack([starts, ends], axis=1).ravel(), [height * width]])
    counts = np.diff(borders).tolist()
    return counts if counts[-1] else counts[:-1]


class RleMasks(Sequence[np.ndarray]):
    """COCO RLE masks as bool bitmaps [height, width], each decoded when it is asked for.

    The hundred masks of a large photograph would take more than a gigabyte at once.
    """

    def __init__(self, rles: Sequence[Mapping[str, Any]]) -> None:
        self.rles = rles

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return RleMasks(self.rles[index])
        return np.asarray(coco_mask.decode(self.rles[index])).astype(bool)
