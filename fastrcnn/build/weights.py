"""Weights into the model that a configuration describes."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastrcnn.config import Config
from fastrcnn.weights import PixelFormat, WeightsReport, load_weights


def load_model_weights(
    cfg: Config, model: nn.Module, source: str | Path, *, allow_partial: bool = False, complete: bool = False
) -> WeightsReport:
    """:func:`fastrcnn.load_weights` with what the configuration says of the model's input and stride.

    Args:
        model: as :func:`fastrcnn.build_model` makes it from ``cfg``.
    """
    return load_weights(
        model,
        source,
        pixels=PixelFormat(cfg.INPUT.TO_BGR255, tuple(cfg.INPUT.PIXEL_MEAN), tuple(cfg.INPUT.PIXEL_STD)),
        stride_in_1x1=cfg.MODEL.RESNETS.STRIDE_IN_1X1 if cfg.MODEL.RESNETS.TRANS_FUNC.startswith("Bottle") else None,
        allow_partial=allow_partial,
        complete=complete,
    )
