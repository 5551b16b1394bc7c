"""The sides of the comparison: our detector in its modes, and torchvision's Mask R-CNN.

A side has ``name``, ``mode``, ``dtype``, ``model`` and ``optimizer``; ``step(i)`` trains on batch ``i`` (they are
cycled through) and returns the losses, ``detect(i)`` gives the number of detections of each image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from benchmarks.train_step import calibrate
from benchmarks.train_step.batches import StepBatch, to_torchvision
from benchmarks.train_step.measure import Counter
from fastrcnn.build import build_dataset, build_model, build_train_loader, step_switches
from fastrcnn.config import Config, ConfigError, load_config
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep, autocast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# So small that the statistics of the first step are those of the last; the update is computed all the same.
LEARNING_RATE = 1e-7


class NotHere(RuntimeError):
    """Something that this machine or this version of the package cannot run, with the reason."""


class Side(Protocol):
    """One column of the comparison."""

    name: str
    mode: str
    dtype: str
    model: nn.Module
    optimizer: Any
    batches: Sequence[StepBatch]

    def step(self, number: int) -> dict[str, Tensor]: ...
    def detect(self, number: int) -> list[int]: ...
    def positives(self, number: int) -> float: ...
    def set_score_threshold(self, value: float) -> None: ...
    def class_logits(self, number: int) -> Tensor: ...
    @property
    def box_predictor(self) -> nn.Module: ...


def known_key(config_file: Path, name: str, value: str) -> bool:
    """Whether this version of the package has the configuration key ``name``.

    Raises:
        ConfigError: it has, and does not take ``value``.
    """
    try:
        load_config(config_file, [name, value])
    except ConfigError as error:
        if "unknown key" in str(error).lower():
            return False
        raise
    return True


def capture(module: nn.Module, call: Callable[[], Any]) -> Any:
    """What ``module`` returned the last time that it ran within ``call()``."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        call()
    finally:
        handle.remove()
    if not seen:
        raise NotHere(f"{type(module).__name__} did not run as a module")
    return seen[-1]


def each_once(batches: Sequence[StepBatch], convert: Callable[[StepBatch], Any]) -> list[Any]:
    """``convert`` of each batch, called once for one that recurs."""
    found = {id(batch): batch for batch in batches}
    converted = {key: convert(batch) for key, batch in found.items()}
    return [converted[id(batch)] for batch in batches]


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
        self.name, self.mode, self.dtype = "ours", mode, cfg.DTYPE
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
        cfg = side.cfg
        self._dataset = build_dataset(cfg, cfg.DATASETS.TRAIN, is_train=True)
        self._batches = iter(build_train_loader(cfg, self._dataset))

    def step(self, number: int) -> dict[str, Tensor]:
        try:
            batch = next(self._batches)
        except StopIteration:  # SOLVER.MAX_ITER steps are over
            self._batches = iter(build_train_loader(self.side.cfg, self._dataset))
            batch = next(self._batches)
        return self.side.train_step(batch, number)


def torchvision_name(amp: torch.dtype | None, channels_last: bool) -> str:
    words = ["torchvision", "AMP" if amp else "", "channels last" if channels_last else ""]
    return " ".join(word for word in words if word)


class TorchVision:
    """``maskrcnn_resnet50_fpn`` with frozen batch normalisation and three trained layers of the backbone.

    Its own resizing and normalisation are switched off as far as its options allow (``_skip_resize``, mean 0 and
    standard deviation 1), since ours gets images that are ready; padding to multiples of 32 is part of its model.

    Args:
        amp: the type of autocast, float16 with a loss scaler; None trains in float32.
        counts: ``num_classes`` and how many proposals and samples an image has, as torchvision's model takes them.
    """

    def __init__(
        self,
        batches: Sequence[StepBatch],
        device: torch.device,
        *,
        counts: dict[str, Any],
        amp: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        try:
            import torchvision
            from torchvision.models.detection import MaskRCNN
            from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        except ImportError as error:
            raise NotHere(f"torchvision is not installed ({error})") from error
        self.name = torchvision_name(amp, channels_last)
        self.mode, self.dtype = "eager", str(amp or torch.float32).removeprefix("torch.")
        self.device, self.amp = device, amp
        torch.manual_seed(0)
        backbone = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, trainable_layers=3, norm_layer=torchvision.ops.FrozenBatchNorm2d
        )
        self.model = MaskRCNN(backbone, image_mean=[0.0] * 3, image_std=[1.0] * 3, _skip_resize=True, **counts).to(
            device
        )
        calibrate.scale_blocks(self.model)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.batches = batches
        self.inputs = each_once(batches, lambda batch: to_torchvision(batch, device))
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4, fused=True if device.type == "cuda" else None,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.bias = calibrate.HeadBias()
        self.model.train()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None)

    def step(self, number: int) -> dict[str, Tensor]:
        images, targets = self.inputs[number % len(self.inputs)]
        with self._autocast():
            losses = self.model(images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses

    @torch.no_grad()
    def calibrate(self, positives: int) -> None:
        """See :mod:`benchmarks.train_step.calibrate`."""
        rpn = self.model.rpn
        for index, (images, targets) in enumerate(self.inputs):
            batch, _ = self.model.transform(images, None)
            with self._autocast():
                features = self.model.backbone(batch.tensors)
                outputs = rpn.head(list(features.values()))
                if index == 0:
                    calibrate.scale_predictors(rpn.head, outputs)
                    outputs = rpn.head(list(features.values()))
            maps = list(features.values())
            anchors = rpn.anchor_generator(batch, maps)[0]
            lengths = [o.shape[1] * o.shape[2] * o.shape[3] for o in outputs[0]]
            self.bias.add(
                calibrate.head_bias(
                    outputs,
                    anchors.split(lengths),
                    [target["boxes"] for target in targets],
                    positives=positives,
                    encode=rpn.box_coder.encode_single,
                )
            )
        rpn.head.register_forward_hook(self.bias)

    def positives(self, number: int) -> float:
        """Mean positive proposals of an image of a batch."""
        seen: list[float] = []
        heads = self.model.roi_heads
        select = heads.select_training_samples

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = select(*args, **kwargs)
            seen.append(float(torch.stack([(labels > 0).sum() for labels in result[2]]).float().mean()))
            return result

        heads.select_training_samples = recorded
        images, targets = self.inputs[number % len(self.inputs)]
        try:
            with torch.no_grad(), self._autocast():
                self.model(images, targets)
        finally:
            del heads.select_training_samples
        return seen[-1] if seen else float("nan")

    @torch.no_grad()
    def detect(self, number: int) -> list[int]:
        images, _ = self.inputs[number % len(self.inputs)]
        with self._autocast():
            return [len(found["boxes"]) for found in self.model(images)]

    def set_score_threshold(self, value: float) -> None:
        self.model.roi_heads.score_thresh = value

    def class_logits(self, number: int) -> Tensor:
        return capture(self.box_predictor, lambda: self.detect(number))[0]

    @property
    def box_predictor(self) -> nn.Module:
        return self.model.roi_heads.box_predictor


def torchvision_sides(device: torch.device) -> list[dict[str, Any]]:
    """The arguments of :class:`TorchVision` for each of its forms that is worth a column on this device."""
    if device.type == "cuda":
        return [{}, {"amp": torch.float16}, {"amp": torch.float16, "channels_last": True}]
    # bfloat16 is emulated on most CPUs: slower than float32.
    return [{}, {"channels_last": True}]
