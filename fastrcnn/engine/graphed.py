"""A training step that is recorded for each shape and replayed.

Every call is a real step on its own batch: the first ones of a shape run as they are, which is the warm-up (kernels are
compiled and chosen, buffers are made), then one is recorded, and the rest are replays. Nothing has to be undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrcnn.engine.graph import Recorder, Replay
from fastrcnn.engine.static import StaticInputs, flatten

logger = logging.getLogger("fastrcnn.graph")

Losses = Mapping[str, Tensor]


class Program(Protocol):
    """A step, as a whole or in three parts.

    In parts the host learns a number of the first one, which chooses the third. While it travels the device runs the
    second part, so that it never waits.
    """

    @property
    def in_parts(self) -> bool:
        """Whether to run it in parts."""
        ...

    def whole(self, inputs: Any) -> Losses:
        """All of it; returns 0-dim losses."""
        ...

    def begin(self, inputs: Any) -> Any:
        """The first part; what it returns goes to the others."""
        ...

    def number(self, state: Any) -> Tensor:
        """The number to read, one integer on the device."""
        ...

    def middle(self, state: Any) -> None:
        """The second part."""
        ...

    def choose(self, state: Any, number: int) -> Hashable:
        """The third part that ``number`` calls for."""
        ...

    def finish(self, state: Any, choice: Hashable, *, again: bool) -> Losses:
        """The third part; returns 0-dim losses. ``again``: it will run on this ``state`` again."""
        ...


@dataclass
class Part:
    """A part of a step, or one of the choices for its last part."""

    steps: int = 0
    result: Any = None
    replay: Replay | None = None


@dataclass
class Shape:
    """The batches of one key: where their tensors lie, and what was recorded for them."""

    inputs: StaticInputs
    begin: Part = field(default_factory=Part)
    middle: Part = field(default_factory=Part)
    finish: dict[Hashable, Part] = field(default_factory=dict)


class GraphedStep:
    """Runs a step on batches, recorded once for each of their shapes (and for each choice of the last part).

    Args:
        program: the step, on inputs of the structure that :func:`fastrcnn.engine.static.flatten` makes.
        state: what the step depends on beside its inputs and the values of tensors: modes, addresses. Where it changes,
            what was recorded is dropped.
        warm_up: steps of a shape, and of a choice, before it is recorded.
        max_shapes: most shapes to record; the rest run as they are.
    """

    def __init__(
        self,
        program: Program,
        recorder: Recorder,
        *,
        device: torch.device,
        state: Callable[[], Hashable],
        warm_up: int = 3,
        max_shapes: int = 16,
    ) -> None:
        self.program, self.recorder, self.device, self.state = program, recorder, device, state
        self.warm_up, self.max_shapes = warm_up, max_shapes
        self.shapes: dict[Hashable, Shape] = {}
        self.known: Hashable = None
        self.broken: str | None = None
        self._said: set[str] = set()

    @property
    def recorded(self) -> int:
        """Number of last parts that are replayed: one a shape where there is nothing to choose."""
        parts = (part for shape in self.shapes.values() for part in shape.finish.values())
        return sum(part.replay is not None for part in parts)

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
                return dict(self.program.whole(rebuild([t.to(self.device, non_blocking=True) for t in tensors])))
            shape = self.shapes[key] = Shape(StaticInputs(tensors, rebuild, self.device))
        shape.inputs.load(tensors)
        return self._step(shape)

    def _step(self, shape: Shape) -> dict[str, Tensor]:
        program, value = self.program, shape.inputs.value
        if not program.in_parts:
            part = shape.finish.setdefault(None, Part())
            return _own(self._part(part, lambda: program.whole(value)))
        state = self._part(shape.begin, lambda: program.begin(value))
        wait = self.recorder.fetch(program.number(state))
        self._part(shape.middle, lambda: program.middle(state))
        choice = program.choose(state, wait())
        # The last part goes back through the first: it is recorded on what the replays of that one leave behind.
        again = shape.begin.replay is not None
        part = shape.finish.setdefault(choice, Part())
        return _own(self._part(part, lambda: program.finish(state, choice, again=again), wanted=again))

    def _part(self, part: Part, function: Callable[[], Any], *, wanted: bool = True) -> Any:
        """Replay a part, or record it, or run it."""
        if part.replay is not None:
            part.replay()
            return part.result
        part.steps += 1
        if wanted and part.steps > self.warm_up and self.broken is None:
            try:
                part.result, part.replay = self.recorder.record(function)
                return part.result
            except RuntimeError as error:
                self.broken = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("The step cannot be recorded (%s): it runs operator by operator", self.broken)
        return self.recorder.run(function)

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info(message)


def _own(losses: Losses) -> dict[str, Tensor]:
    """Copies, in one tensor: the next replay writes over the originals."""
    row = torch.stack([loss.float() for loss in losses.values()])
    return dict(zip(losses, row.unbind(), strict=True))
