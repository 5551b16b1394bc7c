"""The detector: Faster R-CNN, Mask R-CNN, Keypoint R-CNN, a region proposal network alone, or RetinaNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from fastrcnn.models import box_head, rpn
from fastrcnn.models.box_head import BoxHead, SampledBoxes
from fastrcnn.models.keypoint_head import KeypointHead
from fastrcnn.models.layers import Conv2d
from fastrcnn.models.mask_head import MaskHead
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.rpn import RPN
from fastrcnn.structures import BoxList, ImageList, Targets


@dataclass
class TrainingState:
    """What the parts of a training forward hand on.

    Attributes:
        features: the feature levels.
        losses: those that are there so far.
        sampled: the boxes that the heads train on; None for a model without a box head.
        box_features: the box head's features of them, once it has run.
    """

    images: ImageList
    targets: Targets
    features: list[Tensor]
    losses: dict[str, Tensor]
    sampled: SampledBoxes | None = None
    box_features: Tensor | None = None

    @property
    def most_positives(self) -> int:
        """The most positives that the batch can have, a number of the host."""
        return self.sampled.positive_labels.numel() if self.sampled is not None else 0


class GeneralizedRCNN(nn.Module):
    """Backbone, RPN and heads; state-dict names are maskrcnn-benchmark's.

    In training, ``model(images, targets)`` gives a dict of scalar losses. In evaluation, ``model(images)`` gives a
    BoxList an image, in the frame of the network's input (resized, before padding): boxes, labels, scores and, with a
    mask head, mask probabilities [n, 1, M, M], with a keypoint head, Keypoints.

    The random samples of training depend on (seed, step, image id) and on nothing else. :meth:`set_sampling` sets seed
    and step; every training forward advances the step by one.

    Args:
        backbone: images to feature levels.
        rpn: the proposals; or RetinaNet, which gives detections itself and has no heads after it.
        box: None trains and tests the RPN alone.
        mask, keypoint: optional; need ``box``.
        fused_convolutions: run convolutions together with frozen norm, bias, residual and ReLU (``layers.Conv2d``).
        channels_last: hold weights and feature maps in NHWC order, which convolutions prefer on most devices.
    """

    sampling_seed: Tensor
    sampling_step: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        rpn: RPN | RetinaNet,
        box: BoxHead | None = None,
        mask: MaskHead | None = None,
        keypoint: KeypointHead | None = None,
        *,
        fused_convolutions: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        heads: dict[str, nn.Module] = {}
        if box is not None and isinstance(rpn, RetinaNet):
            raise ValueError("RetinaNet has no box head")
        if box is not None:
            heads["box"] = box
        for name, head in (("mask", mask), ("keypoint", keypoint)):
            if head is not None:
                if box is None:
                    raise ValueError(f"a {name} head needs a box head")
                heads[name] = head
        self.roi_heads = nn.ModuleDict(heads)
        self.register_buffer("sampling_seed", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("sampling_step", torch.zeros((), dtype=torch.int64), persistent=False)
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.fused = fused_convolutions
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def set_sampling(self, seed: int, step: int) -> None:
        """Set the state of the random samples; the same state, images and weights give the same losses."""
        self.sampling_seed.fill_(seed)
        self.sampling_step.fill_(step)

    def _seeds(self, images: ImageList, stream: int) -> Tensor:
        return kernels.image_seeds(self.sampling_seed, self.sampling_step, images.ids, stream)

    def forward(
        self, images: ImageList, targets: Sequence[BoxList] | Targets | None = None
    ) -> dict[str, Tensor] | list[BoxList]:
        if self.training:
            if targets is None:
                raise ValueError("in training mode the model needs targets: model(images, targets)")
            if not isinstance(targets, Targets):
                # Polygons live on the host, so a list of BoxLists is padded there; a loader hands over Targets.
                targets = Targets.from_boxlists([t.to("cpu") for t in targets]).to(images.tensors.device)
            return self.forward_train(images, targets)
        return self.forward_test(images)

    def features(self, images: ImageList) -> list[Tensor]:
        """The feature levels of a batch of images."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.backbone(images.tensors.contiguous(memory_format=memory_format))

    def forward_train(self, images: ImageList, targets: Targets) -> dict[str, Tensor]:
        state = self.begin_train(images, targets)
        self.box_train(state)
        return self.finish_train(state)

    def begin_train(self, images: ImageList, targets: Targets) -> TrainingState:
        """The first part of the training forward: up to the sample of boxes that the heads train on."""
        features = self.features(images)
        if isinstance(self.rpn, RetinaNet):
            self.sampling_step += 1
            return TrainingState(images, targets, features, self.rpn.losses(images, features, targets))
        proposals, losses = self.rpn(
            images, features, targets, self._seeds(images, rpn.SAMPLING_STREAM), with_proposals="box" in self.roi_heads
        )
        state = TrainingState(images, targets, features, losses)
        if proposals is not None:
            box: BoxHead = self.roi_heads["box"]  # type: ignore[assignment]
            state.sampled = box.sample(proposals, targets, self._seeds(images, box_head.SAMPLING_STREAM))
        self.sampling_step += 1
        return state

    def box_train(self, state: TrainingState) -> None:
        """The second part: the box head, whose losses and features go into ``state``."""
        if state.sampled is not None:
            box: BoxHead = self.roi_heads["box"]  # type: ignore[assignment]
            state.box_features, losses = box.forward_train(state.features, state.sampled)
            state.losses = state.losses | losses

    def finish_train(self, state: TrainingState, mask_capacity: int | None = None) -> dict[str, Tensor]:
        """The last part: the other heads. Returns all losses, and leaves ``state`` as it is.

        ``mask_capacity``: see :meth:`MaskHead.forward_train`.
        """
        losses = dict(state.losses)
        features, sampled, targets = state.features, state.sampled, state.targets
        if sampled is not None and "mask" in self.roi_heads:
            mask: MaskHead = self.roi_heads["mask"]  # type: ignore[assignment]
            shared = mask.feature_extractor is self.roi_heads["box"].feature_extractor
            losses |= mask.forward_train(
                features, sampled, targets, state.images, state.box_features if shared else None, mask_capacity
            )
        if sampled is not None and "keypoint" in self.roi_heads:
            keypoint: KeypointHead = self.roi_heads["keypoint"]  # type: ignore[assignment]
            shared = keypoint.feature_extractor is self.roi_heads["box"].feature_extractor
            losses |= keypoint.forward_train(features, sampled, targets, state.box_features if shared else None)
        return losses

    def forward_test(self, images: ImageList) -> list[BoxList]:
        features = self.features(images)
        if isinstance(self.rpn, RetinaNet):
            return self.rpn.detect(images, features)
        proposals, _ = self.rpn(images, features)
        if "box" not in self.roi_heads:
            return proposals.to_boxlists(images.image_sizes, self.rpn.convention.box_offset)
        box: BoxHead = self.roi_heads["box"]  # type: ignore[assignment]
        detections = box.forward_test(features, proposals, images)
        if "mask" in self.roi_heads:
            mask: MaskHead = self.roi_heads["mask"]  # type: ignore[assignment]
            detections = mask.forward_test(features, detections)
        if "keypoint" in self.roi_heads:
            keypoint: KeypointHead = self.roi_heads["keypoint"]  # type: ignore[assignment]
            detections = keypoint.forward_test(features, detections)
        return detections
