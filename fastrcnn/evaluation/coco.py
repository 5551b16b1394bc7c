"""COCO evaluation of boxes, masks and keypoints.

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.evaluation.results import EvaluationError, Results
from fastrcnn.structures import BoxList

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl")
# In the order of pycocotools; the headline is maskrcnn-benchmark's.
STATS = {
    "bbox": (*METRICS, "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "segm": (*METRICS, "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "keypoints": (*KEYPOINT_METRICS, "AR", "AR50", "AR75", "ARm", "ARl"),
}
FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}

logger = logging.getLogger("fastrcnn.evaluation")


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
        ``{"bbox": [...]}``; if an image came with masks (an empty list counts), ``"segm": [...]``; if the boxes have
        keypoints, ``"keypoints": [...]``, each flat ``[x1, y1, v1, x2, ...]`` with the score of its box.

    Raises:
        EvaluationError: a label without a category id, detections without labels or scores, or a number of masks that
            is not the number of boxes.
    """
    results: dict[str, list[dict[str, Any]]] = {"bbox": []}
    if any(masks is not None for _, _, masks in predictions):
        results["segm"] = []
    if any(found.keypoints is not None for _, found, _ in predictions):
        results["keypoints"] = []
    for image_id, found, masks in predictions:
        if found.labels is None or found.scores is None:
            raise EvaluationError(f"image {image_id}: detections need labels and scores")
        if masks is not None and len(masks) != len(found):
            raise EvaluationError(f"image {image_id}: {len(masks)} masks for {len(found)} boxes")
        points = None if found.keypoints is None else found.keypoints.points.flatten(1).tolist()
        for i, (box, label, score) in enumerate(
            zip(found.convert("xywh").boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        ):
            if label not in label_to_category_id:
                raise EvaluationError(f"image {image_id}: label {label} has no category id in the data set")
            entry = {"image_id": image_id, "category_id": label_to_category_id[label], "score": score}
            results["bbox"].append({**entry, "bbox": box})
            if masks is not None:
                results["segm"].append({**entry, "segmentation": dict(masks[i])})
            if points is not None:
                results["keypoints"].append({**entry, "keypoints": points[i]})
    return results


def evaluate_coco(
    annotations: str | Path | Mapping[str, Any],
    results_by_type: Mapping[str, Sequence[Mapping[str, Any]] | str | Path],
    *,
    image_ids: Sequence[Any] | None = None,
) -> Results:
    """Evaluate COCO results with pycocotools.

    Args:
        annotations: the ground truth: an annotation file or its loaded content (not modified). ``iscrowd`` defaults to
            0 and ``area`` to the box's. If an annotation id is 0 or not unique, ids are renumbered: pycocotools takes
            a match with annotation 0 for none and confuses equal ones.
        results_by_type: for ``bbox``, ``segm`` and/or ``keypoints`` a list of results or the path of a json file with
            one. An empty list is legal and scores 0 (-1 where there is nothing to find either).
        image_ids: evaluate these images only; results on other images of the data set are then left out.

    Returns:
        Results.

    Raises:
        EvaluationError: a file that cannot be read; a result on an unknown image or category, without its box or
            mask, with a number that is not finite, or with a mask whose size is not the image's; a ground truth
            without a shape where ``segm`` is asked for.
    """
    truth, name = load_truth(annotations)
    known = {image["id"]: image for image in truth["images"]}
    if image_ids is not None and (unknown := [i for i in image_ids if i not in known]):
        raise EvaluationError(f"image_ids: image {unknown[0]!r} is not in {name}")
    chosen = sorted(known if image_ids is None else set(image_ids))
    stats: dict[str, dict[str, float]] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    for kind, source in results_by_type.items():
        if kind not in STATS:
            raise EvaluationError(f"unknown result type {kind!r}: choose from {', '.join(STATS)}")
        results = _load_results(kind, source, truth, known, name)
        sigmas = None
        if kind == "segm":
            _require_shapes(truth, set(chosen), name)
        elif kind == "keypoints":
            truth = _with_keypoints(truth, name)
            sigmas = _sigmas(truth, name)
        evaluation = _quietly(partial(_run_pycocotools, kind, truth, results, chosen, sigmas))
        stats[kind] = dict(zip(STATS[kind], (float(value) for value in evaluation.stats), strict=True))
        per_class[kind] = _per_class_ap(evaluation, truth["categories"])
    return Results(stats, per_class, {kind: KEYPOINT_METRICS if kind == "keypoints" else METRICS for kind in stats})


def _read_json(path: str | Path, what: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise EvaluationError(f"{what} {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise EvaluationError(f"{what} {path}: not json ({error})") from error


def load_truth(annotations: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
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
    field = FIELDS[kind]
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
        elif kind == "keypoints":
            value = _checked_keypoints(entry["keypoints"], truth, name, at)
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


def num_keypoints(truth: Mapping[str, Any]) -> int:
    """How many keypoints an instance of the ground truth has; 0 without any."""
    return next((len(a["keypoints"]) // 3 for a in truth["annotations"] if a.get("keypoints")), 0)


def _with_keypoints(truth: dict[str, Any], name: str) -> dict[str, Any]:
    """The ground truth where each annotation has keypoints and their number, as pycocotools needs them.

    An instance without keypoints gets unlabelled ones: pycocotools then ignores it.
    """
    count = num_keypoints(truth)
    if count == 0:
        raise EvaluationError(f"{name}: no annotation has keypoints")
    annotations = []
    for annotation in truth["annotations"]:
        points = annotation.get("keypoints") or [0] * 3 * count
        if len(points) != 3 * count:
            raise EvaluationError(
                f"{name}: annotation {annotation['id']} has {len(points)} keypoint numbers, others {3 * count}"
            )
        labelled = sum(1 for visibility in points[2::3] if visibility > 0)
        annotations.append({**annotation, "keypoints": points, "num_keypoints": labelled})
    return {**truth, "annotations": annotations}


def _sigmas(truth: Mapping[str, Any], name: str) -> list[float] | None:
    """The spread of each keypoint: ``keypoint_sigmas`` of a category, else pycocotools' for COCO's 17 (None)."""
    count = num_keypoints(truth)
    for category in truth["categories"]:
        if (sigmas := category.get("keypoint_sigmas")) is not None:
            if len(sigmas) != count or not _finite(sigmas) or min(sigmas) <= 0:
                raise EvaluationError(
                    f"{name}: category {category['id']}: keypoint_sigmas must be {count} positive numbers"
                )
            return list(sigmas)
    if count != 17:
        raise EvaluationError(
            f"{name}: the evaluation of {count} keypoints needs 'keypoint_sigmas' in the category, {count} numbers "
            "(COCO's are known for its 17)"
        )
    return None


def _checked_keypoints(points: Any, truth: Mapping[str, Any], name: str, at: str) -> list[Any]:
    count = num_keypoints(truth)
    if not isinstance(points, Sequence) or len(points) != 3 * count or not _finite(points):
        raise EvaluationError(f"{at}: keypoints must be {3 * count} finite numbers, as in {name}")
    return list(points)


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
    kind: str,
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    image_ids: Sequence[Any],
    sigmas: Sequence[float] | None = None,
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
    if sigmas is not None:
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=np.float64)
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
