"""The script behind ``make gpu-check``, as far as a machine without a GPU can run it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check runs the script itself")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table():
    def row(group, name, least):
        return {"group": group, "name": name, "stats": {"min": least, "median": least * 2}}

    results = {
        "machine_info": {"torch": "2", "triton": "3", "gpu": {"name": "card"}},
        "benchmarks": [row("nms", "slow", 0.002), row("nms", "fast", 0.001), row(None, "step", 0.5)],
    }
    assert gpu_check.markdown(results).splitlines() == [
        "card, torch 2, triton 3",
        "",
        "| group | benchmark | min ms | median ms |",
        "|---|---|---|---|",
        "|  | step | 500.000 | 1000.000 |",
        "| nms | fast | 1.000 | 2.000 |",
        "| nms | slow | 2.000 | 4.000 |",
    ]


def test_the_training_step_comes_first():
    assert gpu_check.BENCHMARKS[0] == "bench_step.py"
    assert "bench_nms.py" in gpu_check.BENCHMARKS


def test_a_failing_run_is_reported(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test():\n    assert False\n")
    assert gpu_check.run_pytest([str(failing), "-c", "/dev/null", "--rootdir", str(tmp_path)], limit=120) == 1
