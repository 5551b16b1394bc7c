"""COCO evaluation of boxes and masks.

pycocotools is the judge: this module prepares its input, checks what it would swallow silently or fail on without
saying why (an unknown image, a mask of another size, an empty result list), keeps it quiet, and returns named numbers
with the per-class table that pycocotools computes and throws away.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.structures import BoxList

IOU_TYPES = ("bbox", "segm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
STATS = (*METRICS, "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

logger = logging.getLogger("fastrcnn.evaluation")


class EvaluationError(ValueError):
    """Results or ground truth that cannot be evaluated; the message is one line and names the file or the entry."""


@dataclass(frozen=True)
class CocoResults:
    """What pycocotools found.

    Attributes:
        stats: for each of ``bbox``, ``segm``: the twelve numbers of pycocotools by name (``AP``, ``AP50``, ``AP75``,
            ``APs``, ``APm``, ``APl``, ``AR1``, ``AR10``, ``AR100``, ``ARs``, ``ARm``, ``ARl``), fractions in [0, 1];
            -1 where there is no ground truth to find.
        per_class: for each type the AP of each class by name; None for a class without ground truth.
    """

    stats: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float | None]]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries for json: ``{type: {stat: value, ..., "per_class": {name: AP or null}}}``."""
        return {kind: {**stats, "per_class": dict(self.per_class[kind])} for kind, stats in self.stats.items()}

    def table(self, kind: str, columns: int = 3) -> str:
        """The AP of every class of ``kind`` in per cent, in columns; ``-`` where there is no ground truth."""
        cells = [(name, "-" if ap is None else f"{100 * ap:.1f}") for name, ap in self.per_class[kind].items()]
        width = max((len(name) for name, _ in cells), default=0)
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        return "\n".join("  ".join(f"{name:<{width}} {ap:>5}" for name, ap in row).rstrip() for row in rows)

    def __repr__(self) -> str:
        """maskrcnn-benchmark's: task, metric names, values."""
        lines = []
        for kind, stats in self.stats.items():
            lines += [f"Task: {kind}", ", ".join(METRICS), ", ".join(f"{stats[name]:.4f}" for name in METRICS)]
        return "".join(line + "\n" for line in lines)


def detections_to_coco(
    predictions: Sequence[tuple[Any, BoxList, Sequence[Mapping[str, Any]] | None]],
    label_to_category_id: Mapping[int, int],
) -> dict[str, list[dict[str, Any]]]:
    """Detections in COCO's result format.

    Args:
        predictions: for each image (image id, BoxList with labels and scores in ORIGINAL image coordinates, its masks
            as RLE or None). Boxes become (x, y, width, height) with widths that count both end pixels, as
            maskrcnn-benchmark writes them.
        label_to_category_id: the data set's category id of each label.

    Returns:
        ``{"bbox": [...]}`` and, if an image came with masks (an empty list counts), ``"segm": [...]``.

    Raises:
        EvaluationError: a label without a category id, detections without labels or scores, or a number of masks that
            is not the number of boxes.
    """
    results: dict[str, list[dict[str, Any]]] = {"bbox": []}
    if any(masks is not None for _, _, masks in predictions):
        results["segm"] = []
    for image_id, found, masks in predictions:
        if found.labels is None or found.scores is None:
            raise EvaluationError(f"image {image_id}: detections need labels and scores")
        if masks is not None and len(masks) != len(found):
            raise EvaluationError(f"image {image_id}: {len(masks)} masks for {len(found)} boxes")
        for i, (box, label, score) in enumerate(
            zip(found.convert("xywh").boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        ):
            if label not in label_to_category_id:
                raise EvaluationError(f"image {image_id}: label {label} has no category id in the data set")
            entry = {"image_id": image_id, "category_id": label_to_category_id[label], "score": score}
            results["bbox"].append({**entry, "bbox": box})
            if masks is not None:
                results["segm"].append({**entry, "segmentation": dict(masks[i])})
    return results


def evaluate_coco(
    annotations: str | Path | Mapping[str, Any],
    results_by_type: Mapping[str, Sequence[Mapping[str, Any]] | str | Path],
    *,
    image_ids: Sequence[Any] | None = None,
) -> CocoResults:
    """Evaluate COCO results with pycocotools.

    Args:
        annotations: the ground truth: an annotation file or its loaded content (not modified). ``iscrowd`` defaults to
            0 and ``area`` to the box's. If an annotation id is 0 or not unique, ids are renumbered: pycocotools takes
            a match with annotation 0 for none and confuses equal ones.
        results_by_type: for ``bbox`` and/or ``segm`` a list of results or the path of a json file with one. An empty
            list is legal and scores 0 (-1 where there is nothing to find either).
        image_ids: evaluate these images only; results on other images of the data set are then left out.

    Returns:
        CocoResults.

    Raises:
        EvaluationError: a file that cannot be read; a result on an unknown image or category, without its box or
            mask, with a number that is not finite, or with a mask whose size is not the image's; a ground truth
            without a shape where ``segm`` is asked for.
    """
    truth, name = _load_truth(annotations)
    known = {image["id"]: image for image in truth["images"]}
    if image_ids is not None and (unknown := [i for i in image_ids if i not in known]):
        raise EvaluationError(f"image_ids: image {unknown[0]!r} is not in {name}")
    chosen = sorted(known if image_ids is None else set(image_ids))
    stats: dict[str, dict[str, float]] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    for kind, source in results_by_type.items():
        if kind not in IOU_TYPES:
            raise EvaluationError(f"unknown result type {kind!r}: choose from {', '.join(IOU_TYPES)}")
        results = _load_results(kind, source, truth, known, name)
        if kind == "segm":
            _require_shapes(truth, set(chosen), name)
        evaluation = _quietly(partial(_run_pycocotools, kind, truth, results, chosen))
        stats[kind] = dict(zip(STATS, (float(value) for value in evaluation.stats), strict=True))
        per_class[kind] = _per_class_ap(evaluation, truth["categories"])
    return CocoResults(stats, per_class)


def check_expected(results: CocoResults, expected: Sequence[Sequence[Any]], sigma_tol: float) -> bool:
    """Compare with ``TEST.EXPECTED_RESULTS`` and log one PASS or FAIL line each (maskrcnn-benchmark's).

    Args:
        results: what was found.
        expected: rows of (task, metric, mean, std) or (task, metric, (mean, std)), such as ("bbox", "AP", 0.38, 0.002).
        sigma_tol: a value passes within ``sigma_tol`` standard deviations of the mean, exclusive.

    Returns:
        Whether all pass.

    Raises:
        EvaluationError: a row of another form, or a task or metric that was not evaluated.
    """
    all_pass = True
    for row in expected:
        task, metric, *numbers = row
        if len(numbers) == 1 and isinstance(numbers[0], Sequence):
            numbers = list(numbers[0])
        if len(numbers) != 2:
            raise EvaluationError(f"TEST.EXPECTED_RESULTS: {list(row)!r} is not [task, metric, mean, std]")
        if metric not in results.stats.get(task, {}):
            raise EvaluationError(f"TEST.EXPECTED_RESULTS: {task} {metric} was not evaluated")
        mean, std = float(numbers[0]), float(numbers[1])
        actual = results.stats[task][metric]
        low, high = mean - sigma_tol * std, mean + sigma_tol * std
        passed = low < actual < high
        all_pass &= passed
        logger.log(
            logging.INFO if passed else logging.ERROR,
            f"{'PASS' if passed else 'FAIL'}: {task} > {metric} sanity check (actual vs. expected): "
            f"{actual:.3f} vs. mean={mean:.4f}, std={std:.4}, range=({low:.4f}, {high:.4f})",
        )
    return all_pass


def _read_json(path: str | Path, what: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise EvaluationError(f"{what} {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise EvaluationError(f"{what} {path}: not json ({error})") from error


def _load_truth(annotations: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The ground truth with pycocotools' required fields filled in, and a name for messages."""
    name = "the annotations" if isinstance(annotations, Mapping) else str(annotations)
    content = annotations if isinstance(annotations, Mapping) else _read_json(annotations, "annotation file")
    if not isinstance(content, Mapping) or any(key not in content for key in ("images", "annotations", "categories")):
        raise EvaluationError(f"{name}: needs the keys images, annotations and categories of COCO's format")
    truth = {**content, "annotations": [dict(a) for a in content["annotations"]]}
    for annotation in truth["annotations"]:
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    ids = [annotation.get("id", 0) for annotation in truth["annotations"]]
    if 0 in ids or len(set(ids)) != len(ids):
        logger.warning(f"{name}: annotation ids are 0 or not unique; renumbered from 1 for the evaluation")
        for number, annotation in enumerate(truth["annotations"], start=1):
            annotation["id"] = number
    return truth, name


def _require_shapes(truth: dict[str, Any], chosen: set[Any], name: str) -> None:
    for annotation in truth["annotations"]:
        if annotation["image_id"] in chosen and not annotation.get("segmentation"):
            raise EvaluationError(f"{name}: annotation {annotation['id']} has no segmentation for segm")


def _load_results(
    kind: str,
    source: Sequence[Mapping[str, Any]] | str | Path,
    truth: dict[str, Any],
    images: Mapping[Any, Mapping[str, Any]],
    name: str,
) -> list[dict[str, Any]]:
    """Checked copies of the results, with the fields of ``kind`` only.

    A result that has both a box and a mask would otherwise be sized by its box in the evaluation of masks.
    """
    where = f"{kind} results" if not isinstance(source, (str, Path)) else str(source)
    entries = _read_json(source, "result file") if isinstance(source, (str, Path)) else source
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise EvaluationError(f"{where}: must be a list of results")
    categories = {category["id"] for category in truth["categories"]}
    field = "bbox" if kind == "bbox" else "segmentation"
    results = []
    for number, entry in enumerate(entries):
        at = f"{where}: result {number}"
        if not isinstance(entry, Mapping):
            raise EvaluationError(f"{at} is not an object with image_id, category_id, score and {field}")
        if missing := [key for key in ("image_id", "category_id", "score", field) if key not in entry]:
            raise EvaluationError(f"{at} has no {missing[0]}")
        if entry["image_id"] not in images:
            raise EvaluationError(f"{at}: image {entry['image_id']!r} is not in {name}")
        if entry["category_id"] not in categories:
            raise EvaluationError(f"{at}: category {entry['category_id']!r} is not in {name}")
        if not _finite([entry["score"]]):
            raise EvaluationError(f"{at}: score {entry['score']!r} is not a finite number")
        if kind == "bbox":
            if len(entry["bbox"]) != 4 or not _finite(entry["bbox"]):
                raise EvaluationError(f"{at}: bbox {entry['bbox']!r} is not four finite numbers")
            value: Any = list(entry["bbox"])
        else:
            value = _checked_rle(entry["segmentation"], images[entry["image_id"]], at)
        results.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "score": float(entry["score"]),
                field: value,
            }
        )
    return results


def _finite(values: Sequence[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _checked_rle(rle: Any, image: Mapping[str, Any], at: str) -> dict[str, Any]:
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise EvaluationError(f"{at}: segmentation must be RLE with size and counts")
    size = [int(n) for n in rle["size"]]
    height, width = image.get("height"), image.get("width")
    if size != [height, width]:
        raise EvaluationError(
            f"{at}: mask of {size[0]} x {size[1]} (height x width) for image {image['id']} of {height} x {width}"
        )
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        return {"size": size, "counts": counts}
    # pycocotools would read and write past the bitmap's end.
    if (
        not isinstance(counts, list)
        or not _finite(counts)
        or min(counts, default=0) < 0
        or sum(counts) != math.prod(size)
    ):
        raise EvaluationError(f"{at}: the counts of the RLE do not cover its {size[0]} x {size[1]} pixels")
    return coco_mask.frPyObjects({"size": size, "counts": counts}, *size)


def _quietly(run: Callable[[], COCOeval]) -> COCOeval:
    """Run without pycocotools' prints; errors pass through, and the prints go to the debug log."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return run()
    finally:
        logger.debug(printed.getvalue())


def _run_pycocotools(
    kind: str, truth: dict[str, Any], results: list[dict[str, Any]], image_ids: Sequence[Any]
) -> COCOeval:
    # pycocotools writes into the annotations (masks become RLE), so that each type gets copies.
    ground_truth = COCO()
    ground_truth.dataset = {**truth, "annotations": [dict(a) for a in truth["annotations"]]}
    ground_truth.createIndex()
    if results:
        detections = ground_truth.loadRes(results)
    else:  # loadRes looks at the first result
        detections = COCO()
        detections.dataset = {**truth, "annotations": []}
        detections.createIndex()
    evaluation = COCOeval(ground_truth, detections, kind)
    evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _per_class_ap(evaluation: COCOeval, categories: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """AP over IoU .50:.95, all areas, 100 detections an image; None where a class has no ground truth."""
    names = {category["id"]: str(category["name"]) for category in categories}
    repeated = {name for name in names.values() if list(names.values()).count(name) > 1}
    table: dict[str, float | None] = {}
    for index, category_id in enumerate(evaluation.params.catIds):
        name = names[category_id]
        precision = evaluation.eval["precision"][:, :, index, 0, -1]  # [IoU thresholds, recalls]
        precision = precision[precision > -1]
        table[f"{name} ({category_id})" if name in repeated else name] = (
            float(precision.mean()) if precision.size else None
        )
    return table
