"""Seeds and deterministic algorithms."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch on all devices.

    They decide the initial weights only. The order of the data, its augmentation and the sampling in the model come
    from counters (seed, step, image), so that they do not depend on workers, ranks or resumes.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(seed)


def use_deterministic_algorithms() -> None:
    """Same seed, same machine, same numbers: torch raises where an operator has no deterministic implementation.

    Call it before the first CUDA operation.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory would hide reads of it at a price in speed; the operators' own tests poison it instead.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def time_convolutions() -> None:
    """Let cuDNN choose the algorithm of each convolution by timing them, once a shape: worth it where shapes recur.

    Not under :func:`use_deterministic_algorithms`, because the choice may differ from run to run.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
