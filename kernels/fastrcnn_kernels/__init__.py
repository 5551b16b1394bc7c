"""Operators for two-stage detectors."""
from fastrcnn_kernels._library import backend_report, get_backend, set_backend
from fastrcnn_kernels.roi_align import MultiScaleRoIAlign, RoIAlign, assign_levels, multiscale_roi_align, roi_align

__all__ = [
    "MultiScaleRoIAlign",
    "RoIAlign",
    "assign_levels",
    "backend_report",
    "get_backend",
    "multiscale_roi_align",
    "roi_align",
    "set_backend",
]
