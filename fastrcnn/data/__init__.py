"""Images and ground truth in, batches out.

A data set is anything that follows :class:`~fastrcnn.data.dataset.DetectionDataset`; COCO files, Pascal VOC and
Cityscapes are built in.
"""

from fastrcnn.data.arena import ArenaBatch
from fastrcnn.data.buckets import ShapeBuckets
from fastrcnn.data.catalog import Catalog, CityscapesSource, CocoSource, VocSource
from fastrcnn.data.cityscapes import CityscapesDataset
from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.collate import Batch, Normalization, TestBatch
from fastrcnn.data.dataset import ConcatDataset, DataError, DetectionDataset, ImageInfo, Sample
from fastrcnn.data.image import read_image
from fastrcnn.data.loader import Loader, make_test_loader, make_train_loader
from fastrcnn.data.prefetch import Prefetcher
from fastrcnn.data.sampler import BatchSchedule
from fastrcnn.data.to_coco import dataset_to_coco
from fastrcnn.data.transforms import TestTransform, TrainTransform
from fastrcnn.data.voc import VocDataset

__all__ = [
    "ArenaBatch",
    "Batch",
    "BatchSchedule",
    "Catalog",
    "CityscapesDataset",
    "CityscapesSource",
    "CocoDataset",
    "CocoSource",
    "ConcatDataset",
    "DataError",
    "DetectionDataset",
    "ImageInfo",
    "Loader",
    "Normalization",
    "Prefetcher",
    "Sample",
    "ShapeBuckets",
    "TestBatch",
    "TestTransform",
    "TrainTransform",
    "VocDataset",
    "VocSource",
    "dataset_to_coco",
    "make_test_loader",
    "make_train_loader",
    "read_image",
]
