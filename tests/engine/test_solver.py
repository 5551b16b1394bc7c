"""Parameter groups, schedule and optimizer state against maskrcnn-benchmark's rules."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastrcnn.engine.solver import (
    WarmupMultiStepLR,
    load_optimizer_state,
    lr_factor,
    make_optimizer,
    parameter_groups,
)
from tests.engine.standin import StandIn


def upstream_optimizer(model: nn.Module, base_lr: float) -> torch.optim.SGD:
    """maskrcnn-benchmark's ``make_optimizer``: a group for each parameter."""
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr, decay = base_lr, 1e-3
        if "bias" in name:
            lr, decay = base_lr * 2, 0.0
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return torch.optim.SGD(groups, base_lr, momentum=0.9)


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def names_of(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_groups_by_name() -> None:
    model = StandIn()
    model.body.weight.requires_grad_(False)
    groups = parameter_groups(
        model.named_parameters(), base_lr=0.1, bias_lr_factor=2, weight_decay=1e-4, weight_decay_bias=0
    )
    assert [(g["lr"], g["weight_decay"], [n for n, _ in g["params"]]) for g in groups] == [
        (0.2, 0, ["body.bias", "norm.bias", "head.bias"]),
        (0.1, 1e-4, ["norm.weight", "head.weight"]),
    ]


def test_equal_settings_share_a_group() -> None:
    groups = parameter_groups(
        StandIn().named_parameters(), base_lr=0.1, bias_lr_factor=1, weight_decay=0, weight_decay_bias=0
    )
    assert len(groups) == 1


def test_merged_groups_train_as_upstream_does() -> None:
    ours = StandIn()
    theirs = copy.deepcopy(ours)
    optimizer, upstream = (
        make_optimizer(ours, base_lr=0.1, momentum=0.9, weight_decay=1e-3),
        upstream_optimizer(theirs, 0.1),
    )
    for seed in range(4):
        step_on(ours, optimizer, seed)
        step_on(theirs, upstream, seed)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_model_without_trainable_parameters() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(StandIn().requires_grad_(False), base_lr=0.1, momentum=0.9, weight_decay=0)


SCHEDULE = {"milestones": (30, 40), "gamma": 0.1, "warmup_factor": 0.25, "warmup_iters": 8}


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (2, 0.4375), (7, 0.90625), (8, 1.0), (29, 1.0), (30, 0.1), (39, 0.1), (40, 0.01), (1000, 0.01)],
)
def test_linear_schedule(step: int, factor: float) -> None:
    assert lr_factor(step, **SCHEDULE) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (7, 0.25), (8, 1.0), (30, 0.1)])
def test_constant_schedule(step: int, factor: float) -> None:
    assert lr_factor(step, **SCHEDULE, warmup_method="constant") == pytest.approx(factor, rel=1e-15)


def test_unknown_warmup() -> None:
    with pytest.raises(ValueError, match="WARMUP_METHOD is 'cosine'"):
        lr_factor(0, **SCHEDULE, warmup_method="cosine")


def test_milestones_must_increase() -> None:
    optimizer = make_optimizer(StandIn(), base_lr=0.1, momentum=0.9, weight_decay=0)
    with pytest.raises(ValueError, match="must increase"):
        WarmupMultiStepLR(optimizer, milestones=(40, 30))


@given(
    base_lr=st.floats(1e-5, 1.0),
    warmup_factor=st.floats(0.0, 1.0),
    warmup_iters=st.integers(0, 30),
    milestones=st.lists(st.integers(1, 60), unique=True, max_size=3).map(sorted),
)
def test_scheduler_is_upstreams_to_the_bit(
    base_lr: float, warmup_factor: float, warmup_iters: int, milestones: list[int]
) -> None:
    optimizer = make_optimizer(StandIn(), base_lr=base_lr, momentum=0.9, weight_decay=0)
    scheduler = WarmupMultiStepLR(
        optimizer, milestones=milestones, warmup_factor=warmup_factor, warmup_iters=warmup_iters
    )
    for iteration in range(65):
        # maskrcnn-benchmark's get_lr, as it is written there.
        factor = 1
        if iteration < warmup_iters:
            alpha = float(iteration) / warmup_iters
            factor = warmup_factor * (1 - alpha) + alpha
        passed = sum(iteration >= milestone for milestone in milestones)
        for group, base in zip(optimizer.param_groups, (base_lr, base_lr * 2.0), strict=True):
            assert group["lr"] == base * factor * 0.1**passed
        scheduler.step()


def test_resumed_schedule_takes_new_milestones_and_rates() -> None:
    optimizer = make_optimizer(StandIn(), base_lr=0.1, momentum=0.9, weight_decay=0)
    scheduler = WarmupMultiStepLR(optimizer, milestones=(30,), warmup_iters=0)
    for _ in range(20):
        scheduler.step()
    resumed_optimizer = make_optimizer(StandIn(), base_lr=0.5, momentum=0.9, weight_decay=0)
    resumed = WarmupMultiStepLR(resumed_optimizer, milestones=(10,), warmup_iters=0)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.last_epoch == 20
    assert resumed_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("upstream", [False, True], ids=["ours", "maskrcnn-benchmark"])
def test_optimizer_state_goes_by_name(upstream: bool) -> None:
    source = StandIn()
    saved = (
        upstream_optimizer(source, 0.1)
        if upstream
        else make_optimizer(source, base_lr=0.1, momentum=0.9, weight_decay=1e-3)
    )
    step_on(source, saved, 0)
    target = copy.deepcopy(source)
    # One setting for all: the parameters are in another order than in the saved groups.
    optimizer = make_optimizer(
        target, base_lr=0.3, momentum=0.9, weight_decay=1e-3, bias_lr_factor=1, weight_decay_bias=1e-3
    )
    load_optimizer_state(optimizer, saved.state_dict(), names_of(target))
    for name, parameter in target.named_parameters():
        expected = saved.state[dict(source.named_parameters())[name]]["momentum_buffer"]
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected), name
    assert optimizer.param_groups[0]["lr"] == 0.3, "the settings of the new run count"


def test_optimizer_state_of_another_model() -> None:
    source, target = StandIn(), StandIn()
    target.norm.requires_grad_(False)
    saved = make_optimizer(source, base_lr=0.1, momentum=0.9, weight_decay=0)
    optimizer = make_optimizer(target, base_lr=0.1, momentum=0.9, weight_decay=0)
    with pytest.raises(ValueError, match="has 6 parameters, this model has 4"):
        load_optimizer_state(optimizer, saved.state_dict(), names_of(target))


def test_optimizer_state_of_another_shape() -> None:
    source, target = StandIn(), StandIn()
    target.head = nn.Linear(8, 5)
    saved = make_optimizer(source, base_lr=0.1, momentum=0.9, weight_decay=0)
    step_on(source, saved, 0)
    optimizer = make_optimizer(target, base_lr=0.1, momentum=0.9, weight_decay=0)
    with pytest.raises(ValueError, match=r"momentum_buffer of head.weight has shape \(4, 8\)"):
        load_optimizer_state(optimizer, saved.state_dict(), names_of(target))
