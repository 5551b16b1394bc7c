"""torchvision's operators and the parts of its detection models that are built on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrcnn_kernels as kernels
from fastrcnn_kernels.patch import Function, Swap, close, close_with_gradient, on_each_device

Check = Callable[[Function, Function], None]


def sample_boxes(count: int, device: str, side: float = 100.0) -> Tensor:
    """Boxes of an image of ``side`` x ``side`` pixels, some of them alike."""
    corner = torch.rand(count, 2, device=device) * side * 0.7
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2, device=device) * side * 0.3], dim=1)
    boxes[count // 2 :] = boxes[: count - count // 2] + torch.rand(count - count // 2, 4, device=device)
    return boxes


def same_signature(name: str) -> Function:
    """A replacement by our operator of this name, which takes the same arguments."""

    def call(*args: Any, original: Function, **options: Any) -> Any:
        return getattr(kernels, name)(*args, **options)

    return call


@on_each_device
def _check_nms(original: Function, ours: Function, device: str) -> None:
    boxes, scores = sample_boxes(60, device), torch.rand(60, device=device)
    close(ours(boxes, scores, 0.5), original(boxes, scores, 0.5))


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, original: Function) -> Tensor:
    return kernels.batched_nms(boxes, scores, idxs.long(), iou_threshold)


@on_each_device
def _check_batched_nms(original: Function, ours: Function, device: str) -> None:
    boxes, scores, idxs = sample_boxes(60, device), torch.rand(60, device=device), torch.arange(60, device=device) % 3
    close(ours(boxes, scores, idxs, 0.5), original(boxes, scores, idxs, 0.5))


def _pairwise(name: str) -> Function:
    def call(boxes1: Tensor, boxes2: Tensor, *rest: Any, original: Function, **options: Any) -> Tensor:
        if rest or options or not (boxes1.is_floating_point() and boxes1.dtype == boxes2.dtype):
            return original(boxes1, boxes2, *rest, **options)
        return getattr(kernels, name)(boxes1, boxes2)

    return call


@on_each_device
def _check_pairwise(original: Function, ours: Function, device: str) -> None:
    close_with_gradient(original, ours, [sample_boxes(12, device), sample_boxes(9, device)])


@on_each_device
def _check_roi_align(original: Function, ours: Function, device: str) -> None:
    boxes = [sample_boxes(5, device), sample_boxes(3, device)]
    for ratio, aligned in ((2, False), (-1, True)):

        def pooled(function: Function, ratio: int = ratio, aligned: bool = aligned) -> Function:
            return lambda feature: function(feature, boxes, (3, 2), 0.25, ratio, aligned)

        close_with_gradient(pooled(original), pooled(ours), [torch.randn(2, 3, 25, 25, device=device)])


def _multiscale(
    x_filtered: list[Tensor],
    boxes: list[Tensor],
    output_size: Any,
    sampling_ratio: int,
    scales: Any,
    mapper: Any,
    *,
    original: Function,
) -> Tensor:
    if scales is None or mapper is None or len({f.dtype for f in x_filtered}) > 1:
        return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
    image = [b.new_full((len(b), 1), i) for i, b in enumerate(boxes)]
    rois = torch.cat([torch.cat(image), torch.cat(boxes)], dim=1)
    levels = mapper(boxes) if len(x_filtered) > 1 else torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    return kernels.multiscale_roi_align(x_filtered, rois, levels, output_size, scales, sampling_ratio)


@on_each_device
def _check_multiscale(original: Function, ours: Function, device: str) -> None:
    from torchvision.ops import poolers

    boxes = [sample_boxes(9, device, side) for side in (100.0, 900.0)]
    maps = [torch.randn(2, 3, size, size, device=device) for size in (64, 32)]
    mapper = poolers.initLevelMapper(2, 3)

    def pooled(function: Function) -> Function:
        return lambda *features: function(list(features), boxes, (7, 7), 2, [0.25, 0.125], mapper)

    close_with_gradient(pooled(original), pooled(ours), maps)


def _encode_single(self: Any, reference_boxes: Tensor, proposals: Tensor, *, original: Function) -> Tensor:
    if reference_boxes.dtype not in (torch.float32, torch.float64) or proposals.dtype != reference_boxes.dtype:
        return original(self, reference_boxes, proposals)
    return kernels.encode_boxes(reference_boxes, proposals, self.weights)


def _decode_single(self: Any, rel_codes: Tensor, boxes: Tensor, *, original: Function) -> Tensor:
    if rel_codes.dtype not in (torch.float32, torch.float64):
        return original(self, rel_codes, boxes)
    return kernels.decode_boxes(rel_codes, boxes.to(rel_codes.dtype), self.weights, clip=self.bbox_xform_clip)


def _coder() -> Any:
    from torchvision.models.detection._utils import BoxCoder

    return BoxCoder((10.0, 10.0, 5.0, 5.0))


@on_each_device
def _check_encode(original: Function, ours: Function, device: str) -> None:
    pair = sample_boxes(12, device), sample_boxes(12, device).flip(0)
    close(ours(_coder(), *pair), original(_coder(), *pair))


@on_each_device
def _check_decode(original: Function, ours: Function, device: str) -> None:
    boxes = sample_boxes(12, device)

    def decoded(function: Function) -> Function:
        return lambda codes: function(_coder(), codes, boxes)

    close_with_gradient(decoded(original), decoded(ours), [torch.randn(12, 8, device=device) * 20], atol=1e-3)


def _matched(gt_boxes: Tensor, boxes: Tensor, matcher: Any) -> Tensor:
    """int64 [A] of one image: index, -1 below the low threshold, -2 between: the numbers of torchvision's Matcher."""
    return kernels.match_boxes(
        gt_boxes[None],
        torch.tensor([len(gt_boxes)], device=gt_boxes.device),
        boxes,
        high_threshold=matcher.high_threshold,
        low_threshold=matcher.low_threshold,
        allow_low_quality_matches=matcher.allow_low_quality_matches,
    )[0]


def _plain(matcher: Any, boxes: Any) -> bool:
    from torchvision.models.detection._utils import Matcher

    return type(matcher) is Matcher and all(b.dtype in (torch.float32, torch.float64) for b in boxes)


def _assign_targets_to_anchors(self: Any, anchors: Any, targets: Any, *, original: Function) -> Any:
    from torchvision.ops import boxes as box_ops

    own = getattr(box_ops.box_iou, "__fastrcnn_original__", box_ops.box_iou)
    similarity = getattr(self.box_similarity, "__fastrcnn_original__", self.box_similarity)
    if similarity is not own or not _plain(self.proposal_matcher, anchors):
        return original(self, anchors, targets)
    labels, matched_gt_boxes = [], []
    for image_anchors, target in zip(anchors, targets, strict=True):
        gt_boxes = target["boxes"]
        if gt_boxes.numel() == 0:
            matched_gt_boxes.append(torch.zeros_like(image_anchors, dtype=torch.float32))
            labels.append(image_anchors.new_zeros(len(image_anchors), dtype=torch.float32))
            continue
        matched = _matched(gt_boxes.to(image_anchors.dtype), image_anchors, self.proposal_matcher)
        matched_gt_boxes.append(gt_boxes[matched.clamp(min=0)])
        labels.append((matched >= 0).float() - (matched == self.proposal_matcher.BETWEEN_THRESHOLDS).float())
    return labels, matched_gt_boxes


@on_each_device
def _check_anchors(original: Function, ours: Function, device: str) -> None:
    from types import SimpleNamespace

    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import boxes as box_ops

    rpn = SimpleNamespace(box_similarity=box_ops.box_iou, proposal_matcher=Matcher(0.7, 0.3, True))
    anchors = [sample_boxes(200, device), sample_boxes(50, device)]
    targets = [{"boxes": sample_boxes(4, device)}, {"boxes": torch.zeros(0, 4, device=device)}]
    close(ours(rpn, anchors, targets), original(rpn, anchors, targets))


def _assign_targets_to_proposals(
    self: Any, proposals: Any, gt_boxes: Any, gt_labels: Any, *, original: Function
) -> Any:
    if not _plain(self.proposal_matcher, proposals):
        return original(self, proposals, gt_boxes, gt_labels)
    matched_idxs, labels = [], []
    for boxes, gts, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
        if gts.numel() == 0:
            matched = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
            classes = classes.new_zeros(1)
        else:
            matched = _matched(gts, boxes, self.proposal_matcher)
        index = matched.clamp(min=0)
        label = classes[index].long()
        label = torch.where(matched == self.proposal_matcher.BELOW_LOW_THRESHOLD, 0, label)
        labels.append(torch.where(matched == self.proposal_matcher.BETWEEN_THRESHOLDS, -1, label))
        matched_idxs.append(index)
    return matched_idxs, labels


@on_each_device
def _check_proposals(original: Function, ours: Function, device: str) -> None:
    from types import SimpleNamespace

    from torchvision.models.detection._utils import Matcher

    heads = SimpleNamespace(proposal_matcher=Matcher(0.5, 0.4, False))
    proposals = [sample_boxes(200, device), sample_boxes(50, device)]
    gts = [sample_boxes(4, device), torch.zeros(0, 4, device=device)]
    classes = [torch.arange(1, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)]
    close(ours(heads, proposals, gts, classes), original(heads, proposals, gts, classes))


@on_each_device
def _check_roi_pool(original: Function, ours: Function, device: str) -> None:
    boxes = [sample_boxes(5, device), sample_boxes(3, device)]

    def pooled(function: Function) -> Function:
        return lambda feature: function(feature, boxes, (3, 2), 0.25)

    close_with_gradient(pooled(original), pooled(ours), [torch.randn(2, 3, 25, 25, device=device)])


@on_each_device
def _check_deform_conv2d(original: Function, ours: Function, device: str) -> None:
    def convolved(function: Function) -> Function:
        return lambda x, offset, weight, bias, mask: function(x, offset, weight, bias, 2, 1, 1, mask)

    shapes = (2, 4, 9, 8), (2, 36, 5, 4), (6, 2, 3, 3), (6,), (2, 18, 5, 4)
    close_with_gradient(convolved(original), convolved(ours), [torch.randn(shape, device=device) for shape in shapes])


@on_each_device
def _check_focal_loss(original: Function, ours: Function, device: str) -> None:
    targets = (torch.rand(7, 5, device=device) < 0.3).float()
    for reduction in ("none", "mean"):

        def loss(function: Function, reduction: str = reduction) -> Function:
            return lambda inputs: function(inputs, targets, 0.25, 2, reduction)

        close_with_gradient(loss(original), loss(ours), [torch.randn(7, 5, device=device) * 5])


@on_each_device
def check_box_loss(original: Function, ours: Function, device: str) -> None:
    """IoU losses of pairs, with the gradients of both sides."""
    close_with_gradient(original, ours, [sample_boxes(9, device), sample_boxes(9, device).flip(0)])


def frozen_batch_norm(self: Any, x: Tensor, *, original: Function) -> Tensor:
    """``forward`` of a FrozenBatchNorm2d; torchvision's and detectron2's have the same buffers."""
    if x.dtype != self.weight.dtype:
        return original(self, x)
    return kernels.frozen_batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)


def check_frozen_batch_norm(layer: Any, original: Function, ours: Function, device: str) -> None:
    """Results and gradient of ``forward`` of a FrozenBatchNorm2d of 3 channels."""
    layer = layer.to(device)
    for buffer in layer.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)

    def normalised(function: Function) -> Function:
        return lambda x: function(layer, x)

    close_with_gradient(normalised(original), normalised(ours), [torch.randn(2, 3, 5, 4, device=device)])


@on_each_device
def _check_frozen_batch_norm(original: Function, ours: Function, device: str) -> None:
    from torchvision.ops import FrozenBatchNorm2d

    check_frozen_batch_norm(FrozenBatchNorm2d(3), original, ours, device)


def _postprocess_detections(
    self: Any, class_logits: Tensor, box_regression: Tensor, proposals: Any, image_shapes: Any, *, original: Function
) -> Any:
    from torchvision.models.detection._utils import BoxCoder

    if type(self.box_coder) is not BoxCoder or class_logits.dtype not in (torch.float32, torch.float64):
        return original(self, class_logits, box_regression, proposals, image_shapes)
    counts = [len(boxes) for boxes in proposals]
    decoded = self.box_coder.decode(box_regression, proposals).split(counts)
    probabilities = class_logits.softmax(-1).split(counts)
    all_boxes, all_scores, all_labels = [], [], []
    for boxes, scores, shape in zip(decoded, probabilities, image_shapes, strict=True):
        found = kernels.multiclass_nms(
            boxes,
            scores,
            self.score_thresh,
            self.nms_thresh,
            self.detections_per_img,
            image_size=torch.tensor(shape, device=boxes.device),
            min_size=1e-2,
            background=0,
        )
        all_boxes.append(found[0])
        all_scores.append(found[1])
        all_labels.append(found[2])
    return all_boxes, all_scores, all_labels


@on_each_device
def _check_postprocess(original: Function, ours: Function, device: str) -> None:
    from types import SimpleNamespace

    heads = SimpleNamespace(box_coder=_coder(), score_thresh=0.05, nms_thresh=0.5, detections_per_img=20)
    proposals = [sample_boxes(40, device), sample_boxes(9, device)]
    logits, deltas = torch.randn(49, 5, device=device) * 2, torch.randn(49, 20, device=device)
    shapes = [(90, 100), (80, 70)]
    close(ours(heads, logits, deltas, proposals, shapes), original(heads, logits, deltas, proposals, shapes), atol=1e-3)


def _heatmaps_to_keypoints(maps: Tensor, rois: Tensor, *, original: Function) -> Any:
    found = kernels.keypoints_from_heatmaps(maps, rois)  # [K, J, 3]
    return torch.cat([found[..., :2], torch.ones_like(found[..., :1])], dim=-1), found[..., 2]


@on_each_device
def _check_keypoints(original: Function, ours: Function, device: str) -> None:
    maps, boxes = torch.randn(4, 3, 14, 14, device=device), sample_boxes(4, device)
    close(ours(maps, boxes), original(maps, boxes), atol=1e-3)


SWAPS = [
    Swap("torchvision.ops.boxes:nms", same_signature("nms"), _check_nms),
    Swap("torchvision.ops.boxes:batched_nms", _batched_nms, _check_batched_nms),
    *[
        Swap(f"torchvision.ops.boxes:{name}", _pairwise(name), _check_pairwise)
        for name in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
    ],
    Swap("torchvision.ops.roi_align:roi_align", same_signature("roi_align"), _check_roi_align),
    Swap("torchvision.ops.roi_pool:roi_pool", same_signature("roi_pool"), _check_roi_pool),
    Swap("torchvision.ops.deform_conv:deform_conv2d", same_signature("deform_conv2d"), _check_deform_conv2d),
    Swap("torchvision.ops.focal_loss:sigmoid_focal_loss", same_signature("sigmoid_focal_loss"), _check_focal_loss),
    *[
        Swap(f"torchvision.ops.{module}:{name}", same_signature(name), check_box_loss)
        for module, name in (
            ("giou_loss", "generalized_box_iou_loss"),
            ("diou_loss", "distance_box_iou_loss"),
            ("ciou_loss", "complete_box_iou_loss"),
        )
    ],
    Swap("torchvision.ops.misc:FrozenBatchNorm2d.forward", frozen_batch_norm, _check_frozen_batch_norm),
    Swap("torchvision.ops.poolers:_multiscale_roi_align", _multiscale, _check_multiscale),
    Swap("torchvision.models.detection._utils:BoxCoder.encode_single", _encode_single, _check_encode),
    Swap("torchvision.models.detection._utils:BoxCoder.decode_single", _decode_single, _check_decode),
    Swap(
        "torchvision.models.detection.rpn:RegionProposalNetwork.assign_targets_to_anchors",
        _assign_targets_to_anchors,
        _check_anchors,
    ),
    Swap(
        "torchvision.models.detection.roi_heads:RoIHeads.assign_targets_to_proposals",
        _assign_targets_to_proposals,
        _check_proposals,
    ),
    Swap(
        "torchvision.models.detection.roi_heads:RoIHeads.postprocess_detections",
        _postprocess_detections,
        _check_postprocess,
    ),
    Swap("torchvision.models.detection.roi_heads:heatmaps_to_keypoints", _heatmaps_to_keypoints, _check_keypoints),
]

KEPT = {
    "torchvision.ops.boxes:clip_boxes_to_image": "one elementwise pass: PyTorch's is as fast",
    "torchvision.ops.boxes:remove_small_boxes": "one elementwise pass: PyTorch's is as fast",
    "torchvision.models.detection._utils:BalancedPositiveNegativeSampler": (
        "ours draws from a counter, not from torch's generator: a seeded run would train on other samples"
    ),
    "torchvision.models.detection.roi_heads:paste_masks_in_image": (
        "it returns probabilities as dense float images; fastrcnn_kernels.paste_masks returns the masks themselves"
    ),
    "torchvision.models.detection.roi_heads:maskrcnn_loss": (
        "it gets the logits of all classes, which is what our mask loss avoids; its targets are pooled by our roi_align"
    ),
    "torchvision.models.detection.roi_heads:fastrcnn_loss": "PyTorch's losses on a few hundred rows: nothing to gain",
    "torchvision.models.detection.transform:GeneralizedRCNNTransform": "it resizes floating point images, ours uint8",
}
