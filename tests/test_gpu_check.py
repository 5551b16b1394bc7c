"""The script behind ``make gpu-check``: its twin on a CPU, and what it says when something fails or takes too long."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, pytest_lines
from benchmarks.gpu_check import Part

PYTHON = sys.executable


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check runs the script itself")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_whole_check_on_a_cpu_is_refused(tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "--small" in capsys.readouterr().err


def test_unknown_parts(capsys):
    assert gpu_check.main(["--device", "cpu", "--small", "--only", "steps"]) == 2
    assert "tests, step, training, operators, convs" in capsys.readouterr().err


def test_both_sizes_have_the_same_parts_and_stay_under_ten_minutes(tmp_path):
    whole, small = gpu_check.parts(tmp_path, "cuda", False), gpu_check.parts(tmp_path, "cpu", True)
    assert [part.name for part in whole] == [part.name for part in small]
    assert [part.name for part in whole][:2] == ["tests", "step"]
    assert sum(part.limit for part in whole) < 600
    operators = next(part for part in whole if part.name == "operators")
    assert "benchmarks/bench_nms.py" in operators.command
    assert "benchmarks/bench_step.py" not in operators.command


@pytest.mark.slow
def test_the_twin_on_a_cpu(tmp_path, capsys):
    """Every part runs for real, in its own process, and is in the JSON and in the table."""
    code = gpu_check.main(["--device", "cpu", "--small", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert code == 0, result["parts"]
    assert [part["status"] for part in result["parts"]] == ["passed"] * 5
    assert len(result["tests"]) >= 5
    assert result["train"][0]["images_per_second"] > 0
    assert result["training"]["losses"]
    assert result["convs"]["sums"]
    assert {row["group"] for row in result["benchmarks"]}
    text = (tmp_path / "gpu-check.md").read_text()
    for title in ("| part | result |", "## Training step", "## All convolutions of a step", "| group | provider |"):
        assert title in text
    assert text in capsys.readouterr().out


def write_tests(folder: Path, body: str) -> list[str]:
    (folder / "test_it.py").write_text(body)
    lines = folder / "out" / "tests" / "lines.jsonl"
    return [
        PYTHON, "-m", "pytest", "-q", str(folder / "test_it.py"), "-c", "/dev/null", "--rootdir", str(folder),
        "-p", "no:cacheprovider", "-p", "benchmarks.pytest_lines", "--lines", str(lines),
    ]  # fmt: skip


def test_what_fails_is_in_the_table_with_its_reason(tmp_path):
    body = """
import pytest
def test_a(): pass
def test_b(): assert 1 == 2, 'a | b'
@pytest.mark.skip(reason='no x')
def test_c(): pass
"""
    part = gpu_check.run_part(Part("tests", 60, write_tests(tmp_path, body), gpu_check.read_tests), tmp_path / "out")
    assert part["status"] == "failed"
    assert part["reasons"] == ["test_it.py::test_b: AssertionError: a | b assert 1 == 2"]
    outcomes = {test["test"]: (test["outcome"], test["reason"]) for test in part["sections"]["tests"]}
    assert outcomes["test_it.py::test_a"] == ("passed", "")
    assert outcomes["test_it.py::test_c"] == ("skipped", "Skipped: no x")
    text = gpu_check.markdown(gpu_check.combine([part]))
    assert "| tests | failed |" in text
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "| tests | - | | test_it.py::test_b: AssertionError: a / b assert 1 == 2 |" in text


def test_what_was_found_before_the_limit_survives_it(tmp_path):
    body = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)"
    began = time.monotonic()
    part = gpu_check.run_part(Part("tests", 6, write_tests(tmp_path, body), gpu_check.read_tests), tmp_path / "out")
    assert time.monotonic() - began < 30
    assert part["status"] == "stopped"
    assert part["reasons"] == ["tests: stopped after 6 s"]
    assert [test["test"] for test in part["sections"]["tests"]] == ["test_it.py::test_a"]


def test_the_children_of_a_stopped_part_end_with_it(tmp_path):
    """The group is stopped, also a grandchild that would outlive its parent."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert gpu_check.run_limited([PYTHON, "-c", code], 1, tmp_path / "log.txt") == gpu_check.TIMED_OUT
    time.sleep(3)
    assert not mark.exists()


def test_a_crash_without_a_report_has_the_end_of_its_log(tmp_path):
    command = [PYTHON, "-c", "raise RuntimeError('the driver is gone')"]
    part = gpu_check.run_part(Part("step", 30, command, gpu_check.read_step), tmp_path)
    assert part["status"] == "failed"
    assert part["reasons"][0].startswith("step: exit code 1")
    assert "RuntimeError: the driver is gone" in part["reasons"][0]
    assert part["sections"]["train"] == []


def metrics(folder: Path, losses: list[object]) -> Path:
    (folder / "run").mkdir(parents=True)
    lines = [json.dumps({"type": "train", "loss": loss, "images_per_second": 5.0}) for loss in losses]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([3.0, 2.0], ""),
        ([2.0, 2.5], "did not fall"),
        ([2.0, float("nan")], "not finite"),
        ([2.0, "nan"], "not finite"),
        ([2.0], "fewer than two"),
    ],
)
def test_a_training_has_to_learn(tmp_path, losses, reason):
    found, failed = gpu_check.read_training(metrics(tmp_path / "t", losses))
    assert [reason in line for line in failed] == ([True] if reason else [])
    assert len(found["training"]["losses"]) == len(losses)


def test_a_training_without_its_graph_is_a_failure(tmp_path):
    folder = metrics(tmp_path / "t", [3.0, 2.0])
    (folder / "log.txt").write_text("fastrcnn.step INFO: STEP.GRAPH: the step runs operator by operator (no wings)\n")
    _, failed = gpu_check.read_training(folder)
    assert failed == ["training: STEP.GRAPH: the step runs operator by operator (no wings)"]


def test_a_training_that_does_not_learn_is_a_failed_part(tmp_path):
    source, target = metrics(tmp_path / "source", [1.0, 2.0]) / "run", tmp_path / "out" / "training" / "run"
    code = f"import shutil; shutil.copytree({str(source)!r}, {str(target)!r})"
    part = gpu_check.run_part(Part("training", 30, [PYTHON, "-c", code], gpu_check.read_training), tmp_path / "out")
    assert part["status"] == "failed"
    assert "did not fall" in part["reasons"][0]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"test": "a", "outcome": "passed"}\n{"benchmark": {"name": "b"}}\n{"test": "c", "outco')
    assert pytest_lines.read(path) == ([{"test": "a", "outcome": "passed"}], [{"name": "b"}])
    assert pytest_lines.read(tmp_path / "absent") == ([], [])
