"""Pasted masks, pixel for pixel: maskrcnn-benchmark's Masker, torchvision, detectron2, and float64 loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn_kernels import paste, paste_masks
from tests.kernels.exact_fma import exact_fma  # noqa: F401  a fixture
from tests.kernels.helpers import Guards, Place
from tests.kernels.mutations import mutated
from tests.kernels.paste_oracle import (
    HEIGHT,
    WIDTH,
    continuous_by_loops,
    paste_by_detectron2,
    paste_by_loops,
    paste_by_maskrcnn_benchmark,
    random_boxes,
    smooth_masks,
)

PEERS = ("maskrcnn_benchmark", "detectron2")


def some(place: Place, count: int) -> int:
    """How many masks a test pastes: the interpreter takes hundredths of a second for each."""
    return min(count, 5) if place == Place("triton", "cpu") else count


def pasted(
    place: Place, masks: Tensor, boxes: Tensor, size: tuple[int, int] = (HEIGHT, WIDTH), **others: Any
) -> Tensor:
    return paste_masks(masks.to(place.device), boxes.to(place.device), size, **others).cpu()


def wanted(
    masks: Tensor, boxes: Tensor, convention: str, threshold: float = 0.5, padding: int = 1, size: Any = (HEIGHT, WIDTH)
) -> Tensor:
    """The peer's pixels."""
    if convention == "detectron2":
        return torch.stack([paste_by_detectron2(m, b, *size, threshold) for m, b in zip(masks, boxes, strict=True)])
    return torch.stack(
        [paste_by_maskrcnn_benchmark(m, b, *size, threshold, padding) for m, b in zip(masks, boxes, strict=True)]
    )


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 14, 28])
def test_equals_maskrcnn_benchmark(place: Place, guarded: Guards, size: int, padding: int) -> None:
    count = some(place, 200)
    masks, boxes = smooth_masks(200, size, 0)[-count:], random_boxes(200, size)[-count:]
    found = pasted(place, guarded(masks), guarded(boxes), padding=padding)
    assert found.shape == (count, HEIGHT, WIDTH)
    assert found.dtype == torch.uint8
    assert 0 < found.float().mean() < 0.9
    assert torch.equal(found, wanted(masks, boxes, "maskrcnn_benchmark", padding=padding))


@pytest.mark.parametrize("size", [1, 14, 28, 31])
def test_equals_detectron2(place: Place, guarded: Guards, size: int) -> None:
    count = some(place, 200)
    masks, boxes = smooth_masks(200, size, 0)[-count:], random_boxes(200, size)[-count:]
    found = pasted(place, guarded(masks), guarded(boxes), convention="detectron2")
    assert 0 < found.float().mean() < 0.9
    assert torch.equal(found, wanted(masks, boxes, "detectron2"))


@pytest.mark.parametrize("convention", PEERS)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.9, -1.0])
def test_threshold(place: Place, convention: str, threshold: float) -> None:
    count = some(place, 60)
    masks, boxes = smooth_masks(count, 28, 1), random_boxes(count, 7)
    found = pasted(place, masks, boxes, threshold=threshold, convention=convention)
    assert torch.equal(found, wanted(masks, boxes, convention, threshold))
    assert found.max() == (1 if threshold >= 0 else found.max()) > 0


def test_large_boxes(place: Place) -> None:
    """The sides that make F.interpolate take its other kernel, at the border between the two, and far more."""
    extents = [(63, 63), (64, 63), (64, 64), (100, 27), (127, 1), (150, 200), (29.5, 270), (400, 3)]
    corner = torch.tensor([[3.25, 2.5]]).repeat(len(extents), 1)
    boxes = torch.cat([corner, corner + torch.tensor(extents, dtype=torch.float32)], dim=1)
    masks, size = smooth_masks(len(extents), 28, 8), (210, 300)
    if place == Place("triton", "cpu"):
        masks, boxes, size = masks[:5], boxes[:5], (70, 110)
    for convention in PEERS:
        found = pasted(place, masks, boxes, size, convention=convention)
        assert torch.equal(found, wanted(masks, boxes, convention, size=size))


def test_at_the_threshold(place: Place) -> None:
    """0.5 everywhere: not drawn where the threshold must be exceeded, drawn where it must be reached."""
    mask, box = torch.full((1, 8, 8), 0.5), torch.tensor([[4.0, 4, 12, 12]])
    assert not pasted(place, mask, box, (20, 20)).any()
    assert pasted(place, mask + 1e-3, box, (20, 20)).any()
    drawn = pasted(place, mask, box, (20, 20), convention="detectron2")
    assert torch.equal(drawn, wanted(mask, box, "detectron2", size=(20, 20)))
    assert drawn[0, 5:11, 5:11].all()


def flat_masks(count: int) -> tuple[Tensor, Tensor, float]:
    """Masks of one value which is the threshold too: inside its box each pixel is decided by the rounding of a sum."""
    boxes = random_boxes(200, 5)[:count]
    boxes[0] = torch.tensor([-30.0, -20, 75, 57])
    return torch.full((count, 28, 28), 0.7), boxes, 0.7


@pytest.mark.parametrize("convention", PEERS)
def test_sums_round_as_the_peers(place: Place, convention: str) -> None:
    masks, boxes, threshold = flat_masks(some(place, 100))
    found = pasted(place, masks, boxes, convention=convention, threshold=threshold)
    again = paste._paste_masks_reference(masks, boxes, HEIGHT, WIDTH, threshold, 1, convention)
    assert torch.equal(found, again)
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("PyTorch does not fuse multiplications and additions here")
    assert torch.equal(found, wanted(masks, boxes, convention, threshold))


@pytest.mark.parametrize("convention", PEERS)
def test_equals_loops(place: Place, convention: str) -> None:
    count = some(place, 25)
    masks, boxes = smooth_masks(25, 14, 2)[:count], random_boxes(25, 3)[:count]
    found = pasted(place, masks, boxes, convention=convention)
    for mask, box, image in zip(masks, boxes.tolist(), found.numpy(), strict=True):
        if convention == "detectron2":
            values = continuous_by_loops(mask, box, HEIGHT, WIDTH)
        else:
            values = paste_by_loops(mask, box, HEIGHT, WIDTH, 1)
        clear = np.abs(values - 0.5) > 1e-5  # float32 may fall to either side nearer than that
        assert np.array_equal(image[clear], values[clear] > 0.5)
        assert clear.mean() > 0.99


def test_equals_torchvision(place: Place) -> None:
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads", reason="torchvision is not installed")
    masks, boxes = smooth_masks(200, 28, 3), random_boxes(200, 28)
    boxes[:, 2:] = torch.maximum(boxes[:, :2], boxes[:, 2:])
    # torchvision cannot draw a box that lies outside the image.
    inside = (boxes[:, 0] < WIDTH - 3) & (boxes[:, 1] < HEIGHT - 3) & (boxes[:, 2] > 3) & (boxes[:, 3] > 3)
    masks, boxes = masks[inside], boxes[inside]
    assert len(boxes) > 80
    theirs = roi_heads.paste_masks_in_image(masks[:, None], boxes, (HEIGHT, WIDTH))[:, 0]
    count = some(place, len(boxes))
    found = pasted(place, masks[:count], boxes[:count], convention="torchvision")
    assert torch.equal(found.bool(), theirs[:count] > 0.5)


@pytest.mark.parametrize("convention", PEERS)
def test_bad_boxes_draw_nothing(place: Place, convention: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan, 0, 9, 9], [0, 0, 9, nan], [0, 0, inf, 9], [-inf, 0, inf, 9], [9, 9, 2, 2], [200, 5, 300, 9]]
    rows += [[-50, 5, -20, 9], [5, 5, 9, 9]]
    found = pasted(place, torch.ones(8, 28, 28), torch.tensor(rows), convention=convention)
    assert found.sum(dim=(1, 2)).bool().tolist() == [False] * 7 + [True]


@pytest.mark.parametrize("convention", PEERS)
def test_bad_masks_do_no_harm(place: Place, convention: str) -> None:
    masks, boxes = torch.ones(3, 28, 28), torch.tensor([[4.0, 4, 60, 50]]).repeat(3, 1)
    masks[0], masks[1, 3:9, 5:20], masks[2, 7, 7] = float("nan"), float("inf"), float("-inf")
    with_reference = paste._paste_masks_reference(masks, boxes, HEIGHT, WIDTH, 0.5, 1, convention)
    assert torch.equal(pasted(place, masks, boxes, convention=convention), with_reference)
    assert not with_reference[0].any()
    # As a probability what is not a number is zero, and what is out of range is the end of the range.
    found = pasted(place, masks, boxes, convention=convention, threshold=-1.0)
    assert torch.equal(found, paste._paste_masks_reference(masks, boxes, HEIGHT, WIDTH, -1.0, 1, convention))


@pytest.mark.parametrize(("count", "height", "width"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
def test_empty_and_one_pixel(place: Place, count: int, height: int, width: int) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1)
    for convention in PEERS:
        found = pasted(place, torch.ones(count, 28, 28), boxes, (height, width), convention=convention)
        assert found.shape == (count, height, width)
        assert found.all()


class Largest(TorchDispatchMode):
    """Notes the most elements that any result has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_huge_box(place: Place) -> None:
    """Only what is seen of it is made."""
    mask = smooth_masks(1, 28, 4)
    box = torch.tensor([[-5000.0, -7000, 9000, 6000]])
    with Largest() as seen:
        paste._paste_masks_reference(mask, box, HEIGHT, WIDTH, 0.5, 1, "maskrcnn_benchmark")
    assert seen.numel <= 2 * HEIGHT * WIDTH
    values = paste_by_loops(mask[0], box[0].tolist(), HEIGHT, WIDTH, 1)
    clear = np.abs(values - 0.5) > 1e-5
    assert np.array_equal(pasted(place, mask, box)[0].numpy()[clear], values[clear] > 0.5)
    for far in (1e6, 1e9, 1e30, 3e38):
        rows = torch.tensor([[-far, -far, far, far], [5.0, 5, far, far], [-far, 3, 20, 9]])
        for convention in PEERS:
            found = pasted(place, mask.expand(3, -1, -1), rows, convention=convention)
            again = paste._paste_masks_reference(mask.expand(3, -1, -1), rows, HEIGHT, WIDTH, 0.5, 1, convention)
            assert torch.equal(found, again)


def test_then_crop_is_paste_into_the_crop(place: Place) -> None:
    count = some(place, 50)
    masks, boxes = smooth_masks(count, 28, 5), random_boxes(count, 9)
    large = pasted(place, masks, boxes, (HEIGHT + 3, WIDTH + 50))
    assert torch.equal(large[:, :HEIGHT, :WIDTH], pasted(place, masks, boxes))


@pytest.mark.parametrize("convention", PEERS)
def test_ones_cover_their_box(place: Place, convention: str) -> None:
    boxes = torch.tensor([[10.0, 8, 50, 40], [0, 0, 20, 20], [30.5, 20.25, 70, 60]])
    found = pasted(place, torch.ones(3, 28, 28), boxes, convention=convention)
    for (x1, y1, x2, y2), image in zip(boxes.tolist(), found, strict=True):
        assert image[int(y1) + 1 : int(y2), int(x1) + 1 : int(x2)].all()
        outside = image.clone()
        outside[max(int(y1) - 2, 0) : int(y2) + 3, max(int(x1) - 2, 0) : int(x2) + 3] = 0
        assert not outside.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(place: Place, dtype: torch.dtype) -> None:
    count = some(place, 10)
    masks, boxes = smooth_masks(count, 28, 6).to(dtype), random_boxes(count, 11)
    assert torch.equal(pasted(place, masks, boxes), pasted(place, masks.float(), boxes))
    assert torch.equal(pasted(place, masks, boxes.to(dtype)), pasted(place, masks, boxes.to(dtype).float()))


def test_not_contiguous(place: Place) -> None:
    masks, boxes = smooth_masks(8, 28, 6), random_boxes(8, 11)
    expected = pasted(place, masks, boxes)
    assert torch.equal(pasted(place, masks.mT.contiguous().mT, boxes.T.contiguous().T), expected)
    assert torch.equal(pasted(place, torch.stack([masks, masks], 1)[:, 1], boxes), expected)


def test_opcheck(place: Place) -> None:
    operator = torch.ops.fastrcnn_kernels.paste_masks.default
    masks, boxes = smooth_masks(2, 14, 7).to(place.device), random_boxes(2, 13).to(place.device)
    torch.library.opcheck(operator, (masks, boxes, 20, 30, 0.5, 1, "maskrcnn_benchmark"))
    torch.library.opcheck(operator, (masks, boxes, 20, 30, 0.5, 1, "detectron2"))


@pytest.mark.slow
def test_compiles(place: Place) -> None:
    compiled = torch.compile(paste_masks, fullgraph=True, backend="aot_eager")
    masks, boxes = smooth_masks(3, 14, 7).to(place.device), random_boxes(3, 13).to(place.device)
    assert torch.equal(compiled(masks, boxes, (20, 30)), paste_masks(masks, boxes, (20, 30)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.zeros(1, 1, 8, 8)}, "masks must be"),
        ({"masks": torch.zeros(1, 8, 8).byte()}, "masks must be"),
        ({"boxes": torch.zeros(2, 4)}, "boxes must be"),
        ({"image_size": (-5, 5)}, "must not be negative"),
        ({"padding": -1}, "must not be negative"),
        ({"threshold": float("nan")}, "threshold is NaN"),
        ({"convention": "coco"}, "convention must be one of"),
    ],
    ids=["dimensions", "dtype", "boxes", "image size", "padding", "threshold", "convention"],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"masks": torch.zeros(1, 8, 8), "boxes": torch.zeros(1, 4), "image_size": (5, 5)} | change
    with pytest.raises(ValueError, match=message):
        paste_masks(**arguments)


MUTATIONS = {
    "no padding": ("F.pad(masks.float(), (margin_of(padding, convention),) * 4)", "masks.float()"),
    "box not expanded": ("(size + 2 * padding) / size).tolist()", "1.0).tolist()"),
    "rounded instead of truncated": (".trunc().long()", ".round().long()"),
    "floored instead of truncated": (".trunc().long()", ".floor().long()"),
    "not one pixel more": ("h, w = y2 - y1 + 1, x2 - x1 + 1", "h, w = y2 - y1 + 2, x2 - x1 + 2"),
    "corners aligned": ("scale, centre, -0.5)", "scale, centre, 0.0)"),
    "not strict": ("else values > threshold)", "else values >= threshold)"),
    "frame of the image": ("h, region.top - y1, region.bottom - y1", "h, 0, region.bottom - region.top"),
    "one kernel for all sizes": ("separable=h + w > SMALL_SIDES", "separable=True"),
}
CONTINUOUS_MUTATIONS = {
    "centres of pixels": ("device=low.device).float() + 0.5", "device=low.device).float()"),
    "strict": ("values >= threshold if continuous", "values > threshold if continuous"),
    "one pixel beside the box": ("(low.floor() - 1)", "low.floor()"),
    "order of the sum": ("corners if continuous else", "corners[::-1] if continuous else"),
    "margin": ("return 1 if is_continuous", "return 2 if is_continuous"),
}


@pytest.mark.parametrize(
    ("name", "convention"),
    [*((name, "maskrcnn_benchmark") for name in MUTATIONS), *((name, "detectron2") for name in CONTINUOUS_MUTATIONS)],
)
def test_mutations_are_caught(name: str, convention: str) -> None:
    broken = mutated(paste, *(MUTATIONS | CONTINUOUS_MUTATIONS)[name])["paste_masks"]
    if name in ("one kernel for all sizes", "order of the sum"):
        masks, boxes, threshold = flat_masks(100)
    else:
        masks, boxes, threshold = smooth_masks(200, 28, 0), random_boxes(200, 28), 0.5
        masks[-1], boxes[-1] = 0.5, torch.tensor([10.0, 10, 50, 50])
        if name == "one pixel beside the box":
            threshold = 0.0
    found = broken(masks, boxes, (HEIGHT, WIDTH), convention=convention, threshold=threshold)
    assert not torch.equal(found, wanted(masks, boxes, convention, threshold))
