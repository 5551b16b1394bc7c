"""Mask targets from polygons against pycocotools, pixel for pixel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn.outlines import mask_to_polygon
from fastrcnn_kernels import rasterize, rasterize_polygons
from tests.kernels.helpers import ForbidSync, Place
from tests.kernels.mutations import mutated
from tests.kernels.polygon_cases import FAMILIES, packed, random_instances, target_by_pycocotools

SQUARE = np.array([[2, 1], [6, 1], [6, 4], [2, 4]], np.float32)
# Its left edge lies at 7 * (28 / 392), half a pixel: the quotient and 28 times the reciprocal round to either side.
ON_A_TIE = (np.array([[7, 0], [392, 0], [392, 392], [7, 392]], np.float32), [0.0, 0.0, 392.0, 392.0])


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


def regions(place: Place, count: int) -> int:
    """How many regions a test makes: the interpreter takes a tenth of a second for each."""
    return min(count, 4) if place == Place("triton", "cpu") else count


def targets(
    device: Any, instances: Any, boxes: torch.Tensor, size: int, function: Any = rasterize_polygons, **others: Any
) -> np.ndarray:
    arguments = packed(instances) | {"instance_idxs": torch.arange(len(boxes)), "boxes": boxes} | others
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return function(mask_size=size, **arguments).cpu().numpy()


@pytest.mark.parametrize("size", [28, 14])
@pytest.mark.parametrize("family", FAMILIES)
def test_rasterize_polygons_equals_pycocotools(place: Place, family: str, size: int) -> None:
    device = place.device
    instances, boxes = random_instances(family, regions(place, 200), seed=size)
    expected = np.stack([target_by_pycocotools(i, b, size) for i, b in zip(instances, boxes.tolist(), strict=True)])
    assert expected.any() or family in ("one or two vertices", "outside", "tiny"), "the cases test nothing"
    found = targets(device, instances, boxes, size)
    assert found.dtype == np.uint8
    assert (found != expected).sum() == 0


@pytest.mark.parametrize("size", [1, 2, 5, 63, 112])
def test_rasterize_polygons_any_size(device: torch.device, size: int) -> None:
    instances, boxes = random_instances("self-intersecting", 3, seed=size)
    expected = [target_by_pycocotools(i, b, size) for i, b in zip(instances, boxes.tolist(), strict=True)]
    assert np.array_equal(targets(device, instances, boxes, size), expected)


def _annotations(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    out = []
    for name in ("instances_train.json", "instances_val.json"):
        content = json.loads((folder / "annotations" / name).read_text())
        images = {image["id"]: image for image in content["images"]}
        out += [(annotation, images[annotation["image_id"]]) for annotation in content["annotations"]]
    return out


def test_rasterize_polygons_equals_pycocotools_on_real_annotations(place: Place, shared_data: Path) -> None:
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
    quick = place == Place("triton", "cpu")
    step = 8 if quick else 60
    for low in range(0, len(boxes), step)[: 1 if quick else None]:
        part = slice(low, low + step)
        found = targets(place.device, instances[part], boxes32[part], 28, clip_size=torch.tensor(sizes[part]))
        for mask, instance, box, size in zip(found, instances[part], boxes32[part].tolist(), sizes[part], strict=True):
            wrong += int((mask != target_by_pycocotools(instance, box, 28, size)).sum())
    assert wrong == 0


def test_rasterize_polygons_hand_computed(device: torch.device) -> None:
    # A square of 4 x 3 pixels in a box of 8 x 8 pixels and a mask of the same: pixel edges, no rounding.
    whole = targets(device, [[SQUARE]], torch.tensor([[0.0, 0, 8, 8]]), 8)[0]
    expected = np.zeros((8, 8), np.uint8)
    expected[1:4, 2:6] = 1
    assert np.array_equal(whole, expected)
    # The box of the square itself: full.
    assert targets(device, [[SQUARE]], torch.tensor([[2.0, 1, 6, 4]]), 28).all()
    # A corner left of the image is clamped to 0, while the scale stays that of the raw box: 8 / 16 instead of 8 / 8.
    left = targets(device, [[SQUARE]], torch.tensor([[-8.0, 0, 8, 8]]), 8)[0]
    expected = np.zeros((8, 8), np.uint8)
    expected[1:4, 1:3] = 1
    assert np.array_equal(left, expected)


def test_rasterize_polygons_scales_by_the_quotient(device: torch.device) -> None:
    polygon, box = ON_A_TIE
    found = targets(device, [[polygon]], torch.tensor([box]), 28)[0]
    assert np.array_equal(found, target_by_pycocotools([polygon], box, 28))
    assert not found[:, 0].any()
    assert found[:, 1:].all()


def test_rasterize_polygons_unites_polygons_and_fills_one_by_even_odd(device: torch.device) -> None:
    box = torch.tensor([[0.0, 0, 8, 8]])
    other = SQUARE + np.float32([1, 1])
    united = targets(device, [[SQUARE, other]], box, 8)[0]
    assert np.array_equal(
        united, np.maximum(targets(device, [[SQUARE]], box, 8)[0], targets(device, [[other]], box, 8)[0])
    )
    twice = np.concatenate([SQUARE, SQUARE[:1], SQUARE])
    assert not targets(device, [[twice]], box, 8).any()
    assert np.array_equal(targets(device, [[SQUARE, SQUARE]], box, 8), targets(device, [[SQUARE]], box, 8))


def test_rasterize_polygons_clips_corners_to_the_image(device: torch.device) -> None:
    box, clip = [5.0, 9.0, 11.0, 15.0], (4, 6)
    found = targets(device, [[SQUARE * 2]], torch.tensor([box]), 28, clip_size=torch.tensor([clip]))[0]
    assert np.array_equal(found, target_by_pycocotools([SQUARE * 2], box, 28, clip))
    assert not np.array_equal(found, target_by_pycocotools([SQUARE * 2], box, 28))


def test_rasterize_polygons_bad_boxes_and_no_instance_give_zeros(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0, 0, 8, 8], [3, 3, 3, 3], [3, 3, 9, 3], [9, 9, 3, 3], [nan, 0, 8, 8], [0, 0, 8, nan], [0, 0, inf, 8]]
    rows += [[-inf, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 8]]
    idxs = torch.tensor([0] * 8 + [-1, 0])
    found = targets(device, [[SQUARE]], torch.tensor(rows, dtype=torch.float32), 8, instance_idxs=idxs)
    assert found[0].sum() == 12
    assert np.array_equal(found[-1], found[0])
    assert not found[1:-1].any()


def test_rasterize_polygons_bad_vertices_do_no_harm(device: torch.device) -> None:
    bad = SQUARE.copy()
    bad[1] = [np.nan, np.inf]
    far = SQUARE * np.float32(1e30)
    found = targets(device, [[bad], [far], [SQUARE]], torch.tensor([[0.0, 0, 8, 8]] * 3), 8)
    assert found.max() == 1
    assert found[2].sum() == 12


@pytest.mark.parametrize(
    ("instances", "count"),
    [([], 0), ([], 3), ([[]], 1), ([[SQUARE]], 0), ([[np.zeros((0, 2), np.float32)]], 1)],
    ids=["nothing", "boxes only", "empty instance", "no boxes", "empty polygon"],
)
def test_rasterize_polygons_empty(device: torch.device, instances: Any, count: int) -> None:
    idxs = torch.full((count,), 0 if instances else -1)
    found = targets(device, instances, torch.tensor([[0.0, 0, 8, 8]]).repeat(count, 1), 14, instance_idxs=idxs)
    assert found.shape == (count, 14, 14)
    assert not found.any()


def test_rasterize_polygons_empty_among_others(device: torch.device) -> None:
    instances = [[], [SQUARE], [np.zeros((0, 2), np.float32), SQUARE], [], [SQUARE]]
    found = targets(device, instances, torch.tensor([[0.0, 0, 8, 8]] * 5), 8)
    assert found.sum(axis=(1, 2)).tolist() == [0, 12, 12, 0, 12]


def test_rasterize_polygons_does_not_depend_on_batch_padding_or_chunks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances, boxes = random_instances("star", 6, seed=3)
    arguments = packed(instances)
    rng = np.random.default_rng(0)
    idxs = torch.from_numpy(rng.integers(-1, 6, 6))
    whole = targets(device, instances, boxes, 28, instance_idxs=idxs)
    for low in range(0, 6, 4):
        part = targets(device, instances, boxes[low : low + 4], 28, instance_idxs=idxs[low : low + 4])
        assert np.array_equal(part, whole[low : low + 4])
    more = {"max_vertices": arguments["max_vertices"] + 100, "max_polygons": arguments["max_polygons"] + 5}
    assert np.array_equal(targets(device, instances, boxes, 28, instance_idxs=idxs, **more), whole)
    monkeypatch.setitem(rasterize._CHUNK_ELEMENTS, "cpu", 1)  # one region at a time in the reference
    assert np.array_equal(targets(device, instances, boxes, 28, instance_idxs=idxs), whole)


def test_rasterize_polygons_memory_is_bounded() -> None:
    count, vertices = 300, 600
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    polygon = (20 + 15 * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)
    arguments = packed([[polygon]]) | {"instance_idxs": torch.zeros(count, dtype=torch.int64), "clip_size": None}
    with Largest() as seen:
        rasterize._rasterize_polygons_reference(
            boxes=torch.tensor([[0.0, 0, 40, 40]]).repeat(count, 1), mask_size=28, **arguments
        )
    assert seen.numel <= max(count * 28 * 28, rasterize._CHUNK_ELEMENTS["cpu"])


PEAK = """
import resource, numpy as np, torch
from fastrcnn_kernels import rasterize_polygons
from tests.kernels.polygon_cases import packed
rng = np.random.default_rng(0)
instances = [[(rng.random((300, 2)) * 300).astype(np.float32)] for _ in range(128)]
boxes = torch.tensor([[10.0, 10, 290, 290]]).repeat(128, 1)
arguments = packed(instances) | {"instance_idxs": torch.arange(128), "boxes": boxes}
rasterize_polygons(mask_size=28, **(arguments | {"boxes": boxes[:2], "instance_idxs": torch.arange(2)}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
masks = rasterize_polygons(mask_size=28, **arguments)
assert masks.any()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_rasterize_polygons_takes_little_memory() -> None:
    """128 polygons of 300 vertices: the C++ kernel raises the peak of a process by less than 5 MB."""
    if Place("cpp", "cpu").why_not():
        pytest.skip(Place("cpp", "cpu").why_not())
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 1024  # kilobytes


def test_rasterize_polygons_never_waits_for_the_device() -> None:
    instances, boxes = random_instances("integers", 30, seed=1)
    arguments = packed(instances) | {"instance_idxs": torch.arange(30), "boxes": boxes, "mask_size": 28}
    with ForbidSync():
        rasterize._rasterize_polygons_reference(**arguments, clip_size=torch.full((30, 2), 50))


def test_rasterize_polygons_opcheck(device: torch.device) -> None:
    instances, boxes = random_instances("star", 2, seed=2)
    a = packed(instances)
    tensors = (a["vertices"], a["polygon_offsets"], a["instance_offsets"], torch.arange(2), boxes)
    args = [tensor.to(device) for tensor in tensors]
    clip = torch.full((2, 2), 50, device=device)
    operator = torch.ops.fastrcnn_kernels.rasterize_polygons.default
    torch.library.opcheck(operator, (*args, None, 28, a["max_vertices"], a["max_polygons"]))
    torch.library.opcheck(operator, (*args, clip, 14, a["max_vertices"], a["max_polygons"]))


@pytest.mark.slow
def test_rasterize_polygons_compiles(device: torch.device) -> None:
    instances, boxes = random_instances("star", 2, seed=4)
    compiled = torch.compile(rasterize_polygons, fullgraph=True, backend="aot_eager")
    assert np.array_equal(targets(device, instances, boxes, 28, compiled), targets(device, instances, boxes, 28))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rasterize_polygons_on_a_gpu() -> None:
    instances, boxes = random_instances("self-intersecting", 300, seed=5)
    arguments = packed(instances) | {"instance_idxs": torch.arange(300), "boxes": boxes}
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = rasterize_polygons(mask_size=28, **moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), rasterize_polygons(mask_size=28, **arguments))


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
def test_rasterize_polygons_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = packed([[SQUARE]]) | {"instance_idxs": torch.tensor([0]), "boxes": torch.zeros(1, 4), "mask_size": 28}
    with pytest.raises(ValueError, match=message):
        rasterize_polygons(**(arguments | change))


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
def test_rasterize_polygons_mutations_are_caught(name: str) -> None:
    broken = mutated(rasterize, *MUTATIONS[name])["rasterize_polygons"]
    wrong = 0
    for family in ("self-intersecting", "integers", "tenths", "star"):
        instances, boxes = random_instances(family, 150, seed=28)
        instances, boxes = [*instances, [ON_A_TIE[0]]], torch.cat([boxes, torch.tensor([ON_A_TIE[1]])])
        for instance, box, mask in zip(
            instances, boxes.tolist(), targets("cpu", instances, boxes, 28, broken), strict=True
        ):
            wrong += int((mask != target_by_pycocotools(instance, box, 28)).sum())
        if wrong:
            return
    raise AssertionError(f"no pixel differs: {name}")
