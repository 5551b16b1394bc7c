"""Operators for two-stage detectors."""

from fastrcnn_kernels._library import backend_report, get_backend, set_backend
from fastrcnn_kernels.anchors import anchors_inside_image, cell_anchors, grid_anchors
from fastrcnn_kernels.box_coder import decode_boxes, decode_proposals, encode_boxes
from fastrcnn_kernels.box_head_loss import box_head_loss
from fastrcnn_kernels.box_losses import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss
from fastrcnn_kernels.boxes import (
    box_area,
    box_iou,
    clip_boxes_to_image,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
    is_large_enough,
    remove_small_boxes,
)
from fastrcnn_kernels.conv import conv2d
from fastrcnn_kernels.deform_conv import DeformConv2d, deform_conv2d
from fastrcnn_kernels.keypoints import keypoint_targets, keypoints_from_heatmaps
from fastrcnn_kernels.losses import sigmoid_focal_loss, smooth_l1_loss
from fastrcnn_kernels.mask_loss import mask_class_logits, mask_loss
from fastrcnn_kernels.matcher import match_anchors, match_boxes
from fastrcnn_kernels.multiclass_nms import multiclass_nms, multiclass_nms_padded
from fastrcnn_kernels.nms import batched_nms, nms, nms_padded
from fastrcnn_kernels.norm import frozen_batch_norm
from fastrcnn_kernels.optim import FusedSGD, ParameterArena, fused_sgd
from fastrcnn_kernels.paste import paste_masks
from fastrcnn_kernels.paste_rle import paste_masks_rle
from fastrcnn_kernels.patch import patch
from fastrcnn_kernels.preprocess import preprocess_images, resize_image
from fastrcnn_kernels.preprocess_arena import preprocess_arena
from fastrcnn_kernels.proposals import generate_proposals
from fastrcnn_kernels.rasterize import rasterize_polygons
from fastrcnn_kernels.rasterize_bitmaps import rasterize_bitmaps
from fastrcnn_kernels.regions import append_boxes, assign_levels, gather_regions
from fastrcnn_kernels.roi_align import MultiScaleRoIAlign, RoIAlign, multiscale_roi_align, roi_align
from fastrcnn_kernels.roi_pool import RoIPool, roi_pool
from fastrcnn_kernels.rpn_head_loss import rpn_head_loss, rpn_head_outputs
from fastrcnn_kernels.rpn_loss import rpn_loss
from fastrcnn_kernels.sampler import image_seeds, sample_balanced
from fastrcnn_kernels.soft_nms import soft_nms

__all__ = [
    "DeformConv2d",
    "FusedSGD",
    "MultiScaleRoIAlign",
    "ParameterArena",
    "RoIAlign",
    "RoIPool",
    "anchors_inside_image",
    "append_boxes",
    "assign_levels",
    "backend_report",
    "batched_nms",
    "box_area",
    "box_head_loss",
    "box_iou",
    "cell_anchors",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "conv2d",
    "decode_boxes",
    "decode_proposals",
    "deform_conv2d",
    "distance_box_iou",
    "distance_box_iou_loss",
    "encode_boxes",
    "frozen_batch_norm",
    "fused_sgd",
    "gather_regions",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "generate_proposals",
    "get_backend",
    "grid_anchors",
    "image_seeds",
    "is_large_enough",
    "keypoint_targets",
    "keypoints_from_heatmaps",
    "mask_class_logits",
    "mask_loss",
    "match_anchors",
    "match_boxes",
    "multiclass_nms",
    "multiclass_nms_padded",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "paste_masks",
    "paste_masks_rle",
    "patch",
    "preprocess_arena",
    "preprocess_images",
    "rasterize_bitmaps",
    "rasterize_polygons",
    "remove_small_boxes",
    "resize_image",
    "roi_align",
    "roi_pool",
    "rpn_head_loss",
    "rpn_head_outputs",
    "rpn_loss",
    "sample_balanced",
    "set_backend",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "soft_nms",
]
