"""Loading weights: names by their longest end, shapes, and files that must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrcnn.build import load_model_weights
from fastrcnn.weights import PixelFormat, WeightsError, load_weights, read_weights, write_weights
from fastrcnn.weights.pixels import TORCHVISION, convert_stem
from tests.models.inputs import small_config, small_model


def saved(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


def test_a_checkpoint_comes_back_whole(tmp_path):
    source, target = small_model(seed=1), small_model(seed=2)
    path = saved(tmp_path, {"model": {f"module.{k}": v for k, v in source.state_dict().items()}, "iteration": 3})
    report = load_weights(target, path)
    assert (report.missing, report.unused, report.mismatched) == ([], [], [])
    assert len(report.loaded) == len(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def body_of(model):
    """The body's tensors with the names of a classifier's file."""
    prefix = "backbone.body."
    return {n.removeprefix(prefix): v.clone() for n, v in model.state_dict().items() if n.startswith(prefix)}


def as_classifier(tensors):
    return {name.removeprefix("stem."): value for name, value in tensors.items()}


def test_an_imagenet_body_fits_by_the_longest_end(tmp_path):
    source, model = small_model(seed=1), small_model(seed=2)
    content = as_classifier(body_of(source)) | {"fc.weight": torch.zeros(2, 2)}
    report = load_weights(model, saved(tmp_path, content))
    assert report.kind == "imagenet"
    assert torch.equal(model.backbone.body.stem.conv1.weight, source.backbone.body.stem.conv1.weight)
    block = source.backbone.body.layer2[0].conv1.weight
    assert torch.equal(model.backbone.body.layer2[0].conv1.weight, block)
    assert report.unused == []
    assert report.ignored == ["fc.weight (the classifier)"]
    assert "rpn.head.conv.weight" in report.missing
    with pytest.raises(WeightsError, match=r"lacks \d+ of the model's tensors, the first is backbone\.fpn"):
        load_weights(model, saved(tmp_path, content), complete=True)


@pytest.mark.parametrize("change", ["block missing", "block too many"])
def test_a_body_of_another_depth_is_refused(tmp_path, change):
    content = body_of(small_model())
    if change == "block missing":
        content = {name: value for name, value in content.items() if not name.startswith("layer3.1.")}
        message = r"the first is backbone\.body\.layer3\.1\.conv1\.weight"
    else:
        content |= {name.replace("layer3.1", "layer3.2"): v for name, v in content.items() if "layer3.1" in name}
        message = r"no place for 10 of its tensors, the first is layer3\.2\.conv1\.weight; choose"
    with pytest.raises(WeightsError, match=message):
        load_weights(small_model(), saved(tmp_path, content))


def test_the_last_stage_goes_to_the_heads_of_a_c4_model(tmp_path):
    source = as_classifier(body_of(c4_model(seed=1))) | {
        name.partition("head.")[2]: value
        for name, value in c4_model(seed=1).state_dict().items()
        if name.startswith("roi_heads.box.feature_extractor.head.")
    }
    model = c4_model(seed=2)
    report = load_weights(model, saved(tmp_path, source))
    for head in ("box", "mask"):
        loaded = model.state_dict()[f"roi_heads.{head}.feature_extractor.head.layer4.0.conv1.weight"]
        assert torch.equal(loaded, source["layer4.0.conv1.weight"])
    assert report.unused == []


def c4_model(seed):
    return small_model(
        "MODEL.RPN.USE_FPN", "False", "MODEL.ROI_HEADS.USE_FPN", "False", "MODEL.RPN.ANCHOR_STRIDE", "(16,)",
        "MODEL.RPN.ANCHOR_SIZES", "(32, 64, 128, 256, 512)",
        "MODEL.BACKBONE.CONV_BODY", "R-50-C4", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithFixedBatchNorm",
        "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8",
        "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "32",
        "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor",
        "MODEL.ROI_BOX_HEAD.PREDICTOR", "FastRCNNPredictor", "MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.0625,)",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14",
        "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True", "MODEL.ROI_MASK_HEAD.RESOLUTION", "14",
        seed=seed,
    )  # fmt: skip


def test_weights_of_a_plain_block_fill_a_deformable_one(tmp_path):
    """DFConv2d of maskrcnn-benchmark calls its convolution ``conv``; the offsets start from nothing."""

    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset, self.conv = nn.Conv2d(4, 18, 3), nn.Conv2d(4, 4, 3, bias=False)

    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = nn.Module()
    model.backbone.body.layer2 = nn.Sequential(nn.Module())
    model.backbone.body.layer2[0].conv2 = Deformable()
    source = torch.randn(4, 4, 3, 3)
    report = load_weights(model, saved(tmp_path, {"layer2.0.conv2.weight": source}))
    assert torch.equal(model.backbone.body.layer2[0].conv2.conv.weight, source)
    assert report.missing == [f"backbone.body.layer2.0.conv2.offset.{part}" for part in ("weight", "bias")]


def test_a_training_is_not_carried_over(tmp_path):
    state = {"model": small_model(seed=1).state_dict(), "optimizer": {"state": {}}, "scheduler": {}, "iteration": 7}
    report = load_weights(small_model(), saved(tmp_path, state))
    assert report.ignored == ["optimizer, scheduler, iteration (of a training, which --resume goes on with)"]


BGR, RGB = PixelFormat(True, (103.0, 116.0, 123.0), (1.0, 1.0, 1.0)), TORCHVISION


@pytest.mark.parametrize(("source", "target"), [(RGB, BGR), (BGR, RGB)], ids=["to bgr255", "to rgb01"])
def test_the_stem_is_converted_to_other_pixels(source, target):
    """The same image, fed in either way, gives the same up to a constant: the means differ."""
    rgb = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def fed(pixels, image):
        image = image.flip(1) * 255 if pixels.to_bgr255 else image
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (pixels.mean, pixels.std))
        return (image - mean) / std

    converted, said, note = convert_stem(weight, source, target)
    difference = F.conv2d(fed(source, rgb), weight) - F.conv2d(fed(target, rgb), converted)
    assert float((difference - difference[:1, :, :1, :1]).abs().max()) < 1e-6
    assert "the stem" in said
    assert "INPUT.PIXEL_MEAN" in note
    assert convert_stem(weight, source, source)[1:] == ("", "")


def test_loading_converts_the_stem_of_torchvision(tmp_path):
    content = as_classifier(body_of(small_model(seed=1)))
    model = small_model()
    report = load_model_weights(small_config(), model, saved(tmp_path, content))
    stem = content["conv1.weight"]
    expected = stem[:, 2] / (255 * 0.225)  # the model's first channel is blue, torchvision's third
    torch.testing.assert_close(model.backbone.body.stem.conv1.weight[:, 0], expected)
    assert "RGB in 0..1" in str(report)
    load_weights(model, saved(tmp_path, content))  # without pixels it stays
    assert torch.equal(model.backbone.body.stem.conv1.weight, stem)


def test_the_epsilon_at_home_goes_into_the_variance(tmp_path):
    """torchvision adds 1e-5 to the variance, maskrcnn-benchmark nothing: a channel with variance 0 would be NaN."""
    content = as_classifier(body_of(small_model(seed=1)))
    content["bn1.running_var"] = torch.zeros(16)
    model = small_model()
    report = load_weights(model, saved(tmp_path, content))
    assert torch.equal(model.backbone.body.stem.bn1.running_var, torch.full((16,), 1e-5))
    assert any("epsilon 1e-05 of 20 normalisations" in sentence for sentence in report.converted)


def test_a_stride_that_differs_is_said(tmp_path):
    content = as_classifier(body_of(small_model(seed=1)))
    report = load_weights(small_model(), saved(tmp_path, content), stride_in_1x1=True)
    assert report.notes == [
        "the weights were trained with MODEL.RESNETS.STRIDE_IN_1X1 False, the model has True, which gives other "
        "features"
    ]


@pytest.mark.parametrize("there", ["detectron2", "torchvision", "fastrcnn", "safetensors"])
def test_a_model_comes_back_from_every_format(tmp_path, there):
    source, target = small_model(seed=1), small_model(seed=2)
    path = tmp_path / "there"
    weights = read_weights(saved(tmp_path, source.state_dict()))
    write_weights(weights, path, there)
    report = load_weights(target, path)
    assert report.mismatched == []
    for name, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_another_number_of_classes(tmp_path):
    path = saved(tmp_path, small_model().state_dict())
    other = small_model("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "9")
    before = other.roi_heads["box"].predictor.cls_score.weight.clone()
    with pytest.raises(WeightsError, match=r"cls_score\.weight: 5x32 in the file, 9x32 in the model"):
        load_weights(other, path)
    report = load_weights(other, path, allow_partial=True)
    assert len(report.mismatched) == 6
    assert torch.equal(other.roi_heads["box"].predictor.cls_score.weight, before)


def test_a_model_to_be_used_needs_all_its_tensors(tmp_path):
    state = small_model(seed=1).state_dict()
    anchors = [name for name in state if "cell_anchors" in name]
    path = saved(tmp_path, {name: value for name, value in state.items() if name not in anchors})
    report = load_weights(small_model(), path, complete=True)
    assert report.missing == anchors
    del state["rpn.head.conv.bias"]
    path = saved(tmp_path, state)
    assert load_weights(small_model(), path, allow_partial=True).missing == ["rpn.head.conv.bias"]
    with pytest.raises(WeightsError, match=r"lacks 1 of the model's tensors, the first is rpn\.head\.conv\.bias"):
        load_weights(small_model(), path, complete=True)
