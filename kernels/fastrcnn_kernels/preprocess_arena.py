"""Images that lie one after another in a buffer into network input; sizes and flips come from a tensor.

The arithmetic is that of :mod:`fastrcnn_kernels.preprocess`. There the images are separate tensors and the sizes are
numbers on the host, which a CUDA graph would keep for good; here a graph serves every batch of its padded size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn_kernels import _library
from fastrcnn_kernels.preprocess import DTYPES, check_constants, memory_format_of, normalise, resize_axis

FIELDS = 6
FLIP_X, FLIP_Y = 1, 2  # bits of the last field


def _rows(arena: Tensor, table: Tensor, height: int, width: int) -> list[tuple[int, ...]]:
    """The table of host tensors, checked: a wrong offset would read what is not an image.

    Raises:
        ValueError: a row that does not fit the arena or the batch.
    """
    rows = [tuple(row) for row in table.tolist()]
    for number, (offset, h, w, out_h, out_w, flip) in enumerate(rows):
        if min(offset, h - 1, w - 1) < 0 or offset + 3 * h * w > arena.numel():
            raise ValueError(
                f"preprocess_arena: row {number} of table says an image of {h}x{w} at byte {offset}, which an arena of "
                f"{arena.numel()} bytes does not hold"
            )
        if not (1 <= out_h <= height and 1 <= out_w <= width and 0 <= flip <= 3):
            raise ValueError(
                f"preprocess_arena: row {number} of table wants {out_h}x{out_w} pixels, flip {flip}: 1x1 to "
                f"{height}x{width} fit, flip is 0 to 3"
            )
    return rows


def _preprocess_arena_reference(
    arena: Tensor,
    table: Tensor,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    batch = torch.zeros((len(table), channels, height, width), dtype=torch.float32, device=arena.device)
    for (offset, h, w, out_h, out_w, flip), canvas in zip(_rows(arena, table, height, width), batch, strict=True):
        image = arena[offset : offset + 3 * h * w].view(h, w, 3)  # [h, w, 3]
        pixels = resize_axis(resize_axis(image, out_w, 1), out_h, 0)  # [out_h, out_w, 3]
        axes = [axis for axis, bit in ((1, FLIP_X), (0, FLIP_Y)) if flip & bit]
        pixels = pixels.flip(axes) if axes else pixels
        normalise(pixels, canvas[:, :out_h, :out_w], pixel_mean, pixel_std, to_bgr255)
    return batch.to(dtype, memory_format=memory_format_of(channels_last))


def _preprocess_arena_fake(
    arena: Tensor,
    table: Tensor,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        (table.shape[0], channels, height, width),
        dtype=dtype,
        device=arena.device,
        memory_format=memory_format_of(channels_last),
    )


def _preprocess_arena_cpp(
    arena: Tensor,
    table: Tensor,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    base = arena.data_ptr()
    batch = torch.empty(
        (len(table), channels, height, width), dtype=dtype, memory_format=memory_format_of(channels_last)
    )
    _library.extension().preprocess_images(
        [
            (base + offset, h, w, 3 * w, out_h, out_w, flip)
            for offset, h, w, out_h, out_w, flip in _rows(arena, table, height, width)
        ],
        pixel_mean,
        pixel_std,
        to_bgr255,
        height,
        width,
        channels,
        DTYPES.index(dtype),
        channels_last,
        batch.data_ptr(),
        False,
        torch.get_num_threads(),
    )
    return batch


_preprocess_arena = _library.define(
    "preprocess_arena(Tensor arena, Tensor table, float[] pixel_mean, float[] pixel_std, bool to_bgr255, "
    "SymInt height, SymInt width, int channels, ScalarType dtype, bool channels_last) -> Tensor",
    reference=_preprocess_arena_reference,
    fake=_preprocess_arena_fake,
    cpp=_preprocess_arena_cpp,
    triton="fastrcnn_kernels.triton.preprocess_arena:preprocess_arena",
)


def preprocess_arena(
    arena: Tensor,
    table: Tensor,
    *,
    size: tuple[int, int],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    channels: int = 3,
) -> Tensor:
    """Resize, flip, order channels, normalise and batch the images of an arena: on a GPU in one launch.

    The pixels of :func:`fastrcnn_kernels.preprocess_images`, to the bit. Nothing is read on the host on a CUDA device,
    and no bound of a loop is fixed: how many pixels an output needs follows from the table. So the call can be recorded
    in a CUDA graph, whose replays read what arena and table then hold.

    Args:
        arena: uint8 [bytes], contiguous. Bytes that no row names are not read.
        table: int64 [N, 6], contiguous, on the device of ``arena``. A row is an image: the offset of its pixels in the
            arena (uint8 [height, width, 3], RGB, contiguous, any alignment), its height and width there, the height and
            width that it is resized to, and how it is flipped after that: 1 left and right, 2 top and bottom, 3 both, 0
            not.
        size: (height, width) of the batch; every image has to fit. What an image leaves free is 0.
        pixel_mean, pixel_std, to_bgr255, dtype, memory_format, channels: as of ``preprocess_images``.

    Returns:
        ``dtype`` [N, channels, height, width].

    Raises:
        ValueError: other shapes, dtypes or constants; on a CPU also a row that does not fit. On a CUDA device, where a
            check would wait, pixels beyond ``size`` are cut off, and an offset beyond the arena reads foreign memory.
    """
    if arena.dim() != 1 or arena.dtype != torch.uint8 or not arena.is_contiguous():
        raise ValueError(
            f"preprocess_arena: arena must be contiguous uint8 [bytes], got {arena.dtype} {tuple(arena.shape)}"
        )
    if table.dim() != 2 or table.shape[1] != FIELDS or table.dtype != torch.int64 or not table.is_contiguous():
        given = f"{table.dtype} {tuple(table.shape)}"
        raise ValueError(f"preprocess_arena: table must be contiguous int64 [images, {FIELDS}], got {given}")
    if len(table) == 0:
        raise ValueError("preprocess_arena: needs at least one image")
    if table.device != arena.device:
        raise ValueError(f"preprocess_arena: table is on {table.device}, arena on {arena.device}")
    check_constants("preprocess_arena", pixel_mean, pixel_std, dtype, memory_format, channels)
    if min(size) < 1:
        raise ValueError(f"preprocess_arena: size must be at least 1x1, got {tuple(size)}")
    return _preprocess_arena(
        arena,
        table,
        [float(m) for m in pixel_mean],
        [float(s) for s in pixel_std],
        to_bgr255,
        int(size[0]),
        int(size[1]),
        channels,
        dtype,
        memory_format == torch.channels_last,
    )
