"""Operators for two-stage detectors."""
from fastrcnn_kernels._library import backend_report, get_backend, set_backend

__all__ = ["backend_report", "get_backend", "set_backend"]
