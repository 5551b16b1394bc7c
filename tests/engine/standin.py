"""A detector in small for the tests of the engine: the interface of the real one, a few hundred weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.engine.checkpoint import Checkpointer
from fastrcnn.engine.distributed import World
from fastrcnn.engine.outputs import MetricsFile
from fastrcnn.engine.signals import StopSignals
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.engine.trainer import train
from fastrcnn.structures import BoxList, ImageList, Targets

CPU = World(0, 0, 1, torch.device("cpu"))


class StandIn(nn.Module):
    """Losses that depend on the pixels, the targets, the weights and the sampling state; each a mean over images."""

    sampling: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)
        self.register_buffer("sampling", torch.zeros(2, dtype=torch.int64), persistent=False)

    def set_sampling(self, seed: int, step: int) -> None:
        self.sampling[0].fill_(seed)
        self.sampling[1].fill_(step)

    def forward(self, images: ImageList, targets: Targets) -> dict[str, Tensor]:
        features = self.norm(self.body(images.tensors)).relu().mean(dim=(2, 3))
        predicted = self.head(features)
        seed, step = self.sampling
        wanted = targets.boxes[:, 0] / 10 + ((images.ids * 7 + step * 3 + seed) % 5)[:, None]
        return {
            "loss_box_reg": (predicted - wanted).abs().mean(),
            "loss_classifier": 0.1 * (features.sum(1) - targets.labels[:, 0]).square().mean(),
        }


@dataclass(frozen=True)
class Batch:
    images: ImageList
    targets: list[BoxList]


def make_batch(step: int, size: int = 4, rank: int = 0, world_size: int = 1) -> Batch:
    """The batch of a step: a pure function of the step, of which a rank takes its share."""
    generator = torch.Generator().manual_seed(1000 + step)
    pixels = torch.randn((size, 3, 16, 16), generator=generator)
    boxes = torch.rand((size, 1, 4), generator=generator) * 16
    share = slice(rank * size // world_size, (rank + 1) * size // world_size)
    ids = torch.arange(size) + step * size
    images = ImageList(pixels[share], [(16, 16)] * len(pixels[share]), ids[share])
    targets = [BoxList(b, (16, 16), labels=torch.tensor([1 + i % 3])) for i, b in enumerate(boxes)]
    return Batch(images, targets[share])


def make_batches(start: int, stop: int, **kwargs: Any) -> Iterator[Batch]:
    for step in range(start, stop):
        yield make_batch(step, **kwargs)


@dataclass
class Rig:
    """A run of the stand-in: what train.py builds for the real model."""

    step: TrainStep
    checkpointer: Checkpointer
    directory: Path
    world: World = CPU

    def train(self, max_iter: int, *, start: int = 0, batches: Any = None, stop: Any = None, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"log_period": 2, "checkpoint_period": 1000, **kwargs}
        metrics = MetricsFile(self.directory if self.world.is_main else None, start)
        if batches is None:
            batches = make_batches(start, max_iter, rank=self.world.rank, world_size=self.world.size)
        try:
            with StopSignals(self.world) as signals:
                train(
                    self.step,
                    batches,
                    start_iteration=start,
                    max_iter=max_iter,
                    checkpointer=self.checkpointer,
                    metrics=metrics,
                    world=self.world,
                    stop=stop or signals,
                    **settings,
                )
        finally:
            metrics.close()


def make_rig(
    directory: Path,
    *,
    seed: int = 0,
    base_lr: float = 0.02,
    milestones: tuple[int, ...] = (6,),
    dtype: str = "float32",
    keep: int = 0,
    clip_gradients: float = 0.0,
    world: World = CPU,
    fused: bool = False,
    **graph: Any,
) -> Rig:
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = StandIn()
    optimizer = make_optimizer(model, base_lr=base_lr, momentum=0.9, weight_decay=1e-3, fused=fused)
    scheduler = WarmupMultiStepLR(optimizer, milestones=milestones, warmup_iters=3)
    step = TrainStep(
        model, optimizer, scheduler, device=world.device, dtype=dtype, seed=seed, clip_gradients=clip_gradients, **graph
    )
    checkpointer = Checkpointer(
        directory,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=step.scaler,
        keep=keep,
        extra={"seed": seed, "config_hash": "abc"},
        is_main=world.is_main,
    )
    step.join(world)
    return Rig(step, checkpointer, directory, world)


def weights(rig: Rig) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in rig.checkpointer.model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs by {(value - second[name]).abs().max()}"
