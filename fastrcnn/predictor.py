"""A trained model for single images: what an image goes through on its way in, and a detection on its way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastrcnn.build import build_test_augmentation, for_testing
from fastrcnn.config import Config
from fastrcnn.conventions import CONVENTIONS
from fastrcnn.data.collate import Normalization
from fastrcnn.data.transforms import get_size
from fastrcnn.data.video import read_frames
from fastrcnn.engine.step import DTYPES, autocast
from fastrcnn.evaluation import RleMasks, masks_to_rle
from fastrcnn.structures import BoxList, ImageList, Views
from fastrcnn.visualize import draw_detections
from fastrcnn_kernels import resize_image

# A keypoint is drawn from this score on: maskrcnn-benchmark's for logits, detectron2's for probabilities.
KEYPOINT_THRESHOLDS = {"logit": 2.0, "probability": 0.05}


class Predictor:
    """A model together with what an image goes through on its way in and a detection on its way out.

    Args:
        model: as :func:`fastrcnn.build_model` gives it, with trained weights; put into evaluation mode.
        cfg: the configuration it was built from: sizes, pixel mean, padding, ``TEST.BBOX_AUG``.
        class_names: the name of each label, ``__background__`` first; without: ``class 7``.
        threshold: detections with a lower score are left out.
    """

    def __init__(
        self, model: nn.Module, cfg: Config, class_names: Sequence[str] | None = None, *, threshold: float = 0.0
    ) -> None:
        self.model = model.eval()
        self.augmentation = build_test_augmentation(cfg)
        self.detector = for_testing(cfg, model).eval()
        self.class_names = class_names
        self.threshold = threshold
        self.min_size, self.max_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self.rounding = CONVENTIONS[cfg.MODEL.CONVENTION].resize_rounding
        self.mask_paste = CONVENTIONS[cfg.MODEL.CONVENTION].mask_paste
        self.normalization = Normalization(
            cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, cfg.INPUT.TO_BGR255, cfg.DATALOADER.SIZE_DIVISIBILITY
        )
        self.keypoint_threshold = KEYPOINT_THRESHOLDS[CONVENTIONS[cfg.MODEL.CONVENTION].keypoint_score]
        self.dtype = DTYPES[cfg.DTYPE]
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def frames(self, images: Iterable[np.ndarray | Tensor | Image.Image]) -> Iterator[BoxList]:
        """The detections in each image, as soon as it is there; ``images`` may be a camera that never ends."""
        return map(self, images)

    def video(self, path: str | Path) -> Iterator[tuple[Tensor, BoxList]]:
        """Each frame of a video file, uint8 [H, W, 3] RGB, and what was found in it.

        Raises:
            DataError: see :func:`fastrcnn.data.video.read_frames`.
        """
        for frame in read_frames(path):
            yield frame, self(frame)

    @torch.no_grad()
    def __call__(self, image: np.ndarray | Tensor | Image.Image) -> BoxList:
        """Detect.

        Args:
            image: uint8 [H, W, 3] RGB, or a Pillow image of any mode.

        Returns:
            On the CPU, best first, in pixels of ``image``: boxes, labels, scores and, with a mask head, ``masks``:
            probabilities [n, 1, M, M] in the frame of the boxes; :meth:`masks` makes bitmaps of them; with a keypoint
            head, ``keypoints`` with their scores. The proposals of a region proposal network (``MODEL.RPN_ONLY``) are
            of class 1 and have their objectness as score.
        """
        pixels = to_tensor(image)
        height, width = pixels.shape[:2]
        with autocast(self.device, self.dtype):
            found: BoxList = self.detector(self._input(pixels).to(self.device))[0].to("cpu")
        if found.objectness is not None:
            found = replace(found, scores=found.objectness, labels=torch.ones(len(found), dtype=torch.int64))
        assert found.scores is not None
        order = found.scores.argsort(descending=True, stable=True)
        found = found[order[found.scores[order] >= self.threshold]].resize((width, height))
        masks = found.masks if isinstance(found.masks, Tensor) else None
        if masks is not None and masks.dtype != torch.bool:
            masks = masks.float()
        return replace(found, boxes=found.boxes.float(), masks=masks, objectness=None)

    def _input(self, pixels: Tensor) -> ImageList | Views:
        if self.augmentation is not None:
            return self.augmentation([pixels], [0], self.normalization)
        height, width = pixels.shape[:2]
        size = get_size(height, width, self.min_size, self.max_size, self.rounding)
        return self.normalization([pixels if size == (height, width) else resize_image(pixels, size)], [0])

    def rles(self, found: BoxList) -> list[dict[str, Any]] | None:
        """The masks of ``found`` in its image as COCO RLE; None without masks."""
        if not isinstance(found.masks, Tensor):
            return None
        width, height = found.size
        return masks_to_rle(found.masks, found.convert("xyxy").boxes, (height, width), convention=self.mask_paste)

    def masks(self, found: BoxList) -> RleMasks | None:
        """The masks of ``found`` in its image as bool bitmaps [H, W], decoded when asked for; None without masks."""
        rles = self.rles(found)
        return None if rles is None else RleMasks(rles)

    def draw(
        self, image: np.ndarray | Tensor | Image.Image, found: BoxList, masks: RleMasks | None = None
    ) -> Image.Image:
        """``image`` with all of ``found`` drawn on it; ``masks``: those of :meth:`masks`, if they are at hand."""
        masks = self.masks(found) if masks is None else masks
        return draw_detections(
            to_tensor(image), found, masks, self.class_names, self.threshold, self.keypoint_threshold
        )


def to_tensor(image: np.ndarray | Tensor | Image.Image) -> Tensor:
    """An image as uint8 [H, W, 3] RGB on the host."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB")))
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"the image must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels.cpu()
