"""One training step: forward, losses, backward, update, on shapes that repeat.

The same code runs operator by operator on any device, and recorded: as a CUDA graph for each shape of batches
(:mod:`fastrcnn.engine.graphed`). docs/training-step.md tells how.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastrcnn.engine.distributed import World, share_weights, unwrap_model, wrap_model
from fastrcnn.engine.graph import Recorder, make_recorder
from fastrcnn.engine.graphed import GraphedStep
from fastrcnn.engine.solver import WarmupMultiStepLR
from fastrcnn.engine.static import StepInputs
from fastrcnn.structures import BoxList, ImageList, PackedImages, Targets, pad_targets
from fastrcnn_kernels import FusedSGD

logger = logging.getLogger("fastrcnn.step")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingBatch(Protocol):
    """What the loader yields: images and their ground truth in the frame of the network's input.

    :class:`PackedImages` become the network's input within the step; Targets are padded as they shall be.
    """

    @property
    def images(self) -> ImageList | PackedImages: ...
    @property
    def targets(self) -> list[BoxList] | Targets: ...


class TrainStep:
    """Forward, backward, update. Nothing in it waits for a CUDA device.

    Args:
        model: returns a dict of scalar losses; ``set_sampling(seed, step)`` of the unwrapped module sets its random
            choices.
        optimizer: with FusedSGD the gradients are clipped, averaged over processes and applied in one buffer.
        dtype: ``float32``, or ``bfloat16`` / ``float16`` for autocast; float16 scales the loss, and a step whose
            gradients overflowed changes no weight.
        seed: of the run.
        clip_gradients: the largest norm of all gradients together; 0 does not clip.
        graph: record the step for each shape of batches and replay it, as CUDA graphs on a CUDA device, and operator by
            operator on a CPU, which is of use to tests alone. Where that is not possible (:meth:`obstacle`) the step
            runs as it is, and the log says once why.
        mask_shares: what the mask head of a recorded step may run on, as shares of the most positives that a batch can
            have, increasing to 1: the smallest that holds the batch's positives is chosen, so none is lost. Each is a
            graph of its own; (1.0,) makes the step one graph.
        recorder: default by ``device``. warm_up, max_shapes: see :class:`GraphedStep`.
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
        graph: bool = False,
        mask_shares: Sequence[float] = (1.0,),
        recorder: Recorder | None = None,
        warm_up: int = 3,
        max_shapes: int = 16,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.device = device
        self.dtype = DTYPES[dtype]
        self.seed = seed
        self.clip_gradients = clip_gradients
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self.step = 0
        self.processes = 1
        self.graph = graph
        self.mask_shares = tuple(mask_shares)
        increasing = self.mask_shares == tuple(sorted(set(self.mask_shares)))
        if not increasing or self.mask_shares[-1:] != (1.0,) or self.mask_shares[0] <= 0:
            raise ValueError(f"mask_shares must increase from more than 0 to 1, got {self.mask_shares}")
        self.warm_up, self.max_shapes = warm_up, max_shapes
        self._recorder = recorder
        self._graphed: GraphedStep | None = None
        self._modules = list(unwrap_model(model).modules())

    def join(self, world: World) -> None:
        """Train together with the other processes of ``world``: rank 0's weights reach all, gradients are averaged."""
        if not world.distributed:
            return
        if isinstance(self.optimizer, FusedSGD):
            share_weights(self.model, world)
            self.optimizer.refresh_masters()
            self.processes = world.size
        else:
            self.model = wrap_model(self.model, world)

    def __call__(self, batch: TrainingBatch, step: int) -> dict[str, Tensor]:
        """Train on ``batch`` as step ``step`` (0-based).

        Returns:
            ``loss`` (the sum) and each loss by its name, 0-dim tensors on the device, not yet computed on CUDA.
        """
        self.step = step
        graphed = self._graphed_step()
        if graphed is not None:
            given = batch.targets
            targets = given if isinstance(given, Targets) else pad_targets(Targets.from_boxlists(given))
            losses = graphed(StepInputs(batch.images, targets))
        else:
            self.prepare()
            losses = self.whole(self._to_device(batch))
        self.scheduler.step()
        return losses

    def prepare(self) -> None:
        """Give the device what changes from step to step: the place of the random choices, the learning rate."""
        unwrap_model(self.model).set_sampling(self.seed, self.step)  # type: ignore[operator]
        if isinstance(self.optimizer, FusedSGD):
            self.optimizer.upload_settings()

    def whole(self, inputs: StepInputs) -> dict[str, Tensor]:
        """The step on the device: all of it that a graph holds."""
        with autocast(self.device, self.dtype):
            losses: dict[str, Tensor] = self.model(self._images(inputs), inputs.targets)
        return self._learn(losses)

    def _images(self, inputs: StepInputs) -> ImageList:
        """The network's input, preprocessed here where the loader did not."""
        images = inputs.images
        if isinstance(images, ImageList):
            return images
        channels_last = getattr(unwrap_model(self.model), "channels_last", False)
        return images.image_list(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @property
    def in_parts(self) -> bool:
        """Whether the mask head's capacity is chosen in the middle of a recorded step."""
        heads = getattr(self.model, "roi_heads", {})
        return len(self.mask_shares) > 1 and "mask" in heads

    def begin(self, inputs: StepInputs) -> Any:
        """The first part of :meth:`whole`: up to the sample of the heads."""
        with autocast(self.device, self.dtype):
            return self.model.begin_train(self._images(inputs), inputs.targets)  # type: ignore[operator]

    def number(self, state: Any) -> Tensor:
        """int64 []: the positives of the batch, on which the mask head runs."""
        return state.sampled.total_positive

    def middle(self, state: Any) -> None:
        """The second part: the box head."""
        with autocast(self.device, self.dtype):
            self.model.box_train(state)  # type: ignore[operator]

    def capacities(self, state: Any) -> list[int]:
        """What the mask head may run on: shares of the most positives that the batch can have."""
        return sorted({math.ceil(share * state.most_positives) for share in self.mask_shares})

    def rehearse(self, state: Any, capacity: int) -> None:
        """The last part without the update: its kernels are compiled and chosen, and nothing changes."""
        buffers = tuple(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        with autocast(self.device, self.dtype):
            losses: dict[str, Tensor] = self.model.finish_train(state, capacity)  # type: ignore[operator]
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        torch.autograd.grad(self.scaler.scale(total), self._parameters(), retain_graph=True, allow_unused=True)
        # What modules derived from their buffers stays valid: nothing has changed.
        with torch.autograd._unsafe_preserve_version_counter(buffers):
            for buffer, content in zip(buffers, before, strict=True):
                buffer.copy_(content)

    def finish(self, state: Any, capacity: int, *, again: bool) -> dict[str, Tensor]:
        """The last part: the mask head on ``capacity`` slots, and the way back through all parts."""
        with autocast(self.device, self.dtype):
            losses: dict[str, Tensor] = self.model.finish_train(state, capacity)  # type: ignore[operator]
        return self._learn(losses, again=again)

    def _learn(self, losses: dict[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
        """Backward and update. ``again``: the graph of autograd will be gone through once more."""
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self._forget_gradients()
        self.scaler.scale(total).backward(retain_graph=again)
        self._update()
        return {"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def _forget_gradients(self) -> None:
        # None and not zeros, which autograd would have to add to; FusedSGD.zero_grad fills its buffer.
        for parameter in self._parameters():
            parameter.grad = None

    def _update(self) -> None:
        if isinstance(self.optimizer, FusedSGD):
            self.optimizer.collect_grads()
            if self.processes > 1:
                assert self.optimizer.arena is not None
                torch.distributed.all_reduce(self.optimizer.arena.grads)
                self.optimizer.arena.grads.div_(self.processes)
        if self.clip_gradients > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _to_device(self, batch: TrainingBatch) -> StepInputs:
        targets = batch.targets
        if not isinstance(targets, Targets):
            targets = Targets.from_boxlists(targets)
            if self.device.type == "cuda":
                targets = targets.pin_memory()
        images = batch.images.to(self.device, non_blocking=True)
        return StepInputs(images, targets.to(self.device, non_blocking=True))

    def obstacle(self) -> str | None:
        """Why this step cannot be recorded; None where it can."""
        if isinstance(self.model, DistributedDataParallel):
            return "DistributedDataParallel averages the gradients: set STEP.FUSED_OPTIMIZER True"
        if not isinstance(self.optimizer, FusedSGD):
            return "the learning rate of torch.optim.SGD is a number on the host: set STEP.FUSED_OPTIMIZER True"
        for name, module in self.model.named_modules():
            if getattr(module, "positives_only", False):
                key = {"roi_heads.mask": "ROI_MASK_HEAD", "roi_heads.keypoint": "ROI_KEYPOINT_HEAD"}.get(name, name)
                return f"a head reads its number of regions from the device: set MODEL.{key}.POSITIVES_ONLY False"
        return None

    def _graphed_step(self) -> GraphedStep | None:
        if not self.graph:
            return None
        if self._graphed is None:
            obstacle = self.obstacle()
            if obstacle is not None:
                logger.info("STEP.GRAPH: the step runs operator by operator (%s)", obstacle)
                self.graph = False
                return None
            self._graphed = GraphedStep(
                self,
                self._recorder or make_recorder(self.device),
                device=self.device,
                state=self._state,
                warm_up=self.warm_up,
                max_shapes=self.max_shapes,
            )
        return self._graphed

    def _state(self) -> Hashable:
        """What a recording has taken for granted: modes of the modules, and where their tensors are."""
        assert isinstance(self.optimizer, FusedSGD)
        assert self.optimizer.arena is not None
        modes = [module.training for module in self._modules]
        places: list[Any] = [self.optimizer.arena.params.data_ptr(), self.clip_gradients, self.processes]
        for module in self._modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    places.append((tensor.data_ptr(), tensor.requires_grad))
        return tuple(modes), tuple(places)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in ``dtype``; nothing for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)
