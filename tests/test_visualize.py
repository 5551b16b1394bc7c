"""Pictures: what is painted where, and that every label can be read inside the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastrcnn.structures import BoxList, Keypoints, SegmentationMask, Skeleton
from fastrcnn.visualize import class_color, class_name, draw_detections, draw_ground_truth

NAMES = ["__background__", "cat", "dog"]
BACKGROUND = 50


def image(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def detections(boxes: list[list[float]], scores: list[float], labels: list[int], size: tuple[int, int] = (160, 120)):
    return BoxList(torch.tensor(boxes), size, scores=torch.tensor(scores), labels=torch.tensor(labels))


@pytest.fixture
def plates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[float, ...]]]:
    """The texts written, with the rectangle that holds their ink."""
    written = []
    original = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **options: object) -> None:
        written.append((text, self.textbbox(xy, text, font=options["font"])))
        original(self, xy, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return written


def changed(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) != BACKGROUND).any(2)


@pytest.mark.parametrize("kind", ["array", "tensor", "picture"])
def test_draw_detections_leaves_the_image(kind: str) -> None:
    pixels = image()
    given = {"array": pixels, "tensor": torch.from_numpy(pixels), "picture": Image.fromarray(pixels)}[kind]
    picture = draw_detections(given, detections([[30, 40, 90, 100]], [0.9], [1]), None, NAMES)
    assert (picture.mode, picture.size) == ("RGB", (160, 120))
    assert changed(picture).any()
    assert (np.asarray(given) == BACKGROUND).all()


def test_draw_detections_box_and_mask() -> None:
    mask = np.zeros((120, 160), bool)
    mask[50:90, 40:80] = True
    picture = draw_detections(image(), detections([[30, 40, 90, 100]], [0.9], [1]), [mask], NAMES)
    pixels = np.asarray(picture)
    color = class_color(1)
    for x, y in [(30, 70), (90, 70), (60, 100), (40, 60), (79, 60), (60, 89)]:
        assert tuple(pixels[y, x]) == color, f"edge of the box or the mask at {x, y}"
    tinted = [round(BACKGROUND * 0.55 + c * 0.45) for c in color]
    assert np.abs(pixels[70, 60] - np.array(tinted)).max() <= 1
    outside = changed(picture)
    outside[15:101, 30:91] = False
    assert not outside.any(), "nothing beside the box and its label above it"


def test_draw_detections_threshold(plates: list) -> None:
    found = detections([[10, 30, 50, 60], [60, 30, 90, 60], [100, 30, 140, 60]], [0.7, 0.69, float("nan")], [1, 2, 7])
    draw_detections(image(), found, None, NAMES, threshold=0.7)
    assert [text for text, _ in plates] == ["cat 0.70"]
    assert not changed(draw_detections(image(), found, None, NAMES, threshold=0.8)).any()
    assert not changed(draw_detections(image(), found[:0], [], NAMES)).any()


def test_draw_detections_best_on_top(plates: list) -> None:
    found = detections([[30, 40, 90, 100]] * 2, [0.9, 0.6], [1, 2])
    masks = [np.ones((120, 160), bool)] * 2
    picture = np.asarray(draw_detections(image(), found, masks, NAMES))
    assert tuple(picture[70, 30]) == class_color(1)
    assert tuple(picture[0, 0]) == class_color(1)
    assert [text for text, _ in plates] == ["dog 0.60", "cat 0.90"]


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 20, 20],
        [150, 0, 159, 119],
        [0, 0, 159, 119],
        [-50, -50, 300, 300],
        [140, 110, 159, 119],
        [5, 118, 9, 119],
    ],
)
def test_draw_detections_labels_stay_inside(box: list[float], plates: list) -> None:
    draw_detections(image(), detections([box], [0.9], [1]), None, NAMES)
    ((_, (x1, y1, x2, y2)),) = plates
    assert 0 <= x1 < x2 <= 160
    assert 0 <= y1 < y2 <= 120


def test_draw_detections_labels_make_room(plates: list) -> None:
    draw_detections(image(), detections([[30, 40, 90, 100]] * 3, [0.9, 0.8, 0.7], [1, 1, 2]), None, NAMES)
    inks = [ink for _, ink in plates]
    assert len(inks) == 3
    for i, a in enumerate(inks):
        for b in inks[:i]:
            assert a[1] >= b[3] or b[1] >= a[3], "no label hides another where there is room"


def test_draw_detections_tiny_image() -> None:
    assert draw_detections(image(1, 1), detections([[0, 0, 0, 0]], [0.9], [1], (1, 1)), None, NAMES).size == (1, 1)
    assert draw_detections(image(7, 300), detections([[0, 0, 9, 9]], [0.9], [1], (300, 7)), None, NAMES).size == (
        300,
        7,
    )


def test_draw_detections_scales_the_boxes() -> None:
    half = draw_detections(image(), detections([[15, 20, 45, 50]], [0.9], [1], (80, 60)), None, NAMES)
    full = draw_detections(image(), detections([[30, 40, 90, 100]], [0.9], [1]), None, NAMES)
    assert half.tobytes() == full.tobytes()


def test_draw_detections_bad_input() -> None:
    found = detections([[30, 40, 90, 100]], [0.9], [1])
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], got float64 \[120, 160, 3\]"):
        draw_detections(image() / 255.0, found)
    with pytest.raises(ValueError, match="0 masks for 1 boxes"):
        draw_detections(image(), found, [])
    with pytest.raises(ValueError, match=r"mask 0 is \[28, 28\] for an image of \[120, 160\]"):
        draw_detections(image(), found, [np.ones((28, 28), bool)])
    with pytest.raises(ValueError, match="need labels and scores"):
        draw_detections(image(), BoxList(found.boxes, found.size))


def test_draw_ground_truth_smallest_on_top(plates: list) -> None:
    square = [torch.tensor([[20.0, 30], [100, 30], [100, 110], [20, 110]])]
    small = [torch.tensor([[40.0, 50], [60, 50], [60, 70], [40, 70]])]
    target = BoxList(
        torch.tensor([[40.0, 50, 59, 69], [20, 30, 99, 109]]),
        (160, 120),
        labels=torch.tensor([2, 1]),
        masks=SegmentationMask([small, square], (160, 120)),
    )
    pixels = np.asarray(draw_ground_truth(image(), target, NAMES))
    assert tuple(pixels[50, 58]) == class_color(2)
    assert tuple(pixels[109, 60]) == class_color(1)
    assert [text for text, _ in plates] == ["cat", "dog"]
    double = draw_ground_truth(np.repeat(np.repeat(image(), 2, 0), 2, 1), target, NAMES)
    assert tuple(np.asarray(double)[120, 119]) == class_color(2), "boxes and masks follow the image's size"


def test_class_color_distinct() -> None:
    colors = [class_color(label) for label in range(91)]
    assert len(set(colors)) == 91
    for label in range(90):
        assert sum(abs(a - b) for a, b in zip(colors[label], colors[label + 1], strict=True)) > 150


def test_class_name() -> None:
    assert class_name(2, NAMES) == "dog"
    assert class_name(3, NAMES) == "class 3"
    assert class_name(7, None) == "class 7"
    assert class_name(7, {7: "owl"}) == "owl"
    assert class_name(8, {7: "owl"}) == "class 8"


def test_keypoints_and_the_lines_between_them() -> None:
    """A keypoint under the threshold, or not labelled, is not drawn, nor is a line to it."""
    points = torch.tensor([[[50.0, 60, 1], [110, 60, 1], [80, 100, 1]]])
    skeleton = Skeleton(("a", "b", "c"), ((0, 1), (1, 2)))
    scores = torch.tensor([[3.0, 2.5, 1.0]])
    found = detections([[30, 40, 130, 110]], [0.9], [1])
    found = replace(found, keypoints=Keypoints(points, (160, 120), skeleton, scores))
    pixels = np.asarray(draw_detections(image(), found))
    assert tuple(pixels[60, 50]) == tuple(pixels[60, 110]) == (255, 255, 255)
    assert tuple(pixels[60, 80]) == class_color(1), "the line from a to b"
    assert tuple(pixels[100, 80]) == (BACKGROUND,) * 3
    pixels = np.asarray(draw_detections(image(), found, keypoint_threshold=0.5))
    assert tuple(pixels[100, 80]) == (255, 255, 255)
    assert tuple(pixels[80, 95]) == class_color(2), "the line from b to c"

    points[0, 0, 2] = 0
    target = BoxList(found.boxes * 0.5, (80, 60), labels=torch.tensor([1]),
                     keypoints=Keypoints(points * torch.tensor([0.5, 0.5, 1]), (80, 60), skeleton))  # fmt: skip
    pixels = np.asarray(draw_ground_truth(image(), target))
    assert tuple(pixels[60, 50]) == tuple(pixels[60, 80]) == (BACKGROUND,) * 3
    assert tuple(pixels[100, 80]) == (255, 255, 255)
