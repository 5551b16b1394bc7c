"""Smoothed values, the log line, losses read once a period, clocks."""

from __future__ import annotations

import math
import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrcnn.engine.meters import (
    LossHistory,
    NonFiniteLoss,
    SmoothedValue,
    StepClock,
    format_log_line,
    max_memory_mib,
)

CPU = torch.device("cpu")


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60))
def test_smoothed_value_is_torch_median_and_mean(values: list[float]) -> None:
    meter = SmoothedValue(window=20)
    for value in values:
        meter.update(value)
    assert meter.median == torch.tensor(values[-20:]).median().item()
    assert meter.global_avg == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-9)


def test_log_line_is_upstreams() -> None:
    """The example of maskrcnn-benchmark's documentation, rebuilt from values that give it."""
    names = ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "time", "data")
    values = (
        (0.2376, 0.2817),
        (0.1325, 0.1725),
        (0.0580, 0.0655),
        (0.0156, 0.0368),
        (0.0078, 0.0070),
        (0.3508, 0.35),
        (0.0095, 0.0094),
    )
    meters = {}
    for name, (median, average) in zip(names, values, strict=True):
        meter = meters[name] = SmoothedValue()
        for value in (median, 2 * average - median):  # their lower median and their mean, if the median is the lower
            meter.update(value)
        if median > average:
            meter.recent.clear()
            meter.recent.append(median)
    line = format_log_line(eta_seconds=19807.9, iteration=400, meters=meters, lr=0.0173066, max_mem_mib=3050.4)
    assert line == (
        "eta: 5:30:07  iter: 400  loss: 0.2376 (0.2817)  loss_classifier: 0.1325 (0.1725)  "
        "loss_box_reg: 0.0580 (0.0655)  loss_objectness: 0.0156 (0.0368)  loss_rpn_box_reg: 0.0078 (0.0070)  "
        "time: 0.3508 (0.3500)  data: 0.0095 (0.0094)  lr: 0.017307  max mem: 3050"
    )


def test_history_is_read_in_one_copy_and_order_is_kept() -> None:
    history = LossHistory(CPU)
    for iteration in (5, 6, 7):
        history.append(iteration, {"loss": torch.tensor(iteration + 0.5), "b": torch.tensor(1.0), "a": torch.tensor(2)})
    read = history.read()
    assert read == [(i, {"loss": i + 0.5, "b": 1.0, "a": 2.0}) for i in (5, 6, 7)]
    assert list(read[0][1]) == ["loss", "b", "a"]
    assert history.read() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_nonfinite_loss_is_named(bad: float) -> None:
    history = LossHistory(CPU)
    for iteration in range(1, 5):
        part = bad if iteration >= 3 else 0.5
        history.append(
            iteration,
            {"loss": torch.tensor(1 + part), "loss_mask": torch.tensor(1.0), "loss_box_reg": torch.tensor(part)},
        )
    with pytest.raises(NonFiniteLoss, match=rf"loss_box_reg is {re.escape(str(bad))} in iteration 3") as caught:
        history.read()
    assert caught.value.iteration == 3
    assert caught.value.losses["loss_mask"] == 1.0


def test_sum_that_overflows_is_named_itself() -> None:
    history = LossHistory(CPU)
    history.append(1, {"loss": torch.tensor(math.inf), "a": torch.tensor(3e38), "b": torch.tensor(3e38)})
    with pytest.raises(NonFiniteLoss, match="loss is inf in iteration 1"):
        history.read()


def test_changed_losses_are_refused() -> None:
    history = LossHistory(CPU)
    history.append(1, {"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="in iteration 2"):
        history.append(2, {"loss": torch.tensor(1.0), "loss_mask": torch.tensor(1.0)})


def test_clock_measures_iterations_and_skips_pauses() -> None:
    clock = StepClock(CPU)
    time.sleep(0.02)
    assert clock.waited() >= 0.02
    clock.mark()
    time.sleep(0.2)  # a checkpoint
    clock.start()
    clock.mark()
    first, second = clock.read()
    assert first >= 0.02
    assert second < 0.15
    assert clock.read() == []


def test_memory_grows_with_what_is_held() -> None:
    before = max_memory_mib(CPU)
    held = torch.ones(64 * 2**20, dtype=torch.float32)  # 256 MiB
    assert max_memory_mib(CPU) >= before
    assert max_memory_mib(CPU) >= 256
    del held
