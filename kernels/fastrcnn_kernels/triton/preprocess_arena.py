"""Images in an arena to one normalised batch: :mod:`fastrcnn_kernels.triton.preprocess` by offset.

All that changes from batch to batch (pixels, offsets, sizes, flips) is read from device memory, so a CUDA graph that
holds the launch serves every batch of its padded size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn_kernels.triton.preprocess import compile_case, constants, launch


def preprocess_arena(
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
    """Launcher of ``fastrcnn_kernels::preprocess_arena``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(table), channels, height, width)
    batch = torch.empty(shape, dtype=dtype, device=arena.device, memory_format=memory_format)
    options = constants(channels, channels_last, to_bgr255, arena=True)
    launch(arena, table, pixel_mean, pixel_std, batch, height, width, options)
    return batch


COMPILE_CASES = [
    compile_case("fp32-nchw-bgr", "fp32", 3, False, True, arena=True),
    compile_case("fp32-nhwc-rgb", "fp32", 3, True, False, arena=True),
    compile_case("fp16-nhwc4-bgr", "fp16", 4, True, True, arena=True),
    compile_case("bf16-nhwc4-bgr", "bf16", 4, True, True, arena=True),
]
