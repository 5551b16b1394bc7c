"""Blobs of Caffe2: names, folded batch normalisation, group normalisation, heads."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fastrcnn.weights import read_weights
from tests.weights import tables
from tests.weights.tables import K, W

BRANCH = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "downsample.0": "branch1"}


def blobs_of(family: str, last_blocks: dict[int, int]) -> dict[str, np.ndarray]:
    """The blobs of a Caffe2 model whose tensors are those of maskrcnn-benchmark's table, under Caffe2's names."""
    found = {}
    heads = {
        "rpn.head.conv": "conv_rpn", "rpn.head.cls_logits": "rpn_cls_logits", "rpn.head.bbox_pred": "rpn_bbox_pred",
        "roi_heads.box.feature_extractor.fc6": "fc6", "roi_heads.box.feature_extractor.fc7": "fc7",
        "roi_heads.box.predictor.cls_score": "cls_score", "roi_heads.box.predictor.bbox_pred": "bbox_pred",
        "roi_heads.mask.predictor.conv5_mask": "conv5_mask",
        "roi_heads.mask.predictor.mask_fcn_logits": "mask_fcn_logits",
        "roi_heads.keypoint.predictor.kps_score_lowres": "kps_score_lowres",
    }  # fmt: skip
    for name, value in tables.state("maskrcnn_benchmark", family).items():
        module, _, part = name.rpartition(".")
        letter = {"weight": "w", "bias": "b"}.get(part)
        if letter is None or module.startswith("roi_heads.mask.feature_extractor.head."):
            continue  # folded statistics; the second name of stage 5
        module = module.removeprefix("backbone.body.").removeprefix("roi_heads.box.feature_extractor.head.")
        if module == "stem.conv1":
            blob = "conv1_w"
        elif module == "stem.bn1":
            blob = f"res_conv1_bn_{'s' if letter == 'w' else 'b'}"
        elif module.startswith("layer"):
            stage, block, layer = module.split(".", 2)
            stage = f"res{int(stage[5:]) + 1}_{block}"
            if layer.startswith("bn") or layer == "downsample.1":
                conv = "downsample.0" if layer == "downsample.1" else f"conv{layer[2]}"
                blob = f"{stage}_{BRANCH[conv]}_bn_{'s' if letter == 'w' else 'b'}"
            else:
                blob = f"{stage}_{BRANCH[layer]}_w"
        elif module.startswith("backbone.fpn."):
            kind, level = module[len("backbone.fpn.fpn_") : -1], int(module[-1])
            top = "" if level == 4 else "_lateral"
            block = f"res{level + 1}_{last_blocks[level]}_sum"
            blob = f"fpn_inner_{block}{top}_{letter}" if kind == "inner" else f"fpn_{block}_{letter}"
        elif module in heads:
            pyramid = "_fpn2" if "rpn" in module and family != "mask_c4" else ""
            blob = f"{heads[module]}{pyramid}_{letter}"
        elif "mask_fcn" in module:
            blob = f"_[mask]_fcn{module[-1]}_{letter}"
        else:
            assert "conv_fcn" in module
            blob = f"conv_fcn{module[-1]}_{letter}"
        found[blob] = value.numpy()
    return found


@pytest.mark.parametrize("family", ["mask_fpn", "box_fpn", "mask_c4", "keypoint"])
@pytest.mark.parametrize("depth", [50, 101, 152])
def test_detectors(tmp_path, family, depth):
    last = {50: (2, 3, 5, 2), 101: (2, 3, 22, 2), 152: (2, 7, 35, 2)}[depth]
    blobs = blobs_of(family, dict(enumerate(last, 1)))
    blobs |= {f"{name}_momentum": value for name, value in blobs.items()}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, 2))
    weights = read_weights(path)
    assert (weights.kind, weights.body_only, weights.unknown) == ("caffe2", False, {})
    expected = tables.state("maskrcnn_benchmark", family)
    assert set(weights.tensors) == set(expected)
    for name, value in expected.items():
        if name.endswith("running_mean"):
            value = torch.zeros_like(value)
        elif name.endswith("running_var"):
            value = torch.ones_like(value)
        assert torch.equal(weights.tensors[name], value), name
    assert "folded batch normalisations" in " ".join(weights.converted)


def imagenet_blobs(norm: str):
    blobs = blobs_of("box_fpn", dict(enumerate((2, 3, 5, 2), 1)))
    body = {name: value for name, value in blobs.items() if name.startswith(("conv1", "res"))}
    if norm == "gn":
        body = {name.replace("res_conv1_bn", "conv1_gn").replace("_bn_", "_gn_"): v for name, v in body.items()}
    return body | {"fc1000_w": np.zeros((5, 2), "f4"), "fc1000_b": np.zeros(5, "f4")}


def test_imagenet_models(tmp_path):
    path = tmp_path / "R-50.pkl"
    blobs = imagenet_blobs("bn")
    blobs["conv1_b"] = np.full(W, 2.0, "f4")  # before the normalisation
    path.write_bytes(pickle.dumps(blobs, 2))
    weights = read_weights(path)
    assert weights.body_only
    assert weights.stride_in_1x1 is True
    assert weights.ignored == ["fc1000_w (the classifier)", "fc1000_b (the classifier)"]
    scale, shift = (torch.from_numpy(blobs[f"res_conv1_bn_{part}"]) for part in ("s", "b"))
    assert torch.equal(weights.tensors["stem.bn1.bias"], shift + scale * 2)
    assert torch.equal(weights.tensors["layer2.0.downsample.1.running_var"], torch.ones(2 * W))
    assert "stem.conv1.bias" not in weights.tensors


def test_group_normalisation_has_no_statistics(tmp_path):
    path = tmp_path / "R-50-GN.pkl"
    path.write_bytes(pickle.dumps(imagenet_blobs("gn"), 2))
    weights = read_weights(path)
    assert weights.stride_in_1x1 is False
    assert "layer1.0.bn2.weight" in weights.tensors
    assert "stem.bn1.bias" in weights.tensors
    assert not [name for name in weights.tensors if "running" in name]


def test_group_normalisation_in_pyramid_and_heads(tmp_path):
    names = {
        "fpn_inner_res4_5_sum_lateral": "backbone.fpn.fpn_inner3",
        "fpn_res5_2_sum": "backbone.fpn.fpn_layer4",
        "_[mask]_fcn2": "roi_heads.mask.feature_extractor.mask_fcn2",
        "fc6": "roi_heads.box.feature_extractor.fc6",
    }
    blobs = imagenet_blobs("gn") | {"cls_score_w": np.zeros((K, W), "f4")}
    for blob in names:
        blobs |= {
            f"{blob}_w": np.ones((W, W), "f4"),
            f"{blob}_gn_s": np.ones(W, "f4"),
            f"{blob}_gn_b": np.ones(W, "f4"),
        }
    blobs |= {f"head_conv2_{part}": np.ones(W, "f4") for part in ("w", "gn_s", "gn_b")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}, 2))
    tensors = read_weights(tmp_path / "a.pkl").tensors
    for ours in names.values():
        assert {f"{ours}.0.weight", f"{ours}.1.weight", f"{ours}.1.bias"} <= set(tensors)
    head = "roi_heads.box.feature_extractor.xconvs"
    assert {f"{head}.3.weight", f"{head}.4.weight", f"{head}.4.bias"} <= set(tensors)
    assert "backbone.body.stem.bn1.weight" in tensors
