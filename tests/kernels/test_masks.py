"""Mask targets against pycocotools and pasted masks against maskrcnn-benchmark's Masker, pixel for pixel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn.outlines import mask_to_polygon
from fastrcnn_kernels import mask_targets, masks, set_backend
from tests.kernels.helpers import ForbidSync, Place
from tests.kernels.mutations import mutated
from tests.kernels.polygon_cases import FAMILIES, packed, random_instances, target_by_pycocotools

SQUARE = np.array([[2, 1], [6, 1], [6, 4], [2, 4]], np.float32)
# Its left edge lies at 7 * (28 / 392), half a pixel: the quotient and 28 times the reciprocal round to either side.
ON_A_TIE = (np.array([[7, 0], [392, 0], [392, 392], [7, 392]], np.float32), [0.0, 0.0, 392.0, 392.0])


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The back-end in force, of those that this operator has on a CPU."""
    reason = Place(request.param, "cpu").why_not()
    if reason:
        pytest.skip(reason)
    with set_backend(request.param):
        yield request.param


class Largest(TorchDispatchMode):
    """Notes the most elements that any result has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                # Expanded tensors own less than they show.
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def targets(instances: Any, boxes: torch.Tensor, size: int, function: Any = mask_targets, **others: Any) -> np.ndarray:
    arguments = packed(instances) | {"instance_idxs": torch.arange(len(boxes)), "boxes": boxes} | others
    return function(mask_size=size, **arguments).numpy()


@pytest.mark.usefixtures("backend")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [28, 14])
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_targets_equals_pycocotools(family: str, size: int) -> None:
    instances, boxes = random_instances(family, 200, seed=size)
    expected = np.stack([target_by_pycocotools(i, b, size) for i, b in zip(instances, boxes.tolist(), strict=True)])
    assert expected.any() or family in ("one or two vertices", "outside"), "the cases do not exercise the operator"
    found = targets(instances, boxes, size)
    assert found.dtype == np.uint8
    assert (found != expected).sum() == 0


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [1, 2, 5, 63, 112])
def test_mask_targets_any_size(size: int) -> None:
    instances, boxes = random_instances("self-intersecting", 20, seed=size)
    expected = [target_by_pycocotools(i, b, size) for i, b in zip(instances, boxes.tolist(), strict=True)]
    assert np.array_equal(targets(instances, boxes, size), expected)


def _annotations(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    out = []
    for name in ("instances_train.json", "instances_val.json"):
        content = json.loads((folder / "annotations" / name).read_text())
        images = {image["id"]: image for image in content["images"]}
        out += [(annotation, images[annotation["image_id"]]) for annotation in content["annotations"]]
    return out


@pytest.mark.usefixtures("backend")
def test_mask_targets_equals_pycocotools_on_real_annotations(shared_data: Path) -> None:
    folder = shared_data / "coco-cc"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    rng = np.random.default_rng(0)
    instances, boxes, sizes = [], [], []
    for annotation, image in _annotations(folder):
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            rle = segmentation
            if isinstance(rle["counts"], list):
                rle = coco_mask.frPyObjects(rle, image["height"], image["width"])
            polygons = [mask_to_polygon(coco_mask.decode(rle))]
        else:
            polygons = [np.array(p, np.float32).reshape(-1, 2) for p in segmentation]
        x, y, w, h = annotation["bbox"]
        for jitter in (0.0, 0.1, 0.6):
            moved = np.array([x, y, x + w, y + h]) + rng.normal(size=4) * jitter * np.array([w, h, w, h])
            instances.append(polygons)
            boxes.append(moved)
            sizes.append((image["width"], image["height"]))
    boxes32 = torch.from_numpy(np.array(boxes, np.float32))
    assert len(boxes) > 3000
    wrong = 0
    for low in range(0, len(boxes), 60):
        part = slice(low, low + 60)
        found = targets(instances[part], boxes32[part], 28, clip_size=torch.tensor(sizes[part]))
        for mask, instance, box, size in zip(found, instances[part], boxes32[part].tolist(), sizes[part], strict=True):
            wrong += int((mask != target_by_pycocotools(instance, box, 28, size)).sum())
    assert wrong == 0


@pytest.mark.usefixtures("backend")
def test_mask_targets_hand_computed() -> None:
    # A square of 4 x 3 pixels in a box of 8 x 8 pixels and a mask of the same: pixel edges, no rounding.
    whole = targets([[SQUARE]], torch.tensor([[0.0, 0, 8, 8]]), 8)[0]
    expected = np.zeros((8, 8), np.uint8)
    expected[1:4, 2:6] = 1
    assert np.array_equal(whole, expected)
    # The box of the square itself: full.
    assert targets([[SQUARE]], torch.tensor([[2.0, 1, 6, 4]]), 28).all()
    # A corner left of the image is clamped to 0, while the scale stays that of the raw box: 8 / 16 instead of 8 / 8.
    left = targets([[SQUARE]], torch.tensor([[-8.0, 0, 8, 8]]), 8)[0]
    expected = np.zeros((8, 8), np.uint8)
    expected[1:4, 1:3] = 1
    assert np.array_equal(left, expected)


@pytest.mark.usefixtures("backend")
def test_mask_targets_scales_by_the_quotient() -> None:
    polygon, box = ON_A_TIE
    found = targets([[polygon]], torch.tensor([box]), 28)[0]
    assert np.array_equal(found, target_by_pycocotools([polygon], box, 28))
    assert not found[:, 0].any()
    assert found[:, 1:].all()


@pytest.mark.usefixtures("backend")
def test_mask_targets_unites_polygons_and_fills_one_by_even_odd() -> None:
    box = torch.tensor([[0.0, 0, 8, 8]])
    other = SQUARE + np.float32([1, 1])
    united = targets([[SQUARE, other]], box, 8)[0]
    assert np.array_equal(united, np.maximum(targets([[SQUARE]], box, 8)[0], targets([[other]], box, 8)[0]))
    twice = np.concatenate([SQUARE, SQUARE[:1], SQUARE])
    assert not targets([[twice]], box, 8).any()
    assert np.array_equal(targets([[SQUARE, SQUARE]], box, 8), targets([[SQUARE]], box, 8))


@pytest.mark.usefixtures("backend")
def test_mask_targets_clips_corners_to_the_image() -> None:
    box, clip = [5.0, 9.0, 11.0, 15.0], (4, 6)
    found = targets([[SQUARE * 2]], torch.tensor([box]), 28, clip_size=torch.tensor([clip]))[0]
    assert np.array_equal(found, target_by_pycocotools([SQUARE * 2], box, 28, clip))
    assert not np.array_equal(found, target_by_pycocotools([SQUARE * 2], box, 28))


@pytest.mark.usefixtures("backend")
def test_mask_targets_bad_boxes_and_no_instance_give_zeros() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0, 0, 8, 8], [3, 3, 3, 3], [3, 3, 9, 3], [9, 9, 3, 3], [nan, 0, 8, 8], [0, 0, 8, nan], [0, 0, inf, 8]]
    rows += [[-inf, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 8]]
    idxs = torch.tensor([0] * 8 + [-1, 0])
    found = targets([[SQUARE]], torch.tensor(rows, dtype=torch.float32), 8, instance_idxs=idxs)
    assert found[0].sum() == 12
    assert np.array_equal(found[-1], found[0])
    assert not found[1:-1].any()


@pytest.mark.usefixtures("backend")
def test_mask_targets_bad_vertices_do_no_harm() -> None:
    bad = SQUARE.copy()
    bad[1] = [np.nan, np.inf]
    far = SQUARE * np.float32(1e30)
    found = targets([[bad], [far], [SQUARE]], torch.tensor([[0.0, 0, 8, 8]] * 3), 8)
    assert found.max() == 1
    assert found[2].sum() == 12


@pytest.mark.parametrize(
    ("instances", "count"),
    [([], 0), ([], 3), ([[]], 1), ([[SQUARE]], 0), ([[np.zeros((0, 2), np.float32)]], 1)],
    ids=["nothing", "boxes only", "empty instance", "no boxes", "empty polygon"],
)
def test_mask_targets_empty(instances: Any, count: int) -> None:
    idxs = torch.full((count,), 0 if instances else -1)
    found = targets(instances, torch.tensor([[0.0, 0, 8, 8]]).repeat(count, 1), 14, instance_idxs=idxs)
    assert found.shape == (count, 14, 14)
    assert not found.any()


@pytest.mark.usefixtures("backend")
def test_mask_targets_empty_among_others() -> None:
    instances = [[], [SQUARE], [np.zeros((0, 2), np.float32), SQUARE], [], [SQUARE]]
    found = targets(instances, torch.tensor([[0.0, 0, 8, 8]] * 5), 8)
    assert found.sum(axis=(1, 2)).tolist() == [0, 12, 12, 0, 12]


def test_mask_targets_does_not_depend_on_batch_padding_or_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instances, boxes = random_instances("star", 50, seed=3)
    arguments = packed(instances)
    rng = np.random.default_rng(0)
    idxs = torch.from_numpy(rng.integers(-1, 50, 50))
    whole = targets(instances, boxes, 28, instance_idxs=idxs)
    for low in range(0, 50, 7):
        part = targets(instances, boxes[low : low + 7], 28, instance_idxs=idxs[low : low + 7])
        assert np.array_equal(part, whole[low : low + 7])
    more = {"max_vertices": arguments["max_vertices"] + 100, "max_polygons": arguments["max_polygons"] + 5}
    assert np.array_equal(targets(instances, boxes, 28, instance_idxs=idxs, **more), whole)
    monkeypatch.setitem(masks._CHUNK_ELEMENTS, "cpu", 1)  # one region at a time in the reference
    assert np.array_equal(targets(instances, boxes, 28, instance_idxs=idxs), whole)


def test_mask_targets_memory_is_bounded() -> None:
    count, vertices = 300, 600
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    polygon = (20 + 15 * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)
    arguments = packed([[polygon]]) | {"instance_idxs": torch.zeros(count, dtype=torch.int64), "clip_size": None}
    with Largest() as seen:
        masks._mask_targets_reference(
            boxes=torch.tensor([[0.0, 0, 40, 40]]).repeat(count, 1), mask_size=28, **arguments
        )
    assert seen.numel <= max(count * 28 * 28, masks._CHUNK_ELEMENTS["cpu"])


def test_mask_targets_never_waits_for_the_device() -> None:
    instances, boxes = random_instances("integers", 30, seed=1)
    arguments = packed(instances) | {"instance_idxs": torch.arange(30), "boxes": boxes, "mask_size": 28}
    with ForbidSync():
        masks._mask_targets_reference(**arguments, clip_size=torch.full((30, 2), 50))


@pytest.mark.usefixtures("backend")
def test_mask_targets_opcheck() -> None:
    instances, boxes = random_instances("star", 5, seed=2)
    a = packed(instances)
    args = (a["vertices"], a["polygon_offsets"], a["instance_offsets"], torch.arange(5), boxes)
    operator = torch.ops.fastrcnn_kernels.mask_targets.default
    torch.library.opcheck(operator, (*args, None, 28, a["max_vertices"], a["max_polygons"]))
    torch.library.opcheck(operator, (*args, torch.full((5, 2), 50), 14, a["max_vertices"], a["max_polygons"]))


@pytest.mark.slow
def test_mask_targets_compiles() -> None:
    instances, boxes = random_instances("star", 9, seed=4)
    compiled = torch.compile(mask_targets, fullgraph=True, backend="aot_eager")
    assert np.array_equal(targets(instances, boxes, 28, compiled), targets(instances, boxes, 28))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mask_targets_on_a_gpu() -> None:
    instances, boxes = random_instances("self-intersecting", 300, seed=5)
    arguments = packed(instances) | {"instance_idxs": torch.arange(300), "boxes": boxes}
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mask_targets(mask_size=28, **moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), mask_targets(mask_size=28, **arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vertices": torch.zeros(3)}, "vertices must be float32"),
        ({"vertices": torch.zeros(3, 2).double()}, "vertices must be float32"),
        ({"boxes": torch.zeros(1, 5)}, "boxes must be"),
        ({"instance_idxs": torch.zeros(2, dtype=torch.int64)}, "instance_idxs for 1 boxes"),
        ({"polygon_offsets": torch.zeros(0, dtype=torch.int64)}, "polygon_offsets must be"),
        ({"instance_offsets": torch.zeros(1, 2, dtype=torch.int64)}, "instance_offsets must be"),
        ({"clip_size": torch.zeros(2, 2)}, "clip_size must be"),
        ({"mask_size": 0}, "mask_size >= 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mask_targets_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = packed([[SQUARE]]) | {"instance_idxs": torch.tensor([0]), "boxes": torch.zeros(1, 4), "mask_size": 28}
    with pytest.raises(ValueError, match=message):
        mask_targets(**(arguments | change))


MUTATIONS = {
    "no rounding to the grid": ("coordinates.double() * 5.0 + 0.5", "coordinates.double() * 5.0"),
    "column of the grid": ("dtype=torch.float64) * 5.0 + 2.0", "dtype=torch.float64) * 5.0 + 3.0"),
    "ordinate of the step after": ("xs - (slope < 0).double()", "xs"),
    "step not verified": (".add_(near)", ".add_(1)"),
    "rows round down": ("v.add_(2.5)", "v.add_(0.5)"),
    "rows round up": ("v.add_(2.5)", "v.add_(3.5)"),
    "ends both count": ("(column < torch.maximum(x0, x1)", "(column <= torch.maximum(x0, x1)"),
    "longer axis": ("flat = dx >= dy", "flat = dx <= dy"),
    "parity over all polygons": ("part[..., None] * size", "part[..., None] * 0"),
    "padded vertices count": ("crossing & inside[..., None]", "crossing"),
    "polygons left open": ("following[start]]", "(start + 1).clamp(max=vertices.shape[0] - 1)]"),
    "corner not clamped": ("boxes[:, :2].clamp(min=0.0)", "boxes[:, :2]"),
    "one more pixel of width": ("extent = boxes[:, 2:] - boxes[:, :2]", "extent = boxes[:, 2:] - boxes[:, :2] + 1"),
    "scaled by a reciprocal": ("torch.full_like(extent, mask_size) / extent", "mask_size / extent"),
    "axes swapped": ("inside.amax(dim=1).transpose(1, 2)", "inside.amax(dim=1)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mask_targets_mutations_are_caught(name: str) -> None:
    broken = mutated(masks, *MUTATIONS[name])["mask_targets"]
    wrong = 0
    for family in ("self-intersecting", "integers", "tenths", "star"):
        instances, boxes = random_instances(family, 150, seed=28)
        instances, boxes = [*instances, [ON_A_TIE[0]]], torch.cat([boxes, torch.tensor([ON_A_TIE[1]])])
        for instance, box, mask in zip(instances, boxes.tolist(), targets(instances, boxes, 28, broken), strict=True):
            wrong += int((mask != target_by_pycocotools(instance, box, 28)).sum())
        if wrong:
            return
    raise AssertionError(f"no pixel differs: {name}")
