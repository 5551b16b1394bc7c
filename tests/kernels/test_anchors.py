"""Anchors against maskrcnn-benchmark's published tables and scalar loops; the grids on every back-end."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastrcnn_kernels import anchors_inside_image, cell_anchors, grid_anchors
from tests.kernels.helpers import ForbidSync, Place
from tests.kernels.nosync import forbid_host_sync

RATIOS = (0.5, 1.0, 2.0)
FPN = {
    (4, 32): [[-22, -10, 25, 13], [-14, -14, 17, 17], [-10, -22, 13, 25]],
    (8, 64): [[-40, -20, 47, 27], [-28, -28, 35, 35], [-20, -44, 27, 51]],
    (16, 128): [[-84, -40, 99, 55], [-56, -56, 71, 71], [-36, -80, 51, 95]],
    (32, 256): [[-164, -72, 195, 103], [-112, -112, 143, 143], [-76, -168, 107, 199]],
    (64, 512): [[-332, -152, 395, 215], [-224, -224, 287, 287], [-148, -328, 211, 391]],
}
C4 = [
    [-15, -4, 30, 19], [-38, -16, 53, 31], [-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199],
    [-8, -8, 23, 23], [-24, -24, 39, 39], [-56, -56, 71, 71], [-120, -120, 135, 135], [-248, -248, 263, 263],
    [-3, -14, 18, 29], [-14, -36, 29, 51], [-36, -80, 51, 95], [-80, -168, 95, 183], [-168, -344, 183, 359],
]  # fmt: skip
RETINANET = [[-18, -8, 25, 15], [-23.7183, -11.1191, 30.7183, 18.1191], [-30.9228, -15.0488, 37.9228, 22.0488]]


def half_even(value: float) -> int:
    """Rounding of numpy, written out: a tie goes to the even neighbour."""
    low = math.floor(value)
    rest = value - low
    if rest == 0.5:
        return low if low % 2 == 0 else low + 1
    return low if rest < 0.5 else low + 1


def mb_cells(
    stride: int, sizes: tuple[float, ...], ratios: tuple[float, ...], rounding: Callable[[float], float] = half_even
) -> list[list[float]]:
    """maskrcnn-benchmark's two enumerations (ratio, then scale), with windows (x1, y1, x2, y2) in between."""
    centre = (stride - 1) / 2
    cells = []
    for ratio in ratios:
        width = rounding(math.sqrt(stride * stride / ratio))
        height = rounding(width * ratio)
        for size in sizes:
            w, h = width * (size / stride), height * (size / stride)
            cells.append([centre - (w - 1) / 2, centre - (h - 1) / 2, centre + (w - 1) / 2, centre + (h - 1) / 2])
    return cells


@pytest.mark.parametrize(("stride", "size"), FPN)
def test_cells_of_fpn(stride: int, size: int) -> None:
    cells = cell_anchors(stride, [size], RATIOS)
    assert cells.dtype == torch.float32
    assert cells.tolist() == FPN[stride, size]


def test_cells_of_c4() -> None:
    assert cell_anchors(16, (32, 64, 128, 256, 512), RATIOS).tolist() == C4


def test_cells_of_retinanet() -> None:
    octaves = [32 * 2 ** (i / 3) for i in range(3)]
    cells = cell_anchors(8, octaves, RATIOS)
    torch.testing.assert_close(cells[:3], torch.tensor(RETINANET), atol=1e-4, rtol=0)
    assert cells[3].tolist() == [-12, -12, 19, 19]


def test_ties_round_to_even() -> None:
    """At stride 32 and ratio 0.5, height = 45 * 0.5 = 22.5 becomes 22: 176 high at size 256, not 184."""
    x1, y1, x2, y2 = cell_anchors(32, [256], [0.5])[0].tolist()
    assert (x2 - x1 + 1, y2 - y1 + 1) == (360, 176)


@pytest.mark.parametrize("stride", [1, 4, 7, 16, 32, 128])
@pytest.mark.parametrize("ratios", [RATIOS, (1.0,), (0.33, 3.0, 0.75)])
def test_cells_equal_loops(stride: int, ratios: tuple[float, ...]) -> None:
    sizes = (24.0, 33.5, 512.0)
    expected = torch.tensor(mb_cells(stride, sizes, ratios), dtype=torch.float64).float()
    assert torch.equal(cell_anchors(stride, sizes, ratios), expected)


def test_other_styles() -> None:
    half = 32 / math.sqrt(2)
    cells = cell_anchors(4, [32, 64], [0.5, 1.0], style="detectron2")
    expected = [[-half, -half / 2, half, half / 2], [-16, -16, 16, 16]]
    torch.testing.assert_close(cells[:2], torch.tensor(expected))
    torch.testing.assert_close(cells[2:], 2 * torch.tensor(expected))
    cells = cell_anchors(4, [32, 64], [0.5, 1.0], style="torchvision")
    assert cells.tolist() == [[-23, -11, 23, 11], [-45, -23, 45, 23], [-16, -16, 16, 16], [-32, -32, 32, 32]]


def test_torchvision_style_equals_torchvision() -> None:
    generator = pytest.importorskip("torchvision.models.detection.anchor_utils").AnchorGenerator()
    for sizes in ((32,), (64.0, 100.0), (128, 161, 203)):
        expected = generator.generate_anchors(sizes, RATIOS)
        assert torch.equal(cell_anchors(4, sizes, RATIOS, style="torchvision"), expected)


def test_cells_are_fresh() -> None:
    cell_anchors(4, [32], RATIOS).zero_()
    assert cell_anchors(4, [32], RATIOS).tolist() == FPN[4, 32]


def grid_loop(cell: torch.Tensor, height: int, width: int, stride: int) -> torch.Tensor:
    rows = [
        [a[0] + stride * x, a[1] + stride * y, a[2] + stride * x, a[3] + stride * y]
        for y in range(height)
        for x in range(width)
        for a in cell.tolist()
    ]
    return torch.tensor(rows, dtype=cell.dtype).reshape(-1, 4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (5, 3), (0, 4), (4, 0), (9, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_anchors_order(device: torch.device, height: int, width: int, dtype: torch.dtype) -> None:
    cell = cell_anchors(16, (32, 64), RATIOS).to(dtype)
    (actual,) = grid_anchors([cell.to(device)], [(height, width)], [16])
    assert actual.shape == (height * width * 6, 4)
    assert actual.dtype == dtype
    assert torch.equal(actual.cpu(), grid_loop(cell, height, width, 16))


@pytest.mark.parametrize("levels", [1, 2, 5, 6, 7, 13])
def test_grid_of_many_levels(device: torch.device, levels: int) -> None:
    """Every level against the loop: odd sizes, cells of different length, a level without pixels or anchors, and more
    levels than one launch takes."""
    cells = [cell_anchors(4 + i, (16.0, 33.3)[: 1 + i % 2], RATIOS[: 1 + i % 3]) for i in range(levels)]
    sizes = [(7 + 3 * i, 11 - i % 5) for i in range(levels)]
    if levels > 5:
        sizes[2], cells[4] = (0, 9), torch.empty(0, 4)
    strides = [4 + i for i in range(levels)]
    grids = grid_anchors([cell.to(device) for cell in cells], sizes, strides)
    assert len(grids) == levels
    for grid, cell, (height, width), stride in zip(grids, cells, sizes, strides, strict=True):
        assert torch.equal(grid.cpu(), grid_loop(cell, height, width, stride))
        assert grid.untyped_storage().data_ptr() == grids[0].untyped_storage().data_ptr(), "views of one buffer"


def test_grid_of_strided_and_half_cells(device: torch.device) -> None:
    cell = cell_anchors(16, (32, 64), RATIOS)
    strided = cell.T.contiguous().T.to(device)
    assert not strided.is_contiguous()
    half = cell.to(torch.bfloat16).to(device)
    grids = grid_anchors([strided, half], [(3, 5), (2, 2)], [16, 32])
    assert torch.equal(grids[0].cpu(), grid_loop(cell, 3, 5, 16))
    assert grids[1].dtype == torch.float32
    assert torch.equal(grids[1].cpu(), grid_loop(cell.to(torch.bfloat16).float(), 2, 2, 32))


def test_grid_of_the_walk_through(place: Place) -> None:
    """Two images padded to 800 x 1344: 201600 + 50400 + 12600 + 3150 + 819 anchors."""
    if place == Place("triton", "cpu"):
        pytest.skip("a thousand programs in the interpreter")
    device = torch.device(place.device)
    maps = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    cells = [cell_anchors(stride, [size], RATIOS).to(device) for stride, size in FPN]
    grids = grid_anchors(cells, maps, [stride for stride, _ in FPN])
    assert [len(grid) for grid in grids] == [201600, 50400, 12600, 3150, 819]
    for grid, cell, (height, width), (stride, _) in zip(grids, cells, maps, FPN, strict=True):
        last = cell + torch.tensor([width - 1, height - 1] * 2, device=device) * stride
        assert torch.equal(grid[-3:], last)
        assert torch.equal(grid[:3], cell)


def inside_loop(anchors: torch.Tensor, sizes: torch.Tensor, t: float) -> torch.Tensor:
    rows = [
        [t < 0 or (x1 >= -t and y1 >= -t and x2 < width + t and y2 < height + t) for x1, y1, x2, y2 in anchors.tolist()]
        for height, width in sizes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(sizes), len(anchors))


@pytest.mark.parametrize("threshold", [0, 5, 16.5, -1])
def test_anchors_inside_image(threshold: float) -> None:
    (anchors,) = grid_anchors([cell_anchors(8, [16, 32], RATIOS)], [(9, 12)], [8])
    sizes = torch.tensor([[72, 96], [50, 90], [8, 8]])
    actual = anchors_inside_image(anchors, sizes, threshold)
    assert actual.dtype == torch.bool
    assert torch.equal(actual, inside_loop(anchors, sizes, threshold))
    if threshold == 0:
        assert 0 < int(actual[0].sum()) < len(anchors), "the case would prove nothing"


def test_inside_boundary_is_strict_on_the_far_side() -> None:
    anchors = torch.tensor(
        [[0.0, 0.0, 59.0, 39.0], [0.0, 0.0, 60.0, 39.0], [0.0, 0.0, 59.0, 40.0], [-1.0, 0.0, 9.0, 9.0]]
    )
    assert anchors_inside_image(anchors, torch.tensor([[40, 60]]), 0).tolist() == [[True, False, False, False]]
    spoiled = torch.tensor([[float("nan"), 0.0, 9.0, 9.0]])
    assert anchors_inside_image(torch.cat([spoiled, anchors]), torch.tensor([[40, 60]]), 0)[0, :2].tolist() == [
        False,
        True,
    ]


def test_empty(device: torch.device) -> None:
    cell = cell_anchors(4, [], RATIOS)
    assert cell.shape == (0, 4)
    assert [grid.shape for grid in grid_anchors([cell.to(device)] * 2, [(3, 4), (0, 0)], [4, 8])] == [(0, 4)] * 2
    sizes = torch.empty(0, 2, dtype=torch.int64)
    for threshold in (0, -1):
        assert anchors_inside_image(torch.zeros(5, 4), sizes, threshold).shape == (0, 5)
        assert anchors_inside_image(torch.zeros(0, 4), torch.ones(2, 2, dtype=torch.int64), threshold).shape == (2, 0)


def test_no_host_sync(device: torch.device) -> None:
    cell, sizes = cell_anchors(4, [32], RATIOS).to(device), torch.tensor([[40, 60]], device=device)
    with ForbidSync():
        grid_anchors([cell, cell], [(10, 15), (5, 8)], [4, 8])
    with forbid_host_sync(allow_constants=False):
        anchors_inside_image(cell, sizes, 0)
        anchors_inside_image(cell, sizes, -1)


def test_opcheck(device: torch.device) -> None:
    cells = [cell_anchors(4, [32], RATIOS).to(device), cell_anchors(8, [64], RATIOS).to(device)]
    torch.library.opcheck(torch.ops.fastrcnn_kernels.grid_anchors.default, (cells, [3, 4, 2, 2], [4, 8]))


def test_compile_fullgraph(device: torch.device) -> None:
    def both(cell: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        anchors = torch.cat(grid_anchors([cell, cell * 2], [(10, 15), (5, 8)], [4, 8]))
        return anchors, anchors_inside_image(anchors, sizes, 0)

    cell, sizes = cell_anchors(4, [32], RATIOS).to(device), torch.tensor([[40, 60], [30, 30]], device=device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(cell, sizes), both(cell, sizes), strict=True):
        assert torch.equal(actual, expected)


def test_equals_torchvision() -> None:
    utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
    generator = utils.AnchorGenerator(((32,), (64, 100)), (RATIOS, RATIOS))
    theirs = generator.grid_anchors([(9, 13), (5, 7)], [[torch.tensor(8), torch.tensor(8)], [torch.tensor(16)] * 2])
    ours = grid_anchors(generator.cell_anchors, [(9, 13), (5, 7)], [8, 16])
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cell_anchors(4, [32], RATIOS, style="caffe"), "unknown anchor style 'caffe': choose one of"),
        (lambda: cell_anchors(0, [32], RATIOS), "must be positive, got 0"),
        (lambda: cell_anchors(4, [32], [-1.0]), r"must be positive, got 4, \[32\], \[-1.0\]"),
        (lambda: grid_anchors([torch.zeros(4)], [(1, 1)], [4]), r"cells must have the shape \[A, 4\], got \[4\]"),
        (lambda: grid_anchors([torch.zeros(1, 4)], [(1, 1)], [4, 8]), "one entry a level, got 1, 1 and 2"),
        (lambda: grid_anchors([], [], []), "one entry a level, got 0, 0 and 0"),
        (
            lambda: grid_anchors([torch.zeros(1, 4), torch.zeros(1, 4, device="meta")], [(1, 1)] * 2, [4, 8]),
            "on one device, got cpu and meta",
        ),
        (lambda: anchors_inside_image(torch.zeros(1, 4), torch.ones(2), 0), r"image_sizes must .* got \[2\]"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "rounding",
    [
        pytest.param(lambda v: math.floor(v + 0.5), id="half up"),
        pytest.param(math.floor, id="down"),
        pytest.param(lambda v: v, id="none"),
    ],
)
def test_the_tables_reject_another_rounding(rounding: Callable[[float], float]) -> None:
    assert [mb_cells(stride, (size,), RATIOS, rounding) for stride, size in FPN] != list(FPN.values())
    assert [mb_cells(stride, (size,), RATIOS) for stride, size in FPN] == list(FPN.values())


def test_the_loop_rejects_other_orders() -> None:
    cell = cell_anchors(16, (32, 64), RATIOS)
    right = grid_anchors([cell], [(3, 5)], [16])[0].view(3, 5, 6, 4)
    for wrong in ((1, 0, 2, 3), (2, 0, 1, 3)):
        assert not torch.equal(right.permute(wrong).reshape(-1, 4), right.view(-1, 4))
