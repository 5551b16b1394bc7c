"""One training step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fastrcnn.engine.distributed import unwrap_model
from fastrcnn.engine.solver import WarmupMultiStepLR
from fastrcnn.structures import BoxList, ImageList, Targets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingBatch(Protocol):
    """What the loader yields: images and their ground truth in the frame of the network's input."""

    @property
    def images(self) -> ImageList: ...
    @property
    def targets(self) -> list[BoxList]: ...


class TrainStep:
    """Forward, backward, update. Nothing in it waits for a CUDA device.

    Args:
        model: returns a dict of scalar losses; ``set_sampling(seed, step)`` of the unwrapped module sets its random
            choices.
        dtype: ``float32``, or ``bfloat16`` / ``float16`` for autocast; float16 scales the loss, and a step whose
            gradients overflowed changes no weight.
        seed: of the run.
        clip_gradients: the largest norm of all gradients together; 0 does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: WarmupMultiStepLR,
        *,
        device: torch.device,
        dtype: str = "float32",
        seed: int = 0,
        clip_gradients: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.device = device
        self.dtype = DTYPES[dtype]
        self.seed = seed
        self.clip_gradients = clip_gradients
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    def __call__(self, batch: TrainingBatch, step: int) -> dict[str, Tensor]:
        """Train on ``batch`` as step ``step`` (0-based).

        Returns:
            ``loss`` (the sum) and each loss by its name, 0-dim tensors on the device, not yet computed on CUDA.
        """
        images, targets = self._to_device(batch)
        unwrap_model(self.model).set_sampling(self.seed, step)  # type: ignore[operator]
        with autocast(self.device, self.dtype):
            losses: dict[str, Tensor] = self.model(images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()

        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        if self.clip_gradients > 0:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return {"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def _to_device(self, batch: TrainingBatch) -> tuple[ImageList, Targets]:
        targets = Targets.from_boxlists(batch.targets)
        if self.device.type == "cuda":
            targets = targets.pin_memory()
        images = batch.images.to(self.device, non_blocking=True)
        return images, targets.to(self.device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in ``dtype``; nothing for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)
