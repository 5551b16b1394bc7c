"""``python -m fastrcnn.train`` and ``python -m fastrcnn.evaluate``: what they write, and how they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrcnn import evaluate, train
from fastrcnn.config import load_config
from fastrcnn.engine.checkpoint import read_checkpoint
from tests.conftest import REPOSITORY
from tests.engine.standin import assert_same

SHARED_TIMES = {"time", "data_time", "images_per_second", "max_mem_mib"}


def losses_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SHARED_TIMES} for line in lines if line["type"] == "train"]


def files_in(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole_run(small_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations with an evaluation after two and at the end."""
    output = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--config-file", small_config, "OUTPUT_DIR", str(output), "SOLVER.TEST_PERIOD", "2"]
    assert train.main([*arguments, "TEST.VIS_IMAGES=3"]) == 0
    return output


def test_run_writes_what_is_documented(whole_run: Path) -> None:
    names = {name for name in files_in(whole_run) if not name.startswith("tensorboard")}
    pictures = {name for name in names if name.endswith(".png")}
    assert names - pictures == {
        "command.txt",
        "config.yml",
        "inference/instances_val/bbox.json",
        "inference/instances_val/segm.json",
        "inference/instances_val/summary.json",
        "labels.json",
        "last_checkpoint",
        "log.txt",
        "metrics.jsonl",
        "model_0000002.pth",
        "model_0000004.pth",
        "model_best.pth",
        "model_final.pth",
    }
    assert len(pictures) == 3
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["type"], line["iteration"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]
    assert {"bbox/AP", "segm/AP50"} < set(lines[2])
    assert json.loads((whole_run / "labels.json").read_text())["0"] == "__background__"
    assert "annotations sha256" in (whole_run / "command.txt").read_text()
    summary = json.loads((whole_run / "inference/instances_val/summary.json").read_text())
    assert (summary["iteration"], summary["num_images"]) == (4, 4)
    assert (whole_run / "log.txt").read_text().count("fastrcnn.trainer INFO: eta: ") == 4


def test_written_config_is_the_one_in_force(whole_run: Path, small_config: str) -> None:
    overrides = ["OUTPUT_DIR", str(whole_run), "SOLVER.TEST_PERIOD", "2", "TEST.VIS_IMAGES", "3"]
    assert load_config(whole_run / "config.yml") == load_config(small_config, overrides)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(whole_run: Path, small_config: str, tmp_path: Path, workers: int) -> None:
    """Two iterations, resumed with other workers for two more: weights, momentum and losses of four in one go."""
    out = tmp_path / "out"
    arguments = ["--config-file", small_config, "--skip-test", "OUTPUT_DIR", str(out)]
    assert train.main([*arguments, "SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", str(2 - workers)]) == 0
    assert train.main([*arguments, "--resume", "DATALOADER.NUM_WORKERS", str(workers)]) == 0
    whole, parts = (read_checkpoint(folder / "model_final.pth") for folder in (whole_run, out))
    assert_same(whole["model"], parts["model"])
    for index, state in whole["optimizer"]["state"].items():
        assert_same(state, parts["optimizer"]["state"][index])
    assert losses_of(whole_run) == losses_of(out)


def test_resume_after_the_end_does_nothing(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(whole_run)
    assert train.main(["--config-file", str(whole_run / "config.yml"), "--resume"]) == 0
    assert "Nothing to do: all 4 iterations are done" in capsys.readouterr().out
    assert files_in(whole_run) == before


def test_evaluate_agrees_with_the_run(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((whole_run / "inference/instances_val/summary.json").read_text())["results"]
    config, weights = str(whole_run / "config.yml"), str(whole_run / "model_final.pth")
    assert evaluate.main(["--config-file", config, "--weights", weights, "OUTPUT_DIR", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "inference/instances_val/summary.json").read_text())
    assert found["results"] == expected
    assert "bbox AP of each class" in capsys.readouterr().out


def test_evaluate_takes_the_newest_checkpoint(whole_run: Path, tmp_path: Path, shapes_data: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("last_checkpoint", "model_final.pth"):
        (out / name).write_bytes((whole_run / name).read_bytes())
    dataset = f"{shapes_data}/annotations/instances_train.json@{shapes_data}/images"
    config = str(whole_run / "config.yml")
    assert evaluate.main(["--config-file", config, "--dataset", dataset, "OUTPUT_DIR", str(out)]) == 0
    summary = json.loads((out / "inference/instances_train/summary.json").read_text())
    assert summary["weights"] == str(out / "model_final.pth")
    assert summary["num_images"] == 6


def test_dry_run_writes_nothing(small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config-file", small_config, "--dry-run", "OUTPUT_DIR", str(tmp_path / "out")]) == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "loss_mask: " in said
    assert "nothing was written" in said


def test_print_config(small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert train.main(["--config-file", small_config, "--print-config", "OUTPUT_DIR", out]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(small_config, ["OUTPUT_DIR", out])
    assert not (tmp_path / "out").exists()


def test_flags_after_keys_are_flags(small_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse's REMAINDER, which maskrcnn-benchmark uses, would swallow them."""
    arguments = ["MODEL.RPN.STRADDLE_THRESH", "-1", "--local-rank=0", "--print-config", "SOLVER.MAX_ITER", "7"]
    assert train.main(["--config-file", small_config, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "MAX_ITER: 7" in printed
    assert "STRADDLE_THRESH: -1" in printed


def annotations_without_image(data: Path, folder: Path) -> str:
    path = folder / "ghost.json"
    content = json.loads((data / "annotations/instances_train.json").read_text())
    content["annotations"][0]["image_id"] = 4711
    path.write_text(json.dumps(content))
    return f"('{path}@{data}/images',)"


def weights_of_another_shape(run: Path, folder: Path) -> str:
    content = read_checkpoint(run / "model_final.pth")
    name = "roi_heads.box.predictor.cls_score.weight"
    content["model"][name] = torch.zeros(3, content["model"][name].shape[1])
    torch.save(content, folder / "other.pth")
    return str(folder / "other.pth")


BAD = {
    "unknown key": (["SOLVER.BASE_LEARNING_RATE", "0.1"], "SOLVER.BASE_LEARNING_RATE"),
    "nearest key": (["SOLVER.BASE_RL", "0.1"], "BASE_LR"),
    "wrong type": (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
    "missing config": (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
    "missing annotations": (["DATASETS.TRAIN", "('nowhere.json@images',)"], "nowhere.json"),
    "annotation without image": (["DATASETS.TRAIN", annotations_without_image], "4711"),
    "class count": (["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "81"], "pass MODEL.ROI_BOX_HEAD.NUM_CLASSES 6"),
    "missing weights": (["MODEL.WEIGHT", "nowhere.pth"], "nowhere.pth"),
    "weights of another shape": (["MODEL.WEIGHT", weights_of_another_shape], "cls_score.weight"),
    "no training set": (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    "unknown flag": (["--fast"], "--fast"),
    "contradiction": (["--resume", "--overwrite"], "exclude each other"),
    "key without value": (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(
    case: str,
    whole_run: Path,
    small_config: str,
    shapes_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, expected = BAD[case]
    made = {annotations_without_image: shapes_data, weights_of_another_shape: whole_run}
    arguments = [a if isinstance(a, str) else a(made[a], tmp_path) for a in arguments]
    out = tmp_path / "out"
    code = train.main(["--config-file", small_config, "OUTPUT_DIR", str(out), *arguments])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line]
    assert code == 2
    assert len(errors) == 1, captured.err
    assert errors[0].startswith("error: ")
    assert expected in errors[0]
    assert "Traceback" not in captured.out + captured.err
    assert not out.exists()


def test_output_dir_in_use_is_left_alone(
    whole_run: Path, small_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(whole_run)
    assert train.main(["--config-file", small_config, "OUTPUT_DIR", str(whole_run)]) == 2
    assert capsys.readouterr().err.startswith(f"error: OUTPUT_DIR {whole_run} is not empty")
    # Nor does --overwrite lose finished work to a mistake elsewhere.
    bad = ["OUTPUT_DIR", str(whole_run), "MODEL.WEIGHT", "nowhere.pth"]
    assert train.main(["--config-file", small_config, "--overwrite", *bad]) == 2
    assert files_in(whole_run) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda(small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-file", small_config, "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cuda"]
    assert train.main(arguments) == 2
    assert "pass MODEL.DEVICE cpu" in capsys.readouterr().err
    assert evaluate.main(arguments) == 2


def test_evaluate_without_weights(small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--config-file", small_config, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "has no checkpoint: pass --weights" in capsys.readouterr().err


def test_evaluate_on_other_classes(
    whole_run: Path, tmp_path: Path, shapes_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((shapes_data / "annotations/instances_val.json").read_text())
    content["categories"].append({"id": 99, "name": "zebra"})
    (tmp_path / "zoo.json").write_text(json.dumps(content))
    dataset = f"{tmp_path}/zoo.json@{shapes_data}/images"
    assert evaluate.main(["--config-file", str(whole_run / "config.yml"), "--dataset", dataset]) == 2
    assert "zoo.json" in (message := capsys.readouterr().err)
    assert "pass MODEL.ROI_BOX_HEAD.NUM_CLASSES 7" in message


def test_test_set_with_other_names_is_refused_before_training(
    small_config: str, tmp_path: Path, shapes_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((shapes_data / "annotations/instances_val.json").read_text())
    content["categories"][0]["name"] = "zebra"
    (tmp_path / "zoo.json").write_text(json.dumps(content))
    arguments = ["OUTPUT_DIR", str(tmp_path / "out"), "DATASETS.TEST", f"('{tmp_path}/zoo.json@{shapes_data}/images',)"]
    assert train.main(["--config-file", small_config, *arguments]) == 2
    assert "'zebra'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_test_set_of_the_catalog(
    small_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration of maskrcnn-benchmark names COCO's test set; training on other data does not need it."""
    monkeypatch.setenv("FASTRCNN_DATASETS", str(tmp_path))
    arguments = ["--config-file", small_config, "DATASETS.TEST", "('coco_2014_minival',)", "SOLVER.MAX_ITER", "1"]
    assert train.main([*arguments, "OUTPUT_DIR", str(tmp_path / "a")]) == 0
    assert "instances_minival2014.json is missing; this run will not be evaluated on it" in capsys.readouterr().out
    assert train.main([*arguments, "OUTPUT_DIR", str(tmp_path / "b"), "SOLVER.TEST_PERIOD", "1"]) == 2
    assert "instances_minival2014.json" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_deterministic_runs_are_equal(small_config: str, tmp_path: Path) -> None:
    try:
        for name in "ab":
            arguments = ["--deterministic", "--skip-test", "OUTPUT_DIR", str(tmp_path / name), "SOLVER.MAX_ITER", "2"]
            assert train.main(["--config-file", small_config, *arguments]) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (read_checkpoint(tmp_path / name / "model_final.pth")["model"] for name in "ab")
    assert_same(a, b)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


def test_the_seed_decides(whole_run: Path, small_config: str, tmp_path: Path) -> None:
    arguments = ["--skip-test", "OUTPUT_DIR", str(tmp_path / "a"), "SOLVER.MAX_ITER", "1", "SOLVER.SEED", "1"]
    assert train.main(["--config-file", small_config, *arguments]) == 0
    assert losses_of(tmp_path / "a")[0]["loss"] != losses_of(whole_run)[0]["loss"]


def test_failure_exits_with_1(
    small_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.TrainStep, "__call__", explode)
    assert train.main(["--config-file", small_config, "--skip-test", "OUTPUT_DIR", str(tmp_path / "out")]) == 1
    said = (tmp_path / "out/log.txt").read_text()
    assert said.count("Traceback") == 1
    assert "lower SOLVER.IMS_PER_BATCH" in said
    assert "Traceback" in capsys.readouterr().out


def test_diverging_run_exits_with_3(small_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["SOLVER.BASE_LR", "1e20", "SOLVER.WARMUP_ITERS", "0", "SOLVER.CHECKPOINT_PERIOD", "1"]
    assert train.main(["--config-file", small_config, "--skip-test", "OUTPUT_DIR", str(out), *arguments]) == 3
    assert "in iteration" in capsys.readouterr().err
    for path in out.glob("*.pth"):
        assert all(v.isfinite().all() for v in read_checkpoint(path)["model"].values() if v.is_floating_point())
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["type"] == "nonfinite"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (train, evaluate):
        with pytest.raises(SystemExit) as caught:
            command.main(["--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert "examples:" in printed
        assert "exit codes:" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_whole_process_group(small_config: str, tmp_path: Path, signum: int, code: int) -> None:
    """As a terminal or a scheduler sends it: the loader's workers must not die of it before the step is done."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastrcnn.train", "--config-file", small_config, "OUTPUT_DIR", str(out)]
    options = ["SOLVER.MAX_ITER", "100000", "SOLVER.STEPS", "(90000,)", "DATALOADER.NUM_WORKERS", "2"]
    child = subprocess.Popen([*command, *options], cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "model_0000002.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(child.pid, signum)
        assert child.wait(timeout=60) == code
    finally:
        if child.poll() is None:
            child.kill()
    newest = out / (out / "last_checkpoint").read_text()
    done = read_checkpoint(newest)["iteration"]
    assert done >= 2
    assert losses_of(out)[-1]["iteration"] == done
