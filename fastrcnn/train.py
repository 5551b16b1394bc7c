"""``python -m fastrcnn.train``: train a detector, save it, evaluate it."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrcnn import build
from fastrcnn.config import Config, dump_config, load_config
from fastrcnn.conventions import MASKRCNN_BENCHMARK
from fastrcnn.data import Catalog, DetectionDataset, Prefetcher
from fastrcnn.data.catalog import BENCHMARK_SOURCES
from fastrcnn.engine.checkpoint import Checkpointer
from fastrcnn.engine.command import UsageError, make_parser, run_command
from fastrcnn.engine.distributed import World, join_world, leave_world, unwrap_model
from fastrcnn.engine.inference import as_metrics, result_folders
from fastrcnn.engine.meters import LossHistory, max_memory_mib
from fastrcnn.engine.outputs import (
    MetricsFile,
    check_output_dir,
    describe_run,
    free_space_warning,
    log_to_file,
    prepare_output_dir,
    set_up_logging,
    write_json,
    write_text,
)
from fastrcnn.engine.reproducibility import seed_everything, time_convolutions, use_deterministic_algorithms
from fastrcnn.engine.signals import StopSignals, iterate
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.engine.trainer import train
from fastrcnn.evaluate import build_test_datasets, check_batch_size, check_classes, check_keypoints, evaluate_model

logger = logging.getLogger("fastrcnn.train")

EXAMPLES = """\
  python -m fastrcnn.train --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml OUTPUT_DIR output
  python -m fastrcnn.train --config-file F.yaml DATASETS.TRAIN "('train.json@images',)" \\
      SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025 SOLVER.MAX_ITER 720000 SOLVER.STEPS "(480000, 640000)"
  python -m fastrcnn.train --config-file F.yaml MODEL.DEVICE cpu --dry-run
  python -m fastrcnn.train --config-file output/config.yml --resume
  python -m fastrcnn.train --config-file F.yaml --finetune output/model_final.pth --allow-partial OUTPUT_DIR new
  torchrun --nproc_per_node=8 -m fastrcnn.train --config-file F.yaml OUTPUT_DIR output
"""

# Settings that may change from one start of a run to the next without changing what it computes.
NOT_HASHED = (
    "OUTPUT_DIR",
    "MODEL.WEIGHT",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.DEVICE_PREPROCESSING",
    "STEP",
    "TEST.VIS_IMAGES",
)


@dataclass
class Run:
    """Everything that a run is made of, built and checked before the first file is written."""

    cfg: Config
    world: World
    dataset: DetectionDataset
    test_datasets: dict[str, DetectionDataset]
    step: TrainStep
    checkpointer: Checkpointer
    start_iteration: int


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m fastrcnn.train", (__doc__ or "").split("``: ")[1], EXAMPLES)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of OUTPUT_DIR, if any")
    parser.add_argument("--finetune", metavar="FILE", help="start a new run from FILE's weights, as MODEL.WEIGHT FILE")
    parser.add_argument("--allow-partial", action="store_true", help="load what fits of the weights, report the rest")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of a former run in OUTPUT_DIR")
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate after training")
    parser.add_argument("--print-config", action="store_true", help="print the configuration in force and stop")
    parser.add_argument("--dry-run", action="store_true", help="build everything, train one step, write nothing")
    parser.add_argument("--deterministic", action="store_true", help="same seed, same machine: same numbers")
    args = parser.parse_intermixed_args(argv)
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if args.resume and args.finetune:
        raise UsageError(
            "--resume goes on with a run (weights, optimizer, schedule, iteration), --finetune starts a new one from "
            "weights: pass one of them"
        )
    if args.finetune:
        args.opts += ["MODEL.WEIGHT", args.finetune]
    return args


def main(argv: list[str] | None = None, catalog: Catalog | None = None) -> int:
    """Train. Returns the exit code (``--help`` lists them). ``catalog`` holds data sets registered by function."""
    command_line = [sys.executable, "-m", "fastrcnn.train", *(sys.argv[1:] if argv is None else argv)]
    return run_command(lambda: run(parse_arguments(argv), command_line, catalog))


def run(args: argparse.Namespace, command_line: Sequence[str], catalog: Catalog | None = None) -> int:
    """Train as ``args`` say; raises what :func:`fastrcnn.engine.command.run_command` understands."""
    cfg = load_config(args.config_file, args.opts)
    if args.print_config:
        print(dump_config(cfg), end="")
        return 0
    world = join_world(cfg.MODEL.DEVICE)
    set_up_logging(world.rank)
    if args.deterministic:
        use_deterministic_algorithms()
    output_dir = Path(cfg.OUTPUT_DIR)
    if args.dry_run:
        return dry_run(build_run(cfg, world, args, catalog))
    world.on_main(lambda: check_output_dir(output_dir, resume=args.resume, overwrite=args.overwrite))
    this = build_run(cfg, world, args, catalog)
    folders = result_folders(list(this.test_datasets))
    done = this.start_iteration >= cfg.SOLVER.MAX_ITER
    if done and (args.skip_test or tested(output_dir, folders, this.start_iteration)):
        logger.info("Nothing to do: all %d iterations are done and evaluated", this.start_iteration)
        leave_world(world)
        return 0

    world.on_main(lambda: start_output(this, args, command_line))
    log_to_file(output_dir, world.rank)
    metrics = MetricsFile(output_dir if world.is_main else None, this.start_iteration)
    try:
        with StopSignals(world) as stop:
            train_and_test(this, metrics, stop, final_test=not args.skip_test)
    finally:
        metrics.close()
    leave_world(world)
    return 0


def build_run(cfg: Config, world: World, args: argparse.Namespace, catalog: Catalog | None = None) -> Run:
    """Build and check everything, reading only. Restores the newest checkpoint with ``--resume``."""
    if not cfg.DATASETS.TRAIN:
        raise UsageError("DATASETS.TRAIN is empty: pass DATASETS.TRAIN \"('ANNOTATIONS.json@IMAGE_FOLDER',)\"")
    check_batch_size("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, world)
    dataset = build.build_dataset(cfg, cfg.DATASETS.TRAIN, is_train=True, catalog=catalog)
    check_classes(cfg, ", ".join(cfg.DATASETS.TRAIN), dataset)
    if cfg.MODEL.MASK_ON and not dataset.has_masks:
        raise UsageError(f"{', '.join(cfg.DATASETS.TRAIN)} has no masks: pass MODEL.MASK_ON False")
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg, ", ".join(cfg.DATASETS.TRAIN), dataset)
    test_datasets: dict[str, DetectionDataset] = {}
    if not args.skip_test or cfg.SOLVER.TEST_PERIOD:
        check_batch_size("TEST.IMS_PER_BATCH", cfg.TEST.IMS_PER_BATCH, world)
        test_datasets = build_test_datasets(cfg, present_test_sets(cfg, catalog), like=dataset, catalog=catalog)

    seed_everything(cfg.SOLVER.SEED)
    model = build.build_model(cfg)
    graph, fused = build.step_switches(cfg, world.device)
    if graph:
        time_convolutions()
    optimizer = make_optimizer(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        fused=fused,
    )
    scheduler = WarmupMultiStepLR(
        optimizer,
        milestones=cfg.SOLVER.STEPS,
        gamma=cfg.SOLVER.GAMMA,
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
        warmup_iters=cfg.SOLVER.WARMUP_ITERS,
        warmup_method=cfg.SOLVER.WARMUP_METHOD,
    )
    step = TrainStep(
        model,
        optimizer,
        scheduler,
        device=world.device,
        dtype=cfg.DTYPE,
        seed=cfg.SOLVER.SEED,
        clip_gradients=cfg.SOLVER.CLIP_GRADIENTS,
        graph=graph,
        mask_shares=cfg.STEP.MASK_SHARES,
    )
    checkpointer = Checkpointer(
        Path(cfg.OUTPUT_DIR),
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=step.scaler,
        keep=cfg.SOLVER.KEEP_CHECKPOINTS,
        extra={"seed": cfg.SOLVER.SEED, "config_hash": config_hash(cfg)},
        is_main=world.is_main,
    )
    start_iteration = checkpointer.load_for_resume() if args.resume else 0
    if start_iteration == 0:
        if args.resume:
            logger.info("%s has no checkpoint: starting from the beginning", cfg.OUTPUT_DIR)
        if cfg.MODEL.WEIGHT:
            report = build.load_model_weights(cfg, model, cfg.MODEL.WEIGHT, allow_partial=args.allow_partial)
            logger.info("%s", report)
    step.join(world)  # last: it sends rank 0's weights to all ranks
    return Run(cfg, world, dataset, test_datasets, step, checkpointer, start_iteration)


def present_test_sets(cfg: Config, catalog: Catalog | None = None) -> list[str]:
    """DATASETS.TEST without the catalog's sets that are not on this machine, which only an evaluation would need.

    The configurations of maskrcnn-benchmark name COCO's; whoever trains on own data may not have it. With
    SOLVER.TEST_PERIOD the run does need them, and building them raises DataError.
    """
    present = []
    names = build.build_catalog(cfg, catalog)
    for name in cfg.DATASETS.TEST:
        marker = getattr(names.resolve(name), "marker", None) if name in BENCHMARK_SOURCES else None
        if marker is not None and not marker.exists() and not cfg.SOLVER.TEST_PERIOD:
            logger.warning("DATASETS.TEST %s: %s is missing; this run will not be evaluated on it", name, marker)
        else:
            present.append(name)
    return present


def start_output(this: Run, args: argparse.Namespace, command_line: Sequence[str]) -> None:
    """Write what describes the run: the first files of OUTPUT_DIR."""
    cfg, directory = this.cfg, Path(this.cfg.OUTPUT_DIR)
    prepare_output_dir(directory, resume=args.resume, overwrite=args.overwrite)
    write_text(directory / "config.yml", dump_config(cfg))
    datasets = {", ".join(cfg.DATASETS.TRAIN): fingerprint(this.dataset)}
    datasets |= {name: fingerprint(dataset) for name, dataset in this.test_datasets.items()}
    description = describe_run(command_line, this.world.device, this.world.size, datasets)
    former = directory / "command.txt"
    if args.resume and former.exists():
        description = f"{former.read_text()}\n{description}"
    write_text(former, description)
    write_json(directory / "labels.json", dict(enumerate(this.dataset.class_names)))
    weights = sum(t.numel() * t.element_size() for t in this.checkpointer.model.state_dict().values())
    warning = free_space_warning(directory, 2 * weights)
    if warning:
        logger.warning(warning)
    shared = shared_proposals_warning(cfg, cfg.SOLVER.IMS_PER_BATCH // this.world.size)
    if shared:
        logger.warning(shared)


def shared_proposals_warning(cfg: Config, images: int) -> str | None:
    """What to say where maskrcnn-benchmark's rule of one number of proposals for all ``images`` of a process misleads.

    Its 2000 are meant for two images each. With another number of them an image gets more or fewer proposals than the
    published results had. Whoever sets another number has thought about it.
    """
    rpn = cfg.MODEL.RPN
    by_batch = rpn.USE_FPN and rpn.FPN_POST_NMS_PER_BATCH and not (cfg.MODEL.RPN_ONLY or cfg.MODEL.RETINANET_ON)
    if not by_batch or images == 2 or rpn.FPN_POST_NMS_TOP_N_TRAIN != MASKRCNN_BENCHMARK.post_nms_top_n_train:
        return None
    return (
        f"MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN {rpn.FPN_POST_NMS_TOP_N_TRAIN} counts over the {images} image"
        f"{'s' if images > 1 else ''} of a process together and is meant for two; "
        f"set it to {1000 * images} (1000 an image), or MODEL.RPN.FPN_POST_NMS_PER_BATCH False to count for each image"
    )


def train_and_test(this: Run, metrics: MetricsFile, stop: StopSignals, *, final_test: bool) -> None:
    """The run itself."""
    cfg, world = this.cfg, this.world
    model = unwrap_model(this.step.model)
    total, trained = build.count_parameters(model)
    logger.info("%s parameters, %s trained; %s", f"{total:,}", f"{trained:,}", this.dataset)

    def evaluate(iteration: int) -> Mapping[str, float]:
        found: dict[str, float] = {}
        results = evaluate_model(cfg, model, this.test_datasets, world, stop, about={"iteration": iteration})
        for name, result in results.items():
            numbers = as_metrics(result)
            metrics.write("eval", iteration, {"dataset": name, **numbers})
            # The first test set decides which checkpoint is the best.
            found = found or numbers
        return found

    train(
        this.step,
        training_batches(this),
        start_iteration=this.start_iteration,
        max_iter=cfg.SOLVER.MAX_ITER,
        checkpointer=this.checkpointer,
        metrics=metrics,
        world=world,
        stop=stop,
        log_period=cfg.SOLVER.LOG_PERIOD,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        test_period=cfg.SOLVER.TEST_PERIOD,
        evaluate=evaluate if this.test_datasets else None,
    )
    if final_test and this.test_datasets:
        evaluate(cfg.SOLVER.MAX_ITER)


def training_batches(this: Run) -> Prefetcher[Any]:
    """The batches that are left of the run, this rank's share, on the way to the device."""
    loader = build.build_train_loader(this.cfg, this.dataset, this.start_iteration, this.world.rank, this.world.size)
    return Prefetcher(loader, this.world.device)


def dry_run(this: Run) -> int:
    """One batch forward, backward and through the optimizer, to see that everything fits. Writes nothing."""
    world = this.world
    batch = next(iterate(training_batches(this)))
    history = LossHistory(world.device, world.mean if world.distributed else None)
    this.step.model.train()
    started = time.perf_counter()
    history.append(this.start_iteration + 1, this.step(batch, this.start_iteration))
    ((_, losses),) = history.read()
    seconds = time.perf_counter() - started
    total, trained = build.count_parameters(unwrap_model(this.step.model))
    logger.info("%s parameters, %s trained; %s", f"{total:,}", f"{trained:,}", this.dataset)
    logger.info("%s", batch.images)
    logger.info("  ".join(f"{name}: {value:.4f}" for name, value in losses.items()))
    logger.info(
        "Dry run: one step took %.2f s, max mem %.0f MiB; nothing was written", seconds, max_memory_mib(world.device)
    )
    leave_world(world)
    return 0


def tested(output_dir: Path, folders: Sequence[str], iteration: int) -> bool:
    """Whether the results in OUTPUT_DIR are those of ``iteration``."""
    for folder in folders:
        try:
            summary = json.loads((output_dir / "inference" / folder / "summary.json").read_text())
        except (OSError, ValueError):
            return False
        if summary.get("iteration") != iteration:
            return False
    return True


def fingerprint(dataset: object) -> str:
    """The SHA-256 of the annotations, and the number of images."""
    parts = getattr(dataset, "datasets", None) or [dataset]
    digests = [str(getattr(part, "fingerprint", "unknown")) for part in parts]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"{len(dataset)} images, annotations sha256 {digest}"  # type: ignore[arg-type]


def config_hash(cfg: Config) -> str:
    """A hash of the settings that decide what a run computes."""
    content = cfg.model_dump(mode="json")
    for name in NOT_HASHED:
        *sections, key = name.split(".")
        inside = content
        for section in sections:
            inside = inside[section]
        del inside[key]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
