"""The optimizer and its learning rate, after maskrcnn-benchmark's ``solver``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn_kernels import FusedSGD

WARMUP_METHODS = ("linear", "constant")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    base_lr: float,
    bias_lr_factor: float,
    weight_decay: float,
    weight_decay_bias: float,
) -> list[dict[str, Any]]:
    """maskrcnn-benchmark's settings: a parameter with "bias" in its name has its own learning rate and decay.

    There each parameter is a group of its own; here parameters of equal settings share one, so that the optimizer
    needs few launches. The first group is that of the first trainable parameter, whose learning rate is logged.

    Returns:
        Groups for a ``torch.optim.Optimizer``; ``params`` are (name, parameter) pairs, frozen ones left out.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        bias = "bias" in name
        setting = (base_lr * bias_lr_factor, weight_decay_bias) if bias else (base_lr, weight_decay)
        groups.setdefault(setting, []).append((name, parameter))
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def make_optimizer(
    model: nn.Module,
    *,
    base_lr: float,
    momentum: float,
    weight_decay: float,
    bias_lr_factor: float = 2.0,
    weight_decay_bias: float = 0.0,
    fused: bool = False,
) -> torch.optim.SGD:
    """SGD over the trainable parameters of ``model``.

    Args:
        fused: :class:`fastrcnn_kernels.FusedSGD`, one launch for all parameters, whose memory becomes one buffer (so
            put the model on its device first); its learning rate is on the device, which a recorded step needs.
            Else PyTorch's, one launch a group on CUDA. Checkpoints of both are the same.

    Raises:
        ValueError: if the model has no trainable parameter.
    """
    groups = parameter_groups(
        model.named_parameters(),
        base_lr=base_lr,
        bias_lr_factor=bias_lr_factor,
        weight_decay=weight_decay,
        weight_decay_bias=weight_decay_bias,
    )
    if not groups:
        raise ValueError("the model has no trainable parameter")
    if fused:
        return FusedSGD(groups, lr=base_lr, momentum=momentum)
    on_cuda = all(parameter.is_cuda for group in groups for _, parameter in group["params"])
    return torch.optim.SGD(groups, lr=base_lr, momentum=momentum, fused=True if on_cuda else None)


def warmup_factor_at(step: int, *, warmup_factor: float, warmup_iters: int, warmup_method: str) -> float:
    """The factor on the learning rate of step ``step`` (0-based) during the warm-up; 1 after it."""
    if warmup_method not in WARMUP_METHODS:
        raise ValueError(f"SOLVER.WARMUP_METHOD is {warmup_method!r}: choose one of {', '.join(WARMUP_METHODS)}")
    if step >= warmup_iters:
        return 1.0
    if warmup_method == "constant":
        return warmup_factor
    alpha = float(step) / warmup_iters
    return warmup_factor * (1 - alpha) + alpha


def lr_factor(
    step: int,
    *,
    milestones: Sequence[int],
    gamma: float,
    warmup_factor: float,
    warmup_iters: int,
    warmup_method: str = "linear",
) -> float:
    """The factor on the learning rate of step ``step`` (0-based): warm-up times ``gamma`` for each milestone passed."""
    warmup = warmup_factor_at(step, warmup_factor=warmup_factor, warmup_iters=warmup_iters, warmup_method=warmup_method)
    return warmup * gamma ** bisect_right(list(milestones), step)


class WarmupMultiStepLR:
    """Sets the learning rate of each step: linear or constant warm-up, then a drop by ``gamma`` at each milestone.

    maskrcnn-benchmark's schedule to the last bit. Its state is the step alone: milestones, factors and base rates
    come from the configuration of the run, so that a resumed run may change them (there the milestones travel in the
    checkpoint, and changing SOLVER.STEPS has no effect).

    Args:
        milestones: the steps of SOLVER.STEPS, increasing.

    Raises:
        ValueError: for milestones that do not increase, or an unknown warm-up.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 1.0 / 3,
        warmup_iters: int = 500,
        warmup_method: str = "linear",
    ) -> None:
        if list(milestones) != sorted(milestones):
            raise ValueError(f"SOLVER.STEPS must increase, got {tuple(milestones)}")
        self.optimizer = optimizer
        self.base_lrs: list[float] = [float(group["lr"]) for group in optimizer.param_groups]
        self.milestones = list(milestones)
        self.gamma = gamma
        self.warmup = {
            "warmup_factor": warmup_factor,
            "warmup_iters": warmup_iters,
            "warmup_method": warmup_method,
        }
        self._set(0)

    def _set(self, step: int) -> None:
        self.last_epoch = step
        warmup = warmup_factor_at(step, **self.warmup)  # type: ignore[arg-type]
        decay = self.gamma ** bisect_right(self.milestones, step)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * warmup * decay

    def step(self) -> None:
        """Go on to the next step; call it after ``optimizer.step()``."""
        self._set(self.last_epoch + 1)

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state["last_epoch"]``, the only entry used; maskrcnn-benchmark's checkpoints have it too."""
        self._set(int(state["last_epoch"]))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], names: Sequence[str]) -> None:
    """Restore the momentum of each parameter by name, and keep the settings (learning rate, decay) of the new run.

    Args:
        state: of this package (groups with ``param_names``), or of maskrcnn-benchmark, where each parameter is a
            group, in the order of ``names``.
        names: the trainable parameters in the order of ``model.named_parameters()``.

    Raises:
        ValueError: if ``state`` belongs to other parameters, or the shape of one differs.
    """
    saved_order = [index for group in state["param_groups"] for index in group["params"]]
    saved_names = [name for group in state["param_groups"] for name in group.get("param_names", ())]
    if not saved_names and len(saved_order) == len(names):
        saved_names = list(names)
    if sorted(saved_names) != sorted(names):
        missing = sorted(set(names) - set(saved_names))[:3]
        raise ValueError(
            f"the checkpoint's optimizer has {len(saved_order)} parameters, this model has {len(names)} trainable ones"
            + (f" (not in the checkpoint: {', '.join(missing)})" if saved_names and missing else "")
            + ": resume with the model settings the run was started with"
        )
    by_name = {name: state["state"].get(index, {}) for name, index in zip(saved_names, saved_order, strict=True)}
    current = optimizer.state_dict()
    new_state: dict[int, Any] = {}
    for group, real in zip(current["param_groups"], optimizer.param_groups, strict=True):
        for index, name, parameter in zip(group["params"], group["param_names"], real["params"], strict=True):
            for key, value in by_name[name].items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                    raise ValueError(
                        f"the checkpoint's {key} of {name} has shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(parameter.shape)}"
                    )
            if by_name[name]:
                new_state[index] = by_name[name]
    optimizer.load_state_dict({"state": new_state, "param_groups": current["param_groups"]})
