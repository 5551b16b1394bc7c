"""torchvision's detectors, with random weights: saved there, loaded here, they detect the same; and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrcnn.build import build_model, load_model_weights
from fastrcnn.config import load_config
from fastrcnn.data.image import read_image
from fastrcnn.structures import BoxList, ImageList, Keypoints, SegmentationMask
from fastrcnn.weights import read_weights, write_weights
from tests.models.inputs import CONFIGS

detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")

PHOTOS = Path(os.environ.get("FASTRCNN_TEST_DATA", "../shared/data")) / "coco-cc" / "images"
SHORT, LONG = 160, 267
CLASSES, MOST = 7, 20  # classes with the background; detections an image
RETINANET = [
    "MODEL.BACKBONE.CONV_BODY", "R-50-FPN-RETINANET", "MODEL.RETINANET_ON", "True", "MODEL.MASK_ON", "False",
    "MODEL.RPN.USE_FPN", "True", "MODEL.RETINANET.NUM_CLASSES", str(CLASSES), "MODEL.ROI_HEADS.USE_FPN", "False",
]  # fmt: skip
KEYPOINT = [
    "MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES", "(0.25, 0.125, 0.0625, 0.03125)",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "14", "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56",
    "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False",
]  # fmt: skip
MODELS = {
    "maskrcnn_resnet50_fpn": ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", str(CLASSES)],
    "fasterrcnn_resnet50_fpn": ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", str(CLASSES), "MODEL.MASK_ON", "False"],
    "keypointrcnn_resnet50_fpn": KEYPOINT,
    "retinanet_resnet50_fpn": RETINANET,
}


def theirs_of(name: str) -> nn.Module:
    """torchvision's model with random weights that give detections of many scores."""
    torch.manual_seed(3)
    classes = 2 if name.startswith("keypoint") else CLASSES
    most = "detections_per_img" if name.startswith("retinanet") else "box_detections_per_img"
    model = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=classes, min_size=SHORT, max_size=LONG, **{most: MOST}
    ).eval()
    spread = {"rpn.head.cls_logits": 0.3, "cls_score": 0.3, "bbox_pred": 0.03, "bbox_reg": 0.03, "cls_logits": 0.05}
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.8)
        for end, std in spread.items():
            if key.endswith(end):
                nn.init.normal_(module.weight, std=std)
                break
        if "head.conv." in key and isinstance(module, nn.Conv2d):  # of RetinaNet's towers, which start near nothing
            nn.init.normal_(module.weight, std=0.03)
        if key.endswith("classification_head.cls_logits"):
            nn.init.normal_(module.bias, mean=-2.0)
    return model


def ours_of(name: str, *more: str) -> tuple[nn.Module, object]:
    options = ["MODEL.CONVENTION", "torchvision", "MODEL.DEVICE", "cpu", "MODEL.WEIGHT", "", *MODELS[name], *more]
    options += ["MODEL.ROI_HEADS.DETECTIONS_PER_IMG", str(MOST), "TEST.DETECTIONS_PER_IMG", str(MOST)]
    cfg = load_config(CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml", options)
    return build_model(cfg).eval(), cfg


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(name, theirs, ours with their weights)."""
    theirs = theirs_of(request.param)
    path = tmp_path_factory.mktemp("theirs") / "weights.pth"
    torch.save(theirs.state_dict(), path)
    ours, cfg = ours_of(request.param)
    report = load_model_weights(cfg, ours, path, complete=True)
    assert (report.kind, report.unused, report.mismatched, report.notes) == ("torchvision", [], [], [])
    return request.param, theirs, ours


def batches():
    """Photographs one at a time and two together, as torchvision's own transform makes them."""
    names = sorted(PHOTOS.glob("*.jpg"))[:3]
    if not names:
        pytest.skip(f"{PHOTOS} has no photographs: set FASTRCNN_TEST_DATA")
    photos = [read_image(name).permute(2, 0, 1).float() / 255 for name in names]
    return [photos[:1], photos[1:3]]


@torch.no_grad()
def detections_of(theirs, photos):
    """Their input, and their detections in its frame: no resizing back, masks and heat maps as predicted."""
    images, _ = theirs.transform(photos)
    features = theirs.backbone(images.tensors)
    if not hasattr(theirs, "roi_heads"):
        outputs = theirs.head(list(features.values()))
        anchors = theirs.anchor_generator(images, list(features.values()))
        counts = [
            f.shape[2] * f.shape[3] * theirs.anchor_generator.num_anchors_per_location()[0] for f in features.values()
        ]
        split = {key: list(value.split(counts, dim=1)) for key, value in outputs.items()}
        found = theirs.postprocess_detections(split, [list(a.split(counts)) for a in anchors], images.image_sizes)
    else:
        proposals, _ = theirs.rpn(images, features)
        found, _ = theirs.roi_heads(features, proposals, images.image_sizes)
    return ImageList(images.tensors, images.image_sizes), found


def test_detections(pair):
    name, theirs, ours = pair
    total = 0
    for photos in batches():
        images, expected = detections_of(theirs, photos)
        with torch.no_grad():
            found = ours(images)
        for a, b in zip(found, expected, strict=True):
            total += len(b["boxes"])
            assert len(a) == len(b["boxes"])
            ours_order, theirs_order = order(a.scores, a.boxes), order(b["scores"], b["boxes"])
            assert_equal(a.scores[ours_order], b["scores"][theirs_order], 1e-4)
            assert torch.equal(a.labels[ours_order], b["labels"][theirs_order])
            assert_equal(a.boxes[ours_order], b["boxes"][theirs_order], 0.01)
            if name.startswith("mask"):
                assert_equal(a.masks[ours_order], b["masks"][theirs_order], 1e-3)
            if name.startswith("keypoint"):
                assert_equal(a.keypoints.points[ours_order][..., :2], b["keypoints"][theirs_order][..., :2], 0.01)
                assert_equal(a.keypoints.scores[ours_order], b["keypoints_scores"][theirs_order], 1e-3)
    assert total > 20


def order(scores, boxes):
    return (scores - boxes[:, 0] * 1e-9).argsort(descending=True)


def assert_equal(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_export(pair, tmp_path):
    """Weights exported from here load there, strictly, and are the same."""
    _, theirs, ours = pair
    torch.save({"model": ours.state_dict()}, tmp_path / "ours.pth")
    write_weights(read_weights(tmp_path / "ours.pth"), tmp_path / "theirs.pth", "torchvision")
    exported = torch.load(tmp_path / "theirs.pth", weights_only=True)
    theirs.load_state_dict(exported)
    for name, value in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(exported[name], value), name


# Samples that take every candidate, so that their random choice does not matter; few proposals, so that it is quick.
EVERY = [
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "30000", "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "60",
    "MODEL.RPN.POST_NMS_TOP_N_TRAIN", "2000", "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "60",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "300",
]  # fmt: skip
NAMES = {
    "classification": "loss_retina_cls", "bbox_regression": "loss_retina_reg", "loss_keypoint": "loss_kp",
}  # fmt: skip


def scene(size, generator):
    """Three objects in an image of ``size`` (height, width): here and there."""
    height, width = size
    corner = torch.rand(3, 2, generator=generator) * torch.tensor([width * 0.5, height * 0.5])
    boxes = torch.cat([corner, corner + torch.tensor([[30.0, 60.0], [70.0, 50.0], [24.0, 22.0]])], dim=1)
    boxes = torch.minimum(boxes, torch.tensor([width, height, width, height]) - 2.0)
    corners = [box[:2] + torch.rand(6, 2, generator=generator) * (box[2:] - box[:2]) for box in boxes]
    masks = SegmentationMask([[polygon] for polygon in corners], (width, height))
    points = boxes[:, None, :2] + torch.rand(3, 17, 2, generator=generator) * (boxes[:, None, 2:] - boxes[:, None, :2])
    visible = torch.randint(0, 3, (3, 17, 1), generator=generator).float()
    return boxes, masks, torch.cat([points, visible], dim=2)


def test_training_losses(pair):
    name, theirs, ours_with_weights = pair
    photos = [nn.functional.interpolate(p[None], size=(SHORT, 224), mode="bilinear")[0] for p in batches()[1]]
    generator = torch.Generator().manual_seed(5)
    scenes = [scene(photo.shape[1:], generator) for photo in photos]
    label = torch.tensor([1, 1, 1]) if name.startswith("keypoint") else torch.tensor([1, 4, 6])
    ours, _ = ours_of(name, *EVERY)
    ours.load_state_dict(ours_with_weights.state_dict())
    targets = [
        BoxList(
            boxes,
            (224, SHORT),
            labels=label,
            masks=masks if name.startswith("mask") else None,
            keypoints=Keypoints(points, (224, SHORT)) if name.startswith("keypoint") else None,
        )
        for boxes, masks, points in scenes
    ]
    images, _ = theirs.transform(photos)
    found = ours.train()(ImageList(images.tensors, images.image_sizes), targets)

    theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if hasattr(theirs, "rpn"):
        theirs.rpn.fg_bg_sampler.batch_size_per_image = 30000
        theirs.rpn._pre_nms_top_n["training"] = theirs.rpn._post_nms_top_n["training"] = 60
        theirs.roi_heads.fg_bg_sampler.batch_size_per_image = 300
    told = [
        {"boxes": boxes, "labels": label, "masks": masks.decode().to(torch.uint8), "keypoints": points}
        for boxes, masks, points in scenes
    ]
    try:
        expected = theirs(photos, told)
    finally:
        theirs.eval()
    assert {NAMES.get(key, key) for key in expected} == set(found)
    for key, value in expected.items():
        assert value.item() > 0, key
        torch.testing.assert_close(
            found[NAMES.get(key, key)], value, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
