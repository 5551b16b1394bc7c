"""Loading weights: names by their longest end, shapes, and files that must be refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastrcnn.weights import WeightsError, load_weights
from tests.models.inputs import small_model


def saved(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


def test_a_checkpoint_comes_back_whole(tmp_path):
    source, target = small_model(seed=1), small_model(seed=2)
    path = saved(tmp_path, {"model": {f"module.{k}": v for k, v in source.state_dict().items()}, "iteration": 3})
    report = load_weights(target, path)
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], [])
    assert len(report.loaded) == len(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_an_imagenet_body_fits_by_the_longest_end(tmp_path):
    model = small_model(seed=1)
    stem = torch.randn_like(model.backbone.body.stem.conv1.weight)
    block = torch.randn_like(model.backbone.body.layer2[0].conv1.weight)
    report = load_weights(model, saved(tmp_path, {"conv1.weight": stem, "layer2.0.conv1.weight": block,
                                                  "fc.weight": torch.zeros(2, 2)}), strict_shapes=False)  # fmt: skip
    assert torch.equal(model.backbone.body.stem.conv1.weight, stem)
    assert torch.equal(model.backbone.body.layer2[0].conv1.weight, block)
    assert report.unexpected == ["fc.weight"]
    assert "rpn.head.conv.weight" in report.missing


def test_another_number_of_classes(tmp_path):
    path = saved(tmp_path, small_model().state_dict())
    other = small_model("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "9")
    before = other.roi_heads["box"].predictor.cls_score.weight.clone()
    with pytest.raises(WeightsError, match=r"cls_score\.weight: 5x32 in the file, 9x32 in the model"):
        load_weights(other, path)
    report = load_weights(other, path, strict_shapes=False)
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
    assert load_weights(small_model(), path).missing == ["rpn.head.conv.bias"]
    with pytest.raises(WeightsError, match=r"lacks 1 of the model's tensors, the first is rpn\.head\.conv\.bias"):
        load_weights(small_model(), path, complete=True)


class Attack:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "not a readable torch.save file"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "weights"),
        (lambda path: torch.save({"model": {}}, path), "holds no tensors"),
        (lambda path: torch.save([1, 2], path), "holds a list"),
        (lambda path: torch.save({"nothing.fits": torch.zeros(1)}, path), "none of its 1 tensors fits"),
        (lambda path: path.write_bytes(pickle.dumps({"model": Attack()})), "could run code"),
        (lambda path: torch.save({"model": Attack()}, path), "could run code"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, write, message):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(small_model(), path)
    assert "\n" not in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out
