"""Weights in the commands: malformed files, fine-tuning, partial loading."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastrcnn import evaluate, predict, train
from fastrcnn.config import load_config
from fastrcnn.engine.checkpoint import read_checkpoint
from fastrcnn.weights import read_weights, write_weights
from tests.weights.test_files import MALFORMED


@pytest.fixture(scope="module")
def run(small_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration."""
    output = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--config-file", small_config, "--skip-test", "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "1"]
    assert train.main(arguments) == 0
    return output


def command(name: str, config: str, weights: str, folder: Path) -> Callable[[], int]:
    photo = folder / "a.jpg"
    Image.new("RGB", (64, 64)).save(photo)
    out = str(folder / "out")
    if name == "train":
        return lambda: train.main(["--config-file", config, "OUTPUT_DIR", out, "MODEL.WEIGHT", weights])
    if name == "finetune":
        return lambda: train.main(["--config-file", config, "--finetune", weights, "OUTPUT_DIR", out])
    if name == "evaluate":
        return lambda: evaluate.main(["--config-file", config, "--weights", weights, "OUTPUT_DIR", out])
    inputs = ["--input", str(photo), "--output", out]
    return lambda: predict.main(["--config-file", config, "--weights", weights, *inputs])


CASES = ["cut off", "a text file", "code in a pickle", "eval in a pickle", "code in torch.save", "another model"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["train", "finetune", "evaluate", "predict"])
def test_malformed_weights_are_refused(
    name: str,
    case: str,
    small_config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pkl"
    MALFORMED[case][0](path)
    assert command(name, small_config, str(path), tmp_path)() == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line]
    assert len(errors) == 1, said.err
    assert errors[0].startswith(f"error: {path}: ")
    assert "Traceback" not in said.out + said.err
    assert "never be printed" not in said.out
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_weights_of_another_architecture(
    run: Path, small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Mask R-CNN is no Faster R-CNN, nor the other way round."""
    for more, message in ((["MODEL.MASK_ON", "False"], "has no place for"), (["MODEL.FPN.USE_GN", "False"], "lacks")):
        arguments = ["--config-file", small_config, "OUTPUT_DIR", str(tmp_path / "out"), *more]
        for start in (train.main, evaluate.main):
            given = ["MODEL.WEIGHT", str(run / "model_final.pth")]
            assert start([*arguments, *given]) == 2
            assert message in capsys.readouterr().err


def test_finetune_takes_weights_and_nothing_else(run: Path, small_config: str, tmp_path: Path) -> None:
    weights, out = str(run / "model_final.pth"), tmp_path / "out"
    arguments = ["--config-file", small_config, "--skip-test", "OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "1"]
    assert train.main([*arguments, "--finetune", weights, "SOLVER.BASE_LR", "0"]) == 0
    new, old = read_checkpoint(out / "model_final.pth"), read_checkpoint(Path(weights))
    assert new["iteration"] == 1  # it would have had nothing to do after the former run's
    for name, value in old["model"].items():
        assert torch.equal(new["model"][name], value), name
    assert load_config(out / "config.yml").MODEL.WEIGHT == weights


def test_finetune_and_resume_exclude_each_other(
    run: Path, small_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-file", small_config, "OUTPUT_DIR", str(run), "--resume", "--finetune", "a.pth"]
    assert train.main(arguments) == 2
    assert "--finetune starts a new one from weights: pass one of them" in capsys.readouterr().err


def test_another_number_of_classes(
    run: Path, small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in full, loaded in part: the last layers start anew, everything else is taken over."""
    content = read_checkpoint(run / "model_final.pth")
    for name, value in content["model"].items():
        if "predictor.cls_score" in name or "predictor.bbox_pred" in name or "mask_fcn_logits" in name:
            content["model"][name] = torch.cat([value, value])
    weights, out = tmp_path / "other.pth", tmp_path / "out"
    torch.save(content, weights)
    arguments = ["--config-file", small_config, "--skip-test", "OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "1"]
    arguments += ["SOLVER.BASE_LR", "0", "--finetune", str(weights)]
    assert train.main(arguments) == 2
    assert "pass --allow-partial" in capsys.readouterr().err
    assert train.main([*arguments, "--allow-partial"]) == 0
    assert "mismatched: roi_heads.box.predictor.cls_score.weight" in capsys.readouterr().out
    new = read_checkpoint(out / "model_final.pth")["model"]
    name = "roi_heads.mask.feature_extractor.mask_fcn1.0.weight"
    name = name if name in new else "roi_heads.mask.feature_extractor.mask_fcn1.weight"
    assert torch.equal(new[name], content["model"][name])
    logging.getLogger("fastrcnn").handlers.clear()


def test_evaluate_takes_converted_weights(run: Path, small_config: str, tmp_path: Path) -> None:
    """The checkpoint as safetensors gives the numbers of the checkpoint."""
    results = []
    write_weights(read_weights(run / "model_final.pth"), tmp_path / "a.safetensors", "safetensors")
    for number, weights in enumerate((run / "model_final.pth", tmp_path / "a.safetensors")):
        out = tmp_path / str(number)
        given = ["--weights", str(weights), "OUTPUT_DIR", str(out)]
        assert evaluate.main(["--config-file", small_config, *given]) == 0
        results.append((out / "inference/instances_val/bbox.json").read_text())
    assert results[0] == results[1]
