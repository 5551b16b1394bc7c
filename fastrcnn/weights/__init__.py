"""Reading weights into a model: checkpoints of fastrcnn and of maskrcnn-benchmark, and plain state dicts."""

from fastrcnn.weights.load import WeightsError, WeightsReport, load_weights

__all__ = ["WeightsError", "WeightsReport", "load_weights"]
