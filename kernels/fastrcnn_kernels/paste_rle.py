"""Pasted masks as COCO run lengths: :func:`paste_masks` and pycocotools' ``encode`` in one, without the images.

COCO's compressed RLE counts down the columns, runs of zeros and ones in turn, zeros first; from the third on a run is
given by its difference to the one before the last; numbers take five bits a character, the lowest first, with a bit
that says whether more follow (``rleToString`` of its C code).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.paste import _paste_masks_reference, check_paste, is_continuous

_MOST_CHARACTERS = 13  # of a number of 64 bits


def rle_string(places: Tensor, total: int) -> Tensor:
    """The string of a mask of ``total`` pixels that changes at ``places``, int64 [n], increasing. uint8 [characters]"""
    borders = torch.cat([places.new_zeros(1), places, places.new_full((1,), total)])
    runs = borders.diff()  # [n + 1]
    if len(runs) > 1 and int(runs[-1]) == 0:
        runs = runs[:-1]
    values = runs.clone()
    values[3:] -= runs[1:-2]
    shift = 5 * torch.arange(_MOST_CHARACTERS)
    bits = (values[:, None] >> shift) & 31  # [n, characters]
    rest = values[:, None] >> torch.clamp(shift + 5, max=63)
    more = torch.where((bits & 16) != 0, rest != -1, rest != 0)
    begun = torch.cat([torch.ones_like(more[:, :1]), more[:, :-1]], dim=1).long().cumprod(dim=1).bool()
    return (bits + 32 * more.long() + 48)[begun].to(torch.uint8)


def join_strings(strings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Strings one after the other, uint8 [B], and where each begins and the last ends, int64 [K + 1]."""
    lengths = torch.tensor([0, *map(len, strings)])
    return torch.cat([torch.empty(0, dtype=torch.uint8), *strings]), lengths.cumsum(0)


def _places(mask: Tensor) -> Tensor:
    """Where a mask [height, width] of 0 and 1 changes, counted down its columns; it begins after a zero. int64 [n]"""
    pixels = mask.mT.flatten().to(torch.int8)
    return torch.cat([pixels.new_zeros(1), pixels]).diff().nonzero()[:, 0]


def _paste_masks_rle_reference(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> tuple[Tensor, Tensor]:
    strings = []
    for k in range(masks.shape[0]):  # one image at a time
        one = slice(k, k + 1)
        image = _paste_masks_reference(masks[one], boxes[one], height, width, threshold, padding, convention)[0]
        strings.append(rle_string(_places(image).cpu(), height * width))
    return join_strings(strings)


def _paste_masks_rle_cpp(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> tuple[Tensor, Tensor]:
    offsets = torch.empty((masks.shape[0] + 1,), dtype=torch.int64)
    # Held by name until the call is over: it gets their addresses only.
    masks, boxes = masks.float().contiguous(), boxes.float().contiguous()
    data = _library.extension().paste_masks_rle(
        masks.data_ptr(),
        boxes.data_ptr(),
        masks.shape[0],
        masks.shape[-1],
        padding,
        is_continuous(convention),
        height,
        width,
        threshold,
        offsets.data_ptr(),
        torch.get_num_threads(),
    )
    return _as_tensor(data), offsets


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def strings_from_places(places: Tensor, ends: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The strings of K masks from where each changes, down its columns, a place twice being none.

    Args:
        places: int64 [n] on the CPU, mask after mask, in each not decreasing.
        ends: int64 [K], where each mask's places end.
        total: pixels of an image.
    """
    if _library._EXTENSION is None:
        strings, begin = [], 0
        for end in ends.tolist():
            place, count = places[begin:end].unique_consecutive(return_counts=True)
            strings.append(rle_string(place[count % 2 == 1], total))
            begin = end
        return join_strings(strings)
    offsets = torch.empty((len(ends) + 1,), dtype=torch.int64)
    places, ends = places.contiguous(), ends.contiguous()
    extension = _library.extension()
    data = extension.rle_from_places(places.data_ptr(), ends.data_ptr(), len(ends), total, offsets.data_ptr())
    return _as_tensor(data), offsets


def _paste_masks_rle_triton(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> tuple[Tensor, Tensor]:
    from fastrcnn_kernels.triton import paste_rle as launcher

    places, ends = launcher.mask_changes(masks, boxes, height, width, threshold, padding, is_continuous(convention))
    return strings_from_places(places.cpu(), ends.cpu(), height * width)


def _paste_masks_rle_fake(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, padding: int, convention: str
) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty((size,), dtype=torch.uint8, device="cpu"),
        torch.empty((masks.shape[0] + 1,), dtype=torch.int64, device="cpu"),
    )


_paste_masks_rle = _library.define(
    "paste_masks_rle(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold, SymInt padding, "
    "str convention) -> (Tensor, Tensor)",
    reference=_paste_masks_rle_reference,
    cpp=_paste_masks_rle_cpp,
    triton="fastrcnn_kernels.paste_rle:_paste_masks_rle_triton",
    fake=_paste_masks_rle_fake,
)


def paste_masks_rle(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    padding: int = 1,
    convention: str = "maskrcnn_benchmark",
) -> list[dict[str, Any]]:
    """Draw masks into images and encode these as COCO RLE, without making the images.

    Equal, character for character, to ``pycocotools.mask.encode`` of :func:`paste_masks` with the same arguments (which
    see for the rules). Memory: the strings; on a GPU the places where each column of the image changes. The result is
    on the host, so a GPU is waited for. Not differentiable.

    Args:
        masks: probabilities, floating [K, M, M].
        boxes: [K, 4], (x1, y1, x2, y2) in pixels of the image.
        image_size: (height, width) of the image.
        threshold: as in :func:`paste_masks`; not negative.
        padding: margin in mask pixels; ``detectron2`` has none, whatever is given.
        convention: ``maskrcnn_benchmark``, ``torchvision`` or ``detectron2``.

    Returns:
        K times ``{"size": [height, width], "counts": bytes}``, which pycocotools takes. json wants
        ``counts.decode()``.

    Raises:
        ValueError: for wrong shapes, a negative or NaN threshold or another convention.
    """
    check_paste("paste_masks_rle", masks, boxes, image_size, threshold, padding, convention)
    if threshold < 0:
        raise ValueError(f"paste_masks_rle: threshold must not be negative, got {threshold}")
    height, width = int(image_size[0]), int(image_size[1])
    data, offsets = _paste_masks_rle(
        masks.detach(), boxes.detach(), height, width, float(threshold), padding, convention
    )
    characters, ends = data.numpy().tobytes(), offsets.tolist()
    return [{"size": [height, width], "counts": characters[begin:end]} for begin, end in pairwise(ends)]
