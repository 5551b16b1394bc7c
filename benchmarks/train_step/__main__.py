"""The whole training step: images a second, where the time goes, against torchvision and against itself.

    python -m benchmarks.train_step                                        one batch size, quick
    python -m benchmarks.train_step --batch-sizes 1,2,4,8,16,32 --layouts padded,bucketed --modes eager,graph \\
        --dtypes float32,bfloat16 --ablation 2,16 --inference 1,8 --profile 2          everything, on a GPU
    python -m benchmarks.train_step --images annotations.json@images       a data set instead of noise

Writes ``OUTPUT/train_step.json`` after each row, so that what was measured outlives a time limit, and
``OUTPUT/train_step.md``. What each column means: docs/benchmarks.md. Exits with 1 where our own side has failed, with
2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.train_step.ablation import measure_ablation, measure_inference
from benchmarks.train_step.profile import measure_profile
from benchmarks.train_step.run import Options, Row, config, failure, measure_group
from benchmarks.train_step.sides import DTYPES
from benchmarks.train_step.tables import markdown
from fastrcnn.config import ConfigError
from fastrcnn.data.dataset import DataError

ROOT = Path(__file__).resolve().parents[2]
MODES, LAYOUTS = ("eager", "graph"), ("padded", "bucketed")


def words(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(word for word in text.split(",") if word)
        if not found or any(word not in allowed for word in found):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(allowed)}")
        return found

    return parse


def integers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        found = (0,)
    if any(value < 1 for value in found):
        raise argparse.ArgumentTypeError(f"{text!r}: integers above 0, separated by commas")
    return found


def image_size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not x or not width.isdigit() or not height.isdigit() or int(width) % 32 or int(height) % 32:
        raise argparse.ArgumentTypeError(f"{text!r}: WIDTHxHEIGHT, multiples of 32")
    return int(width), int(height)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", type=Path, default=ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml")
    add("--device", default="cuda" if gpu else "cpu")
    add("--batch-sizes", type=integers, default=(2,), help="images a step, separated by commas (default 2)")
    add("--no-train", action="store_true", help="no training groups: only what --ablation, --inference, --profile ask")
    add("--images", default="synthetic", help="synthetic (noise and rectangles), or ANNOTATIONS.json@FOLDER")
    add("--boxes", type=int, default=10, help="ground truths an image of synthetic images (%(default)s)")
    add("--positives", type=int, default=64, help="positive proposals an image that the RPN is calibrated to give, as "
        "late in training; 0: what random weights give (%(default)s)")  # fmt: skip
    add("--layouts", type=words(LAYOUTS), default=("padded",), help="padded: all of --size; bucketed: COCO's widths")
    add("--size", type=image_size, default=(1344, 800), metavar="WxH", help="of padded images (1344x800)")
    add("--modes", type=words(MODES), default=MODES if gpu else ("eager",), help="eager, graph (a captured step)")
    add("--dtypes", type=words(tuple(DTYPES)), default=("float32", "bfloat16") if gpu else ("float32",))
    add("--rounds", type=int, default=3, help="turns of each side (%(default)s)")
    add("--seconds", type=float, default=3.0, help="timed seconds of each side over all turns; at least a step a turn")
    add("--warmup", type=int, default=5 if gpu else 1, help="steps before the first that is measured (%(default)s)")
    add("--no-torchvision", action="store_true", help="our sides alone")
    add("--ablation", type=integers, default=(), metavar="SIZES", help="batch sizes of the ablation")
    add("--inference", type=integers, default=(), metavar="SIZES", help="batch sizes of detection")
    add("--profile", type=integers, default=(), metavar="SIZES", help="batch sizes whose kernels are listed by time")
    add("--peak-tflops", type=float, help="what MFU is a share of; default: a large matrix product, measured")
    add("--budget", type=float, default=float("inf"), help="seconds after which no further group begins")
    add("--output", type=Path, default=ROOT / "output" / "train_step")
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys for our sides")
    return parser.parse_intermixed_args(argv)


def options_of(args: argparse.Namespace) -> Options:
    return Options(
        config_file=args.config_file,
        overrides=tuple(args.overrides),
        device=torch.device(args.device),
        batch_sizes=() if args.no_train else args.batch_sizes,
        images=args.images,
        boxes=args.boxes,
        positives=args.positives,
        layouts=args.layouts if args.images == "synthetic" else ("real",),
        size=args.size,
        modes=args.modes,
        dtypes=args.dtypes,
        rounds=args.rounds,
        seconds=args.seconds,
        warmup=args.warmup,
        torchvision=not args.no_torchvision,
        ablation=args.ablation,
        inference=args.inference,
        profile=args.profile,
        peak_tflops=args.peak_tflops,
    )


Measure = Callable[[Callable[[list[Row]], None]], list[Row]]


def groups(options: Options) -> list[tuple[str, str, int, Measure]]:
    """(section, layout, batch size, what measures it) of everything to be measured, in the order of its worth."""
    found: list[tuple[str, str, int, Measure]] = []
    for layout in options.layouts:
        for size in options.batch_sizes:
            found.append(("train", layout, size, partial(measure_group, options, layout, size)))
    plain = "padded" if options.synthetic else "real"
    for size in options.ablation:
        found.append(("ablation", plain, size, partial(measure_ablation, options, size)))
    for size in options.inference:
        found.append(("inference", plain, size, partial(measure_inference, options, size)))
    for size in options.profile:
        found.append(("profile", plain, size, partial(measure_profile, options, size)))
    return found


def write(result: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "train_step.json").write_text(json.dumps(result, indent=1))
    (output / "train_step.md").write_text(markdown(result))


def run(options: Options, output: Path, budget: float = float("inf")) -> dict[str, Any]:
    """Measure everything; the files hold what there is after each row."""
    result: dict[str, Any] = {
        "machine_info": describe(),
        # a configuration of ours by its place in the repository, whatever machine it ran on
        "arguments": {name: str(value).removeprefix(f"{ROOT}/") for name, value in vars(options).items()},
        "train": [],
        "ablation": [],
        "inference": [],
        "profile": [],
        "notes": [],
    }
    began = time.monotonic()
    for section, layout, batch_size, measure in groups(options):
        if time.monotonic() - began > budget:
            result["notes"].append(f"{section}, {layout}, batch {batch_size}: not begun, the time was up")
            continue

        def save(rows: list[Row], section: str = section) -> None:
            write({**result, section: [*result[section], *rows]}, output)

        try:
            result[section] += measure(save)
        except (RuntimeError, AssertionError, ValueError) as error:
            row = {"layout": layout, "batch_size": batch_size, "side": "ours", "mode": "", "dtype": ""}
            result[section].append({**row, "reason": failure(error)})
        write(result, output)
    write(result, output)
    return result


def failed(result: dict[str, Any]) -> bool:
    """Whether a side of ours that this machine could have run gave no figure."""
    rows = [row for section in ("train", "inference") for row in result[section] if row["side"] == "ours"]
    return not any("images_per_second" in row for row in rows) and bool(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = options_of(args)
    if options.device.type == "cuda":
        if not torch.cuda.is_available():
            print("error: PyTorch finds no CUDA device here: pass --device cpu", file=sys.stderr)
            return 2
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        config(options, args.batch_sizes[0])
        result = run(options, args.output, args.budget)
    except (ConfigError, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(result))
    return 1 if failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
