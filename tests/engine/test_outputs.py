"""OUTPUT_DIR: when it is refused, what is removed, what is written."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from fastrcnn.engine import outputs
from fastrcnn.engine.outputs import (
    MetricsFile,
    OutputDirError,
    check_output_dir,
    close_logging,
    describe_run,
    free_space_warning,
    git_state,
    log_to_file,
    own_files,
    prepare_output_dir,
    set_up_logging,
)

RUN_FILES = [
    "config.yml",
    "command.txt",
    "labels.json",
    "log.txt",
    "log.rank1.txt",
    "metrics.jsonl",
    "last_checkpoint",
    "model_0000010.pth",
    "model_final.pth",
    "model_best.pth",
    ".model_0000020.pth.tmp-123",
    "tensorboard/events.out.tfevents.1.host",
    "inference/coco_val/bbox.json",
    "inference/coco_val/segm.json",
    "inference/coco_val/summary.json",
    "inference/coco_val/images/7.png",
]
FOREIGN_FILES = ["notes.txt", "model_mine.pth", "config.yaml", "inference/paper.pdf", "inference/coco_val/mine.json"]


def fill(directory: Path, names: list[str]) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def files_in(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["config.yml", "notes.txt", "model_0000010.pth"])
def test_directory_in_use_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "out", [name])
    with pytest.raises(OutputDirError, match=rf"not empty \(it holds {name}\): pass --resume .* --overwrite"):
        prepare_output_dir(tmp_path / "out")
    assert files_in(tmp_path) == [f"out/{name}"]
    check_output_dir(tmp_path / "out", resume=True)
    check_output_dir(tmp_path / "out", overwrite=True)


def test_new_and_empty_directories_are_fine(tmp_path: Path) -> None:
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists(), "checking writes nothing"
    prepare_output_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_working_directory_may_hold_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, ["setup.py"])
    check_output_dir(Path("."))
    fill(tmp_path, ["last_checkpoint"])
    with pytest.raises(OutputDirError, match="it holds last_checkpoint"):
        check_output_dir(Path("."))


def test_overwrite_removes_only_what_a_run_writes(tmp_path: Path) -> None:
    fill(tmp_path, RUN_FILES + FOREIGN_FILES)
    assert sorted(str(p.relative_to(tmp_path)) for p in own_files(tmp_path)) == sorted(RUN_FILES)
    prepare_output_dir(tmp_path, overwrite=True)
    assert files_in(tmp_path) == sorted(FOREIGN_FILES)


def test_resume_removes_only_unfinished_files(tmp_path: Path) -> None:
    fill(tmp_path, RUN_FILES + FOREIGN_FILES)
    prepare_output_dir(tmp_path, resume=True)
    assert files_in(tmp_path) == sorted({*RUN_FILES, *FOREIGN_FILES} - {".model_0000020.pth.tmp-123"})


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    fill(tmp_path, ["out"])
    with pytest.raises(OutputDirError, match="is a file"):
        check_output_dir(tmp_path / "out")
    with pytest.raises(OutputDirError, match="cannot be written"):
        check_output_dir(tmp_path / "out" / "deeper")


def test_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: the tests may run as root, who may write everywhere.
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: False)
    with pytest.raises(OutputDirError, match=f"cannot be written: no permission in {tmp_path}"):
        check_output_dir(tmp_path / "a" / "b")


def test_metrics_lines_are_json_and_survive_a_resume(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for iteration in (20, 40, 60):
        metrics.write("train", iteration, {"loss": iteration / 10})
    metrics.write("nonfinite", 61, {"loss": math.nan, "loss_mask": -math.inf, "loss_box_reg": 1.0})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"type": "train", "itera')  # cut off by a crash
    resumed = MetricsFile(tmp_path, start_iteration=40)
    resumed.write("train", 60, {"loss": 5.0})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"type": "train", "iteration": 20, "loss": 2.0},
        {"type": "train", "iteration": 40, "loss": 4.0},
        {"type": "train", "iteration": 60, "loss": 5.0},
    ]


def test_nonfinite_metrics_are_legal_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.write("nonfinite", 3, {"loss": math.nan, "loss_mask": -math.inf})
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    parsed = json.loads(line, parse_constant=refuse)
    assert parsed == {"type": "nonfinite", "iteration": 3, "loss": "nan", "loss_mask": "-inf"}


def test_metrics_of_other_ranks_go_nowhere(tmp_path: Path) -> None:
    metrics = MetricsFile(None)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_log_file_has_what_was_said_before_it_existed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logger = logging.getLogger("fastrcnn.somewhere")
    try:
        logger.info("before")
        log_to_file(tmp_path)
        logger.info("after")
    finally:
        close_logging()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "fastrcnn.somewhere INFO: before",
        "fastrcnn.somewhere INFO: after",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_description_of_a_run(tmp_path: Path) -> None:
    text = describe_run(["prog", "A B", "(1, 2)"], torch.device("cpu"), 2, {"coco_val": "sha256 abc"})
    rows = dict(line.split(": ", 1) for line in text.splitlines())
    assert rows["command"] == "prog 'A B' '(1, 2)'"
    assert rows["torch"] == torch.__version__
    assert rows["device"].startswith("2 x cpu")
    assert rows["dataset coco_val"] == "sha256 abc"
    assert git_state(tmp_path) == "not a git checkout"


def test_free_space(tmp_path: Path) -> None:
    assert free_space_warning(tmp_path, 1) == ""
    assert "one checkpoint needs about" in free_space_warning(tmp_path, 2**62)
