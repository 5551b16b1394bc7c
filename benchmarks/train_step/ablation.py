"""Our step with each optimisation switched off in turn, and detection against torchvision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.train_step import calibrate, measure
from benchmarks.train_step.ours import Ours
from benchmarks.train_step.run import (
    PROPOSALS,
    Options,
    Row,
    add_utilisation,
    config,
    failure,
    free,
    make_batches,
    mode_keys,
    nothing,
    peer_sides,
    prepare,
    progress,
    timed,
)
from benchmarks.train_step.sides import NotHere, known_key

logger = logging.getLogger("benchmarks.train_step")

# Largest relative difference of a loss with a switch on and off, both in float32 (a GPU without TF32). Both sides
# compute the same numbers in another order; an anchor at the edge of a top-k or of NMS may fall on the other side.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Switch:
    """One optimisation: a configuration key, its value without it and, if that is not the default, with it.

    ``mode`` is the only one that has it.
    """

    name: str
    key: str
    off: str
    on: str = ""
    mode: str = ""


SWITCHES = (
    Switch("graph", "STEP.GRAPH", "False"),
    Switch("channels last", "MODEL.CHANNELS_LAST", "False", "True"),
    Switch("fused convolutions", "MODEL.FUSED_CONVOLUTIONS", "False"),
    Switch("sparse RPN backward", "MODEL.RPN.SPARSE_BACKWARD", "False"),
    Switch("mask head on the positives", "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False", mode="eager"),
    Switch("capacities of the mask head", "STEP.MASK_SHARES", "(1.0,)", mode="graph"),
    Switch("fused optimizer", "STEP.FUSED_OPTIMIZER", "False"),
)


def base_overrides(options: Options, switches: Sequence[Switch] = SWITCHES) -> dict[str, str]:
    """The keys that have to be set for everything to be on; the rest is on by default."""
    return {s.key: s.on for s in switches if s.on and known_key(options.config_file, s.key, s.on)}


def best_mode(options: Options) -> str:
    """``graph`` where it was asked for and this version has it."""
    wanted = "graph" in options.modes and known_key(options.config_file, "STEP.GRAPH", "True")
    return "graph" if wanted else "eager"


def off_reason(options: Options, switch: Switch, mode: str) -> str:
    """Why ``switch`` cannot be switched off here; empty where it can."""
    if not known_key(options.config_file, switch.key, switch.off):
        return f"this version has no key {switch.key}"
    if switch.key == "STEP.GRAPH" and mode != "graph":
        return "off already: the graph is no mode of this run"
    if switch.mode and switch.mode != mode:
        return f"off already: it is of no use to a {mode}"
    return ""


def build(options: Options, batches: Any, batch_size: int, *, dtype: str, mode: str, **keys: str) -> Ours:
    return Ours(config(options, batch_size, dtype=dtype, **keys), batches, mode=mode)


def as_arguments(keys: dict[str, str]) -> dict[str, str]:
    return {key.replace(".", "__"): value for key, value in keys.items()}


def loss_difference(on: dict[str, float], off: dict[str, float]) -> float:
    """The largest relative difference of a loss.

    Raises:
        NotHere: the two have other losses.
    """
    if on.keys() != off.keys():
        raise NotHere(f"losses {sorted(on)} with it, {sorted(off)} without")
    return max(abs(off[name] - on[name]) / max(abs(on[name]), 1e-6) for name in on)


def check_losses(options: Options, batches: Any, batch_size: int, keys: dict[str, str], weights: Ours) -> float:
    """The relative difference in float32 of the losses with ``keys`` from those of the base, on the first batch.

    Raises:
        NotHere: it is above the tolerance: there is nothing to time.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        found = []
        for overrides in (base_overrides(options), {**base_overrides(options), **keys}):
            side = build(options, batches[:1], batch_size, dtype="float32", mode="eager", **as_arguments(overrides))
            side.take_weights(weights)
            found.append(side.losses(0))
            del side
            free()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    difference = loss_difference(*found)
    if not difference <= TOLERANCE:
        raise NotHere(f"the losses differ by {difference:.2e}, more than {TOLERANCE:g}: not timed")
    return difference


def measure_ablation(
    options: Options,
    batch_size: int,
    save: Callable[[list[Row]], None] = nothing,
    switches: Sequence[Switch] = SWITCHES,
) -> list[Row]:
    """The base and, for each switch, the base without it, timed in turns with the base.

    Each row has ``slower``: the time without the optimisation over the time with it; ``loss_difference``; or
    ``reason``. The type is the last of ``options.dtypes``, the mode a graph where there is one.
    """
    dtype = options.dtypes[-1]
    mode = best_mode(options)
    batches = make_batches(options, "padded" if options.synthetic else "real", batch_size)
    on = as_arguments(base_overrides(options, switches)) | mode_keys(mode)
    common = {"layout": "padded", "batch_size": batch_size, "dtype": dtype}
    base_row: Row = {**common, "side": "all on", "mode": mode}
    rows = [base_row]
    try:
        base = build(options, batches, batch_size, dtype=dtype, mode=mode, **on)
        if options.synthetic and options.positives:
            base.calibrate(options.positives)
        base_row |= prepare(base, options)
    except (NotHere, RuntimeError, AssertionError, ValueError) as error:
        return [{**base_row, "reason": failure(error)}]
    base_times: list[float] = []
    for switch in switches:
        off_mode = "eager" if switch.key == "STEP.GRAPH" else mode
        row: Row = {**common, "side": f"without {switch.name}", "mode": off_mode, "switch": switch.key}
        rows.append(row)
        try:
            reason = off_reason(options, switch, mode)
            if reason:
                raise NotHere(reason)
            row["loss_difference"] = check_losses(options, batches, batch_size, {switch.key: switch.off}, base)
            keys = {**on, **as_arguments({switch.key: switch.off})}
            side = build(options, batches, batch_size, dtype=dtype, mode=off_mode, **keys)
            side.take_weights(base)
            row |= prepare(side, options)
            with_it, without = measure.turn_by_turn(
                [base.step, side.step], options.device, rounds=options.rounds, seconds=options.seconds
            )
            rows[-1] = timed(row, without, batch_size)
            if not without.failed and not with_it.failed:
                rows[-1]["slower"] = without.median / with_it.median
                base_times.append(with_it.median)
        except (NotHere, RuntimeError, AssertionError, ValueError) as error:
            row["reason"] = failure(error)
        side = None  # type: ignore[assignment]  # a captured graph keeps its memory as long as it lives
        free()
        logger.info("%s", progress(rows[-1]))
        save(rows)
    if not base_times:
        (timing,) = measure.turn_by_turn([base.step], options.device, rounds=options.rounds, seconds=options.seconds)
        base_times = timing.seconds
    middle = sorted(base_times)[len(base_times) // 2]
    rows[0] |= {"ms_per_step": 1e3 * middle, "images_per_second": batch_size / middle, "slower": 1.0}
    add_utilisation(rows, options)
    return rows


def equalise_detections(side: Any, wanted: int) -> None:
    """Set the score threshold of a side so that it finds ``wanted`` detections in each image of its first batch.

    Random weights give each class about the same small probability: many scores are equal, and a threshold of 0.05
    would find nothing. The class predictor is scaled so that its logits have a standard deviation of 2. The threshold
    becomes that score above which lie 4 ``wanted`` pairs of a proposal and a class an image (then 8, 16 ...,
    until NMS leaves enough): what enters NMS is the same number on both sides, and what leaves it is cut at
    ``wanted``.

    Raises:
        NotHere: there are not so many.
    """
    calibrate.scale_classes(side.box_predictor, side.class_logits(0))
    logits = side.class_logits(0)
    images = len(side.detect(0))
    scores = logits.float().softmax(-1)[:, 1:].flatten()
    times = 4
    while times * wanted * images < len(scores):
        side.set_score_threshold(float(scores.topk(times * wanted * images).values[-1]))
        if min(side.detect(0)) >= wanted:
            return
        times *= 2
    raise NotHere(f"fewer than {wanted} detections an image at any score threshold")


def measure_inference(
    options: Options, batch_size: int, save: Callable[[list[Row]], None] = nothing, detections: int = 100
) -> list[Row]:
    """Detection with masks in the image: our sides and torchvision's in turns, on the first padded batch.

    Both keep 1000 proposals and find ``detections`` an image (:func:`equalise_detections`); both paste their masks into
    the image, ours as bits, torchvision as probabilities.
    """
    batches = make_batches(options, "padded" if options.synthetic else "real", batch_size)
    common = {"layout": "padded", "batch_size": batch_size}
    makers: list[tuple[Row, Any]] = []
    for dtype in options.dtypes:
        keys = base_overrides(options) | {
            "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS": "True",
            "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST": str(PROPOSALS),
            "MODEL.ROI_HEADS.DETECTIONS_PER_IMG": str(detections),
        }
        row = {"side": "ours", "mode": "eager", "dtype": dtype}
        makers.append(
            (
                row,
                (lambda d=dtype, k=keys: build(options, batches, batch_size, dtype=d, mode="eager", **as_arguments(k))),
            )
        )
    if options.torchvision:
        makers += list(peer_sides(options, batches, box_detections_per_img=detections))
    rows: list[Row] = []
    ready = []
    for row, make in makers:
        rows.append({**common, **row})
        try:
            side = make()
            if options.synthetic and options.positives:
                side.calibrate(options.positives)
            side.model.eval()
            equalise_detections(side, detections)
            found = side.detect(0)
            rows[-1]["detections_per_image"] = sum(found) / len(found)
            ready.append((len(rows) - 1, side))
        except (NotHere, RuntimeError, AssertionError, ValueError) as error:
            rows[-1]["reason"] = failure(error)
        if "reason" in rows[-1]:
            free()
        save(rows)
    timings = measure.turn_by_turn(
        [side.detect for _, side in ready], options.device, rounds=options.rounds, seconds=options.seconds
    )
    for (index, _), timing in zip(ready, timings, strict=True):
        rows[index] = timed(rows[index], timing, batch_size)
        logger.info("detection, %s", progress(rows[index]))
    return rows
