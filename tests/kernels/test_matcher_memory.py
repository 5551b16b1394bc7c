"""Matching 5000 ground truths against all anchors never holds a matrix of overlaps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn_kernels import (
    _library,
    matcher_reference,
)
from fastrcnn_kernels.matcher_reference import match_boxes_reference
from tests.kernels.helpers import MARGIN
from tests.kernels.test_matcher import RPN, random_boxes


class Largest(TorchDispatchMode):
    """The most elements any operator produced; raw bytes, of which the test's guarded buffers are made, aside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_of_the_reference_is_bounded() -> None:
    """5000 ground truths: 600 boxes on the CPU, and the shapes alone (device meta) for all 250,000."""
    gts, count = random_boxes(1, 5000), torch.tensor([5000])
    with Largest() as largest:
        match_boxes_reference(gts, count, random_boxes(600, seed=1), **RPN)
    assert largest.numel <= 5000 * matcher_reference.MIN_CHUNK + 2 * MARGIN
    with Largest() as largest:
        boxes = torch.empty(250_000, 4, device="meta")
        matched = match_boxes_reference(gts.to("meta"), count.to("meta"), boxes, **RPN)
    assert matched.shape == (1, 250_000)
    assert largest.numel <= matcher_reference.CHUNK_ELEMENTS
    small, boxes = torch.empty(2, 10, 4, device="meta"), torch.empty(9, 4, device="meta")
    with Largest() as largest:
        match_boxes_reference(small, torch.empty(2, device="meta", dtype=torch.int64), boxes, **RPN)
    assert largest.numel <= 2 * 10 * 9, "no more than the pairs there are"


MEMORY_PROGRAM = """
import sys, threading, torch
from fastrcnn_kernels import cell_anchors, grid_anchors, match_anchors, match_boxes
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
cells = [cell_anchors(s, [8 * s], [0.5, 1.0, 2.0]) for s in (4, 8, 16, 32, 64)]
grids = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
anchors = torch.cat(grid_anchors(cells, grids, [4 << i for i in range(len(cells))]))
random = torch.Generator().manual_seed(0)
corner = torch.rand(1, 5000, 2, generator=random) * torch.tensor([1200.0, 700.0])
gts = torch.cat([corner, corner + 5 + 30 * torch.rand(1, 5000, 2, generator=random)], 2)
count, sizes = torch.tensor([5000]), torch.tensor([[800, 1344]])
rule = dict(high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True)
match_boxes(gts[:, :5], torch.tensor([5]), anchors[:50000], **rule)
peak, done, before = 0, False, resident()
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
watcher = threading.Thread(target=watch)
watcher.start()
a = match_boxes(gts, count, anchors, **rule)
b = match_anchors(gts, count, cells, grids, [4, 8, 16, 32, 64], sizes, straddle_thresh=-1, **rule)
done = True
watcher.join()
assert len(anchors) == 268569 and torch.equal(a, b) and (a >= 0).any()
print(max(peak, resident()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.skipif(_library._EXTENSION is None, reason="the C++ kernels are not built")
def test_memory_of_the_kernel_is_bounded() -> None:
    """5000 ground truths and 268,569 anchors, whose IoUs would fill 5 GB, add less than 50 MB to a process."""
    environment = {**os.environ, "FASTRCNN_BACKEND": "cpp"}
    run = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert 2_000_000 < int(run.stdout) < 50_000_000
