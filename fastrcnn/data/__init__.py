"""Images and ground truth in, batches out.

A data set is anything that follows :class:`~fastrcnn.data.dataset.DetectionDataset`; COCO files are built in.
"""

from fastrcnn.data.catalog import load_dataset
from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.collate import Batch, Normalization, TestBatch
from fastrcnn.data.dataset import ConcatDataset, DataError, DetectionDataset, ImageInfo, Sample
from fastrcnn.data.image import read_image
from fastrcnn.data.loader import Loader, make_test_loader, make_train_loader
from fastrcnn.data.sampler import BatchSchedule
from fastrcnn.data.transforms import TestTransform, TrainTransform

__all__ = [
    "Batch",
    "BatchSchedule",
    "CocoDataset",
    "ConcatDataset",
    "DataError",
    "DetectionDataset",
    "ImageInfo",
    "Loader",
    "Normalization",
    "Sample",
    "TestBatch",
    "TestTransform",
    "TrainTransform",
    "load_dataset",
    "make_test_loader",
    "make_train_loader",
    "read_image",
]
