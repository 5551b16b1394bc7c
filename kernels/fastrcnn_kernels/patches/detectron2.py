"""The operators of detectron2. What it takes from torchvision is swapped in detectron2 only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastrcnn_kernels as kernels
from fastrcnn_kernels.patch import Function, Swap, close, close_with_gradient, on_each_device
from fastrcnn_kernels.patches.torchvision import (
    check_frozen_batch_norm,
    frozen_batch_norm,
    same_signature,
    sample_boxes,
)


@on_each_device
def _check_nms(original: Function, ours: Function, device: str) -> None:
    boxes, scores = sample_boxes(60, device), torch.rand(60, device=device)
    close(ours(boxes, scores, 0.5), original(boxes, scores, 0.5))


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, original: Function) -> Tensor:
    return kernels.batched_nms(boxes.float(), scores, idxs.long(), iou_threshold)


@on_each_device
def _check_batched_nms(original: Function, ours: Function, device: str) -> None:
    boxes, scores, idxs = sample_boxes(60, device), torch.rand(60, device=device), torch.arange(60, device=device) % 3
    close(ours(boxes, scores, idxs, 0.5), original(boxes, scores, idxs, 0.5))


@on_each_device
def _check_roi_align(original: Function, ours: Function, device: str) -> None:
    rois = torch.cat([torch.tensor([[0.0], [1], [1]], device=device), sample_boxes(3, device)], dim=1)

    def pooled(function: Function) -> Function:
        return lambda feature: function(feature, rois, (3, 2), 0.25, 0, True)

    close_with_gradient(pooled(original), pooled(ours), [torch.randn(2, 3, 25, 25, device=device)])


def _pool(self: Any, x: list[Tensor], box_lists: list[Any], *, original: Function) -> Tensor:
    from detectron2.layers import ROIAlign
    from detectron2.modeling import poolers
    from detectron2.structures import Boxes

    kinds = {(type(p), p.sampling_ratio, p.aligned) for p in self.level_poolers if isinstance(p, ROIAlign)}
    plain = len(kinds) == 1 and len(x) == len(self.level_poolers) and all(type(b) is Boxes for b in box_lists)
    if not plain or not box_lists or len(x) == 1 or any(type(p) is not ROIAlign for p in self.level_poolers):
        return original(self, x, box_lists)
    rois = poolers.convert_boxes_to_pooler_format(box_lists)
    levels = poolers.assign_boxes_to_levels(
        box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
    )
    first = self.level_poolers[0]
    scales = [p.spatial_scale for p in self.level_poolers]
    return kernels.multiscale_roi_align(x, rois, levels, self.output_size, scales, first.sampling_ratio, first.aligned)


@on_each_device
def _check_pool(original: Function, ours: Function, device: str) -> None:
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    pooler = ROIPooler((7, 7), (0.25, 0.125), 0, "ROIAlignV2")
    boxes = [Boxes(sample_boxes(9, device, side)) for side in (100.0, 900.0)]

    def pooled(function: Function) -> Function:
        return lambda *features: function(pooler, list(features), boxes)

    maps = [torch.randn(2, 3, size, size, device=device) for size in (64, 32)]
    close_with_gradient(pooled(original), pooled(ours), maps)


def _pairwise_iou(boxes1: Any, boxes2: Any, *, original: Function) -> Tensor:
    first, second = boxes1.tensor, boxes2.tensor
    if first.dtype != second.dtype or first.dtype not in (torch.float32, torch.float64):
        return original(boxes1, boxes2)
    return kernels.box_iou(first, second)


@on_each_device
def _check_pairwise_iou(original: Function, ours: Function, device: str) -> None:
    from detectron2.structures import Boxes

    pair = (
        Boxes(sample_boxes(12, device)),
        Boxes(torch.cat([sample_boxes(9, device), torch.zeros(1, 4, device=device)])),
    )
    close(ours(*pair), original(*pair))


def _get_deltas(self: Any, src_boxes: Tensor, target_boxes: Tensor, *, original: Function) -> Tensor:
    if src_boxes.dtype != target_boxes.dtype or src_boxes.dtype not in (torch.float32, torch.float64):
        return original(self, src_boxes, target_boxes)
    deltas = kernels.encode_boxes(target_boxes, src_boxes, self.weights)
    valid = (src_boxes[:, 2] > src_boxes[:, 0]).all().item()
    assert valid, "Input boxes to Box2BoxTransform are not valid!"
    return deltas


def _apply_deltas(self: Any, deltas: Tensor, boxes: Tensor, *, original: Function) -> Tensor:
    return kernels.decode_boxes(deltas.float(), boxes.float(), self.weights, clip=self.scale_clamp)


def _transform() -> Any:
    from detectron2.modeling.box_regression import Box2BoxTransform

    return Box2BoxTransform((10.0, 10.0, 5.0, 5.0))


@on_each_device
def _check_get_deltas(original: Function, ours: Function, device: str) -> None:
    pair = sample_boxes(12, device), sample_boxes(12, device).flip(0)
    close(ours(_transform(), *pair), original(_transform(), *pair))


@on_each_device
def _check_apply_deltas(original: Function, ours: Function, device: str) -> None:
    boxes = sample_boxes(12, device)

    def decoded(function: Function) -> Function:
        return lambda deltas: function(_transform(), deltas, boxes)

    close_with_gradient(decoded(original), decoded(ours), [torch.randn(12, 8, device=device)], atol=1e-3)


@on_each_device
def _check_frozen_batch_norm(original: Function, ours: Function, device: str) -> None:
    from detectron2.layers import FrozenBatchNorm2d

    check_frozen_batch_norm(FrozenBatchNorm2d(3), original, ours, device)


def _paste_masks(
    masks: Tensor, boxes: Any, image_shape: tuple[int, int], threshold: float = 0.5, *, original: Function
) -> Tensor:
    corners = boxes if isinstance(boxes, Tensor) else boxes.tensor
    pasted = kernels.paste_masks(
        masks.float(), corners, (int(image_shape[0]), int(image_shape[1])), threshold=threshold, convention="detectron2"
    )
    # detectron2 returns bool, and uint8 in its mode for visualisation and of no masks at all.
    return pasted.bool() if threshold >= 0 and len(masks) else pasted


@on_each_device
def _check_paste_masks(original: Function, ours: Function, device: str) -> None:
    from detectron2.structures import Boxes

    masks, boxes = torch.rand(6, 14, 14, device=device), Boxes(sample_boxes(6, device))
    found, expected = ours(masks, boxes, (90, 110)), original(masks, boxes, (90, 110))
    assert found.dtype == expected.dtype, f"{found.dtype} instead of {expected.dtype}"
    share = (found != expected).float().mean().item()
    assert share < 1e-4, f"{share:.1e} of the pixels differ"


def _deform_conv(self: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None, *, original: Function) -> Tensor:
    if x.numel() == 0:
        return original(self, x, offset) if mask is None else original(self, x, offset, mask)
    bias = getattr(self, "bias", None)
    x = kernels.deform_conv2d(x, offset, self.weight, bias, self.stride, self.padding, self.dilation, mask)
    if self.norm is not None:
        x = self.norm(x)
    return self.activation(x) if self.activation is not None else x


def _check_deform(name: str, with_mask: bool) -> Function:
    @on_each_device
    def check(original: Function, ours: Function, device: str) -> None:
        from detectron2 import layers

        layer = getattr(layers, name)(4, 6, 3, stride=2, padding=1, groups=2, deformable_groups=2).to(device)
        shapes = [(2, 4, 9, 8), (2, 36, 5, 4)] + ([(2, 18, 5, 4)] if with_mask else [])

        def convolved(function: Function) -> Function:
            return lambda *inputs: function(layer, *inputs)

        inputs = [torch.randn(shape, device=device) for shape in shapes]
        close_with_gradient(convolved(original), convolved(ours), inputs)

    return check


SWAPS = [
    Swap("detectron2.layers.nms:nms", same_signature("nms"), _check_nms),
    Swap("detectron2.layers.nms:batched_nms", _batched_nms, _check_batched_nms),
    Swap("detectron2.layers.roi_align:roi_align", same_signature("roi_align"), _check_roi_align),
    Swap("detectron2.modeling.poolers:ROIPooler.forward", _pool, _check_pool),
    Swap("detectron2.structures.boxes:pairwise_iou", _pairwise_iou, _check_pairwise_iou),
    Swap("detectron2.modeling.box_regression:Box2BoxTransform.get_deltas", _get_deltas, _check_get_deltas),
    Swap("detectron2.modeling.box_regression:Box2BoxTransform.apply_deltas", _apply_deltas, _check_apply_deltas),
    Swap("detectron2.layers.batch_norm:FrozenBatchNorm2d.forward", frozen_batch_norm, _check_frozen_batch_norm),
    Swap("detectron2.layers.mask_ops:paste_masks_in_image", _paste_masks, _check_paste_masks),
    Swap("detectron2.layers.deform_conv:DeformConv.forward", _deform_conv, _check_deform("DeformConv", False)),
    Swap(
        "detectron2.layers.deform_conv:ModulatedDeformConv.forward",
        _deform_conv,
        _check_deform("ModulatedDeformConv", True),
    ),
]

KEPT = {
    "detectron2.modeling.matcher:Matcher": "it gets the matrix of overlaps, which match_boxes never builds",
    "detectron2.modeling.sampling:subsample_labels": (
        "ours draws from a counter, not from torch's generator: a seeded run would train on other samples"
    ),
    "detectron2.layers.nms:nms_rotated": "we have no rotated boxes",
    "detectron2.layers.roi_align_rotated:ROIAlignRotated": "we have no rotated boxes",
    "fvcore.nn:sigmoid_focal_loss_jit": "a scripted function: its callers hold the compiled graph",
}
