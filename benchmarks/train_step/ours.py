"""Our side: the detector and its training step as ``fastrcnn.train`` builds them, and on its loader's batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from benchmarks.train_step import calibrate
from benchmarks.train_step.batches import StepBatch
from benchmarks.train_step.measure import Counter
from benchmarks.train_step.sides import DTYPES, LEARNING_RATE, capture, each_once
from fastrcnn.build import build_dataset, build_model, build_train_loader, step_switches
from fastrcnn.config import Config
from fastrcnn.data import Prefetcher
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep, autocast


class Ours:
    """Our detector and :class:`fastrcnn.engine.step.TrainStep`, as ``fastrcnn.train`` builds them.

    Args:
        mode: ``eager``, or ``graph`` for the step captured as a CUDA graph.
        resident: the images lie on the device before the step begins, as torchvision's do.
    """

    def __init__(
        self,
        cfg: Config,
        batches: Sequence[StepBatch],
        *,
        mode: str = "eager",
        resident: bool = True,
    ) -> None:
        self.mode, self.dtype = mode, cfg.DTYPE
        self.cfg = cfg
        self.device = torch.device(cfg.MODEL.DEVICE)
        torch.manual_seed(0)
        self.model = build_model(cfg)
        calibrate.scale_blocks(self.model)
        graph, fused = step_switches(cfg, self.device)
        self.optimizer = make_optimizer(
            self.model,
            base_lr=LEARNING_RATE,
            momentum=cfg.SOLVER.MOMENTUM,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            fused=fused,
        )
        self.train_step = TrainStep(
            self.model,
            self.optimizer,
            WarmupMultiStepLR(self.optimizer, milestones=(), warmup_iters=0),
            device=self.device,
            dtype=cfg.DTYPE,
            clip_gradients=cfg.SOLVER.CLIP_GRADIENTS,
            graph=graph,
            mask_shares=cfg.STEP.MASK_SHARES,
        )
        self.batches = list(batches)
        if resident:
            self.batches = each_once(batches, lambda b: StepBatch(b.images.to(self.device), b.targets))
        self.bias = calibrate.HeadBias()
        self.model.train()

    def step(self, number: int) -> dict[str, Tensor]:
        return self.train_step(self.batches[number % len(self.batches)], number)

    def flops(self, number: int) -> int:
        """Of a step run operator by operator: a replay shows none of its operators."""
        graph, self.train_step.graph = self.train_step.graph, False
        try:
            with Counter() as counter:
                self.step(number)
        finally:
            self.train_step.graph = graph
        return counter.flops

    def why_not_recorded(self) -> str:
        """Why the step is not replayed as a graph; empty where it is."""
        graphed = self.train_step._graphed
        if graphed is None:
            return self.train_step.obstacle() or "STEP.GRAPH is off"
        return "" if graphed.recorded else graphed.broken or "too few steps"

    def losses(self, number: int) -> dict[str, float]:
        """The losses of a batch in the model's own type, without an update; the random samples are those of step 0."""
        batch = self.batches[number % len(self.batches)]
        self.model.set_sampling(0, 0)
        with torch.no_grad(), autocast(self.device, DTYPES[self.dtype]):
            losses = self.model(batch.images.to(self.device), batch.targets)
        return {name: float(loss) for name, loss in losses.items()}

    @torch.no_grad()
    def calibrate(self, positives: int) -> None:
        """See :mod:`benchmarks.train_step.calibrate`."""
        rpn = self.model.rpn
        offset = rpn.convention.box_offset
        for index, batch in enumerate(each_once(self.batches, lambda batch: batch)):
            images = batch.images.to(self.device)
            with autocast(self.device, DTYPES[self.dtype]):
                features = self.model.features(images)
                outputs = rpn.head(features)
                if index == 0:
                    calibrate.scale_predictors(rpn.head, outputs)
                    outputs = rpn.head(features)
            self.bias.add(
                calibrate.head_bias(
                    outputs,
                    rpn.anchor_generator(features, images.padded_size),
                    [target.boxes.to(self.device) for target in batch.targets],
                    positives=positives,
                    encode=lambda boxes, anchors: kernels.encode_boxes(boxes, anchors, box_offset=offset),
                )
            )
        rpn.head.register_forward_hook(self.bias)

    def take_weights(self, other: Ours) -> None:
        """The weights and the calibration of ``other``, whose batches are the same."""
        self.model.load_state_dict(other.model.state_dict())
        self.bias = calibrate.HeadBias()
        self.bias.biases = other.bias.biases
        if other.bias.biases:
            self.model.rpn.head.register_forward_hook(self.bias)

    def positives(self, number: int) -> float:
        """Mean positive proposals of an image of a batch."""
        seen: list[Tensor] = []
        box = self.model.roi_heads["box"]
        sample = box.sample

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            seen.append(result.num_positive)
            return result

        box.sample = recorded  # type: ignore[method-assign]
        try:
            self.losses(number)
        finally:
            del box.sample
        return float(seen[-1].float().mean()) if seen else float("nan")

    @torch.no_grad()
    def detect(self, number: int) -> list[int]:
        batch = self.batches[number % len(self.batches)]
        with autocast(self.device, DTYPES[self.dtype]):
            return [len(found) for found in self.model(batch.images)]

    def set_score_threshold(self, value: float) -> None:
        self.model.roi_heads["box"].score_thresh = value

    def class_logits(self, number: int) -> Tensor:
        return capture(self.box_predictor, lambda: self.detect(number))[0]

    @property
    def box_predictor(self) -> nn.Module:
        return self.model.roi_heads["box"].predictor


class Loading:
    """Our side on the batches of its training loader as they come: a step waits for the loader where it is slower."""

    def __init__(self, side: Ours) -> None:
        self.side = side
        self.mode, self.dtype, self.batches = side.mode, side.dtype, side.batches
        self.model, self.optimizer, self.positives = side.model, side.optimizer, side.positives
        self.why_not_recorded, self.flops = side.why_not_recorded, side.flops
        self._dataset = build_dataset(side.cfg, side.cfg.DATASETS.TRAIN, is_train=True)
        self._batches = self._loader()

    def _loader(self) -> Iterator[Any]:
        return iter(Prefetcher(build_train_loader(self.side.cfg, self._dataset), self.side.device))

    def step(self, number: int) -> dict[str, Tensor]:
        try:
            batch = next(self._batches)
        except StopIteration:  # SOLVER.MAX_ITER steps are over
            self._batches = self._loader()
            batch = next(self._batches)
        return self.side.train_step(batch, number)
