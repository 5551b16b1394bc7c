"""``python -m fastrcnn.train`` with STEP.GRAPH on a CPU: the same run, and the same run resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrcnn import train
from fastrcnn.engine.checkpoint import read_checkpoint
from tests.engine.standin import assert_same

SETTINGS = ["SOLVER.CHECKPOINT_PERIOD", "5", "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False"]


def run(config: str, output: Path, *overrides: str, flag: str = "--skip-test") -> list[dict[str, Any]]:
    command = ["--config-file", config, flag, "OUTPUT_DIR", str(output), *SETTINGS, "SOLVER.MAX_ITER", "7", *overrides]
    assert train.main(command) == 0
    assert "operator by operator" not in (output / "log.txt").read_text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "train"]


@pytest.mark.slow
def test_a_recorded_run(small_config: str, tmp_path: Path) -> None:
    """With an evaluation between the recorded steps, against plain steps, and with a stop in the middle."""
    graph = ("STEP.GRAPH", "True")
    plain = run(small_config, tmp_path / "plain")
    whole = run(small_config, tmp_path / "whole", *graph, "SOLVER.TEST_PERIOD", "6")
    for ours, theirs in zip(whole, plain, strict=True):
        for name in theirs:
            if name.startswith("loss") or name == "lr":
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), (name, ours["iteration"])
    run(small_config, tmp_path / "parts", *graph, "SOLVER.MAX_ITER", "5")
    run(small_config, tmp_path / "parts", *graph, "DATASETS.TEST", "()", flag="--resume")
    one, two = (read_checkpoint(tmp_path / name / "model_final.pth") for name in ("whole", "parts"))
    assert_same(one["model"], two["model"])
    for index, state in one["optimizer"]["state"].items():
        assert_same(state, two["optimizer"]["state"][index])
