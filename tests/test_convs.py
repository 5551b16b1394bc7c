"""``python -m benchmarks.convs``: what it collects, its arithmetic, its comparison with a former run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import convs

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--config-file", str(ROOT / "configs" / "demo_shapes.yaml"), "--device", "cpu", "--size", "64x64", "--seconds", "0",
    "--positives", "2",
]  # fmt: skip


def test_the_convolutions_are_those_of_the_model():
    found = convs.collect(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml", [], 2, (1344, 800), 64)
    by_name = {conv.name: conv for conv in found}
    # 53 of ResNet-50 with its stem and shortcuts, 8 of FPN, 3 on each of 5 levels of the RPN, 6 of the mask head
    assert sum(conv.times for conv in found) == 53 + 8 + 3 * 5 + 6
    assert len({conv.key for conv in found}) == len(found)
    stem = by_name["backbone.body.stem.conv1"]
    assert (stem.input, stem.weight, stem.stride) == ((2, 3, 800, 1344), (64, 3, 7, 7), (2, 2))
    assert not stem.dgrad
    assert not stem.wgrad
    first_trained = by_name["backbone.body.layer2.0.conv1"]
    assert first_trained.wgrad
    assert not first_trained.dgrad  # nothing below it is trained
    assert by_name["backbone.body.layer3.0.conv2"].times == 8  # six blocks' second, FPN's and the RPN's on that level
    assert by_name["roi_heads.mask.feature_extractor.mask_fcn1"].input == (128, 256, 14, 14)
    assert by_name["roi_heads.mask.predictor.conv5_mask"].transposed


@pytest.mark.parametrize("transposed", [False, True])
def test_the_flops_are_those_that_torch_counts(transposed):
    from torch.utils.flop_counter import FlopCounterMode

    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = kind(3, 6, 2, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 10, requires_grad=True)
    conv = convs.convolution_of("one", module, x)
    assert conv.dgrad
    assert conv.wgrad
    with FlopCounterMode(display=False) as counter:
        output = module(x)
    assert conv.flops(output) == counter.get_total_flops()


def test_each_pass_is_torchs_gradient():
    module = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    conv = convs.convolution_of("one", module, x)
    output, gradient, calls = convs.torch_calls(conv, x.detach(), module.weight.detach())
    assert torch.equal(output, module(x).detach())
    dx, dw = torch.autograd.grad(module(x), (x, module.weight), gradient)
    torch.testing.assert_close(calls["dgrad"]()[0], dx)
    torch.testing.assert_close(calls["wgrad"]()[1], dw)
    torch.testing.assert_close(calls["forward"](), output)


@pytest.mark.skipif("ours" not in convs.PROVIDERS, reason="fastrcnn_kernels has no convolution")
@pytest.mark.parametrize("layout", convs.LAYOUTS)
def test_ours_computes_what_torch_computes(layout):
    module = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    conv = convs.convolution_of("one", module, torch.randn(2, 8, 12, 20, requires_grad=True))
    row = convs.one_row(conv, torch.device("cpu"), torch.float32, convs.LAYOUTS[layout], "ours", 0)
    assert row["difference"] < 1e-5
    assert {f"{name}_ms" for name in convs.PASSES} <= row.keys()


def test_another_result_is_not_timed(monkeypatch):
    module = nn.Conv2d(3, 4, 3, bias=False)
    conv = convs.convolution_of("one", module, torch.randn(1, 3, 9, 9))
    monkeypatch.setattr(
        convs, "our_calls", lambda conv, x, weight, gradient: {"forward": lambda: torch.conv2d(x, weight * 1.01)}
    )
    with pytest.raises(RuntimeError, match=r"differs from torch's by 1.0e-02"):
        convs.one_row(conv, torch.device("cpu"), torch.float32, torch.contiguous_format, "ours", 0)


def test_a_run_its_files_and_a_comparison(tmp_path, capsys):
    assert convs.main([*SMALL, "--output", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "convs.json").read_text())
    assert not [row for row in result["rows"] if "reason" in row]
    assert {row["layout"] for row in result["rows"]} == {"nchw", "channels_last"}
    total = result["sums"][0]
    of_it = [r for r in result["rows"] if (r["layout"], r["provider"]) == (total["layout"], total["provider"])]
    assert total["forward_ms"] == pytest.approx(sum(row["times"] * row["forward_ms"] for row in of_it))
    assert total["all_ms"] == pytest.approx(total["forward_ms"] + total["dgrad_ms"] + total["wgrad_ms"])
    assert "## All convolutions of a step" in (tmp_path / "a" / "convs.md").read_text()

    for row in result["rows"]:
        row["forward_ms"] /= 1e6
    (tmp_path / "old.json").write_text(json.dumps(result))
    assert convs.main([*SMALL, "--output", str(tmp_path / "b"), "--compare", str(tmp_path / "old.json")]) == 1
    assert "## Slower than before" in capsys.readouterr().out


def test_the_comparison_names_the_pass_and_what_is_new_is_no_loss():
    row = {"conv": "1x1", "dtype": "float32", "layout": "nchw", "provider": "torch", "forward_ms": 1.0, "dgrad_ms": 2.0}
    now = {**row, "forward_ms": 1.05, "dgrad_ms": 3.0, "wgrad_ms": 9.0}
    other = {**now, "conv": "3x3"}
    (found,) = convs.compare([row], [now, other])
    assert (found["pass"], found["was"], found["now"], found["times_slower"]) == ("dgrad", 2.0, 3.0, 1.5)


def test_no_time_is_a_reason(tmp_path):
    assert convs.main([*SMALL, "--output", str(tmp_path), "--budget", "-1"]) == 0
    result = json.loads((tmp_path / "convs.json").read_text())
    assert {row["reason"] for row in result["rows"]} == {"not begun, the time was up"}
    assert sum(total["missing"] for total in result["sums"]) == len(result["rows"])


def test_a_missing_former_run(tmp_path, capsys):
    assert convs.main([*SMALL, "--compare", str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err
