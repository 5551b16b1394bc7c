"""Bitmaps as polygons: the outline of a mask as one closed polygon that rasterises back to the mask exactly.

COCO stores crowds, and many other data sets store everything, as bitmaps (RLE). As an outline a bitmap can be resized,
flipped and cropped like any other polygon, and one rasteriser serves the training targets of both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mask_to_polygon(mask: NDArray[np.generic]) -> NDArray[np.float32]:
    """The outline of a bitmap as one polygon.

    The polygon runs along pixel edges: the pixel in column c and row r covers [c, c + 1] x [r, r + 1], the convention
    of COCO's own polygons. Outer boundaries, holes and separate components are loops of the one polygon, joined by
    bridges that are traversed once forth and once back. A bridge therefore encloses nothing, and a rasteriser by the
    even-odd rule, as pycocotools' is, gives the bitmap back bit for bit; also after any scaling, since both passes over
    a bridge round alike. Under other fill rules holes may come out filled: loops have no particular orientation, and
    two pixels that touch at a corner only are one loop that crosses itself there.

    Args:
        mask: [h, w] of any integer or bool type; what is not zero belongs to the shape. As made by
            ``pycocotools.mask.decode``.

    Returns:
        float32 [v, 2], (x, y) in pixels, integers; collinear points merged; [0, 2] for an empty mask. The edge from the
        last vertex to the first closes the polygon.

    Raises:
        ValueError: if ``mask`` is not two-dimensional.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask_to_polygon: mask must be [h, w], got shape {mask.shape}")
    x, y = _corners(mask)
    if len(x) == 0:
        return np.zeros((0, 2), dtype=np.float32)
    order = _joined_loops(_neighbours(y, x), _neighbours(x, y))
    return np.stack([x[order], y[order]], axis=1).astype(np.float32)


def _corners(mask: NDArray[np.generic]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the outline turns: grid points with an odd number of set pixels among the four around them.

    With two set pixels that touch at their corners the outline crosses itself in straight lines, which by the even-odd
    rule is the same as two turns.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), dtype=bool)
    padded[1:-1, 1:-1] = mask != 0
    sideways = padded[:, 1:] ^ padded[:, :-1]  # [h + 2, w + 1]
    y, x = np.nonzero(sideways[1:] ^ sideways[:-1])  # [h + 1, w + 1]
    return x, y


def _neighbours(line: NDArray[np.int64], along: NDArray[np.int64]) -> NDArray[np.int64]:
    """The other end of the edge that each corner has on its grid line.

    Along a line, corners alternately begin and end an edge, so the 1st and the 2nd are joined, the 3rd and the 4th, ...
    """
    ordered = np.lexsort((along, line))
    other = np.empty_like(ordered)
    other[ordered[0::2]], other[ordered[1::2]] = ordered[1::2], ordered[0::2]
    return other


def _joined_loops(across: NDArray[np.int64], down: NDArray[np.int64]) -> list[int]:
    """All loops as one walk: each loop closed at its own start, then back over the starts in reverse order.

    Args:
        across: for each corner the other end of its horizontal edge.
        down: the same for its vertical edge.
    """
    # Two edges at a time: from each corner over its horizontal edge and then the vertical one.
    along, onward = across.tolist(), down[across].tolist()
    seen = bytearray(len(along))
    walk: list[int] = []
    starts: list[int] = []
    start = 0
    while start >= 0:
        corner = start
        while not seen[corner]:
            other = along[corner]
            seen[corner] = seen[other] = 1
            walk += (corner, other)
            corner = onward[corner]
        walk.append(start)
        starts.append(start)
        start = seen.find(0, start)
    if len(starts) == 1:
        return walk[:-1]
    # The first start needs no second visit: the polygon closes onto it.
    return walk + starts[-2:0:-1]
