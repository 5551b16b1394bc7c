"""Running a detector over a data set and judging what it found."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrcnn.engine.distributed import World
from fastrcnn.engine.in_order import InOrder
from fastrcnn.engine.judge import Judge, Prediction
from fastrcnn.engine.outputs import write_json
from fastrcnn.engine.signals import StopSignals, iterate
from fastrcnn.engine.step import autocast
from fastrcnn.evaluation import Results, masks_to_rle
from fastrcnn.structures import BoxList, ImageList, Views

logger = logging.getLogger("fastrcnn.inference")

# Threads that paste and encode masks: one takes 2 to 4 ms an image of 100 detections.
FINISHERS = 2


class DetectionBatch(Protocol):
    """What the loader yields: images, and what they were before they were resized."""

    @property
    def images(self) -> ImageList | Views: ...
    @property
    def image_ids(self) -> list[int]: ...
    @property
    def indices(self) -> list[int]: ...
    @property
    def original_sizes(self) -> list[tuple[int, int]]: ...


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[DetectionBatch],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    mask_paste: str = "maskrcnn_benchmark",
    stop: StopSignals | None = None,
) -> tuple[list[Prediction], float]:
    """Run ``model`` in evaluation mode over ``batches``.

    Boxes are scaled plainly to the original image (maskrcnn-benchmark: ``prediction.resize``), masks are pasted there
    by the rule ``mask_paste`` of :func:`fastrcnn_kernels.paste_masks`. Where the model is on a CUDA device that happens
    in other threads, while it works on the next images.

    Returns:
        The predictions in the order of the batches, and the seconds spent in the model.

    Raises:
        Stopped: if ``stop`` was signalled.
    """
    model.eval()
    seconds = 0.0
    with InOrder[Prediction](FINISHERS if device.type == "cuda" else 0) as finished:
        for batch in iterate(batches):
            if stop is not None:
                stop.check("while evaluating")
            started = time.perf_counter()
            with autocast(device, dtype):
                detections: list[BoxList] = model(batch.images.to(device, non_blocking=True))
            found_on_host = [found.to("cpu") for found in detections]
            seconds += time.perf_counter() - started
            for found, image_id, index, size in zip(
                found_on_host, batch.image_ids, batch.indices, batch.original_sizes, strict=True
            ):
                finished.call(partial(in_original_image, found, image_id, index, size, mask_paste))
        return finished.results(), seconds


def in_original_image(
    found: BoxList, image_id: int, index: int, size: tuple[int, int], mask_paste: str = "maskrcnn_benchmark"
) -> Prediction:
    """Detections in the frame of the network's input, taken to the original image of ``size`` (height, width)."""
    height, width = size
    resized = found.resize((width, height)).convert("xyxy")
    masks = None
    if isinstance(resized.masks, Tensor):
        masks = masks_to_rle(resized.masks, resized.boxes.float(), (height, width), convention=mask_paste)
    plain = replace(resized, boxes=resized.boxes.float(), masks=None)
    return Prediction(index, image_id, plain, masks)


def evaluate_dataset(
    model: nn.Module,
    batches: Iterable[DetectionBatch],
    *,
    name: str,
    num_images: int,
    judge: Judge,
    output_dir: Path,
    world: World,
    dtype: torch.dtype = torch.float32,
    mask_paste: str = "maskrcnn_benchmark",
    stop: StopSignals | None = None,
    about: Mapping[str, Any] | None = None,
    draw: Callable[[Sequence[Prediction], Path], None] | None = None,
) -> Results:
    """Detect in every image of a data set, write the detections and evaluate them. All ranks call it.

    Writes ``summary.json`` and the files of ``judge`` (``bbox.json``, ``segm.json``: COCO results) to ``output_dir``.

    Args:
        name: of the data set, for the log.
        batches: this rank's share; over the ranks each image exactly once.
        judge: see :func:`fastrcnn.engine.judge.judge_for`; called on rank 0.
        mask_paste: see :func:`predict`.
        about: entries for ``summary.json``, such as the iteration.
        draw: draws some of the predictions into a folder (rank 0).

    Returns:
        The same results on all ranks.
    """
    logger.info("Start evaluation on %s dataset(%d images).", name, num_images)
    world.share_statistics(model)
    started = time.perf_counter()
    mine, model_seconds = predict(model, batches, device=world.device, dtype=dtype, mask_paste=mask_paste, stop=stop)
    gathered = world.gather(mine)
    _log_time("Total run time", time.perf_counter() - started, num_images, world.size)
    _log_time("Model inference time", model_seconds, num_images, world.size)

    def conclude() -> Results:
        assert gathered is not None
        predictions = sorted((p for part in gathered for p in part), key=lambda p: p.index)
        found = judge(predictions, output_dir)
        summary = {
            "dataset": name,
            "num_images": num_images,
            "num_detections": sum(len(p.found) for p in predictions),
            **(about or {}),
            "results": found.to_dict(),
        }
        write_json(output_dir / "summary.json", summary)
        if draw is not None:
            draw(predictions, output_dir / "images")
        logger.info("\n%s", found)
        return found

    return world.on_main(conclude)


def as_metrics(results: Results) -> dict[str, float]:
    """``{"bbox/AP": 0.37, ..., "segm/APl": 0.5}``."""
    return {f"{kind}/{name}": stats[name] for kind, stats in results.stats.items() for name in results.metrics(kind)}


def result_folders(names: Sequence[str]) -> list[str]:
    """A folder name for each data set: its name; given by hand, that of its file or folder and its split."""
    folders: list[str] = []
    for name in names:
        first, _, last = name.rpartition("@")
        if first.endswith(".json"):
            folder = Path(first).stem
        elif first:
            folder = f"{Path(first.partition(':')[2]).name}_{last}"
        else:
            folder = name.replace("/", "_")
        same = sum(taken == folder or taken.startswith(f"{folder}.") for taken in folders)
        folders.append(f"{folder}.{same + 1}" if same else folder)
    return folders


def _log_time(what: str, seconds: float, num_images: int, num_devices: int) -> None:
    logger.info(
        "%s: %s (%.6g s / img per device, on %d devices)",
        what,
        datetime.timedelta(seconds=int(seconds)),
        seconds * num_devices / max(1, num_images),
        num_devices,
    )
