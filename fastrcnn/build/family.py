"""What kind of detector a configuration describes, for the entry points."""

from __future__ import annotations

from fastrcnn.config import Config


def gives_proposals(cfg: Config) -> bool:
    """Whether the model is a region proposal network alone: its detections have an objectness, but no class.

    maskrcnn-benchmark's RetinaNet files set ``RPN_ONLY`` too; RetinaNet detects classes.
    """
    return cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON


def classes_key(cfg: Config) -> str:
    """The key that holds the number of classes of the model."""
    return "MODEL.RETINANET.NUM_CLASSES" if cfg.MODEL.RETINANET_ON else "MODEL.ROI_BOX_HEAD.NUM_CLASSES"


def num_classes(cfg: Config) -> int:
    """Number of classes of the detections, background included; proposals are of one class."""
    if gives_proposals(cfg):
        return 2
    return cfg.MODEL.RETINANET.NUM_CLASSES if cfg.MODEL.RETINANET_ON else cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
