"""The loop: exact resumes, what is written when, and every way in which it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrcnn.engine.checkpoint import read_checkpoint
from fastrcnn.engine.meters import NonFiniteLoss
from fastrcnn.engine.signals import Stopped
from tests.engine.standin import Batch, assert_same, make_batch, make_batches, make_rig, weights


@pytest.fixture(autouse=True)
def captured_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logging.getLogger("fastrcnn").propagate = True
    with caplog.at_level(logging.INFO, "fastrcnn"):
        yield


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses_of(directory: Path) -> list[dict[str, Any]]:
    timing = {"time", "data_time", "images_per_second", "max_mem_mib"}
    return [{k: v for k, v in line.items() if k not in timing} for line in metrics_of(directory)]


@pytest.mark.parametrize("clip_gradients", [0.0, 0.5])
@pytest.mark.parametrize("first", [1, 3, 6, 7])
def test_resume_is_exact(tmp_path: Path, first: int, clip_gradients: float) -> None:
    whole = make_rig(tmp_path / "whole", clip_gradients=clip_gradients)
    whole.train(8, log_period=1)

    part = make_rig(tmp_path / "parts", clip_gradients=clip_gradients)
    with pytest.raises(Stopped):
        part.train(8, log_period=1, batches=stopping_after(first))
    resumed = make_rig(tmp_path / "parts", seed=0, clip_gradients=clip_gradients)
    with torch.no_grad():
        for parameter in resumed.checkpointer.model.parameters():
            parameter.add_(1)  # the initial weights must not matter
    start = resumed.checkpointer.load_for_resume()
    assert start == first
    resumed.train(8, start=start, log_period=1)

    assert_same(weights(whole), weights(resumed))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    a, b = (read_checkpoint(tmp_path / name / "model_final.pth") for name in ("whole", "parts"))
    for key in a["optimizer"]["state"]:
        assert_same(a["optimizer"]["state"][key], b["optimizer"]["state"][key])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["scheduler"] == b["scheduler"]


def stopping_after(steps: int, signum: int = signal.SIGTERM) -> Iterator[Batch]:
    """Batches; the signal comes while the last one before the stop is handed over."""
    for step in range(100):
        if step == steps - 1:
            os.kill(os.getpid(), signum)
        yield make_batch(step)


def test_resume_after_the_last_step_does_nothing(tmp_path: Path) -> None:
    make_rig(tmp_path).train(4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pth")}
    resumed = make_rig(tmp_path)
    start = resumed.checkpointer.load_for_resume()
    resumed.train(4, start=start)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pth")} == before


def test_what_is_written_when(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_rig(tmp_path).train(7, log_period=3, checkpoint_period=2)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000002.pth",
        "model_0000004.pth",
        "model_0000006.pth",
        "model_final.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert [line["iteration"] for line in metrics_of(tmp_path)] == [3, 6, 7]
    lines = [r.message for r in caplog.records if r.name == "fastrcnn.trainer"]
    assert lines[0] == "Start training"
    number = r"\d+\.\d{4} \(\d+\.\d{4}\)"
    pattern = (
        rf"eta: \d:\d\d:\d\d  iter: (\d+)  loss: {number}  loss_box_reg: {number}  loss_classifier: {number}"
        rf"  time: {number}  data: {number}  lr: \d\.\d{{6}}  max mem: \d+"
    )
    matches = [re.fullmatch(pattern, line) for line in lines[1:4]]
    assert [match and match[1] for match in matches] == ["3", "6", "7"]
    assert re.fullmatch(r"Total training time: \d:\d\d:\d\d \(\d+\.\d{4} s / it\)", lines[-1])


def test_metrics_are_means_over_the_period(tmp_path: Path) -> None:
    make_rig(tmp_path / "each").train(6, log_period=1)
    make_rig(tmp_path / "period").train(6, log_period=3)
    each, period = metrics_of(tmp_path / "each"), metrics_of(tmp_path / "period")
    for line, parts in zip(period, (each[:3], each[3:]), strict=True):
        assert line["loss"] == pytest.approx(sum(part["loss"] for part in parts) / 3)
        assert line["lr"] == parts[-1]["lr"]
        assert line["images_per_second"] > 0


def poisoned_batches(step_of_nan: int) -> Iterator[Batch]:
    for step in range(100):
        batch = make_batch(step)
        if step == step_of_nan:
            batch.images.tensors[0, 0, 0, 0] = torch.nan
        yield batch


def test_nonfinite_loss_ends_the_run_at_once(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    with pytest.raises(NonFiniteLoss, match="loss_box_reg is nan in iteration 6"):
        rig.train(20, log_period=10, checkpoint_period=4, batches=poisoned_batches(5))
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000004.pth"]
    content = read_checkpoint(tmp_path / "model_0000004.pth")
    assert all(value.isfinite().all() for value in content["model"].values())
    last = metrics_of(tmp_path)[-1]
    assert (last["type"], last["iteration"], last["loss_box_reg"]) == ("nonfinite", 6, "nan")


def test_diverging_run(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, base_lr=1e25)
    with pytest.raises(NonFiniteLoss):
        rig.train(20, checkpoint_period=1)
    for path in tmp_path.glob("*.pth"):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["model"].values()), path


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    """All losses were finite, a gradient was not: only the weights show it."""
    rig = make_rig(tmp_path)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf

    rig.checkpointer.model.body.weight.register_hook(poison)
    with pytest.raises(NonFiniteLoss, match=r"a weight is not finite .* in iteration 1"):
        rig.train(1)
    assert list(tmp_path.glob("*.pth")) == []
    assert metrics_of(tmp_path)[-1]["type"] == "nonfinite"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_saves(tmp_path: Path, signum: int, code: int) -> None:
    rig = make_rig(tmp_path)
    with pytest.raises(Stopped, match=r"after iteration 3; go on with --resume") as caught:
        rig.train(50, batches=stopping_after(3, signum))
    assert caught.value.exit_code == code
    assert [p.name for p in tmp_path.glob("*.pth")] == ["model_0000003.pth"]
    assert metrics_of(tmp_path)[-1]["iteration"] == 3


def test_signal_in_the_last_step(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    with pytest.raises(Stopped):
        rig.train(3, batches=(b for b, _ in zip(stopping_after(3), range(3), strict=False)))
    assert [p.name for p in tmp_path.glob("*.pth")] == ["model_final.pth"]


def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def impatient() -> Iterator[Batch]:
        for step in range(10):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            yield make_batch(step)

    with pytest.raises(KeyboardInterrupt):
        make_rig(tmp_path).train(10, batches=impatient())
    assert list(tmp_path.glob("*.pth")) == []


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    make_rig(tmp_path).train(2)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_evaluation_every_period_and_best(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    calls = []

    def evaluate(iteration: int) -> dict[str, float]:
        rig.step.model.eval()
        calls.append(iteration)
        return {"bbox/AP": 0.9 - iteration / 100, "segm/AP": {2: 0.1, 4: 0.4, 6: 0.2}[iteration]}

    modes = []
    rig.step.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    rig.train(8, test_period=2, evaluate=evaluate)
    assert calls == [2, 4, 6], "the evaluation after the last step is the caller's"
    assert all(modes), "the model is back in training mode"
    best = read_checkpoint(tmp_path / "model_best.pth")
    assert best["best"] == {"metric": "segm/AP", "value": 0.4, "iteration": 4}
    assert best["iteration"] == 4


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    plain, tested = make_rig(tmp_path / "a"), make_rig(tmp_path / "b")
    plain.train(6)
    tested.train(6, test_period=2, evaluate=lambda iteration: {"bbox/AP": torch.rand(()).item()})
    assert_same(weights(plain), weights(tested))


def test_error_in_the_loader_is_not_swallowed(tmp_path: Path) -> None:
    def broken() -> Iterator[Batch]:
        yield from make_batches(0, 2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        make_rig(tmp_path).train(10, batches=broken())
