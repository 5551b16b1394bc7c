"""What travels between the data, the model and the user.

Public: :class:`ImageList`, :class:`BoxList`, :class:`SegmentationMask`, :class:`Keypoints`, with the meaning they have
in maskrcnn-benchmark, but with named, typed fields instead of a bag of strings, and without mutation: every method
returns a new object. Inside the model: :class:`Targets` and :class:`Proposals`, padded batches whose real lengths are
tensors on the device, so that nothing on the training path has to ask the device for a size.

Frames: a ``BoxList`` is in the frame of an image of ``size`` (width, height) pixels. Boxes are inclusive pixels:
a box of one pixel has x1 == x2, and widths are x2 - x1 + 1.
"""

from fastrcnn.structures.box_list import BoxList
from fastrcnn.structures.capacities import pad_targets
from fastrcnn.structures.image_list import ImageList, to_image_list
from fastrcnn.structures.keypoints import PERSON, Keypoints, PersonKeypoints, Skeleton
from fastrcnn.structures.packed_images import DeviceImages, PackedImages
from fastrcnn.structures.padded import Proposals, Targets
from fastrcnn.structures.segmentation import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, SegmentationMask
from fastrcnn.structures.views import Views

__all__ = [
    "FLIP_LEFT_RIGHT",
    "FLIP_TOP_BOTTOM",
    "PERSON",
    "BoxList",
    "DeviceImages",
    "ImageList",
    "Keypoints",
    "PackedImages",
    "PersonKeypoints",
    "Proposals",
    "SegmentationMask",
    "Skeleton",
    "Targets",
    "Views",
    "pad_targets",
    "to_image_list",
]
