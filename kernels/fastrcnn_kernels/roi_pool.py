"""RoIPool (Fast R-CNN, Girshick, 2015): the highest value of each bin of a region, with torchvision's numbers.

A region (x1, y1, x2, y2) is scaled, rounded to whole pixels (halves away from zero) and taken with both ends
included, at least one pixel wide and high; bin i of PH along y reads the rows ::

    floor(i * h / PH) + y1  up to, not including,  ceil((i + 1) * h / PH) + y1        h = y2 - y1 + 1

clamped to the map, in float32 (float64 for float64 features), each operation rounded, so that every implementation
reads the same pixels. The first of equal values in the order of rows wins. A NaN is never the highest; a bin of
nothing but NaN and -inf gives the lowest finite number and no gradient (torchvision's numbers), a bin without pixels
gives 0.

Beyond torchvision: a region whose image index is negative, or with a NaN or an infinite coordinate, is absent (zeros,
no gradient). The gradient goes to the pixel that won; it is the same, bit for bit, every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn_kernels import _library
from fastrcnn_kernels.roi_align import _pair, _to_rois

_FAR = float(1 << 30)  # pixels are clamped to this before they become integers
_CHUNK_ELEMENTS = 1 << 22


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _live(rois: Tensor, num_images: int) -> Tensor:
    """Whether each region is present. [K]"""
    present = (rois[:, 0] >= 0) & torch.isfinite(rois).all(dim=1)
    known = rois[:, 0] < num_images
    if rois.device.type == "cpu":
        message = f"roi_pool: a roi names an image outside 0..{num_images - 1}"
        torch._assert_async((known | ~present).all(), message)
    return present & known


def _bounds(rois: Tensor, live: Tensor, scale: float, axis: int, bins: int, extent: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last pixel of each bin along x (axis 0) or y (axis 1). int64 [K, bins]"""

    def pixel(column: int) -> Tensor:
        scaled = torch.where(live, rois[:, column], 0.0) * scale
        # Halves away from zero, which torch.round does not do; exact, as x - trunc(x) is.
        whole = scaled.trunc()
        away = torch.where((scaled - whole).abs() >= 0.5, scaled.sign(), 0.0)
        return (whole + away).clamp(-_FAR, _FAR).long()

    low, high = pixel(1 + axis), pixel(3 + axis)
    size = (high - low + 1).clamp(min=1).to(rois.dtype) / bins  # [K]
    index = torch.arange(bins, device=rois.device, dtype=rois.dtype)
    first = (index * size[:, None]).floor().long() + low[:, None]  # [K, bins]
    last = ((index + 1) * size[:, None]).ceil().long() + low[:, None]
    return first.clamp(0, extent), last.clamp(0, extent)


def roi_pool_reference(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    """The specification: highest values and where they are (y * W + x, -1 for none), both [K, C, PH, PW].

    Columns first, then rows; bounded memory.
    """
    num_images, channels, height, width = input.shape
    dtype = _compute_dtype(input.dtype)
    rois = rois.to(dtype)
    live = _live(rois, num_images)
    top, bottom = _bounds(rois, live, spatial_scale, 1, pooled_height, height)
    left, right = _bounds(rois, live, spatial_scale, 0, pooled_width, width)
    layout = torch.channels_last if _is_channels_last(input) else torch.contiguous_format
    shape = (rois.shape[0], channels, pooled_height, pooled_width)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    argmax = torch.empty(shape, dtype=torch.int32, device=input.device, memory_format=layout)
    if num_images == 0:
        return out.zero_(), argmax.fill_(-1)
    lowest = torch.finfo(input.dtype).min
    rows, columns = (torch.arange(extent, device=input.device) for extent in (height, width))
    step = max(1, _CHUNK_ELEMENTS // max(1, channels * height * width))
    for k in range(0, rois.shape[0], step):
        part = slice(k, k + step)
        image = torch.where(live[part], rois[part, 0], 0.0).long()
        # What cannot win is the lowest number; what must not be found has no candidate.
        values = input[image]  # [k, C, H, W]
        candidate = values > lowest
        values = torch.where(candidate, values, lowest)
        in_x = (columns >= left[part, :, None]) & (columns < right[part, :, None])  # [k, PW, W]
        in_y = (rows >= top[part, :, None]) & (rows < bottom[part, :, None])  # [k, PH, H]
        best_x = values.new_empty((*values.shape[:3], pooled_width))  # [k, C, H, PW]
        where_x = torch.empty(best_x.shape, dtype=torch.int64, device=input.device)
        for pw in range(pooled_width):
            inside = torch.where(in_x[:, None, None, pw], values, lowest)
            best_x[..., pw] = inside.amax(3)
            # The first of equals: argmax promises no order.
            equal = (inside == best_x[..., pw : pw + 1]) & in_x[:, None, None, pw] & candidate
            where_x[..., pw] = torch.where(equal, columns, width).amin(3)
        for ph in range(pooled_height):
            present = in_y[:, None, ph, :, None] & (where_x < width)  # [k, C, H, PW]
            inside = torch.where(present, best_x, lowest)
            best = inside.amax(2)  # [k, C, PW]
            equal = (inside == best[:, :, None]) & present
            row = torch.where(equal, rows[:, None], height).amin(2)  # [k, C, PW]
            found = row < height
            column = where_x.gather(2, row.clamp(max=height - 1)[:, :, None]).squeeze(2)
            argmax[part, :, ph] = torch.where(found, row * width + column, -1).int()
            empty = ~in_y[:, None, ph].any(2, keepdim=True) | ~in_x.any(2)[:, None] | ~live[part, None, None]
            out[part, :, ph] = torch.where(empty, 0.0, best)
            argmax[part, :, ph].masked_fill_(empty, -1)
    return out, argmax


def roi_pool_backward_reference(
    grad: Tensor, rois: Tensor, argmax: Tensor, num_images: int, height: int, width: int
) -> Tensor:
    """Every output gradient is added to the pixel that won. [N, C, H, W]"""
    dtype = _compute_dtype(grad.dtype)
    channels = grad.shape[1]
    out = _backward_fake(grad, rois, argmax, num_images, height, width)
    if num_images == 0:
        return out
    image = torch.where(rois[:, 0] >= 0, rois[:, 0], 0.0).long().clamp(max=num_images - 1)  # [K]
    plane = image[:, None] * channels + torch.arange(channels, device=grad.device)  # [K, C]
    spot = plane[:, :, None] * (height * width) + argmax.clamp(min=0).flatten(2)
    values = torch.where(argmax >= 0, grad.to(dtype), 0.0).flatten(2)
    flat = torch.zeros(num_images * channels * height * width, dtype=dtype, device=grad.device)
    flat.index_add_(0, spot.flatten(), values.flatten())
    return out.copy_(flat.view(out.shape))


def _fake(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if _is_channels_last(input) else torch.contiguous_format
    shape = (rois.shape[0], input.shape[1], pooled_height, pooled_width)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    return out, torch.empty(shape, dtype=torch.int32, device=input.device, memory_format=layout)


def _backward_fake(grad: Tensor, rois: Tensor, argmax: Tensor, num_images: int, height: int, width: int) -> Tensor:
    layout = torch.channels_last if _is_channels_last(argmax) else torch.contiguous_format
    shape = (num_images, grad.shape[1], height, width)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _code(x: Tensor) -> int:
    if x.dtype not in _DTYPE_CODES:
        raise TypeError(f"roi_pool: the C++ kernels take float16, bfloat16, float32 and float64, not {x.dtype}")
    return _DTYPE_CODES[x.dtype]


def _cpp(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    channels_last = _is_channels_last(input)
    input = input.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    rois = rois.to(_compute_dtype(input.dtype)).contiguous()
    out, argmax = _fake(input, rois, spatial_scale, pooled_height, pooled_width)
    wrong = _library.extension().roi_pool_forward(
        input.data_ptr(), rois.data_ptr(), out.data_ptr(), argmax.data_ptr(),
        [*input.shape, rois.shape[0], pooled_height, pooled_width], spatial_scale, channels_last, _code(input),
        torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise RuntimeError(
            f"roi_pool: roi {wrong} names image {rois[wrong, 0].item():g}, outside 0..{input.shape[0] - 1}"
        )
    return out, argmax


def _backward_cpp(grad: Tensor, rois: Tensor, argmax: Tensor, num_images: int, height: int, width: int) -> Tensor:
    channels_last = _is_channels_last(argmax)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad, argmax = grad.contiguous(memory_format=layout), argmax.contiguous(memory_format=layout)
    rois = rois.to(_compute_dtype(grad.dtype)).contiguous()
    out = _backward_fake(grad, rois, argmax, num_images, height, width)
    _library.extension().roi_pool_backward(
        out.data_ptr(), rois.data_ptr(), grad.data_ptr(), argmax.data_ptr(),
        [*out.shape, rois.shape[0], *grad.shape[2:]], channels_last, _code(grad), torch.get_num_threads(),
    )  # fmt: skip
    return out


_forward_op = _library.define(
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> "
    "(Tensor, Tensor)",
    reference=roi_pool_reference,
    fake=_fake,
    cpp=_cpp,
    triton="fastrcnn_kernels.triton.roi_pool:roi_pool",
)
_backward_op = _library.define(
    "roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, SymInt num_images, SymInt height, SymInt width) -> "
    "Tensor",
    reference=roi_pool_backward_reference,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.roi_pool:roi_pool_backward",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, rois = inputs[:2]
    ctx.save_for_backward(rois, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.num_images, ctx.size = input.shape[0], input.shape[2:]


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    rois, argmax = ctx.saved_tensors
    return _backward_op(grad, rois, argmax, ctx.num_images, *ctx.size), None, None, None, None


_library.register_autograd("roi_pool", _gradient, _context)


def roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """RoIPool of one feature map, with torchvision's signature and numbers.

    Args:
        input (Tensor[N, C, H, W]): the features, NCHW or channels_last; fewer than 2**31 pixels a plane.
        boxes: Tensor[K, 5] (image index, x1, y1, x2, y2) or one Tensor[L, 4] an image, in the frame that
            ``spatial_scale`` takes to feature pixels.
        output_size: PH and PW, or one number for both.
        spatial_scale: feature pixels per pixel of the boxes.

    Returns:
        Tensor[K, C, PH, PW] in the dtype and memory format of the features. Differentiable, once, in the features.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
        RuntimeError: on the CPU, for an image index >= N. On CUDA, where looking would stop the stream, such a region
            gives zeros.
    """
    rois = boxes if isinstance(boxes, Tensor) else _to_rois(boxes)
    ph, pw = _pair(output_size, "output_size")
    if input.dim() != 4 or not input.dtype.is_floating_point or min(input.shape[2:]) < 1:
        raise ValueError(f"input must be floating-point [N, C, H, W] with pixels, got {input.dtype}{list(input.shape)}")
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.dtype.is_floating_point:
        raise ValueError(
            f"boxes must be floating-point [K, 5] (image, x1, y1, x2, y2), got {rois.dtype}{list(rois.shape)}"
        )
    if rois.device != input.device:
        raise ValueError(f"boxes on {rois.device} and input on {input.device} must be together")
    return _forward_op(input, rois, float(spatial_scale), ph, pw)[0]


class RoIPool(nn.Module):
    """:func:`roi_pool` with its parameters fixed; torchvision's module."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Tensor[N, C, H, W] and regions as in :func:`roi_pool` -> Tensor[K, C, PH, PW]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
