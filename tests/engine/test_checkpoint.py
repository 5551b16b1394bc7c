"""Checkpoints: whole or absent, safe to read, and enough to go on from."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrcnn.engine.checkpoint import CheckpointError, last_checkpoint, read_checkpoint
from fastrcnn.files import write_atomically
from tests.engine.standin import Rig, assert_same, make_batch, make_rig, weights


def trained(directory: Path, steps: int = 2, **kwargs: object) -> Rig:
    rig = make_rig(directory, **kwargs)  # type: ignore[arg-type]
    for step in range(steps):
        rig.step(make_batch(step), step)
    return rig


def test_file_has_upstreams_keys_and_names(tmp_path: Path) -> None:
    rig = trained(tmp_path)
    rig.checkpointer.save(2)
    content = read_checkpoint(tmp_path / "model_0000002.pth")
    assert {"model", "optimizer", "scheduler", "iteration", "seed", "config_hash", "best"} == set(content)
    assert content["iteration"] == 2
    assert set(content["model"]) == set(rig.checkpointer.model.state_dict())
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000002.pth"]


def test_resume_restores_everything(tmp_path: Path) -> None:
    rig = trained(tmp_path, steps=3)
    rig.checkpointer.save(3)
    resumed = make_rig(tmp_path, seed=9)  # other initial weights
    resumed.step.seed = rig.step.seed
    assert resumed.checkpointer.load_for_resume() == 3
    assert_same(weights(rig), weights(resumed))
    assert resumed.step.scheduler.last_epoch == 3
    for step in (3, 4):  # momentum and learning rate too
        rig.step(make_batch(step), step)
        resumed.step(make_batch(step), step)
        assert_same(weights(rig), weights(resumed))


def test_loss_scale_is_restored(tmp_path: Path) -> None:
    rig = trained(tmp_path, dtype="float16", steps=1)
    rig.checkpointer.save(1)
    scale = rig.step.scaler.get_scale()
    resumed = make_rig(tmp_path, dtype="float16")
    resumed.step.scaler.load_state_dict({**resumed.step.scaler.state_dict(), "scale": 2.0})
    resumed.checkpointer.load_for_resume()
    assert resumed.step.scaler.get_scale() == scale


def test_empty_directory_starts_at_zero(tmp_path: Path) -> None:
    assert make_rig(tmp_path).checkpointer.load_for_resume() == 0


def test_keep_n(tmp_path: Path) -> None:
    rig = trained(tmp_path, keep=2)
    for iteration in (2, 4, 6, 8):
        rig.checkpointer.save(iteration)
    rig.checkpointer.save(8, "model_final.pth")
    names = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert names == ["model_0000006.pth", "model_0000008.pth", "model_final.pth"]


def test_best(tmp_path: Path) -> None:
    rig = trained(tmp_path)
    saved = [rig.checkpointer.save_best(i, "bbox/AP", value) for i, value in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.3))]
    assert saved == [True, True, False, False]
    assert read_checkpoint(tmp_path / "model_best.pth")["best"] == {"metric": "bbox/AP", "value": 0.3, "iteration": 2}
    rig.checkpointer.save(4)
    resumed = make_rig(tmp_path)
    resumed.checkpointer.load_for_resume()
    assert not resumed.checkpointer.save_best(5, "bbox/AP", 0.25), "the best of before the resume counts"


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_damaged_newest_falls_back(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    rig = trained(tmp_path)
    rig.checkpointer.save(2)
    expected = weights(rig)
    rig.step(make_batch(2), 2)
    newest = rig.checkpointer.save(3)
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        tensor = rig.checkpointer.model.state_dict()["body.weight"].numpy().tobytes()
        content[content.index(tensor) + 7] ^= 0xFF
    newest.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>", "flipped": content}[damage]
    )
    resumed = make_rig(tmp_path, seed=5)
    with caplog.at_level(logging.WARNING, "fastrcnn"):
        logging.getLogger("fastrcnn").propagate = True
        assert resumed.checkpointer.load_for_resume() == 2
    assert "model_0000003.pth: not a whole checkpoint" in caplog.text
    assert_same(weights(resumed), expected)


def test_only_damaged_ones(tmp_path: Path) -> None:
    for iteration in (1, 2):
        (tmp_path / f"model_{iteration:07d}.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read"):
        make_rig(tmp_path).checkpointer.load_for_resume()


def test_newer_file_wins_over_pointer(tmp_path: Path) -> None:
    """A process killed after the checkpoint and before the pointer."""
    rig = trained(tmp_path)
    rig.checkpointer.save(2)
    rig.checkpointer.save(5)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    assert make_rig(tmp_path).checkpointer.load_for_resume() == 5


def test_final_counts_by_its_iteration(tmp_path: Path) -> None:
    rig = trained(tmp_path)
    rig.checkpointer.save(4, "model_final.pth")
    assert make_rig(tmp_path).checkpointer.load_for_resume() == 4
    rig.checkpointer.save(6)  # the run was extended with a larger MAX_ITER
    assert make_rig(tmp_path).checkpointer.load_for_resume() == 6


def test_pointer_with_a_path(tmp_path: Path) -> None:
    """maskrcnn-benchmark writes a path; a folder that was moved still has the file beside the pointer."""
    rig = trained(tmp_path)
    rig.checkpointer.save(2)
    (tmp_path / "last_checkpoint").write_text("/somewhere/else/model_0000002.pth\n")
    assert last_checkpoint(tmp_path) == tmp_path / "model_0000002.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert last_checkpoint(tmp_path) is None


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(file: object) -> None:
        file.write(b"new")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def save_on_a_full_disk(rig: Rig) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        rig.checkpointer.save(2)
    except OSError as error:
        os._exit(42 if "File too large" in str(error) else 1)
    os._exit(0)


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    rig = trained(tmp_path)
    rig.checkpointer.save(1)
    for parameter in rig.checkpointer.model.parameters():
        parameter.data = torch.zeros(100_000)
    child = multiprocessing.get_context("fork").Process(target=save_on_a_full_disk, args=(rig,))
    child.start()
    child.join()
    assert child.exitcode == 42
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert make_rig(tmp_path).checkpointer.load_for_resume() == 1


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = tmp_path / "model_0000001.pth"
    torch.save({"model": {}, "optimizer": Attack()}, path)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "attacked").exists()


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    rig = trained(tmp_path)
    rig.checkpointer.model.head = nn.Linear(8, 5)
    rig.checkpointer.save(2)
    with pytest.raises(CheckpointError, match=r"does not fit this model \(2 entries differ, first head.weight\)"):
        make_rig(tmp_path).checkpointer.load_for_resume()


def test_weights_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    torch.save({"model": make_rig(tmp_path).checkpointer.model.state_dict()}, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"no optimizer, scheduler, iteration: .* pass it as MODEL.WEIGHT"):
        make_rig(tmp_path).checkpointer.load_for_resume()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    rig = trained(tmp_path)
    rig.checkpointer.is_main = False
    rig.checkpointer.save(2)
    rig.checkpointer.save_best(2, "bbox/AP", 0.5)
    assert list(tmp_path.iterdir()) == []


def save_for_ever(rig: Rig) -> None:
    for iteration in range(1, 10**6):
        rig.checkpointer.save(iteration)


def test_killed_while_saving(tmp_path: Path) -> None:
    """Whatever moment the process dies at, a whole checkpoint is there and the pointer names a whole one."""
    chance = random.Random(0)
    caught_writing = 0
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        rig = make_rig(directory, keep=3)
        for parameter in rig.checkpointer.model.parameters():
            parameter.data = torch.zeros(200_000)  # large enough to be caught writing
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(rig,))
        child.start()
        while not (directory / "last_checkpoint").exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.join()
        pointed = last_checkpoint(directory)
        files = sorted(directory.glob("model_*.pth"))
        assert files
        assert pointed is None or pointed in files
        for path in files:
            assert read_checkpoint(path)["iteration"] == int(path.stem.split("_")[1])
        caught_writing += any(directory.glob(".*.tmp-*"))
        shutil.rmtree(directory)
    assert caught_writing > 0, "no attempt hit a write: the test shows nothing"
