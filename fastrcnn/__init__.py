"""Faster R-CNN and Mask R-CNN training on kernels of its own."""
