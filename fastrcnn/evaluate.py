"""``python -m fastrcnn.evaluate``: detect in every image of the test sets and judge the detections."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrcnn import build
from fastrcnn.config import Config, load_config
from fastrcnn.conventions import CONVENTIONS
from fastrcnn.data import Catalog, DetectionDataset
from fastrcnn.engine.checkpoint import last_checkpoint
from fastrcnn.engine.command import UsageError, make_parser, run_command
from fastrcnn.engine.distributed import World, join_world, leave_world
from fastrcnn.engine.inference import evaluate_dataset, result_folders
from fastrcnn.engine.judge import Prediction, judge_for
from fastrcnn.engine.outputs import set_up_logging
from fastrcnn.engine.signals import StopSignals
from fastrcnn.engine.step import DTYPES
from fastrcnn.evaluation import Results, RleMasks, check_expected
from fastrcnn.visualize import draw_detections

logger = logging.getLogger("fastrcnn.evaluate")

EXAMPLES = """\
  python -m fastrcnn.evaluate --config-file output/config.yml
  python -m fastrcnn.evaluate --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml --weights model_final.pth \\
      --dataset annotations/val.json@images/val MODEL.DEVICE cpu TEST.VIS_IMAGES 16
  torchrun --nproc_per_node=8 -m fastrcnn.evaluate --config-file output/config.yml

Without --weights the newest checkpoint of OUTPUT_DIR is evaluated. Results go to OUTPUT_DIR/inference/<dataset>/:
bbox.json, segm.json and keypoints.json in COCO's result format (box_proposals.pth of MODEL.RPN_ONLY), result.txt of
Pascal VOC, summary.json, and with TEST.VIS_IMAGES drawn images.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m fastrcnn.evaluate", (__doc__ or "").split("``: ")[1], EXAMPLES)
    parser.add_argument("--weights", metavar="FILE", help="weights or checkpoint (default: the newest of OUTPUT_DIR)")
    parser.add_argument("--allow-partial", action="store_true", help="load what fits of the weights, report the rest")
    parser.add_argument("--dataset", metavar="ANN@DIR", help="evaluate on this data set instead of DATASETS.TEST")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, catalog: Catalog | None = None) -> int:
    """Evaluate. Returns the exit code (``--help`` lists them).

    ``catalog`` holds data sets that were registered by function.
    """
    return run_command(lambda: evaluate(parse_arguments(argv), catalog))


def evaluate(args: argparse.Namespace, catalog: Catalog | None = None) -> int:
    """Evaluate the weights on each test set; raises what :func:`fastrcnn.engine.command.run_command` understands."""
    cfg = load_config(args.config_file, args.opts)
    names = (args.dataset,) if args.dataset else cfg.DATASETS.TEST
    if not names:
        raise UsageError(
            "no data set to evaluate on: pass --dataset ANNOTATIONS.json@IMAGE_FOLDER or set DATASETS.TEST"
        )
    world = join_world(cfg.MODEL.DEVICE)
    set_up_logging(world.rank)
    check_batch_size("TEST.IMS_PER_BATCH", cfg.TEST.IMS_PER_BATCH, world)
    weights = find_weights(cfg, args.weights)
    datasets = build_test_datasets(cfg, names, catalog=catalog)
    model = build.build_model(cfg)
    report = build.load_model_weights(cfg, model, weights, allow_partial=args.allow_partial, complete=True)
    logger.info("%s", report)
    with StopSignals(world) as stop:
        all_results = evaluate_model(cfg, model, datasets, world, stop, about={"weights": str(weights)})
    if world.is_main:
        for name, results in all_results.items():
            for kind in results.stats:
                if results.per_class.get(kind):
                    print(f"\n{name}: {kind} AP of each class, per cent\n{results.table(kind)}")
    leave_world(world)
    return 0


def find_weights(cfg: Config, given: str | None) -> str | Path:
    """``--weights``, else the newest checkpoint of OUTPUT_DIR, else MODEL.WEIGHT."""
    if given is not None:
        return given
    newest = last_checkpoint(Path(cfg.OUTPUT_DIR))
    if newest is not None:
        return newest
    if cfg.MODEL.WEIGHT:
        return cfg.MODEL.WEIGHT
    raise UsageError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint: pass --weights FILE, or the run's OUTPUT_DIR")


def check_batch_size(key: str, size: int, world: World) -> None:
    """Raise UsageError for a batch that cannot be shared equally."""
    if size % world.size:
        raise UsageError(
            f"{key} {size} counts over all processes and cannot be shared by {world.size}: pass {key} "
            f"{max(1, round(size / world.size)) * world.size}"
        )


def check_classes(cfg: Config, name: str, dataset: DetectionDataset) -> None:
    """Raise UsageError where the data set does not fit the model's heads, with the override that helps."""
    if build.gives_proposals(cfg):
        return
    key, configured = build.classes_key(cfg), build.num_classes(cfg)
    if dataset.num_classes != configured:
        raise UsageError(
            f"{name} has {dataset.num_classes - 1} classes and the background, but {key} is {configured}: pass "
            f"{key} {dataset.num_classes}"
        )


def check_keypoints(cfg: Config, name: str, dataset: DetectionDataset) -> None:
    """Raise UsageError where the keypoint head cannot learn from the data set."""
    skeleton = getattr(dataset, "skeleton", None)
    if skeleton is None:
        raise UsageError(f"{name} has no keypoints, or no names for them: pass MODEL.KEYPOINT_ON False")
    key, configured = "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES
    if len(skeleton.names) != configured:
        raise UsageError(
            f"{name} has {len(skeleton.names)} keypoints an instance, but {key} is {configured}: pass {key} "
            f"{len(skeleton.names)}"
        )


def build_test_datasets(
    cfg: Config, names: Sequence[str], like: DetectionDataset | None = None, catalog: Catalog | None = None
) -> dict[str, DetectionDataset]:
    """The test sets by name, checked against the model and, if given, the training set's classes."""
    datasets = {}
    for name in names:
        dataset = build.build_dataset(cfg, (name,), is_train=False, catalog=catalog)
        check_classes(cfg, name, dataset)
        if like is not None and list(dataset.class_names) != list(like.class_names):
            pairs = zip(like.class_names, dataset.class_names, strict=True)
            theirs = next(pair for pair in pairs if pair[0] != pair[1])
            raise UsageError(
                f"{name} has other classes than the training set: {theirs[1]!r} where that has {theirs[0]!r}: the "
                "categories of both annotation files must have the same names in the order of their ids"
            )
        datasets[name] = dataset
    return datasets


def evaluate_model(
    cfg: Config,
    model: torch.nn.Module,
    datasets: Mapping[str, DetectionDataset],
    world: World,
    stop: StopSignals,
    about: Mapping[str, Any],
) -> dict[str, Results]:
    """Evaluate ``model`` on each data set and write the results to OUTPUT_DIR/inference. All ranks call it."""
    found = {}
    for (name, dataset), folder in zip(datasets.items(), result_folders(list(datasets)), strict=True):
        results = evaluate_dataset(
            build.for_testing(cfg, model),
            build.build_test_loader(cfg, dataset, world.rank, world.size),
            name=name,
            num_images=len(dataset),
            judge=judge_for(dataset, proposals=build.gives_proposals(cfg)),
            output_dir=Path(cfg.OUTPUT_DIR) / "inference" / folder,
            world=world,
            dtype=DTYPES[cfg.DTYPE],
            mask_paste=CONVENTIONS[cfg.MODEL.CONVENTION].mask_paste,
            stop=stop,
            about=about,
            draw=picture_writer(dataset, cfg.TEST.VIS_IMAGES) if cfg.TEST.VIS_IMAGES else None,
        )
        if cfg.TEST.EXPECTED_RESULTS:
            check_expected(results, cfg.TEST.EXPECTED_RESULTS, cfg.TEST.EXPECTED_RESULTS_SIGMA_TOL)
        found[name] = results
    return found


def picture_writer(dataset: DetectionDataset, count: int) -> Callable[[Sequence[Prediction], Path], None]:
    """A function that draws the first ``count`` predictions into a folder, as ``<image id>.png``."""

    def write(predictions: Sequence[Prediction], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for prediction in predictions[:count]:
            image = dataset[prediction.index].image
            masks = RleMasks(prediction.masks) if prediction.masks is not None else None
            picture = draw_detections(image, prediction.found, masks, dataset.class_names, 0.5)
            picture.save(folder / f"{prediction.image_id}.png")

    return write


if __name__ == "__main__":
    sys.exit(main())
