"""The checks of test_nms.py must be able to fail: one-line breakages of nms, each of which they have to reject."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrcnn_kernels.nms import (
    _greedy,
    _nms_rows,
    _overlaps,
    _resolve_fixed_point,
    _resolve_in_order,
    batched_nms_reference,
    comparison_threshold,
    compute_dtype,
    nms_padded_reference,
    nms_reference,
)
from tests.kernels.nms_oracle import loop_batched_nms, loop_nms, loop_nms_padded, make_boxes, make_groups
from tests.kernels.test_nms import BOUNDARY, GOLDEN, GOLDEN_BOXES, GOLDEN_SCORES, padded_inputs

FUNCTIONS = [
    comparison_threshold,
    compute_dtype,
    _overlaps,
    _resolve_in_order,
    _resolve_fixed_point,
    _greedy,
    nms_padded_reference,
    _nms_rows,
    nms_reference,
    batched_nms_reference,
]


def rebuild(function: str = "", old: str = "", new: str = "") -> SimpleNamespace:
    """The reference from its source, with one line of one function changed."""
    import ctypes

    # Small blocks: a breakage between blocks shows with few boxes.
    space: dict[str, Any] = {"torch": torch, "math": math, "ctypes": ctypes, "_BLOCK_ELEMENTS": 512}
    for original in FUNCTIONS:
        source = inspect.getsource(original)
        if original.__name__ == function:
            assert source.count(old) >= 1, f"{old!r} is not in {function}: this breakage no longer applies"
            source = source.replace(old, new)
        exec("from __future__ import annotations\n" + source, space)
    return SimpleNamespace(**space)


def check_values(candidate: SimpleNamespace) -> None:
    """What test_nms.py demands of a back-end, on fewer cases."""
    for kind, size, threshold, box_offset in (
        ("random", 40, 0.3, 0),
        ("clustered", 50, 0.5, 1),
        ("integer", 50, 0.5, 0),
        ("degenerate", 50, 0.0, 0),
    ):
        boxes, scores = make_boxes(kind, size, size)
        assert candidate.nms_reference(boxes, scores, threshold, box_offset).tolist() == loop_nms(
            boxes, scores, threshold, box_offset
        )
        groups = make_groups(size)
        keep = candidate.batched_nms_reference(boxes, scores, groups, threshold, box_offset)
        assert keep.tolist() == loop_batched_nms(boxes, scores, groups, threshold, box_offset)
    for segments, size, max_output in ((3, 20, 9), (1, 40, 60), (2, 50, 12)):
        boxes, scores = padded_inputs(segments, size)
        keep, count = candidate.nms_padded_reference(boxes, scores, 0.5, max_output, 0)
        assert (keep.tolist(), count.tolist()) == loop_nms_padded(boxes, scores, 0.5, max_output)
    # A chain in which each box drops the next, twice over: 32 boxes in blocks of 16, and in blocks of 8.
    start = torch.arange(32.0)[:, None] * 4
    chain = torch.cat([start, start * 0, start + 10, start * 0 + 10], 1).repeat(2, 1, 1)
    falling = torch.arange(32, 0, -1.0).repeat(2, 1)
    for boxes, scores in ((chain[:1], falling[:1]), (chain, falling)):
        keep, count = candidate.nms_padded_reference(boxes, scores, 0.4, 20, 0)
        assert (keep.tolist(), count.tolist()) == loop_nms_padded(boxes, scores, 0.4, 20)
    for threshold, kept in GOLDEN:
        keep = candidate.nms_reference(torch.tensor(GOLDEN_BOXES).float(), torch.tensor(GOLDEN_SCORES), threshold, 1)
        assert set(keep.tolist()) == kept
    for height, threshold, both in BOUNDARY:
        pair = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, height]])
        keep = candidate.nms_reference(pair, torch.tensor([2.0, 1.0]), threshold, 0)
        assert keep.tolist() == ([0, 1] if both else [0])


MUTATIONS = [
    ("_overlaps", "> threshold", ">= threshold"),
    ("_overlaps", "row_area + column_area - inter", "row_area + column_area"),
    ("_overlaps", "torch.minimum(row_x2, column_x2)", "torch.maximum(row_x2, column_x2)"),
    ("_overlaps", "(row_y2 - row_y1 + box_offset)", "(row_y2 - row_y1)"),
    ("_overlaps", "torch.maximum(row_x1, column_x1) + box_offset", "torch.maximum(row_x1, column_x1)"),
    ("_overlaps", "width.clamp_(min=0)", "width"),
    ("_overlaps", "height.clamp_(min=0)", "height"),
    ("_resolve_in_order", "& keep[:, row : row + 1]", ""),
    ("_resolve_in_order", "range(alive.shape[1] - 1)", "range(alive.shape[1] - 2)"),
    ("_resolve_fixed_point", "if torch.equal(new, keep):", "if True:"),
    ("_greedy", ".triu(1)", ".triu(0)"),
    ("_greedy", ".triu(1)", ""),
    ("_greedy", "& keep[:, :, None]).any(1)  # [S, P - stop]", ").any(1)"),
    ("_greedy", "alive[:, stop:] &= ~later", "pass"),
    ("nms_padded_reference", "descending=True", "descending=False"),
    ("nms_padded_reference", "!= -math.inf", "!= math.inf"),
    ("nms_padded_reference", ".clamp(max=max_output), max_output)", ".clamp(max=max_output - 1), max_output)"),
    ("nms_padded_reference", "kept.sum(1).clamp(max=max_output)", "kept.sum(1)"),
    ("nms_padded_reference", "max_output + 1), -1)", "max_output + 1), 0)"),
    ("nms_padded_reference", "kept.cumsum(1) - 1", "kept.cumsum(1)"),
    ("_nms_rows", "boxes.to(dtype)[order][None]", "boxes.to(dtype)[None]"),
    ("_nms_rows", "descending=True", "descending=False"),
    ("batched_nms_reference", "idxs == group", "idxs >= group"),
    ("batched_nms_reference", "order[kept[order]]", "kept.nonzero()[:, 0]"),
    ("comparison_threshold", "-1 if nearest.value > 0 else 1", "0"),
]


def test_the_reference_itself_passes() -> None:
    check_values(rebuild())


@pytest.mark.parametrize(
    ("function", "old", "new"), MUTATIONS, ids=[f"{f.strip('_')}-{i}" for i, (f, _, _) in enumerate(MUTATIONS)]
)
def test_a_broken_reference_is_rejected(function: str, old: str, new: str) -> None:
    broken = rebuild(function, old, new)
    with pytest.raises((AssertionError, RuntimeError)):
        check_values(broken)
