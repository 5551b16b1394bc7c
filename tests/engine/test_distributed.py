"""Two processes with gloo: the same training as one, and the same end for all whatever happens to one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrcnn.engine.checkpoint import read_checkpoint
from fastrcnn.engine.distributed import DeviceError, World, pick_device
from tests.conftest import REPOSITORY
from tests.engine.standin import make_rig

PATIENCE = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(mode: str, directory: Path, size: int = 2) -> list[tuple[int, str]]:
    """(exit code, output) of each rank. torchrun would do the same and end the others when one fails."""
    port = free_port()
    children = []
    for rank in range(size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.engine.distributed_worker", mode, str(directory)]
        children.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    deadline = time.monotonic() + PATIENCE
    results = []
    try:
        for child in children:
            output, _ = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
            results.append((child.returncode, output))
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
    return results


def lines_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "fused", "graph"])
def test_two_ranks_train_as_one(tmp_path: Path, mode: str) -> None:
    """Gradients are averaged by DistributedDataParallel, or in one piece, or in one piece in a recorded step."""
    alone = make_rig(tmp_path / "one")
    alone.train(6)
    for code, output in run_ranks(mode, tmp_path / "two"):
        assert code == 0, output
    one, two = (read_checkpoint(tmp_path / name / "model_final.pth") for name in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        for name in ("loss", "loss_box_reg", "loss_classifier", "lr"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-5), "the mean over the ranks"


@pytest.mark.slow
def test_collectives(tmp_path: Path) -> None:
    for code, output in run_ranks("collectives", tmp_path):
        assert code == 0, output


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_run(tmp_path: Path) -> None:
    started = time.monotonic()
    (code0, _), (code1, output1) = run_ranks("raise", tmp_path)
    assert (code0, code1) == (1, 1)
    assert "rank 1 broke on purpose" in output1
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    results = run_ranks("signal", tmp_path)
    assert [code for code, _ in results] == [143, 143], results
    (checkpoint,) = tmp_path.glob("*.pth")
    iteration = read_checkpoint(checkpoint)["iteration"]
    # The signal comes before step 4; the vote on it is read one step later.
    assert iteration == 5
    assert lines_of(tmp_path)[-1]["iteration"] == 5


@pytest.mark.slow
def test_a_nonfinite_loss_on_one_rank_stops_all(tmp_path: Path) -> None:
    results = run_ranks("nan", tmp_path)
    assert [code for code, _ in results] == [3, 3], results
    assert list(tmp_path.glob("*.pth")) == []
    assert lines_of(tmp_path)[-1]["type"] == "nonfinite"
    assert lines_of(tmp_path)[-1]["iteration"] == 4


@pytest.mark.slow
def test_torchrun_trains_the_real_model(small_config: str, tmp_path: Path) -> None:
    """The command as users start it: sharded batches, and every image evaluated once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    arguments = ["-m", "fastrcnn.train", "--config-file", small_config, "OUTPUT_DIR", str(tmp_path / "out")]
    finished = subprocess.run(
        [*command, *arguments, "SOLVER.MAX_ITER", "2"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    out = tmp_path / "out"
    assert (out / "log.rank1.txt").exists()
    assert read_checkpoint(out / "model_final.pth")["iteration"] == 2
    summary = json.loads((out / "inference/instances_val/summary.json").read_text())
    assert summary["num_images"] == 4
    found = {entry["image_id"] for entry in json.loads((out / "inference/instances_val/bbox.json").read_text())}
    assert len(found) == 4


def test_a_world_of_one() -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    assert world.gather("a") == ["a"]
    assert world.broadcast(3) == 3
    assert world.on_main(lambda: 4) == 4
    assert world.max_later(5)() == 5


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="must be cuda, cuda:N or cpu"):
        pick_device("tpu")
    with pytest.raises(DeviceError, match="must be cuda, cuda:N or cpu"):
        pick_device("meta")


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda", 1, distributed=True) == torch.device("cuda", 1)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="--nproc_per_node=2"):
        pick_device("cuda", 2, distributed=True)
    with pytest.raises(DeviceError, match="there are 2 CUDA devices"):
        pick_device("cuda:5")
