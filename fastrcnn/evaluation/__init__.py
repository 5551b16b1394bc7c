"""Measuring detections against ground truth."""

from fastrcnn.evaluation.coco import (
    CocoResults,
    EvaluationError,
    check_expected,
    detections_to_coco,
    evaluate_coco,
)
from fastrcnn.evaluation.rle import RleMasks, encode_mask, masks_to_rle

__all__ = [
    "CocoResults",
    "EvaluationError",
    "RleMasks",
    "check_expected",
    "detections_to_coco",
    "encode_mask",
    "evaluate_coco",
    "masks_to_rle",
]
