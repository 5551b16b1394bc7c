"""Weights of maskrcnn-benchmark, detectron2, torchvision and Caffe2: read, converted, written. See docs/weights.md."""

from fastrcnn.weights.content import Weights
from fastrcnn.weights.load import load_weights
from fastrcnn.weights.pixels import PixelFormat
from fastrcnn.weights.recognise import read_weights
from fastrcnn.weights.report import WeightsError, WeightsReport
from fastrcnn.weights.write import write_weights

__all__ = [
    "PixelFormat",
    "Weights",
    "WeightsError",
    "WeightsReport",
    "load_weights",
    "read_weights",
    "write_weights",
]
