"""What the first convolution sees: channel order, range, mean and standard deviation of the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelFormat:
    """How an image reaches the network, as ``INPUT.TO_BGR255``, ``PIXEL_MEAN`` and ``PIXEL_STD`` say it.

    Attributes:
        to_bgr255: BGR in 0..255, else RGB in 0..1.
        mean, std: of each channel, in that order and range.
        scale: the value of white; 255 with ``to_bgr255``. detectron2 can feed RGB in 0..255, which no setting here
            does, but the weights of which can be converted.
    """

    to_bgr255: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 0.0

    @property
    def white(self) -> float:
        return self.scale or (255.0 if self.to_bgr255 else 1.0)

    def __str__(self) -> str:
        order = "BGR" if self.to_bgr255 else "RGB"
        return f"{order} in 0..{self.white:g}, mean {_numbers(self.mean)}, std {_numbers(self.std)}"


CAFFE2 = PixelFormat(True, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
DETECTRON2 = PixelFormat(True, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
TORCHVISION = PixelFormat(False, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def convert_stem(weight: Tensor, source: PixelFormat, target: PixelFormat) -> tuple[Tensor, str, str]:
    """The stem's weights for pixels in ``target``'s format instead of ``source``'s.

    A shift of the mean cannot be put into a convolution with zero padding; it is left and said.

    Args:
        weight: [C, 3, h, w].

    Returns:
        the weights, a sentence on what was changed (empty: nothing), and one on what to set (empty: nothing).
    """
    order = [2, 1, 0] if source.to_bgr255 != target.to_bgr255 else [0, 1, 2]
    unit = source.white / target.white
    # pixel of the source = (unit * (std_t * x_t + mean_t) - mean_s) / std_s
    mean, std = [source.mean[c] for c in order], [source.std[c] for c in order]
    factor = [unit * t / s for t, s in zip(target.std, std, strict=True)]
    shift = [(unit * t - s) / d for t, s, d in zip(target.mean, mean, std, strict=True)]
    converted = note = ""
    if order != [0, 1, 2] or any(abs(f - 1) > 1e-9 for f in factor):
        weight = weight[:, order] * torch.tensor(factor, dtype=weight.dtype)[:, None, None]
        converted = f"the stem, from {source} to {target}"
    if any(abs(s) > 1e-4 for s in shift):
        wanted = tuple(round(m / unit, 4) for m in mean)
        note = f"the weights were trained with another mean: for the same numbers set INPUT.PIXEL_MEAN {wanted}"
    return weight, converted, note


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
