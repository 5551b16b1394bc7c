"""Cityscapes: instances from polygons or from images of instance ids, and its conversion to COCO's format."""

from fastrcnn.data.cityscapes.dataset import CityscapesDataset
from fastrcnn.data.cityscapes.labels import CLASSES, EVALUATED

__all__ = ["CLASSES", "EVALUATED", "CityscapesDataset"]
