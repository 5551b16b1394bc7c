"""One rank of a run of the stand-in, started by test_distributed.py: ``python -m ... MODE OUTPUT_DIR``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastrcnn.engine.command import run_command
from fastrcnn.engine.distributed import World, join_world, leave_world
from tests.engine.standin import Batch, make_batches, make_rig

STEPS = 6


def batches(mode: str, world: World) -> Iterator[Batch]:
    for step, batch in enumerate(make_batches(0, 100, rank=world.rank, world_size=world.size)):
        if step == 3 and world.rank == 1:
            if mode == "raise":
                raise RuntimeError("rank 1 broke on purpose")
            if mode == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if mode == "nan":
                batch.images.tensors[0] = torch.nan
        yield batch


def collectives(world: World) -> None:
    assert world.gather({"rank": world.rank}) == ([{"rank": k} for k in range(world.size)] if world.is_main else None)
    assert world.broadcast(world.rank + 7) == 7
    assert world.mean(torch.tensor([1.0, float(world.rank)])).tolist() == [1.0, (world.size - 1) / 2]
    assert world.max_later(world.rank)() == world.size - 1
    assert world.on_main(lambda: world.rank) == 0
    norm = torch.nn.BatchNorm2d(3)
    norm(torch.full((2, 3, 1, 1), 10.0 * (world.rank + 1)))
    world.share_statistics(torch.nn.Sequential(norm))
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [1.0] * 3  # a tenth of rank 0's
    with pytest.raises(ValueError, match="seven"):
        world.on_main(lambda: int("seven"))


def main() -> int:
    mode, directory = sys.argv[1], Path(sys.argv[2])
    world = join_world("cpu")
    if mode == "collectives":
        collectives(world)
    else:
        # Different initial weights: rank 0's have to reach all.
        fused = {"fused": True, "graph": mode == "graph"} if mode in ("fused", "graph") else {}
        rig = make_rig(directory, seed=0 if world.is_main else 99, world=world, **fused)
        rig.step.seed = 0
        steps = STEPS if mode in ("train", "fused", "graph") else 100
        limited = (batch for _, batch in zip(range(steps), batches(mode, world), strict=False))
        rig.train(steps, batches=limited, log_period=2 if mode != "nan" else 1)
    leave_world(world)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
