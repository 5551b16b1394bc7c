"""3x3 convolutions of stride 1 with a quarter of the multiplications, on the CPU.

Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray, 2016). For tiles of 4x4 outputs, y = A' [(G w G') * (B' x B)] A
elementwise in 36 planes; over channels and tiles each plane is a matrix product, which torch does. By linearity the
gradient of the weights is G' [sum over tiles of (A g A') * (B' x B)] G, and that of x is the convolution of g with the
flipped weights. Tiles are taken in runs, which bounds the memory.

float32 results differ from the sum's by a few 1e-6 of its largest (tests/kernels/test_conv.py); float64 is as exact as
any order of summation. A pixel that is not finite spoils whole tiles of 4x4 outputs, where the sum confines it to the
filter's reach.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastrcnn_kernels import _library

_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_INPUT, _GRADIENT, _OUTPUT = 0, 1, 2  # the extension's transforms
_RUN_BYTES = 64 << 20  # planes of a run of tiles: with few tiles the products are thin
_FEWEST_TILES, _FEWEST_CHANNELS = 64, 32  # below, transforming the weights costs more than is saved


@lru_cache(maxsize=2)
def _filter_matrix(dtype: torch.dtype) -> Tensor:
    """[36, 9]: G w G' of the nine weights of a filter."""
    g = torch.tensor(_G, dtype=torch.float64)
    return torch.kron(g, g).to(dtype)


def suits(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether this way is right, and faster than the sum, for a convolution."""
    n, channels, height, width = x.shape
    return (
        groups == 1
        and tuple(weight.shape[2:]) == (3, 3)
        and list(stride) == list(padding) == list(dilation) == [1, 1]
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and min(channels, weight.shape[0]) >= _FEWEST_CHANNELS
        and n * -(-height // 4) * -(-width // 4) >= _FEWEST_TILES
    )


def _transform(
    kind: int, map_: Tensor, planes: Tensor, first: int, count: int,
    bias: Tensor | None = None, residual: Tensor | None = None, relu: bool = False,
) -> None:  # fmt: skip
    _library.extension().winograd_transform(
        kind, map_.data_ptr(), planes.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), map_.shape[2], map_.shape[3], map_.shape[1], first, count, relu,
        map_.dtype == torch.float64, torch.get_num_threads(),
    )  # fmt: skip


def _runs(map_: Tensor, channels: int) -> tuple[int, int]:
    """(tiles, tiles of a run): the planes of a run have ``channels`` channels together."""
    tiles = map_.shape[0] * -(-map_.shape[2] // 4) * -(-map_.shape[3] // 4)
    return tiles, min(tiles, max(16, _RUN_BYTES // (36 * channels * map_.element_size())))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(conv(x) + bias + residual), all maps channels_last and dense; ``weight`` [O, I, 3, 3] of any strides."""
    inputs, outputs = x.shape[1], weight.shape[0]
    filters = weight.permute(2, 3, 1, 0).reshape(9, inputs * outputs)
    filters = (_filter_matrix(x.dtype) @ filters).view(36, inputs, outputs)
    out = torch.empty((x.shape[0], outputs, *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    tiles, run = _runs(x, inputs + outputs)
    planes, products = x.new_empty(36 * run * inputs), x.new_empty(36 * run * outputs)
    for first in range(0, tiles, run):
        count = min(run, tiles - first)
        v = planes[: 36 * count * inputs].view(36, count, inputs)
        m = products[: 36 * count * outputs].view(36, count, outputs)
        _transform(_INPUT, x, v, first, count)
        torch.bmm(v, filters, out=m)
        _transform(_OUTPUT, out, m, first, count, bias, residual, relu)
    return out


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient [O, I, 3, 3] of the weights, from that of the output and x, both channels_last and dense."""
    inputs, outputs = x.shape[1], grad.shape[1]
    tiles, run = _runs(x, inputs + outputs)
    run = min(tiles, 4 * run)  # the sum is read and written once a run
    planes, gradients = x.new_empty(36 * run * inputs), x.new_empty(36 * run * outputs)
    total = x.new_zeros((36, inputs, outputs))
    for first in range(0, tiles, run):
        count = min(run, tiles - first)
        v = planes[: 36 * count * inputs].view(36, count, inputs)
        d = gradients[: 36 * count * outputs].view(36, count, outputs)
        _transform(_INPUT, x, v, first, count)
        _transform(_GRADIENT, grad, d, first, count)
        total.baddbmm_(v.transpose(1, 2), d)
    sums = _filter_matrix(x.dtype).t() @ total.view(36, -1)  # [9, I * O]
    return sums.view(3, 3, inputs, outputs).permute(3, 2, 0, 1)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x: the convolution of ``grad``, channels_last and dense, with the flipped filters."""
    return forward(grad, weight.flip(2, 3).transpose(0, 1), None, None, False)
