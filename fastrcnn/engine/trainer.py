"""The training loop."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fastrcnn.engine.checkpoint import FINAL, Checkpointer
from fastrcnn.engine.distributed import World
from fastrcnn.engine.meters import (
    LossHistory,
    NonFiniteLoss,
    SmoothedValue,
    StepClock,
    format_log_line,
    max_memory_mib,
)
from fastrcnn.engine.outputs import MetricsFile
from fastrcnn.engine.signals import Stopped, StopSignals, iterate
from fastrcnn.engine.step import TrainingBatch, TrainStep

logger = logging.getLogger("fastrcnn.trainer")

BEST_METRICS = ("segm/AP", "keypoints/AP", "bbox/AP", "voc/mAP07", "box_proposal/AR@1000")


def train(
    step: TrainStep,
    batches: Iterable[TrainingBatch],
    *,
    start_iteration: int,
    max_iter: int,
    checkpointer: Checkpointer,
    metrics: MetricsFile,
    world: World,
    stop: StopSignals,
    log_period: int = 20,
    checkpoint_period: int = 2500,
    test_period: int = 0,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    best_metric: tuple[str, ...] = BEST_METRICS,
) -> None:
    """Train from ``start_iteration`` steps done to ``max_iter``. All ranks call it with the same arguments.

    Args:
        batches: one for each step that is left.
        evaluate: called every ``test_period`` iterations (not after the last one) with the iteration; returns the
            metrics of the test sets. The first of ``best_metric`` that it has decides ``model_best.pth``.

    Raises:
        Stopped: after SIGINT or SIGTERM; the state is saved.
        NonFiniteLoss: nothing was saved from it.
    """
    if start_iteration >= max_iter:
        logger.info("Nothing to train: %d of %d iterations are done", start_iteration, max_iter)
        return
    logger.info("Start training")
    step.model.train()
    progress = Progress(step, metrics, world, max_iter=max_iter, start_iteration=start_iteration)

    for iteration, batch in enumerate(iterate(batches), start_iteration + 1):
        progress.data_arrived()
        losses = step(batch, iteration - 1)
        progress.step_done(iteration, losses, batch)

        last = iteration == max_iter
        signum = stop.agreed()
        if iteration % log_period == 0 or last or signum:
            progress.log(iteration)
        elif world.device.type == "cpu":
            progress.read()  # costs nothing here, and a loss that is not finite ends the run at once

        if iteration % checkpoint_period == 0 or last or signum:
            progress.require_finite(iteration, checkpointer)
            if iteration % checkpoint_period == 0 or not last:
                checkpointer.save(iteration)
            if last:
                checkpointer.save(iteration, FINAL)
            progress.clock.start()
        if signum:
            raise Stopped(signum, f"after iteration {iteration}; go on with --resume")

        if evaluate is not None and test_period > 0 and iteration % test_period == 0 and not last:
            progress.require_finite(iteration, checkpointer)
            found = evaluate(iteration)
            metric = next((name for name in best_metric if name in found), None)
            if metric is not None:
                checkpointer.save_best(iteration, metric, found[metric])
            step.model.train()
            progress.clock.start()

    progress.finish()


@dataclass
class Progress:
    """Collects what the loop has to say and says it once a log period."""

    step: TrainStep
    metrics: MetricsFile
    world: World
    max_iter: int
    start_iteration: int
    meters: dict[str, SmoothedValue] = field(default_factory=dict)
    period: dict[str, list[float]] = field(default_factory=dict)
    images_in_period: int = 0

    def __post_init__(self) -> None:
        self.history = LossHistory(self.world.device, self.world.mean if self.world.distributed else None)
        self.clock = StepClock(self.world.device)
        self.waits: list[float] = []
        self.began = time.perf_counter()

    def data_arrived(self) -> None:
        self.waits.append(self.clock.waited())

    def step_done(self, iteration: int, losses: Mapping[str, Tensor], batch: TrainingBatch) -> None:
        if self.world.distributed:  # maskrcnn-benchmark's order of the log line
            losses = {"loss": losses["loss"], **{name: losses[name] for name in sorted(losses) if name != "loss"}}
        self.history.append(iteration, losses)
        self.clock.mark()
        self.images_in_period += len(batch.images)

    def read(self) -> None:
        """Take the losses of the iterations since the last reading from the device.

        Raises:
            NonFiniteLoss: after writing it to the metrics.
        """
        try:
            history = self.history.read()
        except NonFiniteLoss as error:
            self.metrics.write("nonfinite", error.iteration, error.losses)
            raise
        for _, losses in history:
            for name, value in losses.items():
                self._add(name, value)
        for duration in self.clock.read():
            self._add("time", duration)
        for wait in self.waits:
            self._add("data", wait)
        self.waits = []

    def _add(self, name: str, value: float) -> None:
        self.meters.setdefault(name, SmoothedValue()).update(value)
        self.period.setdefault(name, []).append(value)

    def log(self, iteration: int) -> None:
        """Write the log line and the line of metrics of the period that ends here."""
        self.read()
        lr = float(self.step.optimizer.param_groups[0]["lr"])
        memory = max_memory_mib(self.world.device)
        eta = self.meters["time"].global_avg * (self.max_iter - iteration)
        logger.info(
            format_log_line(eta_seconds=eta, iteration=iteration, meters=self.meters, lr=lr, max_mem_mib=memory)
        )
        means = {name: sum(values) / len(values) for name, values in self.period.items()}
        seconds = sum(self.period["time"])
        speed = self.images_in_period * self.world.size / seconds if seconds > 0 else 0.0
        means["data_time"] = means.pop("data")
        self.metrics.write("train", iteration, {**means, "images_per_second": speed, "lr": lr, "max_mem_mib": memory})
        self.period, self.images_in_period = {}, 0

    def require_finite(self, iteration: int, checkpointer: Checkpointer) -> None:
        """Raise NonFiniteLoss rather than let a state be saved that is not finite.

        A gradient can overflow in a step whose losses were finite, so the weights are asked too.
        """
        self.read()
        if not checkpointer.weights_are_finite():
            self.metrics.write("nonfinite", iteration, {"weights": "nan"})
            raise NonFiniteLoss(iteration, {}, "a weight is not finite (its gradient overflowed)")

    def finish(self) -> None:
        seconds = time.perf_counter() - self.began
        done = max(1, self.max_iter - self.start_iteration)
        logger.info(f"Total training time: {datetime.timedelta(seconds=int(seconds))} ({seconds / done:.4f} s / it)")
