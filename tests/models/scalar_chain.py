"""Mask R-CNN from head outputs to losses and detections in plain Python: the rules of three systems, a number a time.

Written from the descriptions of the systems, not from :mod:`fastrcnn.conventions`: ``RULES`` says again, independently,
what each does. Layers with weights are the model's own; everything between them is loops over Python floats. Samplers
take every candidate, so that nothing is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from fastrcnn.models.detector import GeneralizedRCNN
from fastrcnn.structures import BoxList, ImageList

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Rules:
    """What one system does. ``wide`` is 1 where a box of inclusive pixels is ``x2 - x1 + 1`` wide."""

    wide: int
    anchor: str
    straddle: bool
    wanted_samples: bool
    rpn_beta: float
    box_beta: float
    over_batch: bool
    smallest: float
    strictly: bool
    log_inside: float
    log_outside: float
    half_pixel: bool
    samples: int
    smallest_detection: float
    drop_empty: bool
    soft_masks: bool


RULES = {
    "maskrcnn_benchmark": Rules(
        wide=1, anchor="corner", straddle=True, wanted_samples=False, rpn_beta=1 / 9, box_beta=1.0, over_batch=True,
        smallest=0.0, strictly=False, log_inside=1e-6, log_outside=0.0, half_pixel=False, samples=2,
        smallest_detection=-math.inf, drop_empty=False, soft_masks=False,
    ),
    "detectron2": Rules(
        wide=0, anchor="exact", straddle=False, wanted_samples=True, rpn_beta=0.0, box_beta=0.0, over_batch=False,
        smallest=0.0, strictly=True, log_inside=1e-8, log_outside=0.0, half_pixel=True, samples=0,
        smallest_detection=-math.inf, drop_empty=True, soft_masks=False,
    ),
    "torchvision": Rules(
        wide=0, anchor="rounded", straddle=False, wanted_samples=False, rpn_beta=1 / 9, box_beta=1 / 9,
        over_batch=False, smallest=1e-3, strictly=False, log_inside=0.0, log_outside=1e-6, half_pixel=False, samples=2,
        smallest_detection=1e-2, drop_empty=False, soft_masks=True,
    ),
}  # fmt: skip
SIZES, STRIDES, RATIOS = (32, 64, 128, 256, 512), (4, 8, 16, 32, 64), (0.5, 1.0, 2.0)


def level_anchors(rules: Rules, level: int, grid: tuple[int, int], padded: tuple[int, int]) -> list[Box]:
    """Anchors of one level in the order y, x, ratio."""
    size, stride = SIZES[level], STRIDES[level]
    cell = []
    for ratio in RATIOS:
        if rules.anchor == "corner":  # sides rounded at the size of the stride, then enlarged about the cell's centre
            width = float(np.round(math.sqrt(stride * stride / ratio)))
            height = float(np.round(width * ratio))
            width, height, centre = width * size / stride, height * size / stride, (stride - 1) / 2
            cell.append((centre - (width - 1) / 2, centre - (height - 1) / 2,
                         centre + (width - 1) / 2, centre + (height - 1) / 2))  # fmt: skip
        else:
            width, height = math.sqrt(size * size / ratio), math.sqrt(size * size * ratio)
            half_width, half_height = width / 2, height / 2
            if rules.anchor == "rounded":
                half_width, half_height = float(np.round(half_width)), float(np.round(half_height))
            else:  # kept in float32, as the cells of every system are
                half_width, half_height = float(np.float32(half_width)), float(np.float32(half_height))
            cell.append((-half_width, -half_height, half_width, half_height))
    step_y, step_x = (padded[0] // grid[0], padded[1] // grid[1]) if rules.anchor == "rounded" else (stride, stride)
    return [
        (a[0] + x * step_x, a[1] + y * step_y, a[2] + x * step_x, a[3] + y * step_y)
        for y in range(grid[0])
        for x in range(grid[1])
        for a in cell
    ]


def area(rules: Rules, box: Box) -> float:
    return (box[2] - box[0] + rules.wide) * (box[3] - box[1] + rules.wide)


def iou(rules: Rules, a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + rules.wide
    height = min(a[3], b[3]) - max(a[1], b[1]) + rules.wide
    inner = max(width, 0.0) * max(height, 0.0)
    total = area(rules, a) + area(rules, b) - inner
    return inner / total if total > 0 else 0.0


def encode(rules: Rules, truth: Box, box: Box, weights: tuple[float, ...]) -> list[float]:
    w, h = box[2] - box[0] + rules.wide, box[3] - box[1] + rules.wide
    tw, th = truth[2] - truth[0] + rules.wide, truth[3] - truth[1] + rules.wide
    return [
        weights[0] * (truth[0] + tw / 2 - box[0] - w / 2) / w,
        weights[1] * (truth[1] + th / 2 - box[1] - h / 2) / h,
        weights[2] * math.log(tw / w),
        weights[3] * math.log(th / h),
    ]


def decode(rules: Rules, deltas: list[float], box: Box, weights: tuple[float, ...]) -> Box:
    w, h = box[2] - box[0] + rules.wide, box[3] - box[1] + rules.wide
    dx, dy, dw, dh = (d / weight for d, weight in zip(deltas, weights, strict=True))
    x, y = box[0] + w / 2 + dx * w, box[1] + h / 2 + dy * h
    w, h = w * math.exp(min(dw, math.log(62.5))), h * math.exp(min(dh, math.log(62.5)))
    return x - w / 2, y - h / 2, x + w / 2 - rules.wide, y + h / 2 - rules.wide


def clip(rules: Rules, box: Box, size: tuple[int, int]) -> Box:
    right, bottom = size[1] - rules.wide, size[0] - rules.wide
    return tuple(min(max(v, 0.0), limit) for v, limit in zip(box, (right, bottom) * 2, strict=True))  # type: ignore


def nms(rules: Rules, boxes: list[Box], threshold: float) -> list[int]:
    """Indices kept of boxes that are in order."""
    kept: list[int] = []
    for i, box in enumerate(boxes):
        if all(iou(rules, boxes[j], box) <= threshold for j in kept):
            kept.append(i)
    return kept


def match(rules: Rules, truth: list[Box], boxes: list[Box], high: float, low: float, rescue: bool) -> list[int]:
    """-1 below ``low``, -2 between; with ``rescue`` the best boxes of each truth get their own best truth back."""
    if not truth:
        return [-1] * len(boxes)
    table = [[iou(rules, t, box) for t in truth] for box in boxes]
    best = [row.index(max(row)) for row in table]
    result = [b if row[b] >= high else (-1 if row[b] < low else -2) for row, b in zip(table, best, strict=True)]
    if rescue:
        for t in range(len(truth)):
            top = max(row[t] for row in table)
            result = [best[i] if row[t] == top else result[i] for i, row in enumerate(table)]
    return result


def smooth_l1(a: list[float], b: list[float], beta: float) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        d = abs(x - y)
        total += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    return total


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def roi_align(
    image: list[list[float]], box: Box, scale: float, side: int, half: bool, samples: int
) -> list[list[float]]:
    shift = 0.5 if half else 0.0
    x1, y1 = box[0] * scale - shift, box[1] * scale - shift
    w, h = box[2] * scale - shift - x1, box[3] * scale - shift - y1
    if not half:
        w, h = max(w, 1.0), max(h, 1.0)
    rows, columns = len(image), len(image[0])
    ny, nx = (samples or max(math.ceil(h / side), 0)), (samples or max(math.ceil(w / side), 0))

    def value(y: float, x: float) -> float:
        if y < -1 or y > rows or x < -1 or x > columns:
            return 0.0
        y, x = max(y, 0.0), max(x, 0.0)
        top, left = min(int(y), rows - 1), min(int(x), columns - 1)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        fy, fx = (y - top if top < rows - 1 else 0.0), (x - left if left < columns - 1 else 0.0)
        upper = image[top][left] * (1 - fx) + image[top][right] * fx
        lower = image[bottom][left] * (1 - fx) + image[bottom][right] * fx
        return upper * (1 - fy) + lower * fy

    return [
        [
            sum(
                value(y1 + (i + (a + 0.5) / ny) * h / side, x1 + (j + (b + 0.5) / nx) * w / side)
                for a in range(ny)
                for b in range(nx)
            )
            / max(ny * nx, 1)
            for j in range(side)
        ]
        for i in range(side)
    ]


def pool(rules: Rules, maps: list[Any], box: Box, side: int) -> list[Any]:
    """[C][side][side] from the level of the box; ``maps`` are [level][C][H][W]."""
    root = math.sqrt(max(area(rules, box), 0.0)) / 224 + rules.log_inside
    level = -9 if root <= 0 else math.floor(4 + math.log2(root) + rules.log_outside)
    level = min(max(level, 2), 5)
    return [roi_align(m, box, 0.5**level, side, rules.half_pixel, rules.samples) for m in maps[level - 2]]


def mask_target(rules: Rules, polygons: list[Tensor], box: Box, side: int, size: tuple[int, int]) -> Any:
    """[side, side]: the polygons drawn in the box, or the shares of the drawn image."""
    if rules.soft_masks:
        flat = [p.double().reshape(-1).tolist() for p in polygons]
        image = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, *size)))
        return np.array(roi_align(image.astype(float).tolist(), box, 1.0, side, False, 0))
    corner = np.float32(box[:2])
    ratio = np.float32([side / float(np.float32(box[2 + i]) - np.float32(box[i])) for i in range(2)])
    flat = [((p.numpy().astype(np.float32) - corner) * ratio).reshape(-1).astype(float).tolist() for p in polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, side, side)))


@dataclass
class Outputs:
    """The head's outputs of one image as lists: per level anchors, logits and deltas."""

    anchors: list[list[Box]]
    logits: list[list[float]]
    deltas: list[list[list[float]]]


def head_outputs(model: GeneralizedRCNN, rules: Rules, images: ImageList) -> tuple[list[Outputs], list[list[Any]]]:
    """For each image the outputs of the RPN, and its feature maps [level][C][H][W]."""
    features = model.backbone(images.tensors)
    objectness, deltas = model.rpn.head(features)
    outputs = []
    for n in range(len(images)):
        one = Outputs([], [], [])
        for level, (o, d) in enumerate(zip(objectness, deltas, strict=True)):
            h, w = o.shape[-2:]
            one.anchors.append(level_anchors(rules, level, (h, w), images.tensors.shape[-2:]))  # type: ignore
            one.logits.append(o[n].permute(1, 2, 0).reshape(-1).tolist())
            one.deltas.append(d[n].view(-1, 4, h, w).permute(2, 3, 0, 1).reshape(-1, 4).tolist())
        outputs.append(one)
    return outputs, [[f[n].tolist() for f in features] for n in range(len(images))]


def rpn_losses(rules: Rules, outputs: list[Outputs], images: ImageList, targets: list[BoxList], wanted: int) -> Any:
    objectness = box = 0.0
    sampled = 0
    for one, (height, width), target in zip(outputs, images.image_sizes, targets, strict=True):
        truth = [tuple(b) for b in target.boxes.tolist()]
        anchors, logits, deltas = (list(chain(*parts)) for parts in (one.anchors, one.logits, one.deltas))
        for i, m in enumerate(match(rules, truth, anchors, 0.7, 0.3, True)):  # type: ignore
            a = anchors[i]
            outside = a[0] < 0 or a[1] < 0 or a[2] >= width or a[3] >= height
            if m == -2 or (rules.straddle and outside):
                continue
            sampled += 1
            objectness += softplus(-logits[i] if m >= 0 else logits[i])
            if m >= 0:
                target_deltas = encode(rules, truth[m], a, (1, 1, 1, 1))  # type: ignore
                box += smooth_l1(deltas[i], target_deltas, rules.rpn_beta)
    by = wanted * len(outputs) if rules.wanted_samples else sampled
    return {"loss_objectness": objectness / by, "loss_rpn_box_reg": box / by}


def proposals(rules: Rules, outputs: list[Outputs], images: ImageList, *, pre: int, post: int, over_batch: bool) -> Any:
    """For each image the boxes, best first within a level; ``post`` counts over the batch or for each image."""
    everything = []
    for n, (one, size) in enumerate(zip(outputs, images.image_sizes, strict=True)):
        for anchors, logits, deltas in zip(one.anchors, one.logits, one.deltas, strict=True):
            order = sorted(range(len(logits)), key=lambda i, logits=logits: -logits[i])[:pre]
            found = [(logits[i], clip(rules, decode(rules, deltas[i], anchors[i], (1, 1, 1, 1)), size)) for i in order]
            sides = [min(b[2] - b[0], b[3] - b[1]) + rules.wide for _, b in found]
            large = [s > rules.smallest if rules.strictly else s >= rules.smallest for s in sides]
            found = [f for f, ok in zip(found, large, strict=True) if ok]
            kept = nms(rules, [b for _, b in found], 0.7)
            everything += [(n, *found[i]) for i in kept]
    groups = [everything] if over_batch else [[p for p in everything if p[0] == n] for n in range(len(outputs))]
    chosen = [p for group in groups for p in sorted(group, key=lambda p: -p[1])[:post]]
    return [[b for m, _, b in chosen if m == n] for n in range(len(outputs))]


def box_outputs(model: GeneralizedRCNN, pooled: list[Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Class logits and deltas of pooled features."""
    head = model.roi_heads["box"]
    x = torch.tensor(pooled, dtype=torch.float64).flatten(1)
    x = F.relu(head.feature_extractor.fc7(F.relu(head.feature_extractor.fc6(x))))
    logits, deltas = head.predictor(x)
    return logits.tolist(), deltas.tolist()


def mask_logits(model: GeneralizedRCNN, pooled: list[Any]) -> Any:
    extractor = model.roi_heads["mask"].feature_extractor
    x = torch.tensor(pooled, dtype=torch.float64)
    for name in extractor.names:
        x = F.relu(extractor.get_submodule(name)(x))
    return model.roi_heads["mask"].predictor(x).tolist()


def losses(model: GeneralizedRCNN, system: str, images: ImageList, targets: list[BoxList], **sizes: int) -> Any:
    """What ``model(images, targets)`` must give; ``sizes``: wanted, pre and post of the RPN."""
    rules = RULES[system]
    outputs, maps = head_outputs(model, rules, images)
    result = rpn_losses(rules, outputs, images, targets, sizes["wanted"])
    found = proposals(rules, outputs, images, pre=sizes["pre"], post=sizes["post"], over_batch=rules.over_batch)
    classifier = box_loss = mask_loss = 0.0
    count = positives = 0
    for n, (target, boxes) in enumerate(zip(targets, found, strict=True)):
        truth = [tuple(b) for b in target.boxes.tolist()]
        boxes = boxes + truth
        matched = match(rules, truth, boxes, 0.5, 0.5, False)  # type: ignore
        logits, deltas = box_outputs(model, [pool(rules, maps[n], b, 7) for b in boxes])
        labels = [int(target.labels[m]) if m >= 0 else 0 for m in matched]
        for row, label in enumerate(labels):
            count += 1
            top = max(logits[row])
            classifier += top + math.log(sum(math.exp(v - top) for v in logits[row])) - logits[row][label]
            if label:
                wanted = encode(rules, truth[matched[row]], boxes[row], (10, 10, 5, 5))  # type: ignore
                box_loss += smooth_l1(deltas[row][4 * label : 4 * label + 4], wanted, rules.box_beta)
        rows = [row for row, label in enumerate(labels) if label]
        drawn = mask_logits(model, [pool(rules, maps[n], boxes[row], 14) for row in rows])
        for row, logit in zip(rows, drawn, strict=True):
            polygons = target.masks.polygons[matched[row]]
            goal = mask_target(rules, polygons, boxes[row], 28, images.image_sizes[n])
            for y in range(28):
                for x in range(28):
                    value = logit[labels[row]][y][x]
                    mask_loss += softplus(value) - value * float(goal[y][x])
            positives += 1
    result |= {"loss_classifier": classifier / count, "loss_box_reg": box_loss / count}
    return result | {"loss_mask": mask_loss / (positives * 28 * 28)}


def detections(model: GeneralizedRCNN, system: str, images: ImageList, *, pre: int, post: int, threshold: float) -> Any:
    """For each image (score, label, box, mask of probabilities), best first; without a limit on their number."""
    rules = RULES[system]
    outputs, maps = head_outputs(model, rules, images)
    found = proposals(rules, outputs, images, pre=pre, post=post, over_batch=False)
    results = []
    for n, (boxes, size) in enumerate(zip(found, images.image_sizes, strict=True)):
        logits, deltas = box_outputs(model, [pool(rules, maps[n], b, 7) for b in boxes])
        result = []
        for label in range(1, len(logits[0])):
            candidates = []
            for row, box in enumerate(boxes):
                score = math.exp(logits[row][label]) / sum(math.exp(v) for v in logits[row])
                one = decode(rules, deltas[row][4 * label : 4 * label + 4], box, (10, 10, 5, 5))
                one = clip(rules, one, size)
                if score > threshold and min(one[2] - one[0], one[3] - one[1]) >= rules.smallest_detection:
                    candidates.append((score, label, one))
            candidates.sort(key=lambda c: -c[0])
            result += [candidates[i] for i in nms(rules, [c[2] for c in candidates], 0.5)]
        result.sort(key=lambda c: -c[0])
        if rules.drop_empty:
            result = [c for c in result if c[2][2] > c[2][0] and c[2][3] > c[2][1]]
        drawn = mask_logits(model, [pool(rules, maps[n], c[2], 14) for c in result])
        probabilities = [
            [[1 / (1 + math.exp(-v)) for v in row] for row in logit[c[1]]]
            for logit, c in zip(drawn, result, strict=True)
        ]
        results.append([(*c, p) for c, p in zip(result, probabilities, strict=True)])
    return results
