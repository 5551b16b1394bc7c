"""Bitmaps to outlines and back through pycocotools, bit for bit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastrcnn.outlines import mask_to_polygon
from fastrcnn_kernels import rasterize_polygons


def rasterised(polygon: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if not len(polygon):
        return np.zeros(shape, np.uint8)
    flat = [polygon.astype(np.float64).flatten().tolist()]
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, *shape))))


def bitmap(picture: str) -> NDArray[np.uint8]:
    return np.array([[c == "#" for c in line] for line in picture.split()], np.uint8)


PICTURES = {
    "one pixel": "#",
    "one of many": "... .#. ...",
    "full": "#### ####",
    "empty": ".... ....",
    "hole": "##### #...# #.#.# #...# #####",
    "diagonal": "#. .#",
    "other diagonal": ".# #.",
    "checkers": "#.#.# .#.#. #.#.#",
    "components": "##..## ##..## ...... ##..##",
    "hole that touches a corner": "#### ##.# #.## ####",
    "thin lines": "#...# .#.#. ..#.. .#.#. #...#",
    "row": "##.###..#",
    "column": "# . # #",
}


@pytest.mark.parametrize("name", PICTURES)
def test_mask_to_polygon_round_trip(name: str) -> None:
    mask = bitmap(PICTURES[name])
    polygon = mask_to_polygon(mask)
    assert polygon.dtype == np.float32
    assert polygon.shape[1:] == (2,)
    assert np.array_equal(rasterised(polygon, mask.shape), mask)


def test_mask_to_polygon_merges_collinear_points() -> None:
    assert sorted(map(tuple, mask_to_polygon(bitmap("#### ####")))) == [(0, 0), (0, 2), (4, 0), (4, 2)]
    assert sorted(map(tuple, mask_to_polygon(bitmap("... .## ...")))) == [(1, 1), (1, 2), (3, 1), (3, 2)]
    # A ring: two loops of four corners, each closed, the second one's start visited on the way back as its end.
    assert len(mask_to_polygon(bitmap("##### #...# #####"))) == 10
    assert mask_to_polygon(bitmap("..")).shape == (0, 2)
    assert mask_to_polygon(np.zeros((0, 5), np.uint8)).shape == (0, 2)


@settings(deadline=None, max_examples=300)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_mask_to_polygon_round_trip_any(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(rasterised(mask_to_polygon(mask), mask.shape), mask)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_mask_to_polygon_round_trip_noise(density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        mask = (rng.random(rng.integers(1, 90, 2)) < density).astype(np.uint8)
        assert np.array_equal(rasterised(mask_to_polygon(mask), mask.shape), mask)


def test_mask_to_polygon_takes_any_layout_and_dtype() -> None:
    mask = bitmap(PICTURES["hole"])
    expected = mask_to_polygon(mask)
    for other in (
        np.asfortranarray(mask),
        mask.astype(bool),
        mask.astype(np.int32) * -7,
        np.repeat(mask, 2, 1)[:, ::2],
    ):
        assert np.array_equal(mask_to_polygon(other), expected)
    with pytest.raises(ValueError, match="must be"):
        mask_to_polygon(mask[None])


def test_mask_to_polygon_survives_scaling() -> None:
    """Bridges enclose nothing in any frame: loops apart, by themselves, give the same mask targets."""
    parts = [bitmap("##### #...# #...# ##### ..... ....."), bitmap("..... ..... ..... ..... ##..# ##..#")]
    together = torch.from_numpy(mask_to_polygon(parts[0] | parts[1]))
    apart = [torch.from_numpy(mask_to_polygon(p)) for p in parts]
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=generator) * 4 - 1
    boxes = torch.cat([corner, corner + 0.3 + 6 * torch.rand(200, 2, generator=generator)], dim=1)

    def targets(polygons: list[torch.Tensor]) -> torch.Tensor:
        lengths = [len(p) for p in polygons]
        return rasterize_polygons(
            torch.cat(polygons),
            torch.tensor(np.cumsum([0, *lengths])),
            torch.tensor([0, len(polygons)]),
            torch.zeros(200, dtype=torch.int64),
            boxes,
            28,
            max_vertices=sum(lengths),
            max_polygons=len(polygons),
        )

    found = targets([together])
    assert found.any()
    assert not found.all()
    assert torch.equal(found, targets(apart))


def test_mask_to_polygon_on_real_masks(shared_data: Path) -> None:
    path = shared_data / "coco-cc-tiny" / "annotations" / "instances_train.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    content = json.loads(path.read_text())
    images = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    seconds = []
    for annotation in content["annotations"]:
        shape, segmentation = images[annotation["image_id"]], annotation["segmentation"]
        if isinstance(segmentation, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *shape))
        else:
            rle = coco_mask.frPyObjects(segmentation, *shape)
        mask = coco_mask.decode(rle)
        began = time.perf_counter()
        polygon = mask_to_polygon(mask)
        seconds.append(time.perf_counter() - began)
        assert np.array_equal(rasterised(polygon, shape), mask)
    # About a millisecond on an idle core; a loop over pixels would take a hundred.
    assert np.median(seconds) < 0.02
