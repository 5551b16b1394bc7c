"""Measuring detections against ground truth."""

from fastrcnn.evaluation.cityscapes import CityscapesImage, evaluate_cityscapes
from fastrcnn.evaluation.coco import detections_to_coco, evaluate_coco
from fastrcnn.evaluation.proposals import evaluate_proposals
from fastrcnn.evaluation.results import EvaluationError, Results, check_expected
from fastrcnn.evaluation.rle import RleMasks, encode_mask, masks_to_rle
from fastrcnn.evaluation.voc import evaluate_voc

__all__ = [
    "CityscapesImage",
    "EvaluationError",
    "Results",
    "RleMasks",
    "check_expected",
    "detections_to_coco",
    "encode_mask",
    "evaluate_cityscapes",
    "evaluate_coco",
    "evaluate_proposals",
    "evaluate_voc",
    "masks_to_rle",
]
