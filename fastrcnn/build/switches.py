"""What "auto" means for keys that depend on the device."""

from __future__ import annotations

import torch

from fastrcnn.config import Config


def step_switches(cfg: Config, device: torch.device) -> tuple[bool, bool]:
    """(STEP.GRAPH, STEP.FUSED_OPTIMIZER) for ``device``."""
    on_cuda = device.type == "cuda"
    graph = on_cuda if cfg.STEP.GRAPH == "auto" else cfg.STEP.GRAPH
    fused = on_cuda or graph if cfg.STEP.FUSED_OPTIMIZER == "auto" else cfg.STEP.FUSED_OPTIMIZER
    return graph, fused


def device_preprocessing(cfg: Config, device: torch.device) -> bool:
    """DATALOADER.DEVICE_PREPROCESSING for ``device``."""
    wanted = cfg.DATALOADER.DEVICE_PREPROCESSING
    return device.type == "cuda" if wanted == "auto" else wanted
