"""RetinaNet: names, losses and detections against scalar loops over the rules of maskrcnn-benchmark."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastrcnn.build import build_model, count_parameters
from fastrcnn.build.rpn import build_retinanet
from fastrcnn.config import load_config
from fastrcnn.conventions import MASKRCNN_BENCHMARK
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.structures import BoxList, Targets
from tests.models.inputs import CONFIGS, RETINANET, random_batch, small_config, small_retinanet

FULL = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET_ON", "True", "MODEL.BACKBONE.CONV_BODY", "R-50-FPN-RETINANET"]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def anchors_of(sizes, strides, octave, scales, ratios, grids):
    """Every anchor (x1, y1, x2, y2), in plain Python: level, y, x, ratio, scale."""
    found = []
    for size, stride, (height, width) in zip(sizes, strides, grids, strict=True):
        for y in range(height):
            for x in range(width):
                for ratio in ratios:
                    w = round(math.sqrt(stride * stride / ratio))
                    h = round(w * ratio)
                    for scale in range(scales):
                        factor = size * octave ** (scale / scales) / stride
                        half_w, half_h = (w * factor - 1) / 2, (h * factor - 1) / 2
                        cx, cy = x * stride + (stride - 1) / 2, y * stride + (stride - 1) / 2
                        found.append((cx - half_w, cy - half_h, cx + half_w, cy + half_h))
    return found


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    inter = max(w, 0) * max(h, 0)
    area = [(r[2] - r[0] + 1) * (r[3] - r[1] + 1) for r in (a, b)]
    return inter / (area[0] + area[1] - inter)


def encode(gt, anchor):
    size = [anchor[i + 2] - anchor[i] + 1 for i in (0, 1)]
    gt_size = [gt[i + 2] - gt[i] + 1 for i in (0, 1)]
    shift = [(gt[i] + gt_size[i] / 2 - anchor[i] - size[i] / 2) / size[i] * WEIGHTS[i] for i in (0, 1)]
    return [*shift, *(math.log(gt_size[i] / size[i]) * WEIGHTS[i + 2] for i in (0, 1))]


def decode(delta, anchor, size):
    """The box, clipped to an image of ``size`` (height, width)."""
    box = []
    for i in (0, 1):
        extent = anchor[i + 2] - anchor[i] + 1
        centre = anchor[i] + extent / 2 + delta[i] / WEIGHTS[i] * extent
        wide = math.exp(min(delta[i + 2] / WEIGHTS[i + 2], math.log(1000 / 16))) * extent
        box.append((centre - wide / 2, centre + wide / 2 - 1))
    limit = (size[1] - 1, size[0] - 1)
    (x1, x2), (y1, y2) = ([min(max(v, 0), limit[i]) for v in box[i]] for i in (0, 1))
    return (x1, y1, x2, y2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def outputs(model, images):
    """Anchors, and for each image the logits [A][C] and deltas [A][4] as lists, in the order of the anchors."""
    retinanet = model.rpn
    features = model.backbone(images.tensors)
    logits, deltas = retinanet.head(features)
    grids = [tuple(f.shape[-2:]) for f in features]
    anchors = anchors_of((32, 64, 128, 256, 512), (8, 16, 32, 64, 128), 2.0, 3, (0.5, 1, 2), grids)
    assert len(anchors) == sum(len(level) for level in retinanet.anchor_generator(features))
    rows = []
    for n in range(len(images)):
        image = []
        for level_logits, level_deltas in zip(logits, deltas, strict=True):
            height, width = level_logits.shape[-2:]
            for y in range(height):
                for x in range(width):
                    for a in range(9):
                        image.append(
                            (
                                level_logits[n, 4 * a : 4 * a + 4, y, x].tolist(),
                                level_deltas[n, 4 * a : 4 * a + 4, y, x].tolist(),
                            )
                        )
        rows.append(image)
    return anchors, [g[0] * g[1] * 9 for g in grids], rows


def scalar_matches(anchors, gts):
    """Index of the ground truth, -1 background, -2 between, by loops."""
    overlaps = [[iou(gt, anchor) for gt in gts] for anchor in anchors]
    best = [max(row, default=0) for row in overlaps]
    arg = [row.index(m) if row else -1 for row, m in zip(overlaps, best, strict=True)]
    matched = [a if m >= 0.5 else (-1 if m < 0.4 else -2) for a, m in zip(arg, best, strict=True)]
    for g in range(len(gts)):
        top = max(row[g] for row in overlaps)
        for i, row in enumerate(overlaps):
            if row[g] == top:
                matched[i] = arg[i]
    return matched


def scalar_losses(model, images, targets, normalizer="batch"):
    anchors, _, rows = outputs(model, images)
    class_losses, box_losses, counts = [], [], []
    for image, target in zip(rows, targets, strict=True):
        gts, labels = target.boxes.tolist(), target.labels.tolist()
        class_sum = box_sum = count = 0.0
        for (logits, delta), anchor, m in zip(image, anchors, scalar_matches(anchors, gts), strict=True):
            if m == -2:
                continue
            for column, x in enumerate(logits):
                p = sigmoid(x)
                if m >= 0 and labels[m] == column + 1:
                    class_sum -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    class_sum -= 0.75 * p**2 * math.log(1 - p)
            if m >= 0:
                count += 1
                for value, wanted in zip(delta, encode(gts[m], anchor), strict=True):
                    d = abs(value - wanted)
                    box_sum += d * d / 0.22 if d < 0.11 else d - 0.055
        class_losses.append(class_sum)
        box_losses.append(box_sum)
        counts.append(count)
    if normalizer == "batch":
        total = sum(counts)
        return sum(class_losses) / (total + len(counts)), sum(box_losses) / max(1, 4 * total), total
    if normalizer == "image":
        pairs = list(zip(class_losses, box_losses, counts, strict=True))
        return (
            sum(c / max(1, k) for c, _, k in pairs) / len(pairs),
            sum(b / max(1, 4 * k) for _, b, k in pairs) / len(pairs),
            sum(counts),
        )
    average = 0.9 * 100 + 0.1 * max(1, sum(counts))
    return sum(class_losses) / average, sum(box_losses) / (4 * average), sum(counts)


def spread(model, images):
    """Random weights predict the same everywhere: scale them until logits deviate by 2 and deltas by 1."""
    head = model.rpn.head
    with torch.no_grad():
        outputs = head(model.backbone(images.tensors))
        for layer, maps, wanted in zip((head.cls_logits, head.bbox_pred), outputs, (2.0, 1.0), strict=True):
            layer.weight.mul_(wanted / torch.cat([m.flatten() for m in maps]).std())


@pytest.mark.parametrize("counts", [[3, 0], [5, 2]])
def test_losses_equal_scalar_loops(counts):
    model = small_retinanet().double()
    images, targets = random_batch(counts, [(96, 64), (64, 80)], dtype=torch.float64, seed=7)
    spread(model, images)
    losses = model(images, targets)
    assert list(losses) == ["loss_retina_cls", "loss_retina_reg"]
    with torch.no_grad():
        class_loss, box_loss, positives = scalar_losses(model, images, targets)
    assert positives > 5
    assert losses["loss_retina_cls"].item() == pytest.approx(class_loss, rel=1e-6)
    assert losses["loss_retina_reg"].item() == pytest.approx(box_loss, rel=1e-6)


@pytest.mark.parametrize("rule", ["image", "moving_average"])
def test_the_other_normalizers(rule):
    """torchvision's is each image's own; detectron2's an average that starts at 100 and moves before it is used."""
    model = small_retinanet().double()
    cfg = small_config(*RETINANET, config_file="rpn_R_50_FPN_1x.yaml")
    other = build_retinanet(cfg, 16, replace(MASKRCNN_BENCHMARK, retinanet_normaliser=rule)).double()
    assert set(other.state_dict()) == set(model.rpn.state_dict())
    other.load_state_dict(model.rpn.state_dict())
    model.rpn = other
    images, targets = random_batch([4, 0], [(96, 64), (64, 80)], dtype=torch.float64, seed=3)
    spread(model, images)
    losses = model(images, targets)
    with torch.no_grad():
        class_loss, box_loss, positives = scalar_losses(model, images, targets, rule)
    assert losses["loss_retina_cls"].item() == pytest.approx(class_loss, rel=1e-6)
    assert losses["loss_retina_reg"].item() == pytest.approx(box_loss, rel=1e-6)
    if rule == "moving_average":
        first = 90 + 0.1 * positives
        assert other.loss_normalizer.item() == pytest.approx(first)
        again = model(images, targets)  # the same losses over a smaller divisor
        second = 0.9 * first + 0.1 * positives
        assert again["loss_retina_cls"].item() == pytest.approx(class_loss * first / second, rel=1e-6)


@pytest.mark.parametrize(("limit", "top_n"), [(100, 1000), (7, 1000), (0, 30)])
def test_detections_equal_scalar_loops(limit, top_n):
    overrides = ["TEST.DETECTIONS_PER_IMG", str(limit), "MODEL.RETINANET.PRE_NMS_TOP_N", str(top_n)]
    model = small_retinanet(*overrides).double().eval()
    images, _ = random_batch([0, 0], [(96, 64), (64, 80)], dtype=torch.float64, seed=5)
    spread(model, images)
    with torch.no_grad():
        found = model(images)
        anchors, level_sizes, rows = outputs(model, images)
    for image, size, detections in zip(rows, images.image_sizes, found, strict=True):
        kept = []
        start = 0
        for number in level_sizes:
            level = []
            for i in range(start, start + number):
                logits, delta = image[i]
                for column, x in enumerate(logits):
                    if sigmoid(x) > 0.05:
                        level.append((sigmoid(x), column + 1, decode(delta, anchors[i], size)))
            level.sort(key=lambda c: -c[0])
            kept += level[:top_n]
            start += number
        kept.sort(key=lambda c: -c[0])
        expected = []
        for candidate in kept:
            if all(e[1] != candidate[1] or iou(e[2], candidate[2]) <= 0.4 for e in expected):
                expected.append(candidate)
        expected = expected[:limit] if limit else expected
        assert len(kept) > 60
        assert detections.size == (size[1], size[0])
        assert len(detections) == len(expected) > 5
        torch.testing.assert_close(detections.scores, torch.tensor([e[0] for e in expected], dtype=torch.float64))
        assert detections.labels.tolist() == [e[1] for e in expected]
        boxes = torch.tensor([e[2] for e in expected], dtype=torch.float64)
        torch.testing.assert_close(detections.boxes, boxes, atol=1e-3, rtol=0)  # the cell anchors are float32


def detector(**changes):
    """RetinaNet of one level of stride 8 without octaves, whose outputs the test writes: 4 x 4 cells, one anchor."""
    cfg = small_config(
        *RETINANET,
        "MODEL.RETINANET.ANCHOR_SIZES", "(8,)",
        "MODEL.RETINANET.ANCHOR_STRIDES", "(8,)",
        "MODEL.RETINANET.ASPECT_RATIOS", "(1.0,)",
        "MODEL.RETINANET.SCALES_PER_OCTAVE", "1",
        "MODEL.RETINANET.NUM_CLASSES", "3",
        "TEST.DETECTIONS_PER_IMG", "2",
        config_file="rpn_R_50_FPN_1x.yaml",
    )  # fmt: skip
    retinanet = build_retinanet(cfg, 16, replace(MASKRCNN_BENCHMARK, **changes))
    logits = torch.full((1, retinanet.num_columns, 4, 4), -9.0)
    deltas = torch.zeros(1, 4, 4, 4)
    retinanet.head.forward = lambda features: ([logits], [deltas])
    return retinanet, logits, deltas


def detect(retinanet, size=(32, 32)):
    images, _ = random_batch([0], [size])
    return retinanet.detect(images, [torch.zeros(1, 16, 4, 4)])[0]


def test_ties_at_the_limit_are_kept_or_cut():
    for keeps in (True, False):
        retinanet, logits, _ = detector(detection_ties=keeps)
        logits[0, 1, 0, 0] = 3
        logits[0, 0, 1, 1] = logits[0, 1, 2, 2] = logits[0, 0, 3, 3] = 1
        found = detect(retinanet)
        assert found.labels.tolist() == ([2, 1, 2, 1] if keeps else [2, 1])
        torch.testing.assert_close(found.boxes[1], torch.tensor([8.0, 8, 15, 15]))


def test_clipping_before_or_after_nms():
    """Two boxes that differ outside the image are one inside it; one that is all outside is dropped at the end."""
    for first in (True, False):
        retinanet, logits, deltas = detector(retinanet_clips_before_nms=first)
        logits[0, 0, 0, 3], logits[0, 0, 1, 3] = 3, 2
        deltas[0, 2:, 0, 3] = math.log(6) * 5  # [4, -20, 51, 27] around (28, 4)
        deltas[0, 2:, 1, 3] = math.log(2) * 5  # [20, 4, 35, 19] around (28, 12)
        found = detect(retinanet)
        assert len(found) == 2
        torch.testing.assert_close(found.boxes[0], torch.tensor([4.0, 0, 31, 27]))
        deltas[0, 0, 0, 3] = 100.0  # moved ten widths to the right
        found = detect(retinanet)
        assert len(found) == (2 if first else 1)
        assert found.boxes[0].tolist() == ([31, 0, 31, 27] if first else [20, 4, 31, 19])


def test_a_background_column_is_never_found_and_takes_no_place():
    retinanet, logits, _ = detector(retinanet_background_column=True)
    assert tuple(logits.shape) == (1, 3, 4, 4)
    logits[0, 0, 0, 0] = 5
    logits[0, 2, 1, 1] = 3
    logits[0, 1, 2, 2] = 2
    assert detect(retinanet).labels.tolist() == [2], "the cap of two counts the background"
    images, _ = random_batch([0], [(32, 32)])
    target = BoxList(torch.tensor([[8.0, 8, 15, 15]]), (32, 32), labels=torch.tensor([2]))
    losses = retinanet.losses(images, [torch.zeros(1, 16, 4, 4)], Targets.from_boxlists([target]))
    expected = 0.0
    for column in range(3):
        for place, x in enumerate(logits[0, column].flatten().tolist()):
            p = sigmoid(x)
            right = column == 2 and place == 5
            expected -= 0.25 * (1 - p) ** 2 * math.log(p) if right else 0.75 * p**2 * math.log(1 - p)
    assert losses["loss_retina_cls"].item() == pytest.approx(expected / 2, rel=1e-5)


def test_octave_sizes_can_be_cut_to_whole_pixels():
    cfg = small_config(*RETINANET, config_file="rpn_R_50_FPN_1x.yaml")
    convention = replace(MASKRCNN_BENCHMARK, anchor_scales="truncated", anchor_style="detectron2")
    cell = build_retinanet(cfg, 16, convention).anchor_generator.cells[0]
    squares = [round((box[2] - box[0]).item()) for box in cell if abs(box[2] - box[0] - box[3] + box[1]) < 1e-4]
    assert squares == [32, 40, 50]
    first = small_retinanet().rpn.anchor_generator.cells[0][:3]
    golden = [[-18, -8, 25, 15], [-23.7183, -11.1191, 30.7183, 18.1191], [-30.9228, -15.0488, 37.9228, 22.0488]]
    torch.testing.assert_close(first, torch.tensor(golden), atol=1e-4, rtol=0)


def test_two_steps_change_every_trained_parameter():
    model = small_retinanet()
    spread(model, random_batch([0], [(128, 96)])[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        images, targets = random_batch([3, 1], [(128, 96), (96, 128)], seed=step)
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert int(model.sampling_step) == 2
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.equal(before[name]) == (not parameter.requires_grad), name
    model.eval()
    with torch.no_grad():
        found = model(images)
    assert [f.size for f in found] == [(128, 96), (96, 128)]


def test_no_detection_is_a_legal_answer():
    model = small_retinanet("MODEL.RETINANET.INFERENCE_TH", "1.0").eval()
    with torch.no_grad():
        assert [len(f) for f in model(random_batch([0], [(64, 64)])[0])] == [0]


def test_padding_changes_nothing():
    """More room for ground truth, and an image that pads its neighbour, leave the losses as they are."""
    model = small_retinanet().double()
    images, targets = random_batch([3, 1], [(128, 96), (96, 128)], dtype=torch.float64)
    spread(model, images)
    results = [model(images, Targets.from_boxlists(targets, min_capacity=room)) for room in (3, 17)]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-12)


def test_names_and_sizes_are_those_of_maskrcnn_benchmark():
    model = build_model(load_config(CONFIGS / "rpn_R_50_FPN_1x.yaml", FULL))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {f"rpn.anchor_generator.cell_anchors.{level}": (9, 4) for level in range(5)}
    for tower in ("cls_tower", "bbox_tower"):
        for index in (0, 2, 4, 6):
            expected |= {f"rpn.head.{tower}.{index}.weight": (256, 256, 3, 3), f"rpn.head.{tower}.{index}.bias": (256,)}
    expected |= {"rpn.head.cls_logits.weight": (720, 256, 3, 3), "rpn.head.cls_logits.bias": (720,)}
    expected |= {"rpn.head.bbox_pred.weight": (36, 256, 3, 3), "rpn.head.bbox_pred.bias": (36,)}
    for level, channels in ((2, 512), (3, 1024), (4, 2048)):
        for name, shape in ((f"inner{level}", (256, channels, 1, 1)), (f"layer{level}", (256, 256, 3, 3))):
            expected |= {f"backbone.fpn.fpn_{name}.weight": shape, f"backbone.fpn.fpn_{name}.bias": (256,)}
    for name, channels in (("p6", 2048), ("p7", 256)):
        expected |= {f"backbone.fpn.top_blocks.{name}.weight": (256, channels, 3, 3)}
        expected |= {f"backbone.fpn.top_blocks.{name}.bias": (256,)}
    assert {k: v for k, v in state.items() if not k.startswith("backbone.body.")} == expected
    prior = torch.full((720,), -4.59512)
    torch.testing.assert_close(model.rpn.head.cls_logits.bias.detach(), prior, atol=1e-5, rtol=0)
    # torchvision's RetinaNet has 34,014,999, with 91 columns of classes, and P6 made from the 256 channels of P5
    assert count_parameters(model)[0] == 34_014_999 - 9 * 11 * (256 * 9 + 1) + (2048 - 256) * 256 * 9


def test_p6_is_made_from_c5_or_p5():
    for use_c5, channels in (("True", 256), ("False", 16)):
        model = small_retinanet("MODEL.RETINANET.USE_C5", use_c5)
        top = model.backbone.fpn.top_blocks
        assert tuple(top.p6.weight.shape) == (16, channels, 3, 3)
        with torch.no_grad():
            body = model.backbone.body(torch.randn(1, 3, 64, 96))
            maps = model.backbone.fpn(body)
        assert [tuple(m.shape[-2:]) for m in maps] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
        source = body[-1] if use_c5 == "True" else maps[2]
        torch.testing.assert_close(maps[3], top.p6(source))
        torch.testing.assert_close(maps[4], top.p7(maps[3].relu()))


def test_retinanet_has_no_heads():
    model = small_retinanet()
    assert isinstance(model.rpn, RetinaNet)
    assert len(model.roi_heads) == 0
