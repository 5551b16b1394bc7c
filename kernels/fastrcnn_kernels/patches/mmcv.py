"""mmcv's operators (``mmcv.ops``, which mmdetection is built on)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastrcnn_kernels as kernels
from fastrcnn_kernels.patch import Function, Swap, close, close_with_gradient, on_each_device
from fastrcnn_kernels.patches.torchvision import sample_boxes


def _nms(
    boxes: Any,
    scores: Any,
    iou_threshold: float | None = None,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
    *,
    original: Function,
    **renamed: Any,
) -> Any:
    if not isinstance(boxes, Tensor) or not isinstance(scores, Tensor) or iou_threshold is None:
        options = renamed if iou_threshold is None else {"iou_threshold": iou_threshold, **renamed}
        options |= {"offset": offset, "score_threshold": score_threshold, "max_num": max_num}
        return original(boxes, scores, **options)
    above = (scores > score_threshold).nonzero().squeeze(1) if score_threshold > 0 else None
    some_boxes, some_scores = (boxes, scores) if above is None else (boxes[above], scores[above])
    keep = kernels.nms(some_boxes, some_scores, float(iou_threshold), box_offset=offset)
    keep = keep[:max_num] if max_num > 0 else keep
    keep = keep if above is None else above[keep]
    return torch.cat([boxes[keep], scores[keep][:, None]], dim=1), keep


@on_each_device
def _check_nms(original: Function, ours: Function, device: str) -> None:
    boxes, scores = sample_boxes(60, device), torch.rand(60, device=device)
    for options in ({"iou_threshold": 0.5}, {"iou_threshold": 0.4, "offset": 1, "score_threshold": 0.2, "max_num": 9}):
        close(ours(boxes, scores, **options), original(boxes, scores, **options))


def _roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
    *,
    original: Function,
) -> Tensor:
    if pool_mode != "avg":
        return original(input, rois, output_size, spatial_scale, sampling_ratio, pool_mode, aligned)
    return kernels.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)


@on_each_device
def _check_roi_align(original: Function, ours: Function, device: str) -> None:
    rois = torch.cat([torch.tensor([[0.0], [1], [1]], device=device), sample_boxes(3, device)], dim=1)

    def pooled(function: Function) -> Function:
        return lambda feature: function(feature, rois, (3, 2), 0.25, 0, "avg", True)

    close_with_gradient(pooled(original), pooled(ours), [torch.randn(2, 3, 25, 25, device=device)])


def _roi_pool(
    input: Tensor, rois: Tensor, output_size: Any, spatial_scale: float = 1.0, *, original: Function
) -> Tensor:
    return kernels.roi_pool(input, rois, output_size, spatial_scale)


@on_each_device
def _check_roi_pool(original: Function, ours: Function, device: str) -> None:
    rois = torch.cat([torch.tensor([[0.0], [1], [1]], device=device), sample_boxes(3, device)], dim=1)

    def pooled(function: Function) -> Function:
        return lambda feature: function(feature, rois, (3, 2), 0.25)

    close_with_gradient(pooled(original), pooled(ours), [torch.randn(2, 3, 25, 25, device=device)])


def _bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    mode: str = "iou",
    aligned: bool = False,
    offset: int = 0,
    *,
    original: Function,
) -> Tensor:
    floating = bboxes1.dtype == bboxes2.dtype and bboxes1.dtype in (torch.float32, torch.float64)
    if mode != "iou" or aligned or not floating or 0 in (bboxes1.shape[0], bboxes2.shape[0]):
        return original(bboxes1, bboxes2, mode=mode, aligned=aligned, offset=offset)
    return kernels.box_iou(bboxes1, bboxes2, box_offset=offset)


@on_each_device
def _check_bbox_overlaps(original: Function, ours: Function, device: str) -> None:
    pair = sample_boxes(12, device), sample_boxes(9, device)
    for offset in (0, 1):
        close(ours(*pair, offset=offset), original(*pair, offset=offset))


def _modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    deform_groups: int = 1,
    *,
    original: Function,
) -> Tensor:
    return kernels.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


@on_each_device
def _check_modulated_deform_conv2d(original: Function, ours: Function, device: str) -> None:
    def convolved(function: Function) -> Function:
        return lambda x, offset, mask, weight, bias: function(x, offset, mask, weight, bias, 2, 1, 1, 2, 2)

    shapes = (2, 4, 9, 8), (2, 36, 5, 4), (2, 18, 5, 4), (6, 2, 3, 3), (6,)
    close_with_gradient(convolved(original), convolved(ours), [torch.randn(shape, device=device) for shape in shapes])


def _deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
    *,
    original: Function,
) -> Tensor:
    return kernels.deform_conv2d(input, offset, weight, None, stride, padding, dilation)


@on_each_device
def _check_deform_conv2d(original: Function, ours: Function, device: str) -> None:
    def convolved(function: Function) -> Function:
        return lambda x, offset, weight: function(x, offset, weight, 2, 1, 1, 2, 2)

    shapes = (2, 4, 9, 8), (2, 36, 5, 4), (6, 2, 3, 3)
    close_with_gradient(convolved(original), convolved(ours), [torch.randn(shape, device=device) for shape in shapes])


SWAPS = [
    Swap("mmcv.ops.nms:nms", _nms, _check_nms),
    Swap("mmcv.ops.roi_align:roi_align", _roi_align, _check_roi_align),
    Swap("mmcv.ops.roi_pool:roi_pool", _roi_pool, _check_roi_pool),
    Swap("mmcv.ops.bbox:bbox_overlaps", _bbox_overlaps, _check_bbox_overlaps),
    Swap("mmcv.ops.deform_conv:deform_conv2d", _deform_conv2d, _check_deform_conv2d),
    Swap(
        "mmcv.ops.modulated_deform_conv:modulated_deform_conv2d",
        _modulated_deform_conv2d,
        _check_modulated_deform_conv2d,
    ),
]

KEPT = {
    "mmcv.ops.nms:batched_nms": "it moves the boxes of each group apart and calls nms, which is ours then",
    "mmcv.ops.nms:soft_nms": "its scores are those of its own order of updates; call fastrcnn_kernels.soft_nms",
    "mmcv.ops.focal_loss:sigmoid_focal_loss": "class labels without background, and weights a class: another function",
}
