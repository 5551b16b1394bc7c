"""Pasted masks against maskrcnn-benchmark's Masker, pixel for pixel, against float64 loops, and against torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn_kernels import masks, paste_masks
from tests.kernels.mutations import mutated

HEIGHT, WIDTH = 61, 83


def paste_by_maskrcnn_benchmark(mask: Tensor, box: Tensor, im_h: int, im_w: int, thresh: float, padding: int) -> Tensor:
    """``paste_mask_in_image`` of ``modeling/roi_heads/mask_head/inference.py``, written out for one mask."""
    size = mask.shape[-1]
    padded = torch.zeros(size + 2 * padding, size + 2 * padding)
    padded[padding : padding + size, padding : padding + size] = mask
    scale = float(size + 2 * padding) / size
    w_half, h_half = (box[2] - box[0]) * 0.5, (box[3] - box[1]) * 0.5
    x_c, y_c = (box[2] + box[0]) * 0.5, (box[3] + box[1]) * 0.5
    w_half, h_half = w_half * scale, h_half * scale
    b = torch.stack([x_c - w_half, y_c - h_half, x_c + w_half, y_c + h_half]).to(torch.int32).tolist()
    w, h = max(b[2] - b[0] + 1, 1), max(b[3] - b[1] + 1, 1)
    values = F.interpolate(padded[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
    values = values > thresh if thresh >= 0 else (values * 255).to(torch.uint8)
    out = torch.zeros((im_h, im_w), dtype=torch.uint8)
    x_0, x_1 = max(b[0], 0), min(b[2] + 1, im_w)
    y_0, y_1 = max(b[1], 0), min(b[3] + 1, im_h)
    if x_0 < x_1 and y_0 < y_1:
        out[y_0:y_1, x_0:x_1] = values[y_0 - b[1] : y_1 - b[1], x_0 - b[0] : x_1 - b[0]]
    return out


def paste_by_loops(mask: Tensor, box: list[float], im_h: int, im_w: int, padding: int) -> np.ndarray:
    """Resized probabilities in float64, pixel by pixel, from the definition; nothing of PyTorch's."""
    size = mask.shape[-1]
    source = np.pad(mask.double().numpy(), padding)
    scale = (size + 2 * padding) / size
    centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    half = [(box[2] - box[0]) / 2 * scale, (box[3] - box[1]) / 2 * scale]
    x1, y1, x2, y2 = (
        int(v) for v in (centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1])
    )

    def taps(position: int, length: int) -> list[tuple[int, float]]:
        at = max((position + 0.5) * len(source) / length - 0.5, 0.0)
        first = int(at)
        return [(first, 1 - (at - first)), (min(first + 1, len(source) - 1), at - first)]

    out = np.zeros((im_h, im_w))
    for y in range(max(y1, 0), min(y2 + 1, im_h)):
        for x in range(max(x1, 0), min(x2 + 1, im_w)):
            for row, weight_y in taps(y - y1, y2 - y1 + 1):
                for column, weight_x in taps(x - x1, x2 - x1 + 1):
                    out[y, x] += weight_y * weight_x * source[row, column]
    return out


def smooth_masks(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)[:, 0]


def random_boxes(count: int, seed: int) -> Tensor:
    """Of all sizes, inside and sticking out on every side, fractional and whole, of one pixel, inverted, far away."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH + 40.0, HEIGHT + 40.0]) - 20
    extent = torch.rand(count, 2, generator=generator) ** 2 * 70
    boxes = torch.cat([corner, corner + extent], dim=1)
    boxes[::4] = boxes[::4].round()
    boxes[1::10, 2:] = boxes[1::10, :2]
    boxes[3::20, 2:] = boxes[3::20, :2] - 1.5
    boxes[5::20] += 500
    return boxes


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 14, 28])
def test_paste_masks_equals_maskrcnn_benchmark(size: int, padding: int) -> None:
    probabilities, boxes = smooth_masks(200, size, 0), random_boxes(200, size)
    found = paste_masks(probabilities, boxes, (HEIGHT, WIDTH), padding=padding)
    assert found.shape == (200, HEIGHT, WIDTH)
    assert found.dtype == torch.uint8
    wanted = [
        paste_by_maskrcnn_benchmark(mask, box, HEIGHT, WIDTH, 0.5, padding)
        for mask, box in zip(probabilities, boxes, strict=True)
    ]
    assert 0.002 < found.float().mean() < 0.9
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.9, -1.0])
def test_paste_masks_threshold(threshold: float) -> None:
    probabilities, boxes = smooth_masks(60, 28, 1), random_boxes(60, 7)
    found = paste_masks(probabilities, boxes, (HEIGHT, WIDTH), threshold=threshold)
    for mask, box, image in zip(probabilities, boxes, found, strict=True):
        assert torch.equal(image, paste_by_maskrcnn_benchmark(mask, box, HEIGHT, WIDTH, threshold, 1))
    assert found.max() == (1 if threshold >= 0 else found.max()) > 0


def test_paste_masks_is_strict_at_the_threshold() -> None:
    mask = torch.full((1, 8, 8), 0.5)
    assert not paste_masks(mask, torch.tensor([[4.0, 4, 12, 12]]), (20, 20)).any()
    assert paste_masks(mask + 1e-3, torch.tensor([[4.0, 4, 12, 12]]), (20, 20)).any()


def test_paste_masks_equals_loops() -> None:
    probabilities, boxes = smooth_masks(25, 14, 2), random_boxes(25, 3)
    found = paste_masks(probabilities, boxes, (HEIGHT, WIDTH))
    for mask, box, image in zip(probabilities, boxes.tolist(), found.numpy(), strict=True):
        wanted = paste_by_loops(mask, box, HEIGHT, WIDTH, 1)
        clear = np.abs(wanted - 0.5) > 1e-5  # float32 may fall to either side nearer than that
        assert np.array_equal(image[clear], wanted[clear] > 0.5)
        assert clear.mean() > 0.99


def test_paste_masks_equals_torchvision() -> None:
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads", reason="torchvision is not installed")
    probabilities, boxes = smooth_masks(200, 28, 3), random_boxes(200, 28)
    boxes[:, 2:] = torch.maximum(boxes[:, :2], boxes[:, 2:])
    # torchvision cannot draw a box that lies outside the image.
    inside = (boxes[:, 0] < WIDTH - 3) & (boxes[:, 1] < HEIGHT - 3) & (boxes[:, 2] > 3) & (boxes[:, 3] > 3)
    probabilities, boxes = probabilities[inside], boxes[inside]
    assert len(boxes) > 80
    theirs = roi_heads.paste_masks_in_image(probabilities[:, None], boxes, (HEIGHT, WIDTH))[:, 0]
    assert torch.equal(paste_masks(probabilities, boxes, (HEIGHT, WIDTH)).bool(), theirs > 0.5)


def test_paste_masks_bad_boxes_draw_nothing() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan, 0, 9, 9], [0, 0, 9, nan], [0, 0, inf, 9], [-inf, 0, inf, 9], [9, 9, 2, 2], [200, 5, 300, 9]]
    rows += [[-50, 5, -20, 9], [5, 5, 9, 9]]
    found = paste_masks(torch.ones(8, 28, 28), torch.tensor(rows), (HEIGHT, WIDTH))
    assert found.sum(dim=(1, 2)).bool().tolist() == [False] * 7 + [True]


@pytest.mark.parametrize(("count", "height", "width"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
def test_paste_masks_empty_and_one_pixel(count: int, height: int, width: int) -> None:
    found = paste_masks(torch.ones(count, 28, 28), torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1), (height, width))
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


def test_paste_masks_of_a_huge_box_makes_only_what_is_seen() -> None:
    mask = smooth_masks(1, 28, 4)
    box = torch.tensor([[-5000.0, -7000, 9000, 6000]])
    with Largest() as seen:
        found = masks._paste_masks_reference(mask, box, HEIGHT, WIDTH, 0.5, 1)
    assert seen.numel <= 2 * HEIGHT * WIDTH
    wanted = paste_by_loops(mask[0], box[0].tolist(), HEIGHT, WIDTH, 1)
    clear = np.abs(wanted - 0.5) > 1e-5
    assert np.array_equal(found[0].numpy()[clear], wanted[clear] > 0.5)
    assert paste_masks(mask, torch.tensor([[-1e30, -1e30, 1e30, 1e30]]), (HEIGHT, WIDTH)).shape == (1, HEIGHT, WIDTH)


@pytest.mark.parametrize("seed", range(5))
def test_resized_part_is_what_interpolate_gives(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, w = torch.randint(1, 300, (2,), generator=generator).tolist()
    mask = torch.rand(30, 30, generator=generator)
    whole = F.interpolate(mask[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
    rows, columns = slice(h // 3, h), slice(w // 5, w - w // 7)
    torch.testing.assert_close(masks._resized_part(mask, h, w, rows, columns), whole[rows, columns], rtol=0, atol=5e-5)


def test_paste_masks_then_crop_is_paste_into_the_crop() -> None:
    probabilities, boxes = smooth_masks(50, 28, 5), random_boxes(50, 9)
    large = paste_masks(probabilities, boxes, (HEIGHT + 30, WIDTH + 50))
    assert torch.equal(large[:, :HEIGHT, :WIDTH], paste_masks(probabilities, boxes, (HEIGHT, WIDTH)))


def test_paste_masks_of_ones_covers_its_box() -> None:
    boxes = torch.tensor([[10.0, 8, 50, 40], [0, 0, 20, 20], [30.5, 20.25, 70, 60]])
    found = paste_masks(torch.ones(3, 28, 28), boxes, (HEIGHT, WIDTH))
    for (x1, y1, x2, y2), image in zip(boxes.tolist(), found, strict=True):
        assert image[int(y1) + 1 : int(y2), int(x1) + 1 : int(x2)].all()
        outside = image.clone()
        outside[max(int(y1) - 2, 0) : int(y2) + 3, max(int(x1) - 2, 0) : int(x2) + 3] = 0
        assert not outside.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_paste_masks_takes_any_float(dtype: torch.dtype) -> None:
    probabilities, boxes = smooth_masks(10, 28, 6).to(dtype), random_boxes(10, 11)
    expected = paste_masks(probabilities.float(), boxes, (HEIGHT, WIDTH))
    assert torch.equal(paste_masks(probabilities, boxes, (HEIGHT, WIDTH)), expected)


def test_paste_masks_opcheck() -> None:
    operator = torch.ops.fastrcnn_kernels.paste_masks.default
    torch.library.opcheck(operator, (smooth_masks(3, 14, 7), random_boxes(3, 13), 20, 30, 0.5, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paste_masks(torch.zeros(1, 1, 8, 8), torch.zeros(1, 4), (5, 5)), "masks must be"),
        (lambda: paste_masks(torch.zeros(1, 8, 8).byte(), torch.zeros(1, 4), (5, 5)), "masks must be"),
        (lambda: paste_masks(torch.zeros(1, 8, 8), torch.zeros(2, 4), (5, 5)), "boxes must be"),
        (lambda: paste_masks(torch.zeros(1, 8, 8), torch.zeros(1, 4), (-5, 5)), "must not be negative"),
        (lambda: paste_masks(torch.zeros(1, 8, 8), torch.zeros(1, 4), (5, 5), padding=-1), "must not be negative"),
    ],
    ids=["dimensions", "dtype", "boxes", "image size", "padding"],
)
def test_paste_masks_bad_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


MUTATIONS = {
    "no padding": ("F.pad(masks.float(), (padding,) * 4)", "masks.float()"),
    "box not expanded": ("(size + 2 * padding) / size).tolist()", "1.0).tolist()"),
    "rounded instead of truncated": (".trunc().long()", ".round().long()"),
    "floored instead of truncated": (".trunc().long()", ".floor().long()"),
    "not one pixel more": ("h, w = y2 - y1 + 1, x2 - x1 + 1", "h, w = y2 - y1 + 2, x2 - x1 + 2"),
    "corners aligned": (
        'mode="bilinear", align_corners=False)[0, 0][part]',
        'mode="bilinear", align_corners=True)[0, 0][part]',
    ),
    "not strict": ("values > threshold if", "values >= threshold if"),
    "frame of the image": ("slice(rows.start - y1, rows.stop - y1)", "slice(0, rows.stop - rows.start)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_paste_masks_mutations_are_caught(name: str) -> None:
    broken = mutated(masks, *MUTATIONS[name])["paste_masks"]
    probabilities, boxes = smooth_masks(200, 28, 0), random_boxes(200, 28)
    probabilities[-1], boxes[-1] = 0.5, torch.tensor([10.0, 10, 50, 50])
    found = broken(probabilities, boxes, (HEIGHT, WIDTH))
    wanted = [
        paste_by_maskrcnn_benchmark(mask, box, HEIGHT, WIDTH, 0.5, 1)
        for mask, box in zip(probabilities, boxes, strict=True)
    ]
    assert not torch.equal(found, torch.stack(wanted))
