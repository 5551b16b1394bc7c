"""The RPN's losses with the gradient through its head taken at the sampled positions alone.

A few hundred anchors an image carry the loss, so the gradient in the dense outputs is zero at all but as many of some
90,000 positions, and so are the gradients through the 1x1 convolutions and the ReLU. What a dense backward convolves
is nearly all zeros: 14 % of the arithmetic of a training step of Mask R-CNN. Here, exactly::

    patches = the 3x3 neighbourhoods of the features at the sampled positions              [R, 9 C], R = N B
    t       = patches @ W + b                                                               recomputed, [R, C']
    dt      = (slopes @ [W_objectness; W_deltas]) * (t > 0)                                 [R, C']
    dW      = dt^T @ patches,   d(features) = the rows of dt @ W^T added where they came from

Two samples at one position are two rows. A pixel that several rows reach adds them in the order of the slots: no
atomics, the same bits every time. The head's outputs are taken as computed (without a graph: nothing of the dense
hidden map is kept), the features carry the graph. No public training code was found that does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastrcnn_kernels import _library, rpn_loss

_ELEMENT_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _neighbours(
    indices: Tensor, shapes: Sequence[tuple[int, int]], num_anchors: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each level row and column [N, B, 9] of the slots' neighbourhoods, and where that is a pixel."""
    step = torch.arange(9, device=indices.device)  # [9]
    first, found = 0, []
    for height, width in shapes:
        local = indices - first  # [N, B]
        here = (local >= 0) & (local < height * width * num_anchors) & (indices >= 0)
        position = torch.where(here, local, 0) // num_anchors  # [N, B]
        y = (position // width)[..., None] + step // 3 - 1  # [N, B, 9]
        x = (position % width)[..., None] + step % 3 - 1  # [N, B, 9]
        inside = here[..., None] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        found.append((y.clamp(0, height - 1), x.clamp(0, width - 1), inside))
        first += height * width * num_anchors
    return found


def patches_reference(features: list[Tensor], indices: Tensor, num_anchors: int, channels_last: bool) -> Tensor:
    """The specification: [N * B, 9 C]; zeros beyond the border and for empty slots."""
    image = torch.arange(indices.shape[0], device=indices.device)[:, None, None]  # [N, 1, 1]
    shapes = [(f.shape[2], f.shape[3]) for f in features]
    out = features[0].new_zeros((*indices.shape, 9, features[0].shape[1]))  # [N, B, 9, C]
    for f, (y, x, inside) in zip(features, _neighbours(indices, shapes, num_anchors), strict=True):
        out = torch.where(inside[..., None], f.permute(0, 2, 3, 1)[image, y, x], out)
    return (out if channels_last else out.transpose(2, 3)).flatten(0, 1).flatten(1)


def scatter_reference(
    rows: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool
) -> list[Tensor]:
    """The specification: patches [N * B, 9 C] added where they came from -> [N, C, H, W] a level."""
    images = indices.shape[0]
    dtype = rpn_loss.compute_dtype(rows.dtype)
    channels = rows.shape[1] // 9
    taps = rows.view(-1, 9, channels) if channels_last else rows.view(-1, channels, 9).transpose(1, 2)  # [R, 9, C]
    taps = taps.reshape(-1, channels).to(dtype)  # [R * 9, C]
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    image = torch.arange(images, device=indices.device)[:, None, None]  # [N, 1, 1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = []
    for (height, width), (y, x, inside) in zip(shapes, _neighbours(indices, shapes, num_anchors), strict=True):
        pixels = images * height * width
        # What has no pixel goes to one more row that is cut off again.
        target = torch.where(inside, (image * height + y) * width + x, pixels).flatten()  # [R * 9]
        dense = taps.new_zeros((pixels + 1, channels)).index_add_(0, target, taps)[:pixels].to(rows.dtype)
        out.append(dense.view(images, height, width, channels).permute(0, 3, 1, 2).clone(memory_format=layout))
    return out


def output_gradients_reference(slopes: Tensor, grad_losses: Tensor, indices: Tensor, num_anchors: int) -> Tensor:
    """The gradient in the head's outputs at each slot [N * B, 5 A]: A logits, then 4 A deltas.

    A slot has one anchor, whose five numbers are ``slopes`` [N, B, 5] times the gradient of the losses [2].
    """
    scaled = (slopes * torch.cat([grad_losses[:1], grad_losses[1:].expand(4)])).flatten(0, 1)  # [R, 5]
    anchor = torch.arange(num_anchors, device=indices.device)  # [A]
    index = indices.flatten()[:, None]  # [R, 1]
    mine = ((index >= 0) & (index % num_anchors == anchor))[..., None]  # [R, A, 1]
    logits = torch.where(mine, scaled[:, None, :1], 0).flatten(1)  # [R, A]
    return torch.cat([logits, torch.where(mine, scaled[:, None, 1:], 0).flatten(1)], dim=1)


def _output_gradients_fake(slopes: Tensor, grad_losses: Tensor, indices: Tensor, num_anchors: int) -> Tensor:
    return slopes.new_empty((indices.shape[0] * indices.shape[1], 5 * num_anchors))


def _output_gradients_cpp(slopes: Tensor, grad_losses: Tensor, indices: Tensor, num_anchors: int) -> Tensor:
    out = _output_gradients_fake(slopes, grad_losses, indices, num_anchors)
    held = (slopes.contiguous(), grad_losses.to(slopes.dtype).contiguous(), indices.contiguous())
    _library.extension().rpn_output_gradients(
        *(t.data_ptr() for t in held), slopes.dtype == torch.float64, indices.numel(), num_anchors, out.data_ptr()
    )
    return out


def _patches_cpp(features: list[Tensor], indices: Tensor, num_anchors: int, channels_last: bool) -> Tensor:
    first = features[0]
    out = torch.empty((indices.numel(), 9 * first.shape[1]), dtype=first.dtype)
    indices = indices.contiguous()
    _library.extension().rpn_patches(
        [(f.data_ptr(), f.shape[2], f.shape[3], f.stride()) for f in features], first.element_size(), *indices.shape,
        first.shape[1], indices.data_ptr(), num_anchors, channels_last, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _scatter_cpp(
    rows: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool
) -> list[Tensor]:
    if rows.dtype not in _ELEMENT_CODES:
        raise TypeError(f"rpn_head_loss: the C++ kernels take half, float and double types, not {rows.dtype}")
    out = _scatter_fake(rows, indices, sizes, num_anchors, channels_last)
    rows, indices = rows.contiguous(), indices.contiguous()
    _library.extension().rpn_scatter_patches(
        [(f.data_ptr(), f.shape[2], f.shape[3], f.stride()) for f in out], _ELEMENT_CODES[rows.dtype], *indices.shape,
        rows.shape[1] // 9, indices.data_ptr(), num_anchors, channels_last, rows.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _patches_fake(features: list[Tensor], indices: Tensor, num_anchors: int, channels_last: bool) -> Tensor:
    return features[0].new_empty((indices.shape[0] * indices.shape[1], 9 * features[0].shape[1]))


def _scatter_fake(
    rows: Tensor, indices: Tensor, sizes: list[int], num_anchors: int, channels_last: bool
) -> list[Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shapes = zip(sizes[::2], sizes[1::2], strict=True)
    return [
        torch.empty(
            (indices.shape[0], rows.shape[1] // 9, height, width),
            dtype=rows.dtype, device=rows.device, memory_format=layout,
        )
        for height, width in shapes
    ]  # fmt: skip


_patches_op = _library.define(
    "rpn_patches(Tensor[] features, Tensor indices, int num_anchors, bool channels_last) -> Tensor",
    reference=patches_reference,
    fake=_patches_fake,
    cpp=_patches_cpp,
    triton="fastrcnn_kernels.triton.rpn_head_loss:patches",
)
_scatter_op = _library.define(
    "rpn_scatter_patches(Tensor rows, Tensor indices, SymInt[] sizes, int num_anchors, bool channels_last) -> Tensor[]",
    reference=scatter_reference,
    fake=_scatter_fake,
    cpp=_scatter_cpp,
    triton="fastrcnn_kernels.triton.rpn_head_loss:scatter_patches",
)

_outputs_op = _library.define(
    "rpn_output_gradients(Tensor slopes, Tensor grad_losses, Tensor indices, int num_anchors) -> Tensor",
    reference=output_gradients_reference,
    fake=_output_gradients_fake,
    cpp=_output_gradients_cpp,
    triton="fastrcnn_kernels.triton.rpn_head_loss:output_gradients",
)

# Features and parameters, before the arguments of rpn_loss.
_HEAD_ARGUMENTS = 7


def _losses_of(forward: Any) -> Any:
    """The forward is that of ``rpn_loss``: the rest of the arguments is for the gradient."""

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return forward(*arguments[_HEAD_ARGUMENTS:])

    return run


def forward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrcnn_kernels::rpn_head_loss``."""
    from fastrcnn_kernels.triton import rpn_loss as launcher

    return launcher.forward(*arguments[_HEAD_ARGUMENTS:])


_forward_op = _library.define(
    "rpn_head_loss(Tensor[] features, Tensor conv_weight, Tensor conv_bias, Tensor cls_weight, Tensor cls_bias, "
    "Tensor bbox_weight, Tensor bbox_bias, Tensor[] objectness, Tensor[] deltas, "
    f"{rpn_loss.SAMPLE_SCHEMA}) -> (Tensor, Tensor)",
    reference=_losses_of(rpn_loss.forward_reference),
    fake=_losses_of(rpn_loss._forward_fake),
    cpp=_losses_of(rpn_loss._forward_cpp),
    triton="fastrcnn_kernels.rpn_head_loss:forward_triton",
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, *parameters, objectness, _, _, strides, indices = inputs[: _HEAD_ARGUMENTS + 5]
    ctx.levels = len(features)
    ctx.save_for_backward(*features, *parameters, indices, output[1])
    ctx.no_gradient_of_sample = rpn_loss.no_gradient_of_sample(strides)
    ctx.mark_non_differentiable(output[1])
    ctx.features_need_grad = any(f.requires_grad for f in features)
    ctx.num_anchors = objectness[0].shape[1]


def _gradient(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    features = list(saved[: ctx.levels])
    conv_weight, conv_bias, cls_weight, cls_bias, bbox_weight, bbox_bias, indices, slopes = saved[ctx.levels :]
    channels_last = rpn_loss.is_channels_last(features)
    dtype, num_anchors = features[0].dtype, ctx.num_anchors
    # Columns in the order of the patches: taps before channels where channels are neighbours in memory.
    ordered = conv_weight.permute(0, 2, 3, 1) if channels_last else conv_weight
    weight = ordered.to(dtype).flatten(1)  # [C', 9 C]
    patches = _patches_op(features, indices, num_anchors, channels_last)  # [R, 9 C]
    hidden = torch.addmm(conv_bias.to(dtype), patches, weight.t()).relu()  # [R, C']

    grad_outputs = _outputs_op(slopes, grad_losses, indices, num_anchors)  # [R, 5 A]
    grad_bias = grad_outputs.sum(0)  # [5 A]
    grad_outputs = grad_outputs.to(dtype)
    predictors = torch.cat([cls_weight.flatten(1), bbox_weight.flatten(1)]).to(dtype)  # [5 A, C']
    grad_predictors = grad_outputs.t() @ hidden  # [5 A, C']
    grad_hidden = torch.ops.aten.threshold_backward(grad_outputs @ predictors, hidden, 0)  # [R, C']

    grad_weight = (grad_hidden.t() @ patches).view(ordered.shape)
    grad_weight = grad_weight.permute(0, 3, 1, 2) if channels_last else grad_weight
    grad_features: list[Tensor | None] = [None] * ctx.levels
    if ctx.features_need_grad:
        sizes = [extent for f in features for extent in f.shape[2:]]
        grad_features = list(_scatter_op(grad_hidden @ weight, indices, sizes, num_anchors, channels_last))
    return (
        grad_features,
        grad_weight.to(conv_weight.dtype),
        grad_hidden.sum(0, dtype=slopes.dtype).to(conv_bias.dtype),
        grad_predictors[:num_anchors].view(cls_weight.shape).to(cls_weight.dtype),
        grad_bias[:num_anchors].to(cls_bias.dtype),
        grad_predictors[num_anchors:].view(bbox_weight.shape).to(bbox_weight.dtype),
        grad_bias[num_anchors:].to(bbox_bias.dtype),
        [None] * ctx.levels,
        [None] * ctx.levels,
        *ctx.no_gradient_of_sample,
    )


_library.register_autograd("rpn_head_loss", _gradient, _context)


def rpn_head_outputs(
    features: Sequence[Tensor], conv_weight: Tensor, conv_bias: Tensor, cls_weight: Tensor, cls_bias: Tensor,
    bbox_weight: Tensor, bbox_bias: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The head that :func:`rpn_head_loss` differentiates: 3x3 convolution, ReLU, two 1x1 convolutions, a level each.

    Returns:
        For each level objectness [N, A, H, W] and deltas [N, 4 A, H, W].
    """
    objectness, deltas = [], []
    for f in features:
        hidden = functional.relu_(functional.conv2d(f, conv_weight, conv_bias, padding=1))
        objectness.append(functional.conv2d(hidden, cls_weight, cls_bias))
        deltas.append(functional.conv2d(hidden, bbox_weight, bbox_bias))
    return objectness, deltas


def rpn_head_loss(
    features: Sequence[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor,
    cls_weight: Tensor,
    cls_bias: Tensor,
    bbox_weight: Tensor,
    bbox_bias: Tensor,
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    indices: Tensor,
    num_positive: Tensor,
    num_sampled: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Tensor,
    *,
    anchors: Tensor | None = None,
    cells: Sequence[Tensor] | None = None,
    strides: Sequence[int] | None = None,
    beta: float = 1.0 / 9,
    box_offset: int = 0,
    normaliser: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`rpn_loss`, differentiated in the features and in the head's parameters, sparsely and exactly.

    Compute ``objectness`` and ``deltas`` under ``torch.no_grad()`` (:func:`rpn_head_outputs` is that head): they have
    no gradient here.

    Args:
        features: for each level [N, C, H, W], NCHW or channels_last, any float type.
        conv_weight, conv_bias: [C', C, 3, 3] and [C'], of the shared convolution with padding 1, a ReLU after it.
        cls_weight, cls_bias: [A, C', 1, 1] and [A]. bbox_weight, bbox_bias: [4 A, C', 1, 1] and [4 A].
        objectness, deltas, and the rest: as in :func:`rpn_loss`.

    Returns:
        Two scalars: objectness loss, box loss. Differentiable once.

    Raises:
        ValueError: for shapes or types that do not fit.
    """
    anchors, steps, normaliser = rpn_loss.check_sample(
        "rpn_head_loss", objectness, deltas, indices, num_positive, num_sampled, matched_idxs, gt_boxes, anchors,
        cells, strides, normaliser,
    )  # fmt: skip
    if beta < 0:
        raise ValueError(f"rpn_head_loss: beta must not be negative, got {beta}")
    if len(features) != len(objectness):
        raise ValueError(f"rpn_head_loss: {len(features)} levels of features but {len(objectness)} of objectness")
    for f, o in zip(features, objectness, strict=True):
        if f.dim() != 4 or f.shape[0] != o.shape[0] or f.shape[2:] != o.shape[2:] or f.dtype != features[0].dtype:
            raise ValueError(f"rpn_head_loss: features {f.dtype}{list(f.shape)} do not fit objectness {list(o.shape)}")
    num_anchors, channels = objectness[0].shape[1], features[0].shape[1]
    width = conv_weight.shape[0]
    expected = {
        "conv_weight": (conv_weight, (width, channels, 3, 3)),
        "conv_bias": (conv_bias, (width,)),
        "cls_weight": (cls_weight, (num_anchors, width, 1, 1)),
        "cls_bias": (cls_bias, (num_anchors,)),
        "bbox_weight": (bbox_weight, (4 * num_anchors, width, 1, 1)),
        "bbox_bias": (bbox_bias, (4 * num_anchors,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"rpn_head_loss: {name} must be {list(shape)}, got {list(tensor.shape)}")
    losses, _ = _forward_op(
        list(features), conv_weight, conv_bias, cls_weight, cls_bias, bbox_weight, bbox_bias,
        [o.detach() for o in objectness], [d.detach() for d in deltas], anchors, steps, indices, num_positive,
        num_sampled, matched_idxs, gt_boxes, normaliser, float(beta), box_offset,
    )  # fmt: skip
    objectness_loss, box_loss = losses.unbind()
    return objectness_loss, box_loss
