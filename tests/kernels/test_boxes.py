"""Areas, clipping and the small-box filter by hand and by their properties; ``test_box_iou.py`` has the pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrcnn_kernels import box_area, clip_boxes_to_image, is_large_enough, remove_small_boxes
from tests.kernels.nosync import forbid_host_sync

OFFSETS = (0, 1)
NAN = float("nan")
Box = tuple[float, float, float, float]


def random_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 80
    size = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 50
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


coordinate = st.floats(-50, 150, width=32)


@st.composite
def box_lists(draw: st.DrawFn, smallest: float = 0.0) -> torch.Tensor:
    corners = draw(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=6))
    raw = torch.tensor(corners)
    first, second = torch.minimum(raw[:, :2], raw[:, 2:]), torch.maximum(raw[:, :2], raw[:, 2:])
    return torch.cat([first, second + smallest], dim=1)


@pytest.mark.parametrize("offset", OFFSETS)
def test_box_area(offset: int) -> None:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 4.0], [2.5, 1.0, 2.5, 1.0], [5.0, 5.0, 3.0, 8.0]])
    expected = [[36.0, 0.0, -6.0], [50.0, 1.0, -4.0]][offset]
    assert box_area(boxes, box_offset=offset).tolist() == expected


def test_box_area_dtypes() -> None:
    big = torch.tensor([[0, 0, 1000, 1000]])
    assert box_area(big).dtype == torch.int64
    assert box_area(big).item() == 1_000_000
    assert box_area(big.to(torch.float16)).item() == 1_000_000, "float16 ends at 65504"
    assert box_area(big.to(torch.bfloat16)).dtype == torch.float32
    assert box_area(big.to(torch.float64)).dtype == torch.float64


def test_nan_spoils_only_its_own() -> None:
    boxes = random_boxes(6)
    spoiled = boxes.clone()
    spoiled[2, 1] = NAN
    others = [0, 1, 3, 4, 5]
    assert torch.equal(box_area(spoiled)[others], box_area(boxes)[others])
    assert torch.equal(clip_boxes_to_image(spoiled, (40, 60))[others], clip_boxes_to_image(boxes, (40, 60))[others])
    assert not is_large_enough(spoiled, 0)[2]
    assert remove_small_boxes(spoiled, 0).tolist() == others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    boxes = (random_boxes(9) * 10).to(dtype)
    clipped = clip_boxes_to_image(boxes, (400, 600))
    assert clipped.dtype == dtype
    assert torch.equal(is_large_enough(boxes, 40), is_large_enough(boxes.float(), 40))


def test_non_contiguous() -> None:
    boxes = random_boxes(8)
    strided = torch.empty(4, 16).T[::2, :].copy_(boxes)
    assert not strided.is_contiguous()
    assert torch.equal(clip_boxes_to_image(strided, (40, 60)), clip_boxes_to_image(boxes, (40, 60)))


@pytest.mark.parametrize("offset", OFFSETS)
def test_clip_boxes_to_image(offset: int) -> None:
    boxes = torch.tensor(
        [[-5.0, -6.0, 500.0, 600.0], [1.0, 2.0, 3.0, 4.0], [59.5, 39.5, 61.0, 41.0], [-9.0, -8.0, -3.0, -2.0]]
    )
    expected = torch.tensor(
        [
            [0.0, 0.0, 60.0 - offset, 40.0 - offset],
            [1.0, 2.0, 3.0, 4.0],
            [min(59.5, 60 - offset), min(39.5, 40 - offset), 60.0 - offset, 40.0 - offset],
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    assert torch.equal(clip_boxes_to_image(boxes, (40, 60), box_offset=offset), expected)
    sizes = torch.tensor([[40, 60], [20, 30]])
    batched = clip_boxes_to_image(boxes.expand(2, 4, 4), sizes, box_offset=offset)
    assert torch.equal(batched[0], expected)
    assert torch.equal(batched[1], clip_boxes_to_image(boxes, (20, 30), box_offset=offset))
    assert torch.equal(clip_boxes_to_image(boxes, sizes[1], box_offset=offset), batched[1])


@pytest.mark.parametrize("offset", OFFSETS)
@settings(deadline=None, max_examples=40)
@given(boxes=box_lists(), height=st.integers(1, 90), width=st.integers(1, 90))
def test_clip_properties(boxes: torch.Tensor, height: int, width: int, offset: int) -> None:
    once = clip_boxes_to_image(boxes, (height, width), box_offset=offset)
    assert torch.equal(clip_boxes_to_image(once, (height, width), box_offset=offset), once), "idempotent"
    limit = torch.tensor([width, height, width, height]) - offset
    assert bool(((once >= 0) & (once <= limit)).all())
    inside = ((boxes >= 0) & (boxes <= limit)).all(dim=1)
    assert torch.equal(once[inside], boxes[inside]), "boxes inside do not move"


@pytest.mark.parametrize("offset", OFFSETS)
def test_small_boxes(offset: int) -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 9.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 9.0, 3.9], [0.0, 0.0, 6.0, 7.0]])
    assert remove_small_boxes(boxes, 5, box_offset=offset).tolist() == ([1, 3] if offset == 0 else [0, 1, 3])
    large = is_large_enough(boxes.view(2, 2, 4), 5, box_offset=offset)
    assert large.shape == (2, 2)
    assert large.flatten().nonzero().flatten().tolist() == remove_small_boxes(boxes, 5, box_offset=offset).tolist()


def test_empty() -> None:
    none = torch.empty(0, 4)
    assert box_area(none).shape == (0,)
    assert clip_boxes_to_image(none, (4, 5)).shape == (0, 4)
    assert clip_boxes_to_image(torch.empty(0, 7, 4), torch.empty(0, 2, dtype=torch.int64)).shape == (0, 7, 4)
    assert clip_boxes_to_image(torch.empty(2, 0, 4), torch.ones(2, 2, dtype=torch.int64)).shape == (2, 0, 4)
    assert remove_small_boxes(none, 1).shape == (0,)
    assert is_large_enough(none, 1).shape == (0,)


@pytest.mark.parametrize("offset", OFFSETS)
def test_gradcheck(offset: int) -> None:
    boxes1 = random_boxes(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: box_area(a, box_offset=offset), (boxes1,))
    assert torch.autograd.gradcheck(lambda a: clip_boxes_to_image(a, (40, 60), box_offset=offset), (boxes1,))


def test_no_host_sync() -> None:
    boxes, sizes = random_boxes(2, 5), torch.tensor([[40, 60], [20, 30]])
    with forbid_host_sync(allow_constants=False):
        box_area(boxes)
        clip_boxes_to_image(boxes, sizes, box_offset=1)
        clip_boxes_to_image(boxes, (40, 60))
        is_large_enough(boxes, 3)


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    def everything(boxes: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        clipped = clip_boxes_to_image(boxes, sizes, box_offset=1)
        return clipped, box_area(boxes), is_large_enough(boxes, 3, box_offset=1)

    boxes, sizes = random_boxes(2, 5), torch.tensor([[40, 60], [20, 30]])
    for actual, expected in zip(
        torch.compile(everything, fullgraph=True)(boxes, sizes), everything(boxes, sizes), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_area(torch.zeros(3)), r"boxes must have the shape \[\.\.\., 4\], got \[3\]"),
        (lambda: box_area(torch.zeros(1, 4), box_offset=2), "box_offset must be 0 .* got 2"),
        (lambda: clip_boxes_to_image(torch.zeros(2, 3, 4), torch.ones(2)), r"size must be .* got \[2\]"),
        (lambda: remove_small_boxes(torch.zeros(2, 3, 4), 1), r"\[N, 4\], got \[2, 3, 4\]"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
