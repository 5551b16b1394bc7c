"""Draw the generated data set ``shapes``: textured objects on a textured background, with the pixels each one shows.

Everything is drawn from raw Philox bits with integer or float64 NumPy arithmetic and rounded coordinates, so that a
seed gives the same pictures on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

# Sub-scanlines a pixel: coverage is exact along x and sampled along y.
_SUBROWS = 8


@dataclass
class Shape:
    """One drawn object.

    Attributes:
        name: its class.
        outline: float64 [v, 2], (x, y) in pixels of the image.
        coverage: float64 [h, w], how much of each pixel it covers, within ``window``.
        window: rows and columns of the image outside of which it covers nothing.
        full, visible: bool [S, S], the pixels it covers at least by half, and those of them that nothing else covers.
    """

    name: str
    outline: Array
    coverage: Array
    window: tuple[slice, slice]
    full: NDArray[np.bool_]
    visible: NDArray[np.bool_]


def _ellipse(rng: np.random.Generator, radius: float) -> Array:
    angle = np.arange(40) * (2 * math.pi / 40)
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius * _between(rng, 0.55, 1.0)], axis=1)


def _triangle(rng: np.random.Generator, radius: float) -> Array:
    angle = np.array([0.0, 1.0, 2.0]) * (2 * math.pi / 3) + (rng.random(3) - 0.5) * 0.6
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius


def _rectangle(rng: np.random.Generator, radius: float) -> Array:
    angle = _between(rng, 0.45, 0.8)  # of the diagonal: sides between 1:1 and 1:2
    w, h = math.cos(angle) * radius, math.sin(angle) * radius
    return np.array([[-w, -h], [w, -h], [w, h], [-w, h]])


def _star(rng: np.random.Generator, radius: float) -> Array:
    angle = np.arange(10) * (math.pi / 5)
    reach = np.where(np.arange(10) % 2 == 0, radius, radius * _between(rng, 0.38, 0.5))
    return np.stack([np.cos(angle) * reach, np.sin(angle) * reach], axis=1)


def _bar(rng: np.random.Generator, radius: float) -> Array:
    half = max(2.0, radius * _between(rng, 0.1, 0.16))
    return np.array([[-radius, -half], [radius, -half], [radius, half], [-radius, half]])


OUTLINES: dict[str, Callable[[np.random.Generator, float], Array]] = {
    "ellipse": _ellipse,
    "triangle": _triangle,
    "rectangle": _rectangle,
    "star": _star,
    "bar": _bar,
}


def draw_image(
    rng: np.random.Generator, size: int, classes: Sequence[str], min_objects: int, max_objects: int
) -> tuple[NDArray[np.uint8], list[Shape]]:
    """A picture, uint8 [size, size, 3], and the objects in it, from back to front.

    Later objects cover earlier ones. A place is tried again if it would leave an object with less than 40 % of its
    pixels, so that everything drawn can be recognised and is annotated.
    """
    canvas = _background(rng, size)
    shapes: list[Shape] = []
    for _ in range(min_objects + int(rng.random() * (max_objects - min_objects + 1))):
        for _attempt in range(20):
            shape = _place(rng, size, classes)
            if _fits(shape, shapes):
                break
        else:
            continue
        under = canvas[shape.window]
        texture = _object_texture(rng, under.shape[:2], canvas[shape.full].mean(axis=0))
        under += shape.coverage[:, :, None] * (texture - under)
        for other in shapes:
            other.visible &= ~shape.full
        shapes.append(shape)
    return np.clip(np.floor(canvas + 0.5), 0, 255).astype(np.uint8), shapes


def polygon_coverage(outline: Array, window: tuple[slice, slice]) -> Array:
    """float64 [h, w]: how much of each pixel of ``window`` a polygon covers (even-odd rule), in [0, 1].

    The pixel in column c and row r covers [c, c + 1] x [r, r + 1], as in COCO's polygons.
    """
    height, width = window[0].stop - window[0].start, window[1].stop - window[1].start
    x0, y0 = outline[:, 0] - window[1].start, outline[:, 1] - window[0].start
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    rows = (np.arange(height * _SUBROWS) + 0.5) / _SUBROWS  # [R]
    crosses = (y0 <= rows[:, None]) != (y1 <= rows[:, None])  # [R, V]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x0 + (rows[:, None] - y0) * ((x1 - x0) / (y1 - y0))
    at = np.sort(np.where(crosses, at, np.inf), axis=1)[:, : int(crosses.sum(axis=1).max(initial=0))]  # [R, K]
    right = np.arange(width) + 1.0
    covered = np.zeros((height * _SUBROWS, width))
    for k in range(at.shape[1]):
        covered += (1.0 if k % 2 == 0 else -1.0) * np.clip(right - at[:, k, None], 0.0, 1.0)
    return covered.reshape(height, _SUBROWS, width).mean(axis=1)


def _place(rng: np.random.Generator, size: int, classes: Sequence[str]) -> Shape:
    name = classes[int(rng.random() * len(classes))]
    radius = size * _between(rng, 0.07, 0.24) * (1.15 if name == "bar" else 1.0)
    outline = OUTLINES[name](rng, radius)
    turn = _between(rng, 0.0, 2 * math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    margin = 0.6 * radius  # an object may reach over the border with less than half of it
    center = margin + rng.random(2) * (size - 2 * margin)
    # Two decimals, as in COCO: what is drawn is exactly what is written.
    outline = np.round(outline @ rotation.T + center, 2)
    low = np.clip(np.floor(outline.min(axis=0)), 0, size).astype(int)
    high = np.clip(np.ceil(outline.max(axis=0)), 0, size).astype(int)
    window = (slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0])))
    coverage = polygon_coverage(outline, window)
    full = np.zeros((size, size), dtype=bool)
    full[window] = coverage >= 0.5
    return Shape(name, outline, coverage, window, full, full.copy())


def _fits(shape: Shape, others: Sequence[Shape]) -> bool:
    if shape.full.sum() < 40:
        return False
    return all((o.visible & ~shape.full).sum() >= 0.4 * o.full.sum() for o in others)


def _background(rng: np.random.Generator, size: int) -> Array:
    """float64 [size, size, 3]: a gradient between two colours under noise of four scales."""
    first, second = rng.random(3) * 200 + 20, rng.random(3) * 200 + 20
    angle = _between(rng, 0.0, 2 * math.pi)
    axis = np.arange(size) / size - 0.5
    ramp = np.clip(axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle) + 0.5, 0, 1)[:, :, None]
    return first + ramp * (second - first) + _noise(rng, (size, size), (3, 7, 24, size), (26.0, 20.0, 16.0, 10.0))


def _object_texture(rng: np.random.Generator, size: tuple[int, int], behind: Array) -> Array:
    """float64 [h, w, 3]: stripes, checks, dots or noise in a colour unlike the mean colour ``behind``."""
    for _attempt in range(50):
        color = rng.random(3) * 235 + 10
        if np.abs(color - behind).sum() > 110:
            break
    other = np.clip(color + (rng.random(3) - 0.5) * 160, 0, 255)
    angle = _between(rng, 0.0, math.pi)
    period = _between(rng, 5.0, 12.0)
    x, y = np.arange(size[1])[None, :], np.arange(size[0])[:, None]
    along = (x * math.cos(angle) + y * math.sin(angle)) / period
    across = (y * math.cos(angle) - x * math.sin(angle)) / period
    kind = int(rng.random() * 4)
    if kind == 0:
        pattern = (np.floor(along) % 2).astype(np.float64)
    elif kind == 1:
        pattern = ((np.floor(along) + np.floor(across)) % 2).astype(np.float64)
    elif kind == 2:
        u, v = along - np.floor(along) - 0.5, across - np.floor(across) - 0.5
        pattern = (u * u + v * v < 0.09).astype(np.float64)
    else:
        pattern = np.zeros(size)
    grain = _noise(rng, size, (6, max(size)), (14.0, 12.0))
    return np.clip(color + pattern[:, :, None] * (other - color) + grain, 0, 255)


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: Sequence[int], amplitudes: Sequence[float]) -> Array:
    """float64 [h, w, 3]: bilinear noise, a layer for each number of ``cells`` along an edge."""
    height, width = size
    total = np.zeros((height, width, 3))
    for count, amplitude in zip(cells, amplitudes, strict=True):
        grid = (rng.random((count, count, 3)) * 256).astype(np.uint8)
        # Pillow resizes bytes in fixed point: the same on every machine, unlike floating-point filters.
        layer = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))
        total += (layer.astype(np.float64) / 127.5 - 1.0) * amplitude
    return total


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())
