"""Drawing detections and ground truth on images, with Pillow alone."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastrcnn.structures import BoxList, Keypoints, SegmentationMask

Color = tuple[int, int, int]
Plate = tuple[float, float, float, float]

MASK_OPACITY = 0.45
GOLDEN_RATIO = 0.618033988749895


def class_color(label: int) -> Color:
    """The colour of a class: the same on every picture, and far in hue from the classes before and after it."""
    hue = label * GOLDEN_RATIO % 1.0
    saturation, value = ((0.85, 1.0), (0.65, 0.85), (1.0, 0.75))[label // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_name(label: int, class_names: Sequence[str] | Mapping[int, str] | None) -> str:
    """The name of ``label``, or ``class 7`` where it has none."""
    if isinstance(class_names, Mapping):
        return class_names.get(label, f"class {label}")
    return class_names[label] if class_names is not None and 0 <= label < len(class_names) else f"class {label}"


def draw_detections(
    image: np.ndarray | Tensor | Image.Image,
    found: BoxList,
    masks: Sequence[np.ndarray | Tensor] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    threshold: float = 0.5,
    keypoint_threshold: float = 2.0,
) -> Image.Image:
    """Draw the detections that score at least ``threshold``, the best on top.

    Args:
        image: uint8 [H, W, 3] RGB, or a Pillow image.
        found: boxes with labels and scores; scaled to the image if they are in the frame of another size.
        masks: for each detection a bool bitmap [H, W] of the image; None draws boxes only.
        class_names: the name of each label, ``__background__`` first; or a mapping; without a name: ``class 7``.
        threshold: detections with a lower score (or none: NaN) are left out.
        keypoint_threshold: keypoints of ``found`` with a lower score are left out; the default is maskrcnn-benchmark's,
            for scores that are logits.

    Returns:
        A new RGB picture of the image's size.
    """
    if found.scores is None or found.labels is None:
        raise ValueError("draw_detections: the boxes need labels and scores")
    scores, labels = found.scores.tolist(), found.labels.tolist()
    shown = (found.scores >= threshold).tolist()  # in the scores' precision: a float32 0.7 reaches 0.7
    order = sorted((i for i in range(len(found)) if shown[i]), key=lambda i: scores[i])
    texts = {i: f"{class_name(labels[i], class_names)} {scores[i]:.2f}" for i in order}
    points = None
    if found.keypoints is not None:
        points = found.keypoints.visible
        if found.keypoints.scores is not None:
            points = points & (found.keypoints.scores >= keypoint_threshold)
    return _draw(image, found, masks, order, texts, points)


def draw_ground_truth(
    image: np.ndarray | Tensor | Image.Image,
    target: BoxList,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Image.Image:
    """Draw annotated boxes, masks and keypoints, the smallest on top.

    Args:
        image: uint8 [H, W, 3] RGB, or a Pillow image.
        target: boxes with labels, and masks as SegmentationMask if there are any; scaled to the image if needed.
        class_names: as for :func:`draw_detections`.
    """
    if target.labels is None:
        raise ValueError("draw_ground_truth: the boxes need labels")
    picture = _to_picture(image)
    target = target if target.size == picture.size else target.resize(picture.size)
    masks = list(target.masks.decode()) if isinstance(target.masks, SegmentationMask) else None
    order = (-target.area()).argsort(stable=True).tolist()
    labels = target.labels.tolist()  # type: ignore[union-attr]  # checked above
    texts = {i: class_name(labels[i], class_names) for i in order}
    return _draw(picture, target, masks, order, texts, None if target.keypoints is None else target.keypoints.visible)


def _to_array(data: np.ndarray | Tensor) -> np.ndarray:
    return data.cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)


def _to_picture(image: np.ndarray | Tensor | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")  # a copy, also of an RGB image
    pixels = _to_array(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"the image must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _draw(
    image: np.ndarray | Tensor | Image.Image,
    boxlist: BoxList,
    masks: Sequence[np.ndarray | Tensor] | None,
    order: Sequence[int],
    texts: Mapping[int, str],
    shown_points: Tensor | None,
) -> Image.Image:
    """Draw the boxes numbered in ``order``, the last one on top, and the keypoints in ``shown_points`` [n, k]."""
    picture = _to_picture(image)
    width, height = picture.size
    if masks is not None and len(masks) != len(boxlist):
        raise ValueError(f"{len(masks)} masks for {len(boxlist)} boxes")
    if boxlist.size != picture.size:
        boxlist = boxlist.resize(picture.size)
    boxes = boxlist.convert("xyxy").boxes.tolist()
    labels = boxlist.labels.tolist() if boxlist.labels is not None else []
    line = max(1, round(min(width, height) / 320))
    if masks is not None:
        pixels = np.array(picture)
        for i in order:
            mask = _to_array(masks[i])
            if mask.shape != (height, width):
                raise ValueError(f"mask {i} is {list(mask.shape)} for an image of [{height}, {width}]")
            _paint_mask(pixels, mask.astype(bool), class_color(labels[i]), line)
        picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for i in order:
        x1, y1, x2, y2 = (min(max(v, -line), m) for v, m in zip(boxes[i], (width, height) * 2, strict=True))
        if x2 >= x1 and y2 >= y1:
            draw.rectangle((x1, y1, x2, y2), outline=class_color(labels[i]), width=line)
        if boxlist.keypoints is not None and shown_points is not None:
            _draw_keypoints(draw, boxlist.keypoints[i], shown_points[i].tolist(), line)
    font = ImageFont.load_default(size=min(max(11, min(width, height) // 32), 40))
    # The best take the best places; they are painted last, so that where plates must overlap the best is readable.
    plates: list[Plate] = []
    for i in reversed(order):
        plates.append(_place(draw, texts[i], font, boxes[i], (width, height), plates))
    for i, plate in zip(order, reversed(plates), strict=True):
        _write(draw, texts[i], font, plate, class_color(labels[i]))
    return picture


def _paint_mask(pixels: np.ndarray, mask: np.ndarray, color: Color, line: int) -> None:
    """Tint the mask's pixels and draw its outline in full colour, in place."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    inside, view = mask[window], pixels[window]
    view[inside] = (view[inside] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY).astype(np.uint8)
    inner = np.pad(inside, 1)
    for _ in range(line):
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    view[inside & ~inner[1:-1, 1:-1]] = color


def _draw_keypoints(draw: ImageDraw.ImageDraw, one: Keypoints, shown: Sequence[bool], line: int) -> None:
    """The keypoints of one instance, and the lines of its skeleton between two that are shown, each in a colour."""
    places = [(x, y) for x, y, _ in one.points[0].tolist()]
    for number, (a, b) in enumerate(one.skeleton.connections if one.skeleton is not None else (), start=1):
        if shown[a] and shown[b]:
            draw.line((*places[a], *places[b]), fill=class_color(number), width=line + 1)
    for (x, y), is_shown in zip(places, shown, strict=True):
        if is_shown:
            radius = line + 1
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255), outline=(0, 0, 0))


def _place(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    box: Sequence[float],
    size: tuple[int, int],
    taken: Sequence[Plate],
) -> Plate:
    """Where the plate of ``text`` goes: above the box, else inside its top, below it, or inside its bottom.

    The first of these that lies in the image and on no other plate; always moved wholly into the image.
    """
    left, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, max(bottom, font.getbbox("Ag")[3]) + 4  # one height for all texts
    x = min(max(box[0], 0), max(size[0] - width, 0))
    tops = [box[1] - height, box[1], box[3] + 1, box[3] - height]
    limit = max(size[1] - height, 0)
    candidates = [(x, min(max(y, 0), limit)) for y in tops if 0 <= y <= limit] or [(x, min(max(tops[1], 0), limit))]
    for cx, cy in candidates:
        plate = (cx, cy, cx + width, cy + height)
        if not any(plate[0] < t[2] and t[0] < plate[2] and plate[1] < t[3] and t[1] < plate[3] for t in taken):
            return plate
    return (*candidates[0], candidates[0][0] + width, candidates[0][1] + height)


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    plate: Plate,
    color: Color,
) -> None:
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    edge = tuple(value // 2 for value in color)  # parts plates of one colour that overlap
    draw.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=color, outline=edge)
    draw.text((plate[0] + 3, plate[1] + 1), text, font=font, fill=(0, 0, 0) if brightness > 128 else (255, 255, 255))
