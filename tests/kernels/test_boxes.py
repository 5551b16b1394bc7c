"""Box geometry against scalar loops in float64, with properties and mutations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrcnn_kernels import box_area, box_iou, clip_boxes_to_image, is_large_enough, remove_small_boxes
from tests.kernels.nosync import forbid_host_sync

OFFSETS = (0, 1)
NAN = float("nan")
Box = tuple[float, float, float, float]


def random_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 80
    size = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 50
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def scalar_iou(a: Box, b: Box, offset: int) -> float:
    """IoU by cases, without any clamp: what the two intervals share, or nothing."""
    shared = 1.0
    for low, high in ((0, 2), (1, 3)):
        left, right = max(a[low], b[low]), min(a[high], b[high]) + offset
        shared *= right - left if right > left else 0.0
    total = sum(max(box[2] - box[0] + offset, 0.0) * max(box[3] - box[1] + offset, 0.0) for box in (a, b))
    return shared / (total - shared) if shared > 0 else 0.0


def iou_loop(boxes1: torch.Tensor, boxes2: torch.Tensor, offset: int) -> torch.Tensor:
    rows = [[scalar_iou(a, b, offset) for b in boxes2.tolist()] for a in boxes1.tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(boxes1), len(boxes2))


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


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 13), (65, 3), (0, 4), (4, 0), (0, 0)])
def test_box_iou_equals_loops(n: int, m: int, offset: int) -> None:
    boxes1, boxes2 = random_boxes(n), random_boxes(m, seed=1)
    actual = box_iou(boxes1, boxes2, box_offset=offset)
    assert actual.shape == (n, m)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), iou_loop(boxes1, boxes2, offset), rtol=1e-5, atol=1e-6)


def test_box_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    b = torch.tensor([[5.0, 0.0, 14.0, 9.0], [9.0, 9.0, 20.0, 20.0], [10.0, 0.0, 19.0, 9.0]])
    assert box_iou(a, b).tolist() == [[pytest.approx(36 / 126), 0.0, 0.0]]
    assert box_iou(a, b, box_offset=1).tolist() == [[pytest.approx(50 / 150), pytest.approx(1 / 243), 0.0]]


@pytest.mark.parametrize("offset", OFFSETS)
def test_box_iou_batch_dimensions(offset: int) -> None:
    boxes1, boxes2 = random_boxes(3, 5), random_boxes(3, 4, seed=2)
    batched = box_iou(boxes1, boxes2, box_offset=offset)
    assert torch.equal(
        batched, torch.stack([box_iou(a, b, box_offset=offset) for a, b in zip(boxes1, boxes2, strict=True)])
    )
    assert torch.equal(
        box_iou(boxes1, boxes2[0], box_offset=offset)[2], box_iou(boxes1[2], boxes2[0], box_offset=offset)
    )


@pytest.mark.parametrize("offset", OFFSETS)
@settings(deadline=None, max_examples=60)
@given(boxes1=box_lists(), boxes2=box_lists())
def test_box_iou_properties(boxes1: torch.Tensor, boxes2: torch.Tensor, offset: int) -> None:
    iou = box_iou(boxes1, boxes2, box_offset=offset)
    assert torch.equal(iou, box_iou(boxes2, boxes1, box_offset=offset).T), "symmetric"
    assert bool(((iou >= 0) & (iou <= 1)).all()), "in [0, 1]"
    with_itself = box_iou(boxes1, boxes1, box_offset=offset).diagonal()
    area = box_area(boxes1, box_offset=offset)
    assert bool((with_itself[area >= torch.finfo(area.dtype).tiny] == 1).all()), "1 with itself"
    assert bool((with_itself[area == 0] == 0).all()), "0 if empty"


@pytest.mark.parametrize("offset", OFFSETS)
def test_box_iou_degenerate(offset: int) -> None:
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    inverted = torch.tensor([[9.0, 9.0, 2.0, 2.0]])
    assert box_iou(point, point, box_offset=offset).item() == offset
    assert box_iou(inverted, inverted, box_offset=offset).item() == 0
    assert box_iou(inverted, point, box_offset=offset).item() == 0


def test_nan_spoils_only_its_own() -> None:
    boxes = random_boxes(6)
    spoiled = boxes.clone()
    spoiled[2, 1] = NAN
    others = [0, 1, 3, 4, 5]
    assert box_iou(spoiled, boxes)[2].isnan().all()
    assert torch.equal(box_iou(spoiled, boxes)[others], box_iou(boxes, boxes)[others])
    assert torch.equal(box_area(spoiled)[others], box_area(boxes)[others])
    assert torch.equal(clip_boxes_to_image(spoiled, (40, 60))[others], clip_boxes_to_image(boxes, (40, 60))[others])
    assert not is_large_enough(spoiled, 0)[2]
    assert remove_small_boxes(spoiled, 0).tolist() == others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    boxes = (random_boxes(9) * 10).to(dtype)
    assert torch.equal(box_iou(boxes, boxes), box_iou(boxes.float(), boxes.float()))
    clipped = clip_boxes_to_image(boxes, (400, 600))
    assert clipped.dtype == dtype
    assert torch.equal(is_large_enough(boxes, 40), is_large_enough(boxes.float(), 40))


def test_non_contiguous() -> None:
    boxes = random_boxes(8)
    strided = torch.empty(4, 16).T[::2, :].copy_(boxes)
    assert not strided.is_contiguous()
    assert torch.equal(box_iou(strided, strided), box_iou(boxes, boxes))
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
    boxes2 = random_boxes(4, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: box_iou(a, b, box_offset=offset), (boxes1, boxes2))
    assert torch.autograd.gradcheck(lambda a: box_area(a, box_offset=offset), (boxes1,))
    assert torch.autograd.gradcheck(lambda a: clip_boxes_to_image(a, (40, 60), box_offset=offset), (boxes1,))


def test_no_host_sync() -> None:
    boxes, sizes = random_boxes(2, 5), torch.tensor([[40, 60], [20, 30]])
    with forbid_host_sync(allow_constants=False):
        box_iou(boxes, boxes, box_offset=1)
        box_area(boxes)
        clip_boxes_to_image(boxes, sizes, box_offset=1)
        clip_boxes_to_image(boxes, (40, 60))
        is_large_enough(boxes, 3)


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    def everything(boxes: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        clipped = clip_boxes_to_image(boxes, sizes, box_offset=1)
        return clipped, box_iou(clipped, boxes, box_offset=1), box_area(boxes), is_large_enough(boxes, 3, box_offset=1)

    boxes, sizes = random_boxes(2, 5), torch.tensor([[40, 60], [20, 30]])
    for actual, expected in zip(
        torch.compile(everything, fullgraph=True)(boxes, sizes), everything(boxes, sizes), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_area(torch.zeros(3)), r"boxes must have the shape \[\.\.\., 4\], got \[3\]"),
        (lambda: box_iou(torch.zeros(1, 4), torch.zeros(1, 5)), r"boxes2 must .* got \[1, 5\]"),
        (lambda: box_area(torch.zeros(1, 4), box_offset=2), "box_offset must be 0 .* got 2"),
        (lambda: clip_boxes_to_image(torch.zeros(2, 3, 4), torch.ones(2)), r"size must be .* got \[2\]"),
        (lambda: remove_small_boxes(torch.zeros(2, 3, 4), 1), r"\[N, 4\], got \[2, 3, 4\]"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _iou_without_offset_in_intersection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (box_area(a, box_offset=1)[:, None] + box_area(b, box_offset=1) - shared)


MUTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "no offset at all": lambda a, b: box_iou(a, b),
    "offset only in the areas": _iou_without_offset_in_intersection,
    "x and y swapped in one": lambda a, b: box_iou(a[:, [1, 0, 3, 2]], b, box_offset=1),
    "transposed": lambda a, b: box_iou(b, a, box_offset=1),
    "union counts the intersection twice": lambda a, b: (iou := box_iou(a, b, box_offset=1)) / (1 + iou),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_rejects(name: str) -> None:
    boxes1, boxes2 = random_boxes(9), random_boxes(9, seed=1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            MUTATIONS[name](boxes1, boxes2).double(), iou_loop(boxes1, boxes2, 1), rtol=1e-5, atol=1e-6
        )
