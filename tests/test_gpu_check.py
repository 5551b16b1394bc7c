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


def test_the_training_step_comes_first():
    assert gpu_check.BENCHMARKS[0] == "bench_step.py"
    assert "bench_nms.py" in gpu_check.BENCHMARKS


def test_a_failing_run_is_reported(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test():\n    assert False\n")
    assert gpu_check.run_pytest([str(failing), "-c", "/dev/null", "--rootdir", str(tmp_path)], limit=120) == 1
