"""Parse a COCO annotation file into flat arrays, checking every entry on the way."""

from __future__ import annotations

import gc
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fastrcnn.data.dataset import DataError

_CROWD = "crowd regions"
_NO_EXTENT = "boxes that are NaN, infinite or without positive width and height"
_OUTSIDE = "boxes outside the image or at most one pixel wide or high"
_SHORT = "polygons of fewer than 3 points"
_MALFORMED = "polygons with an odd number of coordinates, NaN or infinity"

# Six bits a character, from "0" on; pycocotools decodes anything else to nonsense without complaint.
_RLE_LETTERS = "".join(map(chr, range(48, 48 + 64)))


class StringTable(Sequence[str]):
    """Strings in one buffer: a list of them would be copied page by page into every forked worker."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode() for s in strings]
        self._data = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._data[self._ends[index] : self._ends[index + 1]].decode()


@dataclass
class ImageTable:
    """The images of a file, sorted by id: ids int64 [I], sizes int32 [I], file names."""

    ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    file_names: StringTable

    def take(self, rows: np.ndarray) -> ImageTable:
        names = [self.file_names[int(row)] for row in rows]
        return ImageTable(self.ids[rows], self.heights[rows], self.widths[rows], StringTable(names))


@dataclass
class InstanceTable:
    """The ground truth of a file, sorted by image, as compressed rows.

    Attributes:
        image: int64 [n], row of the image table.
        labels: int32 [n], contiguous, from 1.
        boxes: float32 [n, 4], (x1, y1, x2, y2), inclusive pixels, clipped to the image.
        polygon_ends: int64 [n + 1]; instance i owns polygons polygon_ends[i] to polygon_ends[i + 1].
        vertex_ends: int64 [q + 1]; polygon j owns vertices vertex_ends[j] to vertex_ends[j + 1].
        vertices: float32 [v, 2].
        rle_ends: int64 [n + 1], rle: uint8; compressed RLE of instances given as bitmaps.
        rle_size: int32 [n, 2], (height, width) of the RLE.
        keypoints: float32 [n, k, 3], x, y, visibility; zeros where an annotation has none, k = 0 where no one has.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    polygon_ends: np.ndarray
    vertex_ends: np.ndarray
    vertices: np.ndarray
    rle_ends: np.ndarray
    rle: np.ndarray
    rle_size: np.ndarray
    keypoints: np.ndarray

    @property
    def has_masks(self) -> bool:
        return len(self.vertices) > 0 or len(self.rle) > 0

    @property
    def num_without_mask(self) -> int:
        """How many instances have neither a polygon nor an RLE."""
        return int(((np.diff(self.polygon_ends) == 0) & (np.diff(self.rle_ends) == 0)).sum())

    def take(self, rows: np.ndarray) -> InstanceTable:
        polygons, polygon_ends = _take_ranges(self.polygon_ends, rows)
        vertices, vertex_ends = _take_ranges(self.vertex_ends, polygons)
        rle, rle_ends = _take_ranges(self.rle_ends, rows)
        return InstanceTable(
            image=self.image[rows],
            labels=self.labels[rows],
            boxes=self.boxes[rows],
            polygon_ends=polygon_ends,
            vertex_ends=vertex_ends,
            vertices=self.vertices[vertices],
            rle_ends=rle_ends,
            rle=self.rle[rle],
            rle_size=self.rle_size[rows],
            keypoints=self.keypoints[rows],
        )

    def segmentations(self, span: slice) -> list[Any]:
        """COCO segmentations of a range of instances: an RLE dictionary, or a list of flat float32 polygons."""
        result: list[Any] = []
        for i in range(span.start, span.stop):
            if self.rle_ends[i + 1] > self.rle_ends[i]:
                counts = self.rle[self.rle_ends[i] : self.rle_ends[i + 1]].tobytes()
                result.append({"size": self.rle_size[i].tolist(), "counts": counts})
            else:
                ends = self.vertex_ends[self.polygon_ends[i] : self.polygon_ends[i + 1] + 1]
                result.append([self.vertices[a:b].reshape(-1) for a, b in pairwise(ends)])
        return result


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Millions of objects that all live on make the collector look for garbage again and again: 40 % of json.loads."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of an annotation file and its content, with the three lists checked to be there."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"annotation file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None
    try:
        content = json.loads(raw)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON: byte {error.start} is not UTF-8") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected an object with 'images', 'annotations' and 'categories', got a list or value"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(f"{path}: needs a list '{key}' (COCO annotation format)")
    return raw, content


def parse_images(content: Mapping[str, Any], path: Path) -> ImageTable:
    """The images sorted by id.

    Raises:
        DataError: an entry lacks an integer id, a file name or a positive size, or an id appears twice.
    """
    ids, heights, widths, names = [], [], [], []
    for position, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not _is_integer(image.get("id")):
            raise DataError(f"{path}: images[{position}] needs an integer 'id'")
        height, width, name = image.get("height"), image.get("width"), image.get("file_name")
        if not (_is_positive_integer(height) and _is_positive_integer(width)):
            raise DataError(f"{path}: image {image['id']} needs a positive integer 'height' and 'width'")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {image['id']} needs a 'file_name'")
        ids.append(image["id"])
        heights.append(height)
        widths.append(width)
        names.append(name)
    all_ids = np.array(ids, dtype=np.int64)
    order = np.argsort(all_ids, kind="stable")
    all_ids = all_ids[order]
    repeated = np.flatnonzero(all_ids[1:] == all_ids[:-1])
    if len(repeated):
        raise DataError(f"{path}: image id {all_ids[repeated[0]]} appears twice")
    return ImageTable(
        ids=all_ids,
        heights=np.array(heights, dtype=np.int32)[order],
        widths=np.array(widths, dtype=np.int32)[order],
        file_names=StringTable([names[i] for i in order]),
    )


def parse_annotations(
    content: Mapping[str, Any], path: Path, images: ImageTable, labels: Mapping[int, int]
) -> tuple[InstanceTable, dict[str, int]]:
    """The instances sorted by image (in file order within an image), and how many of what were left out.

    Args:
        labels: {category id: contiguous label}.

    Raises:
        DataError: an annotation refers to an image or category that is not in the file, or its box, segmentation or
            keypoints are not of the format.
    """
    dropped = dict.fromkeys((_CROWD, _NO_EXTENT, _OUTSIDE, _SHORT, _MALFORMED), 0)
    rows = {int(image_id): row for row, image_id in enumerate(images.ids)}
    sizes = list(zip(images.heights.tolist(), images.widths.tolist(), strict=True))
    image_of, label_of = array("q"), array("i")
    boxes, vertices = array("d"), array("d")
    polygons_per_instance, vertices_per_polygon = array("q"), array("q")
    rles: list[bytes] = []
    rle_sizes = array("i")
    keypoints, keypoint_rows = array("d"), array("q")

    for position, annotation in enumerate(content["annotations"]):
        try:
            row = rows.get(annotation["image_id"])
            label = labels.get(annotation["category_id"])
        except (KeyError, TypeError):
            raise DataError(
                f"{path}: {_called(annotation, position)} needs an 'image_id' and a 'category_id'"
            ) from None
        if row is None:
            raise DataError(
                f"{path}: {_called(annotation, position)} refers to image {annotation['image_id']}, "
                "which is not in 'images'"
            )
        if label is None:
            raise DataError(
                f"{path}: {_called(annotation, position)} has category_id {annotation['category_id']}, "
                "which is not in 'categories'"
            )
        if annotation.get("iscrowd", 0):
            dropped[_CROWD] += 1
            continue
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise DataError(f"{path}: {_called(annotation, position)} needs a 'bbox' of four numbers")
        image_of.append(row)
        label_of.append(label)
        boxes.extend(box)

        segmentation = annotation.get("segmentation") or []
        rle, num_polygons = b"", 0
        if isinstance(segmentation, dict):
            rle = _compress(segmentation, sizes[row], f"{path}: {_called(annotation, position)}")
        elif isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
            for polygon in segmentation:
                if len(polygon) < 6:
                    dropped[_SHORT] += 1
                elif len(polygon) % 2 or not _all_finite(polygon):
                    dropped[_MALFORMED] += 1
                else:
                    vertices.extend(polygon)
                    vertices_per_polygon.append(len(polygon) // 2)
                    num_polygons += 1
        else:
            raise DataError(
                f"{path}: {_called(annotation, position)} has a 'segmentation' that is neither a list of polygons "
                "(lists of numbers) nor an RLE"
            )
        if annotation.get("keypoints"):
            like = len(keypoints) // len(keypoint_rows) if keypoint_rows else 0
            called = f"{path}: {_called(annotation, position)}"
            keypoints.extend(_keypoint_values(annotation["keypoints"], like, called))
            keypoint_rows.append(len(image_of) - 1)
        polygons_per_instance.append(num_polygons)
        rles.append(rle)
        rle_sizes.extend(sizes[row])

    table = InstanceTable(
        image=np.array(image_of, dtype=np.int64),
        labels=np.array(label_of, dtype=np.int32),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        polygon_ends=_ends(polygons_per_instance),
        vertex_ends=_ends(vertices_per_polygon),
        vertices=np.array(vertices, dtype=np.float32).reshape(-1, 2),
        rle_ends=_ends([len(rle) for rle in rles]),
        rle=np.frombuffer(b"".join(rles), dtype=np.uint8),
        rle_size=np.array(rle_sizes, dtype=np.int32).reshape(-1, 2),
        keypoints=_keypoint_table(keypoints, keypoint_rows, len(image_of)),
    )
    keep = _corners(table, images, dropped)
    kept = np.flatnonzero(keep)
    return table.take(kept[np.argsort(table.image[kept], kind="stable")]), dropped


def _corners(table: InstanceTable, images: ImageTable, dropped: dict[str, int]) -> np.ndarray:
    """Turn (x, y, w, h) into clipped inclusive corners in place, in float32 as maskrcnn-benchmark; what to keep."""
    x, y, w, h = table.boxes.T
    good = np.isfinite(table.boxes).all(axis=1) & (w > 0) & (h > 0)
    with np.errstate(invalid="ignore"):
        x2 = x + np.maximum(w - np.float32(1), np.float32(0))
        y2 = y + np.maximum(h - np.float32(1), np.float32(0))
        right = (images.widths[table.image] - 1).astype(np.float32)
        bottom = (images.heights[table.image] - 1).astype(np.float32)
        corners = np.stack(
            [np.clip(x, 0, right), np.clip(y, 0, bottom), np.clip(x2, 0, right), np.clip(y2, 0, bottom)], axis=1
        )
    inside = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    dropped[_NO_EXTENT] += int((~good).sum())
    dropped[_OUTSIDE] += int((good & ~inside).sum())
    table.boxes = corners.astype(np.float32)
    return good & inside


def _compress(segmentation: Mapping[str, Any], size: tuple[int, int], called: str) -> bytes:
    """The compressed counts of an RLE, after the checks that keep pycocotools from reading past its end."""
    counts = segmentation.get("counts")
    if list(segmentation.get("size") or []) != list(size):
        raise DataError(
            f"{called} has an RLE of size {segmentation.get('size')}, but its image is {list(size)} (height, width)"
        )
    if isinstance(counts, str):
        if counts.strip(_RLE_LETTERS):
            raise DataError(f"{called} has an RLE whose 'counts' hold characters that no RLE has")
        return counts.encode()
    if not isinstance(counts, list) or not all(_is_integer(count) and count >= 0 for count in counts):
        raise DataError(f"{called} has an RLE whose 'counts' are neither a string nor a list of numbers")
    if sum(counts) != size[0] * size[1]:
        raise DataError(f"{called} has an RLE of {sum(counts)} pixels, but its image has {size[0] * size[1]}")
    return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]


def _keypoint_values(values: Any, like: int, called: str) -> Sequence[float]:
    """The flat keypoints of an annotation, checked; ``like``: how many numbers the annotations before it have, or 0."""
    if not isinstance(values, list) or len(values) % 3 or not _all_finite(values):
        raise DataError(f"{called} has 'keypoints' that are not finite numbers in threes (x, y, visibility)")
    if like and len(values) != like:
        raise DataError(f"{called} has {len(values) // 3} keypoints, but the annotations before it have {like // 3}")
    return values


def _keypoint_table(values: Sequence[float], rows: Sequence[int], num_instances: int) -> np.ndarray:
    """float32 [n, k, 3] from the keypoints of the instances ``rows``; the others have zeros."""
    per_instance = len(values) // len(rows) if rows else 0
    table = np.zeros((num_instances, per_instance // 3, 3), dtype=np.float32)
    if rows:
        table[np.asarray(rows)] = np.asarray(values, dtype=np.float32).reshape(len(rows), -1, 3)
    return table


def _called(annotation: Any, position: int) -> str:
    if isinstance(annotation, dict) and "id" in annotation:
        return f"annotation {annotation['id']}"
    return f"annotations[{position}]"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive_integer(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _all_finite(polygon: Sequence[Any]) -> bool:
    # The sum of the parts is finite only where every part is (coordinates are far from the range of doubles), and is
    # many times faster than testing each one of the 40 million numbers of COCO.
    try:
        total = sum(polygon)
    except TypeError:
        return False
    return total - total == 0


def _ends(lengths: Sequence[int]) -> np.ndarray:
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def _take_ranges(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the elements that the chosen rows own, in order, and the ends of those rows in the result."""
    starts, lengths = ends[rows], ends[rows + 1] - ends[rows]
    new_ends = _ends(lengths)
    flat = np.arange(new_ends[-1]) + np.repeat(starts - new_ends[:-1], lengths)
    return flat, new_ends
