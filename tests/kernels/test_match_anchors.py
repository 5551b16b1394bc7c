"""match_anchors against anchors that are written out, matched and filtered one operator at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrcnn_kernels import anchors_inside_image, cell_anchors, match_anchors
from fastrcnn_kernels.anchors import grid_anchors_reference
from fastrcnn_kernels.matcher_reference import match_boxes_reference
from tests.kernels.helpers import ForbidSync
from tests.kernels.nosync import forbid_host_sync

RATIOS = (0.5, 1.0, 2.0)
RPN = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality_matches": True, "box_offset": 1}


def pyramid(
    height: int, width: int, levels: int = 3, sizes: tuple[float, ...] = (1,), dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[tuple[int, int]], list[int]]:
    """Cells, grid sizes and strides of an image: strides 8, 16, ..., anchors of four strides a side times ``sizes``."""
    strides = [8 * 2**level for level in range(levels)]
    cells = [cell_anchors(s, [4 * s * size for size in sizes], RATIOS).to(dtype) for s in strides]
    return cells, [(-(-height // s), -(-width // s)) for s in strides], strides


def ground_truths(*shape: int, seed: int = 0, extent: float = 100) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=random) * extent
    return torch.cat([corner, corner + 4 + torch.rand(*shape, 2, generator=random) * extent / 2], -1)


def written_out(
    gt_boxes: torch.Tensor,
    gt_count: torch.Tensor,
    cells: list[torch.Tensor],
    grid_sizes: list[tuple[int, int]],
    strides: list[int],
    image_sizes: torch.Tensor,
    straddle_thresh: float = 0,
    **arguments: Any,
) -> torch.Tensor:
    """The anchors in memory, matched by the reference on the CPU, then the filter."""
    flat = [side for size in grid_sizes for side in size]
    anchors = grid_anchors_reference([cell.cpu() for cell in cells], flat, strides)
    matched = match_boxes_reference(gt_boxes.cpu(), gt_count.cpu(), anchors, **arguments)
    return torch.where(anchors_inside_image(anchors, image_sizes.cpu(), straddle_thresh), matched, -2)


def check(device: torch.device, gts: torch.Tensor, count: list[int], **change: Any) -> torch.Tensor:
    """The operator on the device gives what the anchors written out give; returns it."""
    arguments = {**RPN, **{k: v for k, v in change.items() if k in RPN}}
    straddle = change.get("straddle_thresh", 0)
    cells, grid_sizes, strides = change.get("pyramid") or pyramid(96, 120)
    sizes = change.get("image_sizes") or [[90, 111], [96, 120], [40, 50]]
    image_sizes = torch.tensor(sizes[: len(gts)], dtype=torch.int64).view(-1, 2)
    inputs = (gts.to(device), torch.tensor(count, device=device, dtype=torch.int64), [c.to(device) for c in cells])
    actual = match_anchors(*inputs, grid_sizes, strides, image_sizes.to(device), straddle_thresh=straddle, **arguments)
    expected = written_out(*inputs, grid_sizes, strides, image_sizes, straddle, **arguments)
    assert actual.dtype == torch.int64
    assert actual.device.type == device.type
    assert torch.equal(actual.cpu(), expected)
    return actual.cpu()


@pytest.mark.parametrize("straddle", [0, 5.5, -1])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("low_quality", [True, False])
def test_equals_anchors_written_out(device: torch.device, straddle: float, offset: int, low_quality: bool) -> None:
    matched = check(
        device,
        ground_truths(3, 7),
        [7, 0, 3],
        straddle_thresh=straddle,
        box_offset=offset,
        allow_low_quality_matches=low_quality,
    )
    kinds = set(matched.flatten().tolist())
    assert -1 in kinds
    assert -2 in kinds or not low_quality
    assert {0, 1} <= kinds or not low_quality or straddle >= 0


def test_outside_anchors_take_part_in_the_matching(device: torch.device) -> None:
    """A ground truth at the edge, whose best anchor sticks out: nobody inside gets its low-quality match."""
    gts = torch.tensor([[[0.0, 0.0, 12.0, 12.0]]])
    image = [[96, 120]]
    everywhere = check(device, gts, [1], straddle_thresh=-1, image_sizes=image)
    inside = check(device, gts, [1], image_sizes=image)
    assert (everywhere == 0).any()
    assert not (inside >= 0).any()
    assert set(inside.flatten().tolist()) == {-2, -1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types(device: torch.device, dtype: torch.dtype) -> None:
    """Half cells are computed with in float32; float64 ground truths with float32 cells keep the float32 anchors."""
    cells, grid_sizes, strides = pyramid(48, 60, 2, dtype=dtype)
    at_least_float32 = [c if dtype == torch.float64 else c.float() for c in cells]
    image_sizes = torch.tensor([[47, 60]])
    for gt_dtype in (torch.float32, dtype):
        gts, count = ground_truths(1, 5, extent=40).to(gt_dtype), torch.tensor([5])
        actual = match_anchors(
            gts.to(device), count.to(device), [c.to(device) for c in cells], grid_sizes, strides,
            image_sizes.to(device), straddle_thresh=0.1, **RPN,
        )  # fmt: skip
        expected = written_out(gts, count, at_least_float32, grid_sizes, strides, image_sizes, 0.1, **RPN)
        assert torch.equal(actual.cpu(), expected)
    mixed = [cells[0].float(), cells[1].float()]
    actual = match_anchors(
        gts.double().to(device), count.to(device), [c.to(device) for c in mixed], grid_sizes, strides,
        image_sizes.to(device), **RPN,
    )  # fmt: skip
    assert torch.equal(actual.cpu(), written_out(gts.double(), count, mixed, grid_sizes, strides, image_sizes, **RPN))


@pytest.mark.parametrize("levels", [1, 5, 6, 8])
def test_levels(device: torch.device, levels: int) -> None:
    """Down to levels of one pixel, anchors of several sizes, and more levels than the Triton kernels take."""
    check(device, ground_truths(1, 3, extent=30), [3], pyramid=pyramid(30, 41, levels, (0.5, 1)), straddle_thresh=20)


def test_levels_that_differ(device: torch.device) -> None:
    """Another number of anchors on each level, a level without pixels and one without anchors."""
    cells, grid_sizes, strides = pyramid(40, 50, 4)
    cells = [cells[0][:1], cells[1], cells[2][:0], torch.cat([cells[3], cells[3] / 2])]
    grid_sizes = [grid_sizes[0], (0, 7), grid_sizes[2], grid_sizes[3]]
    check(device, ground_truths(1, 3, extent=30), [3], pyramid=(cells, grid_sizes, strides), straddle_thresh=30)


def test_anchors_that_are_not_finite(device: torch.device) -> None:
    cells, grid_sizes, strides = pyramid(40, 50, 2)
    for column, value in enumerate((float("nan"), float("inf"), -float("inf"), float("nan"))):
        cells[0][1, column] = value
        for straddle in (-1, 10):
            check(
                device, ground_truths(1, 3, extent=30), [3], pyramid=(cells, grid_sizes, strides),
                straddle_thresh=straddle, low_threshold=0.0,
            )  # fmt: skip


@pytest.mark.parametrize(("images", "num_gts"), [(0, 3), (2, 0), (0, 0)])
def test_empty(device: torch.device, images: int, num_gts: int) -> None:
    matched = check(device, torch.zeros(images, num_gts, 4), [num_gts] * images)
    assert set(matched.flatten().tolist()) <= {-1, -2}
    nowhere = pyramid(0, 0, 2)
    assert check(device, torch.zeros(images, num_gts, 4), [num_gts] * images, pyramid=nowhere).shape == (images, 0)


def test_ground_truth_that_fits_no_anchor(device: torch.device) -> None:
    """Every anchor is then a low-quality match, but those that stick out are not used."""
    gts = torch.tensor([[[900.0, 900.0, 909.0, 909.0], [10.0, 10.0, 60.0, 60.0]]])
    matched = check(device, gts, [2])
    assert set(matched.flatten().tolist()) == {-2, 0, 1}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_many_tiles(threads: int) -> None:
    """40,000 anchors on the CPU, two images."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gts, large = ground_truths(2, 40, extent=700), pyramid(800, 1000)
        check(torch.device("cpu"), gts, [40, 11], pyramid=large, image_sizes=[[800, 1000], [700, 990]])
    finally:
        torch.set_num_threads(before)


def operator_inputs(device: torch.device) -> tuple[Any, ...]:
    cells, grid_sizes, strides = pyramid(48, 60, 2)
    gts, count, sizes = ground_truths(2, 5, extent=40), torch.tensor([5, 4]), torch.tensor([[40, 55], [48, 60]])
    return gts.to(device), count.to(device), [c.to(device) for c in cells], grid_sizes, strides, sizes.to(device)


def test_opcheck(device: torch.device) -> None:
    gts, count, cells, grid_sizes, strides, sizes = operator_inputs(device)
    flat = [extent for size in grid_sizes for extent in size]
    arguments = gts, count, cells, flat, strides, sizes, 0.7, 0.3, True, 0.0, 1
    torch.library.opcheck(torch.ops.fastrcnn_kernels.match_anchors.default, arguments)


@pytest.mark.slow
def test_compile_fullgraph(device: torch.device) -> None:
    inputs = operator_inputs(device)
    compiled = torch.compile(lambda *args: match_anchors(*args, **RPN), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), match_anchors(*inputs, **RPN))


def test_no_host_sync(device: torch.device) -> None:
    cells, grid_sizes, strides = pyramid(96, 120)
    gts, count, sizes = ground_truths(2, 5), torch.tensor([5, 4]), torch.tensor([[90, 111], [96, 120]])
    inputs = gts.to(device), count.to(device), [c.to(device) for c in cells], grid_sizes, strides, sizes.to(device)
    with ForbidSync(), forbid_host_sync(allow_constants=False):
        match_anchors(*inputs, **RPN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_boxes": torch.zeros(3, 4)}, r"\[N, G, 4\], got \[3, 4\]"),
        ({"gt_count": torch.zeros(3)}, r"gt_count .* \[2\], got \[3\]"),
        ({"cells": []}, "an entry a level, got 0, 3 and 3"),
        ({"strides": [8]}, "an entry a level, got 3, 3 and 1"),
        ({"cells": [torch.zeros(4)] * 3}, r"cells must have the shape \[A, 4\] each, got \[4\]"),
        ({"image_sizes": torch.zeros(2, 3)}, r"image_sizes must have the shape \[2, 2\], got \[2, 3\]"),
        ({"low_threshold": 0.8}, "0.8 and 0.7"),
        ({"box_offset": 2}, "got 2"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    cells, grid_sizes, strides = pyramid(96, 120)
    arguments: dict[str, Any] = {
        "gt_boxes": ground_truths(2, 5),
        "gt_count": torch.tensor([5, 4]),
        "cells": cells,
        "grid_sizes": grid_sizes,
        "strides": strides,
        "image_sizes": torch.tensor([[90, 111], [96, 120]]),
        **RPN,
    }
    call: Callable[..., torch.Tensor] = match_anchors
    call(**arguments)
    with pytest.raises(ValueError, match=message):
        call(**{**arguments, **change})
