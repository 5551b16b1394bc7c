"""A training step that is recorded for each shape and replayed.

Every call is a real step on its own batch: the first ones of a shape run as they are, which is the warm-up (kernels are
compiled and chosen, buffers are made), then one is recorded, and the rest are replays. Nothing has to be undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrcnn.engine.graph import Recorder, Replay
from fastrcnn.engine.static import StaticInputs, flatten

logger = logging.getLogger("fastrcnn.graph")

Losses = Mapping[str, Tensor]


@dataclass
class Shape:
    """The batches of one key: where their tensors lie, and what was recorded for them."""

    inputs: StaticInputs
    steps: int = 0
    losses: Losses = field(default_factory=dict)
    replay: Replay | None = None


class GraphedStep:
    """Runs ``compute`` on batches, recorded once for each of their shapes.

    Args:
        compute: the whole step on inputs of the structure that :func:`fastrcnn.engine.static.flatten` makes; returns
            0-dim losses.
        state: what ``compute`` depends on beside its inputs and the values of tensors: modes, addresses. Where it
            changes, what was recorded is dropped.
        warm_up: steps of a shape before it is recorded.
        max_shapes: most shapes to record; the rest run as they are.
    """

    def __init__(
        self,
        compute: Callable[[Any], Losses],
        recorder: Recorder,
        *,
        device: torch.device,
        state: Callable[[], Hashable],
        warm_up: int = 3,
        max_shapes: int = 16,
    ) -> None:
        self.compute, self.recorder, self.device, self.state = compute, recorder, device, state
        self.warm_up, self.max_shapes = warm_up, max_shapes
        self.shapes: dict[Hashable, Shape] = {}
        self.known: Hashable = None
        self.broken: str | None = None
        self._said: set[str] = set()

    @property
    def recorded(self) -> int:
        """Number of shapes that are replayed."""
        return sum(shape.replay is not None for shape in self.shapes.values())

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        """One step; the losses are the caller's to keep."""
        state = self.state()
        if state != self.known:
            if self.recorded:
                logger.info("The model or the optimizer changed: the step is recorded anew")
            self.shapes.clear()
            self.known = state
        tensors, key, rebuild = flatten(inputs)
        shape = self.shapes.get(key)
        if shape is None:
            if len(self.shapes) >= self.max_shapes:
                self._say(f"More than {self.max_shapes} shapes of batches: the others are not recorded")
                on_device = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
                return dict(self.compute(rebuild(on_device)))
            shape = self.shapes[key] = Shape(StaticInputs(tensors, rebuild, self.device))
        shape.inputs.load(tensors)
        shape.steps += 1
        if shape.replay is not None:
            shape.replay()
            return _own(shape.losses)
        compute, value = self.compute, shape.inputs.value
        if shape.steps > self.warm_up and self.broken is None:
            try:
                shape.losses, shape.replay = self.recorder.record(lambda: compute(value))
                return _own(shape.losses)
            except RuntimeError as error:
                self.broken = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("The step cannot be recorded (%s): it runs operator by operator", self.broken)
        return dict(self.recorder.run(lambda: compute(value)))

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info(message)


def _own(losses: Losses) -> dict[str, Tensor]:
    """Copies, in one tensor: the next replay writes over the originals."""
    row = torch.stack([loss.float() for loss in losses.values()])
    return dict(zip(losses, row.unbind(), strict=True))
