"""Measuring detections against ground truth."""

from fastrcnn.evaluation.coco import (
    CocoResults,
    EvaluationError,
    check_expected,
    detections_to_coco,
    encode_mask,
    evaluate_coco,
    masks_to_rle,
)

__all__ = [
    "CocoResults",
    "EvaluationError",
    "check_expected",
    "detections_to_coco",
    "encode_mask",
    "evaluate_coco",
    "masks_to_rle",
]
