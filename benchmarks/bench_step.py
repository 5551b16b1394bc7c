"""A whole training step, forward, backward and update, for ``make bench``; img/s is 1 / time x images.

``python -m benchmarks.train_step`` measures more of it: phases, torchvision, the ablation. Without a GPU a small model
runs, so that the benchmark itself is tested; its figures compare nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.train_step.__main__ import ROOT
from benchmarks.train_step.ours import Ours
from benchmarks.train_step.run import Options, config, make_batches

GPU = torch.cuda.is_available()
CASES = (
    [(2, "float32", False), (2, "bfloat16", True), (16, "bfloat16", False), (16, "bfloat16", True)]
    if GPU
    else [(2, "float32", False), (2, "float32", True)]
)


@pytest.mark.parametrize(("images", "dtype", "channels_last"), CASES)
def bench_train_step(benchmark: Any, images: int, dtype: str, channels_last: bool) -> None:
    options = Options(
        config_file=ROOT / "configs" / ("e2e_mask_rcnn_R_50_FPN_1x.yaml" if GPU else "demo_shapes.yaml"),
        overrides=("MODEL.CHANNELS_LAST", str(channels_last)),
        device=torch.device("cuda" if GPU else "cpu"),
        size=(1344, 800) if GPU else (128, 128),
        boxes=10 if GPU else 4,
        positives=64 if GPU else 12,
    )
    side = Ours(config(options, images, dtype=dtype), make_batches(options, "padded", images))
    side.calibrate(options.positives)
    for number in range(3):
        losses = side.step(number)
    assert all(loss.isfinite() for loss in losses.values())
    benchmark.group = f"train step, {options.config_file.name}, {images} images {'x'.join(map(str, options.size))}"
    benchmark.extra_info.update(images=images, dtype=dtype, channels_last=channels_last, size=list(options.size))
    benchmark(side.step, 0)
