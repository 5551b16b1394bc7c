"""Anchors against maskrcnn-benchmark's published tables and scalar loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastrcnn_kernels import anchors_inside_image, cell_anchors, grid_anchors
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


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (5, 3), (0, 4), (4, 0)])
def test_grid_anchors_order(height: int, width: int) -> None:
    cell = cell_anchors(16, (32, 64), RATIOS)
    expected = [
        [a[0] + 16 * x, a[1] + 16 * y, a[2] + 16 * x, a[3] + 16 * y]
        for y in range(height)
        for x in range(width)
        for a in cell.tolist()
    ]
    actual = grid_anchors(cell, height, width, 16)
    assert actual.shape == (height * width * 6, 4)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, torch.tensor(expected).reshape(-1, 4))


def test_grid_of_the_walk_through() -> None:
    """Two images padded to 800 x 1344: 201600 + 50400 + 12600 + 3150 + 819 anchors."""
    maps = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    counts = [
        len(grid_anchors(cell_anchors(stride, [size], RATIOS), h, w, stride))
        for (stride, size), (h, w) in zip(FPN, maps, strict=True)
    ]
    assert counts == [201600, 50400, 12600, 3150, 819]


def inside_loop(anchors: torch.Tensor, sizes: torch.Tensor, t: float) -> torch.Tensor:
    rows = [
        [t < 0 or (x1 >= -t and y1 >= -t and x2 < width + t and y2 < height + t) for x1, y1, x2, y2 in anchors.tolist()]
        for height, width in sizes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(sizes), len(anchors))


@pytest.mark.parametrize("threshold", [0, 5, 16.5, -1])
def test_anchors_inside_image(threshold: float) -> None:
    anchors = grid_anchors(cell_anchors(8, [16, 32], RATIOS), 9, 12, 8)
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


def test_empty() -> None:
    cell = cell_anchors(4, [], RATIOS)
    assert cell.shape == (0, 4)
    assert grid_anchors(cell, 3, 4, 4).shape == (0, 4)
    sizes = torch.empty(0, 2, dtype=torch.int64)
    for threshold in (0, -1):
        assert anchors_inside_image(torch.zeros(5, 4), sizes, threshold).shape == (0, 5)
        assert anchors_inside_image(torch.zeros(0, 4), torch.ones(2, 2, dtype=torch.int64), threshold).shape == (2, 0)


def test_no_host_sync() -> None:
    cell, sizes = cell_anchors(4, [32], RATIOS), torch.tensor([[40, 60]])
    with forbid_host_sync(allow_constants=False):
        anchors = grid_anchors(cell, 10, 15, 4)
        anchors_inside_image(anchors, sizes, 0)
        anchors_inside_image(anchors, sizes, -1)


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    def both(cell: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        anchors = grid_anchors(cell, 10, 15, 4)
        return anchors, anchors_inside_image(anchors, sizes, 0)

    cell, sizes = cell_anchors(4, [32], RATIOS), torch.tensor([[40, 60], [30, 30]])
    for actual, expected in zip(torch.compile(both, fullgraph=True)(cell, sizes), both(cell, sizes), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cell_anchors(4, [32], RATIOS, style="caffe"), "unknown anchor style 'caffe': choose one of"),
        (lambda: cell_anchors(0, [32], RATIOS), "must be positive, got 0"),
        (lambda: cell_anchors(4, [32], [-1.0]), r"must be positive, got 4, \[32\], \[-1.0\]"),
        (lambda: grid_anchors(torch.zeros(4), 1, 1, 4), r"cell must have the shape \[A, 4\], got \[4\]"),
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
    right = grid_anchors(cell, 3, 5, 16).view(3, 5, 6, 4)
    for wrong in ((1, 0, 2, 3), (2, 0, 1, 3)):
        assert not torch.equal(right.permute(wrong).reshape(-1, 4), right.view(-1, 4))
