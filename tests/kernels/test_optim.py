"""fused_sgd against scalar float64 arithmetic and torch.optim.SGD; FusedSGD as a drop-in for the latter."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrcnn_kernels import FusedSGD, ParameterArena, fused_sgd, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place

HALVES = [torch.float16, torch.bfloat16]
# lr, weight decay, momentum of each group
SETTINGS = [[0.02, 1e-4, 0.9], [0.04, 0.0, 0.9], [0.5, 0.1, 0.0]]


def values(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=count).astype(np.float32))


def loop_sgd(
    params: list[float],
    grads: list[float],
    buffer: list[float] | None,
    groups: list[int],
    settings: list[list[float]],
    nesterov: bool,
    scale: float,
) -> tuple[list[float], list[float] | None]:
    """One parameter at a time, in float64."""
    new_params, new_buffer = list(params), None if buffer is None else list(buffer)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if groups[i // 1024] < 0:
            continue
        lr, decay, momentum = settings[groups[i // 1024]]
        d = g / scale + decay * p
        if new_buffer is not None:
            new_buffer[i] = momentum * new_buffer[i] + d
            d = d + momentum * new_buffer[i] if nesterov else new_buffer[i]
        new_params[i] = p - lr * d
    return new_params, new_buffer


def assert_one_ulp(found: Tensor, wanted: Tensor, of: Tensor) -> None:
    """Within two roundings of the largest term, of which the result may be a small difference."""
    limit = 2.0**-23 * of.double().abs().clamp(min=1e-30) * 2
    assert ((found.double() - wanted.double()).abs() <= limit).all()


CASES = [
    pytest.param(count, *switches, id=f"n{count}-{name}")
    for count in (1, 7, 1023, 1024, 1025, 3000)
    for name, switches in {
        "momentum": (True, False, False), "plain": (False, False, False), "nesterov-scaled": (True, True, True),
        "plain-scaled": (False, False, True), "momentum-scaled": (True, False, True),
    }.items()
]  # fmt: skip


@pytest.mark.parametrize(("count", "momentum", "nesterov", "scaled"), CASES)
def test_fused_sgd(place: Place, guarded: Guards, count: int, momentum: bool, nesterov: bool, scaled: bool) -> None:
    params, grads, buffer = values(count, 1), values(count, 2) * (64 if scaled else 1), values(count, 3)
    groups = [i % 3 for i in range(-(-count // 1024))]
    on = place.device
    moved = [guarded(t.to(on)) for t in (params, grads, buffer)]
    fused_sgd(
        moved[0],
        moved[1],
        moved[2] if momentum else None,
        torch.tensor(groups, dtype=torch.int32, device=on),
        torch.tensor(SETTINGS, device=on),
        nesterov=nesterov,
        grad_scale=torch.tensor([64.0], device=on) if scaled else None,
    )
    settings = torch.tensor(SETTINGS).double().tolist()
    wanted, wanted_buffer = loop_sgd(
        params.tolist(), grads.tolist(), buffer.tolist() if momentum else None, groups, settings, nesterov,
        64.0 if scaled else 1.0,
    )  # fmt: skip
    size = params.abs() + grads.abs() / (64 if scaled else 1) + buffer.abs()
    assert_one_ulp(moved[0].cpu(), torch.tensor(wanted, dtype=torch.float64), size)
    if wanted_buffer is not None:
        assert_one_ulp(moved[2].cpu(), torch.tensor(wanted_buffer, dtype=torch.float64), size)
    else:
        assert torch.equal(moved[2].cpu(), buffer)
    assert torch.equal(moved[1].cpu(), grads)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_gradients_and_copies(place: Place, guarded: Guards, dtype: torch.dtype) -> None:
    """16-bit gradients are widened exactly; the copy is the new parameter rounded once."""
    count, on = 2050, place.device
    grads = values(count, 2).to(dtype)
    grads[:6] = torch.tensor([0.0, -0.0, 6e-8, 1e-5, 60000.0, -1.0]).to(dtype)
    groups = torch.zeros(3, dtype=torch.int32, device=on)
    settings = torch.tensor([[0.1, 0.01, 0.9]], device=on)
    results = []
    for g in (grads, grads.float()):
        params, buffer = (guarded(values(count, s).to(on)) for s in (1, 3))
        out = guarded(torch.full((count,), math.nan, dtype=dtype, device=on))
        fused_sgd(params, guarded(g.to(on)), buffer, groups, settings, copy_out=out)
        # Triton's interpreter cuts bfloat16 off instead of rounding.
        slack = 2.0**-7 if place == Place("triton", "cpu") and dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(out, params.to(dtype), rtol=slack, atol=0)
        results.append((params, buffer))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_blocks_below_zero_are_left_alone(place: Place) -> None:
    count, on = 4 * 1024 - 5, place.device
    params, grads, buffer = (values(count, s).to(on) for s in (1, 2, 3))
    before = params.clone(), buffer.clone()
    out = torch.zeros(count, dtype=torch.bfloat16, device=on)
    groups = torch.tensor([-1, 0, -7, -1], dtype=torch.int32, device=on)
    fused_sgd(params, grads, buffer, groups, torch.tensor([[0.1, 0.0, 0.9]], device=on), copy_out=out)
    for now, then in zip((params, buffer), before, strict=True):
        assert torch.equal(now[:1024], then[:1024])
        assert torch.equal(now[2048:], then[2048:])
        assert (now[1024:2048] != then[1024:2048]).all()
    assert not out[:1024].any()
    assert not out[2048:].any()


@pytest.mark.parametrize("found", [0.0, 1.0, math.nan])
def test_found_inf_skips_all(place: Place, found: float) -> None:
    on = place.device
    params, grads, buffer = (values(1500, s).to(on) for s in (1, 2, 3))
    before = params.clone(), buffer.clone()
    out, step = torch.zeros(1500, dtype=torch.float16, device=on), torch.tensor(4.0, device=on)
    groups, settings = torch.zeros(2, dtype=torch.int32, device=on), torch.tensor([[0.1, 0.0, 0.9]], device=on)
    flag = torch.tensor([found], device=on)
    fused_sgd(params, grads, buffer, groups, settings, found_inf=flag, copy_out=out, step=step)
    skipped = found != 0
    assert step.item() == (4.0 if skipped else 5.0)
    assert torch.equal(params, before[0]) == skipped
    assert torch.equal(buffer, before[1]) == skipped
    assert (not out.any()) == skipped


def test_weight_decay_of_zero_ignores_the_parameter(place: Place) -> None:
    """As in PyTorch, where 0 * inf would be NaN; a NaN gradient spoils its own parameter only."""
    on = place.device
    params = torch.tensor([math.inf, 1.0, 2.0], device=on)
    grads = torch.tensor([1.0, math.nan, 3.0], device=on)
    groups, settings = torch.zeros(1, dtype=torch.int32, device=on), torch.tensor([[1.0, 0.0, 0.0]], device=on)
    fused_sgd(params, grads, None, groups, settings)
    assert params[0] == math.inf
    assert params[1].isnan()
    assert params[2] == -1.0


def test_empty(place: Place) -> None:
    on = place.device
    nothing, step = torch.zeros(0, device=on), torch.tensor(0.0, device=on)
    groups = torch.zeros(0, dtype=torch.int32, device=on)
    fused_sgd(nothing, nothing, nothing.clone(), groups, torch.zeros((1, 3), device=on), step=step)
    assert step.item() == 1.0


def test_never_waits_for_the_device(place: Place) -> None:
    on = place.device
    params, grads, buffer = (values(1500, s).to(on) for s in (1, 2, 3))
    groups, settings = torch.zeros(2, dtype=torch.int32, device=on), torch.tensor([[0.1, 0.0, 0.9]], device=on)
    with ForbidSync():
        fused_sgd(params, grads, buffer, groups, settings, found_inf=torch.zeros(1, device=on))


def test_opcheck_and_compile(place: Place) -> None:
    on = place.device
    params, grads, buffer = (values(1500, s).to(on) for s in (1, 2, 3))
    groups, settings = torch.zeros(2, dtype=torch.int32, device=on), torch.tensor([[0.1, 0.0, 0.9]], device=on)
    out, step = torch.zeros(1500, dtype=torch.bfloat16, device=on), torch.zeros(1, device=on)
    operator = torch.ops.fastrcnn_kernels.fused_sgd.default
    torch.library.opcheck(operator, (params, buffer, grads, groups, settings, False, None, None, out, step))
    torch.library.opcheck(operator, (params, None, grads, groups, settings, False, None, None, None, None))

    def run(p: Tensor, b: Tensor) -> Tensor:
        fused_sgd(p, grads * 2, b, groups, settings)
        return p + 1

    plain, compiled = (params.clone(), buffer.clone()), (params.clone(), buffer.clone())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled), run(*plain))
    assert torch.equal(plain[1], compiled[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": torch.zeros(2, 3)}, ValueError, "params has shape"),
        ({"params": torch.zeros(6, dtype=torch.float16)}, TypeError, "params must be"),
        ({"grads": torch.zeros(5)}, ValueError, "grads has shape"),
        ({"grads": torch.zeros(12)[::2]}, ValueError, "grads has shape"),
        ({"grads": torch.zeros(6, dtype=torch.int32)}, TypeError, "grads must be"),
        ({"block_groups": torch.zeros(2, dtype=torch.int32)}, ValueError, "block_groups has shape"),
        ({"block_groups": torch.zeros(1, dtype=torch.int64)}, TypeError, "block_groups must be"),
        ({"settings": torch.zeros(1, 2)}, ValueError, "settings has shape"),
        ({"copy_out": torch.zeros(6)}, TypeError, "copy_out must be"),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale has shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "params": torch.zeros(6),
        "grads": torch.zeros(6),
        "momentum_buffer": torch.zeros(6),
        "block_groups": torch.zeros(1, dtype=torch.int32),
        "settings": torch.zeros(1, 3),
    }
    with pytest.raises(error, match=message):
        fused_sgd(**(arguments | change))


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))
    return model.to(memory_format=torch.channels_last)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.01},
        {"params": [p for n, p in named if "bias" in n], "lr": 0.2, "weight_decay": 0.0},
    ]


def backward(model: nn.Module, seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, 8, 8)).astype(np.float32))
    model(x).square().mean().backward()


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("backend_name", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_fused_sgd_class_equals_torch(backend_name: str, settings: dict[str, Any]) -> None:
    ours, theirs = make_model(), make_model()
    a, b = FusedSGD(parameter_groups(ours), 0.1, **settings), torch.optim.SGD(parameter_groups(theirs), 0.1, **settings)
    with set_backend(backend_name):
        for step in range(5):
            for model, optimizer in ((ours, a), (theirs, b)):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.7
    assert_same_parameters(ours, theirs)
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last)
    base = a.arena.params if a.arena else None
    assert all(p.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for p in ours.parameters())


@pytest.mark.parametrize("first_is_ours", [True, False])
def test_checkpoints_go_both_ways(first_is_ours: bool) -> None:
    """Three steps with one class, two with the other from its state_dict, are five steps."""
    kinds = (FusedSGD, torch.optim.SGD) if first_is_ours else (torch.optim.SGD, FusedSGD)
    model, wanted = make_model(), make_model()
    reference = torch.optim.SGD(parameter_groups(wanted), 0.1, momentum=0.9)
    optimizer = kinds[0](parameter_groups(model), 0.1, momentum=0.9)
    for step in range(5):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            resumed = make_model(1)
            resumed.load_state_dict(model.state_dict())
            model, optimizer = resumed, kinds[1](parameter_groups(resumed), 0.3, momentum=0.5)
            optimizer.load_state_dict(state)
        for one, its in ((model, optimizer), (wanted, reference)):
            its.zero_grad()
            backward(one, step)
            its.step()
    assert_same_parameters(model, wanted)
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        torch.testing.assert_close(ours["state"][index]["momentum_buffer"], state["momentum_buffer"])


def test_state_dict_before_the_first_step_is_empty() -> None:
    assert FusedSGD(make_model().parameters(), 0.1, momentum=0.9).state_dict()["state"] == {}


def test_parameters_without_gradient_are_left_alone() -> None:
    models = make_model(), make_model()
    optimizers = (
        FusedSGD(models[0].parameters(), 0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.SGD(models[1].parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    )
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            model[2].weight.grad = None
            if step == 1:  # a gradient of its own memory is taken too
                model[0].bias.grad = torch.ones(8)
            optimizer.step()
    assert_same_parameters(*models)
    assert len(optimizers[0].state) == len(optimizers[1].state) == 5
    assert torch.equal(models[0][2].weight, make_model()[2].weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_parameters_have_masters(dtype: torch.dtype) -> None:
    """Steps too small for a 16-bit parameter add up; the state restores the masters."""
    parameter = nn.Parameter(torch.ones(10, dtype=dtype))
    optimizer = FusedSGD([parameter], 1e-5, momentum=0.0)
    for _ in range(1000):
        assert parameter.grad is not None
        parameter.grad.fill_(1.0)
        optimizer.step()
    torch.testing.assert_close(parameter.float(), torch.full((10,), 0.99), rtol=0, atol=4e-3)
    assert (parameter < 1).all()
    other = nn.Parameter(torch.zeros(10, dtype=dtype))
    restored = FusedSGD([other], 1e-5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.arena is not None
    assert optimizer.arena is not None
    assert torch.equal(restored.arena.params, optimizer.arena.params)
    other.data.fill_(2.0)
    restored.refresh_masters()
    assert (restored.arena.params[:10] == 2.0).all()


def test_grad_scaler() -> None:
    """torch.amp.GradScaler hands its scale and its flag to the kernel, and an overflow skips the step."""
    models = make_model(), make_model()
    scaled = FusedSGD(models[0].parameters(), 0.1, momentum=0.9)
    plain = torch.optim.SGD(models[1].parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scaled.zero_grad()
        plain.zero_grad()
        x = torch.from_numpy(np.random.default_rng(step).normal(size=(2, 3, 8, 8)).astype(np.float32))
        scaler.scale(models[0](x).square().mean()).backward()
        models[1](x).square().mean().backward()
        if step == 2:
            assert models[0][0].bias.grad is not None
            models[0][0].bias.grad[0] = math.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same_parameters(*models)


def test_a_tensor_as_learning_rate() -> None:
    models = make_model(), make_model()
    lr = torch.tensor(0.1)
    ours = FusedSGD(models[0].parameters(), lr, momentum=0.9)
    theirs = torch.optim.SGD(models[1].parameters(), 0.1, momentum=0.9)
    for step in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        lr.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    assert_same_parameters(*models)


def test_arena_refuses() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="at least one"):
        ParameterArena([[]])
    with pytest.raises(ValueError, match="occurs twice"):
        ParameterArena([[parameter], [parameter]])
    with pytest.raises(ValueError, match="cannot share"):
        ParameterArena([[parameter, nn.Parameter(torch.ones(3, dtype=torch.float16))]])
    with pytest.raises(ValueError, match="must be float32"):
        ParameterArena([[nn.Parameter(torch.ones(3, dtype=torch.float64))]])
    with pytest.raises(ValueError, match="not dense"):
        ParameterArena([[nn.Parameter(torch.ones(6)[::2])]])
    with pytest.raises(ValueError, match="not supported"):
        FusedSGD([parameter], 0.1, momentum=0.9, dampening=0.5)
    groups = [{"params": [parameter], "nesterov": True}, {"params": [nn.Parameter(torch.ones(2))]}]
    with pytest.raises(ValueError, match="nesterov must be the same"):
        FusedSGD(groups, 0.1, momentum=0.9)
    optimizer = FusedSGD([parameter], 0.1)
    with pytest.raises(ValueError, match="laid out"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
