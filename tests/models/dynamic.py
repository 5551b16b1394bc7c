"""The losses of Mask R-CNN image by image, without padding: an oracle for the model's padded computation.

Transcribed from the rules of maskrcnn-benchmark (Python loops, boolean masks, shapes that depend on the data), sharing
with the model only the operators that have oracles of their own, the layers with weights, and the random draw.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

import fastrcnn_kernels as kernels
from fastrcnn.models import box_head, rpn
from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import BoxList, ImageList


def match(gt: Tensor, boxes: Tensor, high: float, low: float, allow_low_quality: bool) -> Tensor:
    """maskrcnn-benchmark's Matcher on the whole IoU matrix; -1 below ``low``, -2 between."""
    if len(gt) == 0:
        return torch.full((len(boxes),), -1)
    iou = kernels.box_iou(gt, boxes, box_offset=1)
    values, best = iou.max(dim=0)
    matched = best.clone()
    matched[values < low] = -1
    matched[(values >= low) & (values < high)] = -2
    if allow_low_quality:
        ties = (iou == iou.max(dim=1).values[:, None]).any(dim=0)
        matched[ties] = best[ties]
    return matched


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    absolute = difference.abs()
    return torch.where(absolute < beta, 0.5 * absolute**2 / beta, absolute - 0.5 * beta).sum()


def draw(labels: Tensor, size: int, fraction: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(positive, negative) indices of one image."""
    indices, num_positive, num_sampled = kernels.sample_balanced(labels[None], size, fraction, seed[None])
    return indices[0, : int(num_positive)], indices[0, int(num_positive) : int(num_sampled)]


def mask_target(polygons: list[Tensor], box: Tensor, side: int) -> Tensor:
    """Polygons moved by the box's corner, scaled to ``side`` in float32, rasterised by pycocotools."""
    x1, y1, x2, y2 = (np.float32(v) for v in box.tolist())
    ratio_x, ratio_y = np.float32(side / float(x2 - x1)), np.float32(side / float(y2 - y1))
    flat = []
    for polygon in polygons:
        points = polygon.numpy().astype(np.float32)
        flat.append(np.stack([(points[:, 0] - x1) * ratio_x, (points[:, 1] - y1) * ratio_y], 1).reshape(-1).tolist())
    merged = coco_mask.merge(coco_mask.frPyObjects([[float(v) for v in p] for p in flat], side, side))
    return torch.from_numpy(coco_mask.decode(merged))


def losses(model: GeneralizedRCNN, images: ImageList, targets: list[BoxList]) -> dict[str, Tensor]:
    """What ``model(images, targets)`` must give, computed without padding."""
    network, head = model.rpn, model.rpn.head
    features = model.backbone(images.tensors)
    objectness, deltas = head(features)
    anchors = network.anchor_generator(features)
    all_anchors = torch.cat(anchors)
    num_anchors = network.anchor_generator.num_anchors_per_cell
    state = (model.sampling_seed, model.sampling_step, images.ids)
    rpn_seeds = kernels.image_seeds(*state, rpn.SAMPLING_STREAM)
    box_seeds = kernels.image_seeds(*state, box_head.SAMPLING_STREAM)

    rpn_objectness: list[Tensor] = []
    rpn_box = torch.zeros((), dtype=torch.float64)
    rpn_labels: list[Tensor] = []
    candidates = []
    for n, target in enumerate(targets):
        height, width = images.image_sizes[n]
        logits, offsets = [], []
        for level_objectness, level_deltas in zip(objectness, deltas, strict=True):
            h, w = level_objectness.shape[-2:]
            logits.append(level_objectness[n].permute(1, 2, 0).reshape(-1))
            offsets.append(level_deltas[n].view(num_anchors, 4, h, w).permute(2, 3, 0, 1).reshape(-1, 4))
        # losses
        matched = match(target.boxes, all_anchors, network.fg_iou_threshold, network.bg_iou_threshold, True)
        labels = (matched >= 0).long()
        labels[matched == -2] = -1
        outside = (all_anchors[:, 0] < 0) | (all_anchors[:, 1] < 0)
        outside |= (all_anchors[:, 2] >= width) | (all_anchors[:, 3] >= height)
        labels[outside] = -1
        positive, negative = draw(labels, network.batch_size_per_image, network.positive_fraction, rpn_seeds[n])
        chosen = torch.cat([positive, negative])
        rpn_objectness.append(torch.cat(logits)[chosen])
        rpn_labels.append(labels[chosen])
        if len(positive):
            wanted = kernels.encode_boxes(target.boxes[matched[positive]], all_anchors[positive], box_offset=1)
            rpn_box = rpn_box + smooth_l1(torch.cat(offsets)[positive] - wanted, 1 / 9)
        # proposals
        boxes, scores = [], []
        for level_anchors, level_logits, level_offsets in zip(anchors, logits, offsets, strict=True):
            # by logit, ties by lower index: the sigmoids of large logits are all 1
            score, index = level_logits.detach().sort(descending=True, stable=True)
            score, index = score[: network.pre_nms_top_n[0]], index[: network.pre_nms_top_n[0]]
            box = kernels.decode_boxes(level_offsets.detach()[index], level_anchors[index], box_offset=1)
            box = kernels.clip_boxes_to_image(box, (height, width), box_offset=1)
            in_order = -torch.arange(len(box), dtype=box.dtype)
            keep = kernels.nms(box, in_order, network.nms_thresh, box_offset=1)[: network.post_nms_top_n[0]]
            boxes.append(box[keep])
            scores.append(score[keep])
        candidates.append((torch.cat(boxes), torch.cat(scores)))
    num_sampled = sum(len(x) for x in rpn_labels)
    result = {
        "loss_objectness": F.binary_cross_entropy_with_logits(
            torch.cat(rpn_objectness), torch.cat(rpn_labels).to(rpn_objectness[0].dtype)
        ),
        "loss_rpn_box_reg": rpn_box / num_sampled,
    }

    # the best proposals over the batch
    all_scores = torch.cat([scores for _, scores in candidates])
    best = all_scores.sort(descending=True, stable=True).indices[: network.fpn_post_nms_top_n[0]]
    is_best = torch.zeros(len(all_scores), dtype=torch.bool)
    is_best[best] = True
    box, mask = model.roi_heads["box"], model.roi_heads["mask"]
    class_logits, regressions, labels_all, mask_logits, mask_targets = [], [], [], [], []
    box_loss = torch.zeros((), dtype=torch.float64)
    start = 0
    for n, (target, (boxes, _)) in enumerate(zip(targets, candidates, strict=True)):
        proposals = torch.cat([boxes[is_best[start : start + len(boxes)]], target.boxes])
        start += len(boxes)
        matched = match(target.boxes, proposals, box.fg_iou_threshold, box.bg_iou_threshold, False)
        kind = (matched >= 0).long()
        positive, negative = draw(kind, box.batch_size_per_image, box.positive_fraction, box_seeds[n])
        chosen = torch.cat([positive, negative])
        labels = torch.zeros(len(chosen), dtype=torch.int64)
        labels[: len(positive)] = target.labels[matched[positive]]
        rois = torch.cat([torch.full((len(chosen), 1), n, dtype=proposals.dtype), proposals[chosen]], dim=1)
        logits, regression = box.predictor(box.feature_extractor(features, rois))
        class_logits.append(logits)
        regressions.append(regression)
        labels_all.append(labels)
        for row, index in enumerate(positive.tolist()):
            gt = int(matched[index])
            wanted = kernels.encode_boxes(
                target.boxes[gt][None], proposals[index][None], box.bbox_reg_weights, box_offset=1
            )[0]
            label = int(labels[row])
            box_loss = box_loss + smooth_l1(regression[row, 4 * label : 4 * label + 4] - wanted, 1.0)
            mask_targets.append(mask_target(target.masks.polygons[gt], proposals[index], mask.resolution))
        if len(positive):
            logits = mask.predictor(mask.feature_extractor(features, rois[: len(positive)]))
            mask_logits.append(logits[torch.arange(len(positive)), labels[: len(positive)]])
    result["loss_classifier"] = F.cross_entropy(torch.cat(class_logits), torch.cat(labels_all))
    result["loss_box_reg"] = box_loss / sum(len(x) for x in labels_all)
    if mask_logits:
        logits = torch.cat(mask_logits)
        result["loss_mask"] = F.binary_cross_entropy_with_logits(logits, torch.stack(mask_targets).to(logits.dtype))
    else:
        result["loss_mask"] = features[0].sum() * 0
    return result
