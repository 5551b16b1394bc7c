"""``python -m fastrcnn.weights``: what it tells, converts and refuses."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fastrcnn.weights.__main__ import main
from fastrcnn.weights.read import read_file
from tests.weights.tables import SYSTEMS, state


def saved(tmp_path, system, family="mask_fpn"):
    path = tmp_path / f"{system}.pth"
    torch.save(state(system, family), path)
    return str(path)


def test_without_a_destination_the_file_is_described(tmp_path, capsys):
    assert main([saved(tmp_path, "torchvision")]) == 0
    said = capsys.readouterr().out
    assert "torchvision, a detector, " in said
    assert "pixels: RGB in 0..1, mean (0.485, 0.456, 0.406)" in said
    assert "stride in the 1x1 convolution: False" in said


@pytest.mark.parametrize("to", SYSTEMS)
def test_conversion(tmp_path, capsys, to):
    out = tmp_path / "folder" / "out.pth"
    assert main([saved(tmp_path, "torchvision"), str(out), "--to", to]) == 0
    assert f"{out}: written as {to}" in capsys.readouterr().out
    assert set(read_file(out).tensors) == set(SYSTEMS[to]("mask_fpn"))


def test_an_existing_file_is_not_replaced(tmp_path, capsys):
    source, out = saved(tmp_path, "maskrcnn_benchmark"), tmp_path / "out.pth"
    out.write_text("mine")
    assert main([source, str(out), "--to", "detectron2"]) == 2
    assert capsys.readouterr().err == f"error: {out}: exists; pass --overwrite or another name\n"
    assert out.read_text() == "mine"
    assert main([source, str(out), "--to", "detectron2", "--overwrite"]) == 0


def test_the_stem_for_other_pixels(tmp_path, capsys):
    source, out = saved(tmp_path, "maskrcnn_benchmark"), str(tmp_path / "out.pth")
    assert main([source, out, "--to", "torchvision"]) == 0
    assert "torchvision feeds RGB in 0..1" in capsys.readouterr().out
    assert main([source, out, "--to", "torchvision", "--pixels", "rgb01", "--overwrite"]) == 2
    assert "pass --from-pixels" in capsys.readouterr().err
    arguments = ["--to", "torchvision", "--from-pixels", "bgr255", "--pixels", "rgb01", "--overwrite"]
    assert main([source, out, *arguments]) == 0
    found = torch.load(out, weights_only=True)["backbone.body.conv1.weight"]
    stem = state("maskrcnn_benchmark", "mask_fpn")["backbone.body.stem.conv1.weight"]
    torch.testing.assert_close(found[:, 0], stem[:, 2] * 255 * 0.229)  # red is first there and last here


def test_what_a_format_has_no_place_for(tmp_path, capsys):
    source, out = saved(tmp_path, "maskrcnn_benchmark", "mask_c4"), str(tmp_path / "out.pth")
    assert main([source, out, "--to", "torchvision"]) == 2
    assert "torchvision has no place for" in capsys.readouterr().err
    assert main([source, out, "--to", "torchvision", "--allow-partial"]) == 0
    assert "left out: roi_heads.box.feature_extractor.head.layer4" in capsys.readouterr().out


def test_a_file_of_unknown_names(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"conv1_w": 3, "x_w": np.zeros(2, "f4")}, 2))
    assert main([str(tmp_path / "a.pkl")]) == 0  # a plain dict of tensors, which may be anyone's
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"res2_0_branch2a_w": "text", "cls": 3}, 2))
    assert main([str(tmp_path / "b.pkl")]) == 2
    assert "holds no tensors" in capsys.readouterr().err


def test_destination_and_format_go_together(tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([saved(tmp_path, "torchvision"), "out.pth"])
    assert caught.value.code == 2
