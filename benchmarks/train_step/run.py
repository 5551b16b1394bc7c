"""The measurements: groups of sides in turns, the ablation, detection. Each gives rows for the JSON and the tables."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import peak_memory
from benchmarks.train_step import measure
from benchmarks.train_step.batches import (
    StepBatch,
    bucket_order,
    bucketed_batches,
    loader_config,
    mean_ground_truths,
    padded_batches,
    real_batches,
    source_overrides,
)
from benchmarks.train_step.ours import Loading, Ours
from benchmarks.train_step.peer import TorchVision, torchvision_name, torchvision_sides
from benchmarks.train_step.sides import DTYPES, NotHere, Side, known_key
from fastrcnn.config import Config, load_config

logger = logging.getLogger("benchmarks.train_step")

Row = dict[str, Any]
RECORDED_AFTER = 8  # steps of a shape, of which three of each part run as they are and the next is recorded
PROPOSALS = 1000  # kept an image by both sides, in training and in testing


@dataclass(frozen=True)
class Options:
    """What to measure; the fields are the options of the command line (see ``--help``).

    Attributes:
        size: (width, height) of padded images; the shorter side is that of bucketed ones.
    """

    config_file: Path
    overrides: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_sizes: tuple[int, ...] = (2,)
    images: str = "synthetic"
    boxes: int = 10
    positives: int = 64
    layouts: tuple[str, ...] = ("padded",)
    size: tuple[int, int] = (1344, 800)
    modes: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    rounds: int = 3
    seconds: float = 3.0
    warmup: int = 3
    torchvision: bool = True
    ablation: tuple[int, ...] = ()
    inference: tuple[int, ...] = ()
    profile: tuple[int, ...] = ()
    peak_tflops: float | None = None

    @property
    def synthetic(self) -> bool:
        return self.images == "synthetic"


def config(options: Options, batch_size: int, *, dtype: str = "float32", **extra: str) -> Config:
    """The configuration of a side of ours: the user's file and overrides last.

    A key of ``extra`` (dots written as ``__``) that this version of the package lacks is left out.
    """
    wanted: dict[str, Any] = {
        "MODEL.DEVICE": str(options.device),
        "MODEL.WEIGHT": "",
        "DTYPE": dtype,
        "SOLVER.IMS_PER_BATCH": batch_size,
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": PROPOSALS * batch_size,
    }
    for name, value in extra.items():
        key = name.replace("__", ".")
        if known_key(options.config_file, key, value):
            wanted[key] = value
    source = [] if options.synthetic else source_overrides(options.images)
    return load_config(options.config_file, [*loader_config(wanted), *source, *options.overrides])


def make_batches(options: Options, layout: str, batch_size: int) -> list[StepBatch]:
    """The batches that the sides cycle through: two padded ones (on a CPU, where a step takes seconds, one), ten steps
    of COCO's sizes, or the loader's."""
    count = 2 if options.device.type == "cuda" else 1
    cfg = config(options, batch_size)
    classes = cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
    if layout == "real":
        return real_batches(cfg, 4 * count)
    if layout == "bucketed":
        found = bucketed_batches(batch_size, min(options.size), boxes=options.boxes, num_classes=classes)
        return [found[index] for index in bucket_order()]
    return padded_batches(batch_size, options.size, boxes=options.boxes, num_classes=classes, count=count)


def failure(error: BaseException) -> str:
    """One line that says why a side gave no figure."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, NotHere) else f"{type(error).__name__}: "
    return (name + text)[:300]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mode_keys(mode: str) -> dict[str, str]:
    """The keys of a mode, for :func:`config`. A graph has no shape that depends on data: on a CPU, where the mask head
    runs on the real positives else, that has to be said."""
    graph = {"MODEL__ROI_MASK_HEAD__POSITIVES_ONLY": "False"} if mode == "graph" else {}
    return {"STEP__GRAPH": str(mode == "graph"), **graph}


def our_sides(
    options: Options, batches: Sequence[StepBatch], batch_size: int
) -> Iterator[tuple[Row, Callable[[], Side]]]:
    """For each type and mode: the row's first columns, and what makes the side."""
    for dtype in options.dtypes:
        for mode in options.modes:
            row = {"side": "ours", "mode": mode, "dtype": dtype}

            def make(dtype: str = dtype, mode: str = mode) -> Side:
                if mode == "graph" and not known_key(options.config_file, "STEP.GRAPH", "True"):
                    raise NotHere("this version has no key STEP.GRAPH")
                cfg = config(options, batch_size, dtype=dtype, **mode_keys(mode))
                return Ours(cfg, batches, mode=mode)

            yield row, make
            if not options.synthetic:
                yield {**row, "side": "ours, loader running"}, partial(_with_loader, make)


def _with_loader(make: Callable[[], Side]) -> Side:
    """The side that ``make`` makes, on batches that the training loader prepares meanwhile."""
    side = make()
    assert isinstance(side, Ours)
    return Loading(side)


def peer_sides(options: Options, batches: Sequence[StepBatch], **more: int) -> Iterator[tuple[Row, Callable[[], Side]]]:
    """torchvision in each of its forms; ``more`` are arguments of its model."""
    cfg = config(options, 1)
    counts = {
        "num_classes": cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES,
        "rpn_pre_nms_top_n_train": cfg.MODEL.RPN.PRE_NMS_TOP_N_TRAIN,
        "rpn_pre_nms_top_n_test": cfg.MODEL.RPN.PRE_NMS_TOP_N_TEST,
        "rpn_post_nms_top_n_train": PROPOSALS,
        "rpn_post_nms_top_n_test": PROPOSALS,
        "rpn_batch_size_per_image": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
        "box_batch_size_per_image": cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
        "box_positive_fraction": cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION,
        **more,
    }
    for arguments in torchvision_sides(options.device):
        amp, channels_last = arguments.get("amp"), arguments.get("channels_last", False)
        dtype = str(amp or torch.float32).removeprefix("torch.")
        row = {"side": torchvision_name(amp, channels_last), "mode": "eager", "dtype": dtype}

        def make(arguments: dict[str, Any] = arguments) -> Side:
            return TorchVision(batches, options.device, counts=counts, **arguments)

        yield row, make


def warm_up(side: Any, steps: int) -> None:
    """Train ``steps`` times, on each shape of batch at least once: kernels are compiled and chosen, buffers made. A
    side that is a graph records each shape."""
    shapes: dict[tuple[int, int], int] = {}
    for number, batch in enumerate(side.batches):
        shapes.setdefault(batch.images.padded_size, number)
    each = max(RECORDED_AFTER if side.mode == "graph" else 1, -(-steps // len(shapes)))
    for _ in range(each if steps else 0):
        for number in shapes.values():
            side.step(number)


def prepare(side: Any, options: Options) -> Row:
    """Warm a side up and count what one of its steps does.

    Raises:
        NotHere: a loss is not finite, or the step was to be a graph and is none.
    """
    device = options.device
    warm_up(side, max(options.warmup, 1) if side.mode == "graph" else options.warmup)
    if side.mode == "graph" and side.why_not_recorded():
        raise NotHere(f"the step was not recorded: {side.why_not_recorded()}")
    counter = measure.Counter()
    with peak_memory(device) as memory, measure.count_syncs(device) as syncs, counter:
        losses = side.step(0)
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    if not all(map(math.isfinite, values.values())):
        raise NotHere(f"a loss is not finite: {values}")
    captured = side.mode == "graph"
    cuda = device.type == "cuda"
    found = (
        measure.phases(side.model, side.optimizer, device, side.step, range(3 if cuda else 1)) if not captured else {}
    )
    return {
        "losses": values,
        "phases_ms": found,
        "operators": counter.operators,
        "kernels": measure.count_kernels(side.step, device),
        "host_syncs": syncs[0] if cuda else counter.reads,
        "peak_bytes": memory["bytes"],
        "flops": side.flops(0) if captured else counter.flops,
        "mean_positives": sum(map(side.positives, range(len(side.batches)))) / len(side.batches),
    }


def timed(row: Row, timing: measure.Timing, batch_size: int) -> Row:
    if timing.failed:
        return {**row, "reason": timing.failed}
    return {
        **row,
        "ms_per_step": 1e3 * timing.median,
        "ms_least": 1e3 * timing.best,
        "steps": timing.steps,
        "images_per_second": batch_size / timing.median,
    }


def nothing(rows: list[Row]) -> None:
    """For who does not save what there is so far."""


def measure_group(
    options: Options, layout: str, batch_size: int, save: Callable[[list[Row]], None] = nothing
) -> list[Row]:
    """One batch size and layout: our sides and torchvision's, in turns. A side that fails has ``reason`` in its row.

    ``save`` is called with the rows so far after each of them.
    """
    batches = make_batches(options, layout, batch_size)
    makers = list(our_sides(options, batches, batch_size))
    if options.torchvision:
        makers += list(peer_sides(options, batches))
    common = {"layout": layout, "batch_size": batch_size, "mean_ground_truths": mean_ground_truths(batches)}
    rows: list[Row] = []
    ready: list[tuple[int, Side]] = []
    for row, make in makers:
        rows.append({**common, **row})
        try:
            side = make()
            if options.synthetic and options.positives:
                side.calibrate(options.positives)  # type: ignore[attr-defined]
            rows[-1] |= prepare(side, options)
            if options.device.type == "cuda":  # a first figure, should the time not last for the turns
                (timing,) = measure.turn_by_turn([side.step], options.device, rounds=1, seconds=0.2)
                rows[-1] = timed(rows[-1], timing, batch_size) | {"provisional": True}
            ready.append((len(rows) - 1, side))
        except (NotHere, RuntimeError, AssertionError, ValueError) as error:
            rows[-1]["reason"] = failure(error)
        if "reason" in rows[-1]:
            free()  # not before: the error holds the frames, and they what did not fit
        logger.info("%s", progress(rows[-1]))
        save(rows)
    cycle = len(batches) if layout == "bucketed" else 1
    timings = measure.turn_by_turn(
        [side.step for _, side in ready], options.device, rounds=options.rounds, seconds=options.seconds, cycle=cycle
    )
    for (index, _), timing in zip(ready, timings, strict=True):
        rows[index] = timed(rows[index], timing, batch_size)
        rows[index].pop("provisional", None)
        logger.info("%s", progress(rows[index]))
    add_utilisation(rows, options)
    ready.clear()
    free()
    return rows


def add_utilisation(rows: Sequence[Row], options: Options) -> None:
    """``gflop_per_image``, ``ceiling_tflops`` and ``mfu_percent`` in the place of ``flops``."""
    for row in rows:
        flops = row.pop("flops", None)
        if not flops or "ms_per_step" not in row:
            continue
        ceiling = (
            options.peak_tflops * 1e12
            if options.peak_tflops
            else measure.matmul_ceiling(options.device, DTYPES[row["dtype"]])
        )
        row["gflop_per_image"] = flops / row["batch_size"] / 1e9
        row["ceiling_tflops"] = ceiling / 1e12
        row["mfu_percent"] = 100 * flops / (row["ms_per_step"] / 1e3) / ceiling


def progress(row: Row) -> str:
    place = f"{row.get('layout', '')} batch {row['batch_size']} {row['side']} {row['mode']} {row['dtype']}"
    if "reason" in row:
        return f"{place}: {row['reason']}"
    if "images_per_second" in row:
        return f"{place}: {row['images_per_second']:.3f} img/s, {row['ms_per_step']:.1f} ms"
    return f"{place}: ready"
