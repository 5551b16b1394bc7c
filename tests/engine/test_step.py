"""One training step: what it computes, in which precision, and that it never waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn.structures import Targets
from tests.engine.standin import Rig, assert_same, make_batch, make_rig, weights

# What copies from a CUDA device to the host, or has a size that only the device knows.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "equal", "is_nonzero"}


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in SYNCHRONISING:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_step_is_forward_backward_update(tmp_path: Path) -> None:
    rig, twin = make_rig(tmp_path), make_rig(tmp_path)
    losses = rig.step(make_batch(0), 0)

    batch, model = make_batch(0), twin.step.model
    model.set_sampling(0, 0)
    expected = model(batch.images, Targets.from_boxlists(batch.targets))
    sum(expected.values()).backward()
    twin.step.optimizer.step()
    assert list(losses) == ["loss", *expected]
    assert losses["loss"].item() == pytest.approx(sum(v.item() for v in expected.values()))
    assert not any(loss.requires_grad for loss in losses.values())
    assert_same(weights(rig), weights(twin))
    assert rig.step.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * (1 / 3 * 2 / 3 + 1 / 3)), "after the step"


@pytest.mark.parametrize("clip_gradients", [0.0, 0.1])
def test_step_never_waits(tmp_path: Path, clip_gradients: float) -> None:
    rig = make_rig(tmp_path, clip_gradients=clip_gradients)
    batch = make_batch(0)
    with NoSync():
        rig.step(batch, 0)
        rig.step(batch, 1)


def test_the_guard_against_waiting_works() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones(1).item()


def test_sampling_state_reaches_the_model(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, seed=3)
    rig.step(make_batch(0), 11)
    assert rig.step.model.sampling.tolist() == [3, 11]


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, clip_gradients=1e-3)
    rig.step(make_batch(0), 0)
    grads = torch.cat([p.grad.flatten() for p in rig.step.model.parameters()])
    assert grads.norm().item() == pytest.approx(1e-3, rel=1e-3)


def set_scale(rig: Rig, scale: float) -> None:
    if rig.step.scaler.is_enabled():
        rig.step.scaler.load_state_dict({**rig.step.scaler.state_dict(), "scale": scale})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_stays_near_float32(tmp_path: Path, dtype: str) -> None:
    exact, mixed = make_rig(tmp_path), make_rig(tmp_path, dtype=dtype)
    set_scale(mixed, 16.0)  # the default overflows on losses as large as these, and skips steps
    for step in range(5):
        exact.step(make_batch(step), step)
        losses = mixed.step(make_batch(step), step)
    assert losses["loss"].dtype == torch.float32
    for name, value in weights(mixed).items():
        assert value.dtype == torch.float32
        assert (value - weights(exact)[name]).abs().max() < 2e-2, name


def test_overflowing_float16_step_changes_no_weight(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, dtype="float16")
    set_scale(rig, 2.0**60)
    before = weights(rig)
    losses = rig.step(make_batch(0), 0)
    assert losses["loss"].isfinite()
    assert_same(weights(rig), before)
    assert rig.step.scaler.get_scale() < 2.0**60
