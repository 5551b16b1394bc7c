"""Processes: one in a plain run, several under torchrun.

``torchrun --nproc_per_node=8 -m fastrcnn.train ...`` starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE.
NCCL carries CUDA tensors, gloo everything else: what the host has to agree on never waits for the device.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# Long enough for rank 0 to evaluate a data set while the others wait.
TIMEOUT = datetime.timedelta(minutes=60)


class DeviceError(ValueError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class World:
    """The processes of this run, seen from one of them.

    Attributes:
        rank, local_rank, size: of this process, on its machine, and the number of all processes.
        device: the device of this process.
        host_group: the gloo group for what lives on the host; None in a run of one process.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    host_group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1

    def gather(self, item: T) -> list[T] | None:
        """The items of all ranks, in their order, on rank 0; None elsewhere."""
        if not self.distributed:
            return [item]
        items: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(item, items, dst=0, group=self.host_group)
        return items

    def broadcast(self, item: T) -> T:
        """Rank 0's ``item``, on all ranks."""
        if not self.distributed:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 alone; its result, or its exception, reaches all ranks."""
        if not self.distributed:
            return function()
        value: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                value = function()
            except Exception as error:
                failure = error
        value, failure = self.broadcast((value, failure))
        if failure is not None:
            raise failure
        return value

    def mean(self, tensor: Tensor) -> Tensor:
        """``tensor`` averaged over the ranks; a NaN on one rank is a NaN on all."""
        if not self.distributed:
            return tensor
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed / self.size

    def share_statistics(self, model: nn.Module) -> None:
        """Give all ranks rank 0's running statistics of trained batch norms (FBNet): each has gathered its own.

        They are what a checkpoint holds, and in training nothing reads them.
        """
        if not self.distributed:
            return
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)

    def max_later(self, value: int) -> Callable[[], int]:
        """Start to find the largest ``value`` of all ranks; the returned function waits for it."""
        if not self.distributed:
            return lambda: value
        flag = torch.tensor([value], dtype=torch.int64)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True)

        def wait() -> int:
            work.wait()
            return int(flag[0])

        return wait


def pick_device(name: str, local_rank: int = 0, *, distributed: bool = False) -> torch.device:
    """The device of MODEL.DEVICE for this process.

    Raises:
        DeviceError: where it is not there, with the override that helps.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"MODEL.DEVICE is {name!r}: it must be cuda, cuda:N or cpu") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"MODEL.DEVICE is {name!r}: it must be cuda, cuda:N or cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"MODEL.DEVICE is {name!r}, but PyTorch finds no CUDA device here: pass MODEL.DEVICE cpu")
    index = local_rank if distributed or device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"process {index} of this machine has no CUDA device: there are {torch.cuda.device_count()}; start at "
            f"most as many processes (torchrun --nproc_per_node={torch.cuda.device_count()}), or pass MODEL.DEVICE cpu"
            if distributed
            else f"MODEL.DEVICE is {name!r}, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", index)


def join_world(device_name: str) -> World:
    """Join the other processes if torchrun started this one; else a world of one.

    Raises:
        DeviceError: where the device is not there.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name, local_rank, distributed=size > 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return World(rank, local_rank, size, device, dist.new_group(backend="gloo", timeout=TIMEOUT))


def leave_world(world: World) -> None:
    """Leave in good order, after all ranks have finished; after an exception just let the process end."""
    if world.distributed and dist.is_initialized():
        dist.barrier(group=world.host_group)
        dist.destroy_process_group()


def wrap_model(model: nn.Module, world: World) -> nn.Module:
    """``model`` with its gradients averaged over the ranks; itself in a run of one process."""
    if not world.distributed:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False,  # training reads no running statistic; evaluation takes World.share_statistics
        gradient_as_bucket_view=True,
    )


def share_weights(model: nn.Module, world: World) -> None:
    """Give all ranks rank 0's weights and buffers, as :func:`wrap_model` does, for a model that stays unwrapped."""
    if world.distributed:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                # In memory order, whatever the layout: it is the same on all ranks.
                dist.broadcast(tensor.as_strided((tensor.numel(),), (1,)), src=0)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module inside :func:`wrap_model`."""
    return model.module if isinstance(model, DistributedDataParallel) else model
