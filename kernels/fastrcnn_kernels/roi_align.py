"""RoIAlign over one feature map or over all levels of a pyramid in one call (Mask R-CNN, He et al., 2017).

A region (x1, y1, x2, y2), in pixels of the input image, is scaled to its feature map, cut into PH x PW bins, and the
features are averaged over a grid of bilinear samples in each bin::

    start = y1 * scale - 0.5 * aligned              height = (y2 - y1) * scale, at least 1 unless aligned
    bin   = height / PH                             grid   = sampling_ratio, or ceil(bin) where that is <= 0
    y     = start + ph * bin + (iy + 0.5) * bin / grid,   iy = 0 .. grid - 1        (x likewise)

A sample with y < -1 or y > H counts as zero; otherwise y is clamped to [0, H - 1]. These are the rules of
maskrcnn-benchmark and torchvision (``aligned=False``) and of detectron2 (``aligned=True``), to the digit. Validity,
clamping and weights factor over y and x, so the whole operator is ``Wy @ F @ Wx.T`` for each channel.

Beyond torchvision: a region whose image index is negative is absent (zeros, no gradient), and so is one with a NaN or
an infinite coordinate; the adaptive grid is capped at 65,536 samples a bin and axis. Differentiable in the features,
not in the boxes. Coordinates are computed in float64 for float64 features and in float32 otherwise; sums are kept in
that type and cast once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn_kernels import _library
from fastrcnn_kernels import roi_align_reference as reference
from fastrcnn_kernels.regions import assign_levels


def _fake(
    features: list[Tensor], rois: Tensor, levels: Tensor, spatial_scales: list[float],
    pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    shape = (rois.shape[0], features[0].shape[1], pooled_height, pooled_width)
    return reference.empty(shape, features[0], reference.is_channels_last(features))


def _backward_fake(
    grad_output: Tensor, rois: Tensor, levels: Tensor, sizes: list[int], spatial_scales: list[float],
    sampling_ratio: int, aligned: bool, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    pairs = zip(sizes[2::2], sizes[3::2], strict=True)
    return [reference.empty((sizes[0], sizes[1], h, w), grad_output, channels_last) for h, w in pairs]


_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _run_cpp(
    name: str, maps: list[Tensor], pooled: Tensor, rois: Tensor, levels: Tensor, spatial_scales: list[float],
    sampling_ratio: int, aligned: bool, channels_last: bool,
) -> None:  # fmt: skip
    """Run a C++ kernel on dense maps [N, C, H, W] and dense pooled [K, C, PH, PW] of one memory format."""
    native = _library.extension()
    if pooled.dtype not in _DTYPE_CODES:
        raise TypeError(f"roi_align: the C++ kernels take float16, bfloat16, float32 and float64, not {pooled.dtype}")
    rois, levels = rois.to(reference.compute_dtype(pooled.dtype)).contiguous(), levels.contiguous()
    pyramid = [
        native.RoiAlignLevel(f.data_ptr(), f.shape[2], f.shape[3], scale)
        for f, scale in zip(maps, spatial_scales, strict=True)
    ]
    num_images, channels = maps[0].shape[:2]
    num_rois, _, ph, pw = pooled.shape
    problem = native.RoiAlignProblem(
        pyramid, num_images, channels, num_rois, rois.data_ptr(), levels.data_ptr(), ph, pw, sampling_ratio, aligned,
        channels_last, _DTYPE_CODES[pooled.dtype], torch.get_num_threads(),
    )  # fmt: skip
    wrong = getattr(native, name)(problem, pooled.data_ptr())
    if wrong >= 0:
        raise RuntimeError(
            f"roi_align: roi {wrong} names image {rois[wrong, 0].item():g} and level {levels[wrong].item()}, outside "
            f"0..{num_images - 1} and 0..{len(maps) - 1}"
        )


def _cpp(
    features: list[Tensor], rois: Tensor, levels: Tensor, spatial_scales: list[float],
    pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    channels_last = reference.is_channels_last(features)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [f.contiguous(memory_format=layout) for f in features]
    shape = (rois.shape[0], maps[0].shape[1], pooled_height, pooled_width)
    out = reference.empty(shape, maps[0], channels_last)
    _run_cpp("roi_align_forward", maps, out, rois, levels, spatial_scales, sampling_ratio, aligned, channels_last)
    return out


def _backward_cpp(
    grad_output: Tensor, rois: Tensor, levels: Tensor, sizes: list[int], spatial_scales: list[float],
    sampling_ratio: int, aligned: bool, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    grad = grad_output.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    maps = _backward_fake(grad, rois, levels, sizes, spatial_scales, sampling_ratio, aligned, channels_last)
    _run_cpp("roi_align_backward", maps, grad, rois, levels, spatial_scales, sampling_ratio, aligned, channels_last)
    return maps


_forward_op = _library.define(
    "roi_align(Tensor[] features, Tensor rois, Tensor levels, float[] spatial_scales, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    cpp=_cpp,
    triton="fastrcnn_kernels.triton.roi_align:roi_align",
)
_backward_op = _library.define(
    "roi_align_backward(Tensor grad_output, Tensor rois, Tensor levels, SymInt[] sizes, float[] spatial_scales, "
    "int sampling_ratio, bool aligned, bool channels_last) -> Tensor[]",
    reference=reference.backward,
    fake=_backward_fake,
    cpp=_backward_cpp,
    triton="fastrcnn_kernels.triton.roi_align_backward:roi_align_backward",
)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, ctx.scales, _, _, ctx.ratio, ctx.aligned = inputs
    ctx.save_for_backward(rois, levels)
    ctx.sizes = [*features[0].shape[:2], *(extent for f in features for extent in f.shape[2:])]
    ctx.channels_last = reference.is_channels_last(features)


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    grads = _backward_op(grad, rois, levels, ctx.sizes, ctx.scales, ctx.ratio, ctx.aligned, ctx.channels_last)
    return grads, None, None, None, None, None, None, None


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_output, rois, levels, _, ctx.scales, ctx.ratio, ctx.aligned, _ = inputs
    ctx.save_for_backward(rois, levels)
    ctx.pooled = grad_output.shape[2:]


def _backward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    # The operator is linear in the features: the gradient of its gradient is the operator itself.
    rois, levels = ctx.saved_tensors
    grad = _forward_op(grads, rois, levels, ctx.scales, *ctx.pooled, ctx.ratio, ctx.aligned)
    return grad, None, None, None, None, None, None, None


_library.register_autograd("roi_align", _forward_gradient, _forward_context)
_library.register_autograd("roi_align_backward", _backward_gradient, _backward_context)


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive integer or a pair of them, got {value!r}")
    return pair


def _check(features: Sequence[Tensor], rois: Tensor, levels: Tensor, spatial_scales: Sequence[float]) -> None:
    if not features or len(features) != len(spatial_scales):
        raise ValueError(f"{len(features)} feature maps need as many spatial_scales, got {len(spatial_scales)}")
    first = features[0]
    for i, f in enumerate(features):
        if f.dim() != 4 or not f.dtype.is_floating_point:
            raise ValueError(f"features must be floating-point [N, C, H, W], got {f.dtype}{list(f.shape)} at level {i}")
        if f.shape[:2] != first.shape[:2] or f.dtype != first.dtype or f.device != first.device:
            raise ValueError(
                "feature maps must agree in N, C, dtype and device, got "
                f"{first.dtype}{list(first.shape)} on {first.device} and {f.dtype}{list(f.shape)} on {f.device}"
            )
        if f.shape[2] < 1 or f.shape[3] < 1:
            raise ValueError(f"feature maps must have at least one pixel, got {list(f.shape)} at level {i}")
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.dtype.is_floating_point:
        raise ValueError(
            f"rois must be floating-point [K, 5] (image, x1, y1, x2, y2), got {rois.dtype}{list(rois.shape)}"
        )
    if levels.shape != rois.shape[:1] or levels.dtype != torch.int64:
        raise ValueError(f"levels must be int64[{rois.shape[0]}], got {levels.dtype}{list(levels.shape)}")
    if rois.device != first.device or levels.device != first.device:
        raise ValueError(
            f"rois on {rois.device}, levels on {levels.device} and features on {first.device} must be together"
        )


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign over the levels of a pyramid in one launch, without selecting or moving regions by level.

    Args:
        features (sequence of Tensor[N, C, H, W]): the levels; one dtype and device. NCHW or channels_last.
        rois (Tensor[K, 5]): image index and (x1, y1, x2, y2) in pixels of the network input. A region with a negative
            image index is padding: its output is zero and it has no gradient.
        levels (int64 Tensor[K]): index into ``features`` of the level that each region reads.
        output_size: PH and PW, or one number for both.
        spatial_scales: for each level, feature pixels per input pixel (0.25 for stride 4).
        sampling_ratio: samples a bin along each axis; <= 0 for ceil(bin size).
        aligned: shift by half a pixel and do not enlarge small regions (detectron2); False is maskrcnn-benchmark.

    Returns:
        Tensor[K, C, PH, PW] in the dtype and memory format of the features. Differentiable in the features.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
        RuntimeError: on the CPU, for an image index >= N or a level outside 0 .. L - 1. On CUDA, where looking would
            stop the stream, such a region gives zeros.
    """
    ph, pw = _pair(output_size, "output_size")
    _check(features, rois, levels, spatial_scales)
    scales = [float(scale) for scale in spatial_scales]
    return _forward_op(list(features), rois, levels, scales, ph, pw, int(sampling_ratio), bool(aligned))


def _to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """One Tensor[L, 4] an image to Tensor[K, 5]."""
    for b in boxes:
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"boxes must be Tensor[K, 5] or a list of Tensor[L, 4], got a list with {list(b.shape)}")
    if not boxes:
        raise ValueError("boxes must be Tensor[K, 5] or a list of Tensor[L, 4], one an image; got an empty list")
    return torch.cat([torch.cat([b.new_full((b.shape[0], 1), i), b], dim=1) for i, b in enumerate(boxes)])


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign of one feature map, with torchvision's signature and numbers.

    Args:
        input (Tensor[N, C, H, W]): the features.
        boxes: Tensor[K, 5] (image index, x1, y1, x2, y2) or one Tensor[L, 4] an image, in the frame that
            ``spatial_scale`` takes to feature pixels.
        output_size, sampling_ratio, aligned: as in :func:`multiscale_roi_align`.
        spatial_scale: feature pixels per pixel of the boxes.

    Returns:
        Tensor[K, C, PH, PW].
    """
    rois = boxes if isinstance(boxes, Tensor) else _to_rois(boxes)
    levels = torch.zeros(rois.shape[0], dtype=torch.int64, device=rois.device)
    return multiscale_roi_align([input], rois, levels, output_size, [spatial_scale], sampling_ratio, aligned)


class RoIAlign(nn.Module):
    """:func:`roi_align` with its parameters fixed; torchvision's module."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Tensor[N, C, H, W] and regions as in :func:`roi_align` -> Tensor[K, C, PH, PW]."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign over named feature maps, levels by box area: torchvision's module, its numbers, one launch.

    Args:
        featmap_names: the maps to use, finest first.
        output_size, sampling_ratio: as in :func:`multiscale_roi_align`; never aligned.
        canonical_scale, canonical_level: a square of this side lies on this level.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size = _pair(output_size, "output_size")
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Pool every box from the level of its size.

        Args:
            x: named maps Tensor[N, C, H, W]; those not in ``featmap_names`` are ignored.
            boxes: one Tensor[L, 4] an image, in pixels of the network input.
            image_shapes: (height, width) of each image before padding to the batch.

        Returns:
            Tensor[K, C, PH, PW], K in the order of ``boxes``.
        """
        features = [x[name] for name in self.featmap_names if name in x]
        if not features:
            raise ValueError(f"none of the feature maps {self.featmap_names} is in the input, which has {list(x)}")
        if not image_shapes:
            raise ValueError("image_shapes must hold one (height, width) an image, got none")
        # The nearest power of two, from the heights alone, as torchvision infers it.
        height = max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(f.shape[2] / height)) for f in features]
        rois = _to_rois(boxes)
        levels = assign_levels(
            rois[:, 1:],
            min_level=round(-math.log2(scales[0])),
            max_level=round(-math.log2(scales[-1])),
            canonical_size=self.canonical_scale,
            canonical_level=self.canonical_level,
            eps=0.0,
            eps_outside=1e-6,
        )
        return multiscale_roi_align(features, rois, levels, self.output_size, scales, self.sampling_ratio)

    def __repr__(self) -> str:
        return (
            f"MultiScaleRoIAlign(featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio})"
        )
