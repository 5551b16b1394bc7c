"""From each system to each other and back: the same file, for every family."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastrcnn.weights import WeightsError, read_weights, write_weights
from fastrcnn.weights.read import read_file
from fastrcnn_kernels import cell_anchors
from tests.weights.tables import ANCHORS, FAMILIES, SYSTEMS, K, W, has_family, state

PAIRS = [
    pytest.param(family, there, back, id=f"{family}-{back}-{there}-{back}")
    for family in FAMILIES
    for back in SYSTEMS
    for there in (*SYSTEMS, "fastrcnn", "safetensors")
    if there != back and has_family(there, family) and has_family(back, family)
]


def saved(path, tensors):
    torch.save({"model": tensors} if "detectron2" in path.name else tensors, path)
    return path


def convert(source, target, to):
    write_weights(read_weights(source), target, to)
    return target


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("family", "there", "back"), PAIRS)
def test_there_and_back(tmp_path, family, there, back):
    original = state(back, family)
    if back == "maskrcnn_benchmark" and there != "torchvision":
        original |= anchors_of(family)
    if back == "detectron2" and there != "torchvision":
        original |= {
            "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1),
            "pixel_std": torch.ones(3, 1, 1),
        }
    source = saved(tmp_path / f"{back}.pth", original)
    middle = convert(source, tmp_path / "middle", there)
    if there in SYSTEMS:
        names = set(read_file(middle).tensors)
        extra = {n for n in names if "cell_anchors" in n or n in ("pixel_mean", "pixel_std")}
        assert names - extra == set(SYSTEMS[there](family))
    final = read_file(convert(middle, tmp_path / "final", back)).tensors
    if (family, back, there) == ("retinanet", "maskrcnn_benchmark", "torchvision"):
        # A tenth of a float32, times ten, may be its neighbour, and a plain state dict has no room for a note.
        for name in ("rpn.head.bbox_pred.weight", "rpn.head.bbox_pred.bias"):
            torch.testing.assert_close(final[name], original[name], rtol=1.2e-7, atol=0)
            final[name] = original[name]
    assert_same_tensors(final, original)


def anchors_of(family):
    sizes = {9: [32, 40.32, 50.8], 15: [32, 64, 128, 256, 512], 3: [32]}[ANCHORS[family]]
    return {"rpn.anchor_generator.cell_anchors.0": cell_anchors(16, sizes, (0.5, 1.0, 2.0))}


@pytest.mark.parametrize("family", ["mask_fpn", "mask_c4", "retinanet"])
def test_the_zoo_pickle_of_detectron2(tmp_path, family):
    original = state("maskrcnn_benchmark", family) | anchors_of(family)
    middle = convert(saved(tmp_path / "a.pth", original), tmp_path / "b.pkl", "detectron2")
    content = pickle.loads(middle.read_bytes())
    assert content["__author__"] == "fastrcnn"
    assert set(content["model"]) == set(SYSTEMS["detectron2"](family))
    final = convert(middle, tmp_path / "c.pth", "maskrcnn_benchmark")
    assert_same_tensors(read_file(final).tensors, original)


def test_torchvision_loses_only_what_follows_from_the_configuration(tmp_path):
    original = state("maskrcnn_benchmark", "mask_fpn")
    source = saved(tmp_path / "a.pth", original | anchors_of("mask_fpn"))
    done = write_weights(read_weights(source), tmp_path / "b.pth", "torchvision")
    assert any("cell_anchors" in sentence for sentence in done)
    final = convert(tmp_path / "b.pth", tmp_path / "c.pth", "maskrcnn_benchmark")
    assert_same_tensors(read_file(final).tensors, original)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "group-norm"])
def test_layers_with_a_norm_after_them(tmp_path, norm):
    """maskrcnn-benchmark indexes into a Sequential of convolution, norm and ReLU; detectron2 names the norm."""
    original = state("maskrcnn_benchmark", "box_fpn")
    for name in [n for n in original if "fpn." in n or ".fc" in n]:
        value = original.pop(name)
        if not norm:
            original[name] = value
        elif name.endswith("weight"):
            stem = name.removesuffix(".weight")
            original |= {
                f"{stem}.0.weight": value,
                f"{stem}.1.weight": torch.randn(W),
                f"{stem}.1.bias": torch.randn(W),
            }
    for name in [n for n in original if ".fc" in n]:  # detectron2 has no norm after these
        del original[name]
    head = "roi_heads.box.feature_extractor."
    for conv in range(4):
        index = conv * (3 if norm else 2)
        original[f"{head}xconvs.{index}.weight"] = torch.randn(W, W, 3, 3)
        after = f"{head}xconvs.{index + 1}" if norm else f"{head}xconvs.{index}"
        original |= {f"{after}.bias": torch.randn(W)} | ({f"{after}.weight": torch.randn(W)} if norm else {})
    original |= {f"{head}fc6.weight": torch.randn(W, W * 49), f"{head}fc6.bias": torch.randn(W)}
    middle = convert(saved(tmp_path / "a.pth", original), tmp_path / "b.pth", "detectron2")
    theirs = read_file(middle).tensors
    expected = "roi_heads.box_head.conv4.norm.weight" if norm else "roi_heads.box_head.conv4.bias"
    assert expected in theirs
    assert ("backbone.fpn_lateral2.norm.bias" in theirs) == norm
    final = convert(middle, tmp_path / "c.pth", "maskrcnn_benchmark")
    assert_same_tensors(read_file(final).tensors, original)


def test_deformable_layers(tmp_path):
    original = state("maskrcnn_benchmark", "box_fpn")
    block = "backbone.body.layer3.1.conv2"
    original[f"{block}.conv.weight"] = original.pop(f"{block}.weight")
    original |= {f"{block}.offset.weight": torch.randn(18, W, 3, 3), f"{block}.offset.bias": torch.randn(18)}
    middle = convert(saved(tmp_path / "a.pth", original), tmp_path / "b.pth", "detectron2")
    theirs = read_file(middle).tensors
    assert {"backbone.bottom_up.res4.1.conv2.weight", "backbone.bottom_up.res4.1.conv2_offset.bias"} <= set(theirs)
    final = convert(middle, tmp_path / "c.pth", "maskrcnn_benchmark")
    assert_same_tensors(read_file(final).tensors, original)
    with pytest.raises(WeightsError, match=r"torchvision has no place for .* pass --allow-partial"):
        convert(middle, tmp_path / "d.pth", "torchvision")


def test_the_background_moves_and_its_boxes_go(tmp_path):
    original = state("maskrcnn_benchmark", "mask_fpn")
    theirs = read_file(convert(saved(tmp_path / "a.pth", original), tmp_path / "b.pth", "detectron2")).tensors
    ours = {name.removeprefix("roi_heads."): value for name, value in original.items()}
    score = theirs["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(score[-1], ours["box.predictor.cls_score.weight"][0])
    assert torch.equal(score[0], ours["box.predictor.cls_score.weight"][1])
    assert torch.equal(theirs["roi_heads.box_predictor.bbox_pred.bias"], ours["box.predictor.bbox_pred.bias"][4:])
    masks = theirs["roi_heads.mask_head.predictor.bias"]
    assert torch.equal(masks, ours["mask.predictor.mask_fcn_logits.bias"][1:])


def test_class_agnostic_boxes(tmp_path):
    """detectron2 has four columns, maskrcnn-benchmark eight, of which the last four are used."""
    theirs = state("detectron2", "box_fpn")
    for part in ("weight", "bias"):
        name = f"roi_heads.box_predictor.bbox_pred.{part}"
        theirs[name] = theirs[name][:4].clone()
    ours = read_weights(saved(tmp_path / "detectron2.pth", theirs)).tensors["roi_heads.box.predictor.bbox_pred.weight"]
    assert ours.shape == (8, W)
    assert torch.equal(ours[4:], theirs["roi_heads.box_predictor.bbox_pred.weight"])


def test_the_order_of_anchors(tmp_path):
    """detectron2 goes through the sizes and, for each, the ratios; maskrcnn-benchmark the other way round."""
    original = state("maskrcnn_benchmark", "mask_c4") | anchors_of("mask_c4")
    theirs = read_file(convert(saved(tmp_path / "a.pth", original), tmp_path / "b.pth", "detectron2")).tensors
    logits = theirs["proposal_generator.rpn_head.objectness_logits.bias"]
    deltas = theirs["proposal_generator.rpn_head.anchor_deltas.bias"]
    for size in range(5):
        for ratio in range(3):
            ours = ratio * 5 + size
            assert logits[size * 3 + ratio] == original["rpn.head.cls_logits.bias"][ours]
            there = (size * 3 + ratio) * 4
            assert torch.equal(deltas[there : there + 4], original["rpn.head.bbox_pred.bias"][ours * 4 : ours * 4 + 4])


def test_retinanet_of_torchvision(tmp_path):
    """Its classes have a column for the background, its deltas are not scaled."""
    theirs = state("torchvision", "retinanet")
    ours = read_file(convert(saved(tmp_path / "a.pth", theirs), tmp_path / "b.pth", "maskrcnn_benchmark")).tensors
    logits = theirs["head.classification_head.cls_logits.bias"].view(9, K + 1)
    assert torch.equal(ours["rpn.head.cls_logits.bias"].view(9, K), logits[:, 1:])
    scale = torch.tensor([10.0, 10.0, 5.0, 5.0]).repeat(9)
    assert torch.equal(ours["rpn.head.bbox_pred.bias"], theirs["head.regression_head.bbox_reg.bias"] * scale)


def test_names_of_older_torchvision(tmp_path):
    new = state("torchvision", "mask_fpn")
    old = {}
    for name, value in new.items():
        for former in ("inner_blocks", "layer_blocks"):
            if former in name:
                name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if "mask_head" in name:
            index = int(name.split(".")[2])
            name = f"roi_heads.mask_head.mask_fcn{index + 1}.{name.rpartition('.')[2]}"
        old[name] = value
    assert "backbone.fpn.inner_blocks.3.weight" in old
    assert_same_tensors(as_new(tmp_path, old), new)


def test_names_of_an_older_retinanet(tmp_path):
    new = state("torchvision", "retinanet")
    old = {}
    for name, value in new.items():
        if "head.conv." in name:
            front, index, _, part = name.rsplit(".", 3)
            name = f"{front}.{2 * int(index)}.{part}"
        old[name] = value
    assert "head.regression_head.conv.6.bias" in old
    assert_same_tensors(as_new(tmp_path, old), new)


def as_new(tmp_path, old):
    return read_file(convert(saved(tmp_path / "old.pth", old), tmp_path / "new.pth", "torchvision")).tensors
