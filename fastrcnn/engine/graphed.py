"""A training step that is recorded for each shape and replayed.

Every call is a real step on its own batch: the first ones of a shape run as they are, which is the warm-up (kernels are
compiled and chosen, buffers are made), then one is recorded, and the rest are replays. Nothing has to be undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrcnn.engine.graph import Recorder, Replay
from fastrcnn.engine.static import StaticInputs, flatten

logger = logging.getLogger("fastrcnn.graph")

Losses = Mapping[str, Tensor]


class Program(Protocol):
    """A step, as a whole or in three parts.

    In parts the host learns a number of the first one, which chooses a capacity for the third. While it travels the
    device runs the second part, so that it never waits.
    """

    @property
    def in_parts(self) -> bool:
        """Whether to run it in parts."""
        ...

    def prepare(self) -> None:
        """Give the device the numbers of this step; called before each way of running it."""
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

    def capacities(self, state: Any) -> Sequence[int]:
        """Those of the third part, increasing; :meth:`number` never exceeds the last."""
        ...

    def rehearse(self, state: Any, capacity: int) -> None:
        """Run the kernels of the third part, and change nothing."""
        ...

    def finish(self, state: Any, capacity: int, *, again: bool) -> Losses:
        """The third part; returns 0-dim losses. ``again``: it will be called on this ``state`` again."""
        ...


@dataclass
class Recording:
    """What was recorded for a shape: one part, or the first two and all choices for the last.

    The tensors of the step are not held, but for those that leave it: graphs of other shapes use their memory.
    """

    finish: dict[int, tuple[Losses, Replay]]
    begin: Replay | None = None
    middle: Replay | None = None
    number: Tensor | None = None


@dataclass
class Shape:
    """The batches of one key: where their tensors lie, and what was recorded for them."""

    inputs: StaticInputs
    steps: int = 0
    recording: Recording | None = None


class GraphedStep:
    """Runs a step on batches, recorded once for each of their shapes.

    Args:
        program: the step, on inputs of the structure that :func:`fastrcnn.engine.static.flatten` makes.
        state: what the step depends on beside its inputs and the values of tensors: modes, addresses. Where it changes,
            what was recorded is dropped.
        warm_up: steps of a shape before it is recorded.
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
        """Number of shapes that are replayed."""
        return sum(shape.recording is not None for shape in self.shapes.values())

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
                self.program.prepare()
                return dict(self.program.whole(rebuild([t.to(self.device, non_blocking=True) for t in tensors])))
            shape = self.shapes[key] = Shape(StaticInputs(tensors, rebuild, self.device))
        shape.inputs.load(tensors)
        shape.steps += 1
        if shape.recording is not None:
            return self._replay(shape.recording)
        if shape.steps > self.warm_up and self.broken is None:
            try:
                return self._record(shape)
            except RuntimeError as error:
                self.broken = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("The step cannot be recorded (%s): it runs operator by operator", self.broken)
        return self._run(shape)

    def _run(self, shape: Shape) -> dict[str, Tensor]:
        """A step as it is, on the stream of the recorder."""
        program, recorder, value = self.program, self.recorder, shape.inputs.value
        program.prepare()
        if not program.in_parts:
            return dict(recorder.run(lambda: program.whole(value)))
        state = recorder.run(lambda: program.begin(value))
        wait = recorder.fetch(program.number(state))
        recorder.run(lambda: program.middle(state))
        capacities = program.capacities(state)
        if shape.steps == self.warm_up:
            for capacity in capacities:  # all are recorded next, whether a batch had them or not
                recorder.run(partial(program.rehearse, state, capacity))
        return dict(recorder.run(partial(program.finish, state, _choose(capacities, wait()), again=False)))

    def _record(self, shape: Shape) -> dict[str, Tensor]:
        """Record a shape and replay each part, which is the step of this batch."""
        program, value = self.program, shape.inputs.value
        record = partial(self.recorder.record, group=set())
        program.prepare()
        if not program.in_parts:
            shape.recording = Recording({0: record(lambda: program.whole(value))})
            return self._replay(shape.recording)
        state, begin = record(lambda: program.begin(value))
        begin()
        number = program.number(state)
        wait = self.recorder.fetch(number)
        _, middle = record(lambda: program.middle(state))
        middle()
        capacities = program.capacities(state)
        finish = {
            capacity: record(partial(program.finish, state, capacity, again=capacity != capacities[-1]))
            for capacity in capacities
        }
        shape.recording = Recording(finish, begin, middle, number)
        return _last(shape.recording, wait)

    def _replay(self, recording: Recording) -> dict[str, Tensor]:
        self.program.prepare()
        if recording.begin is None or recording.middle is None or recording.number is None:
            return _last(recording, lambda: 0)
        recording.begin()
        wait = self.recorder.fetch(recording.number)
        recording.middle()
        return _last(recording, wait)

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info(message)


def _choose(capacities: Iterable[int], number: int) -> int:
    return next(capacity for capacity in capacities if number <= capacity)


def _last(recording: Recording, wait: Callable[[], int]) -> dict[str, Tensor]:
    losses, replay = recording.finish[_choose(recording.finish, wait())]
    replay()
    return _own(losses)


def _own(losses: Losses) -> dict[str, Tensor]:
    """Copies, in one tensor: the next replay writes over the originals."""
    row = torch.stack([loss.float() for loss in losses.values()])
    return dict(zip(losses, row.unbind(), strict=True))
