"""torchvision's side: Mask R-CNN with frozen batch normalisation, trained in its usual ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_step import calibrate
from benchmarks.train_step.batches import StepBatch, to_torchvision
from benchmarks.train_step.sides import LEARNING_RATE, NotHere, capture, each_once


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
