"""The generated data set: exact, deterministic, and COCO to the letter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fastrcnn.data import Catalog, CocoDataset, DataError
from fastrcnn.data.shapes import CLASSES, _connected_parts, annotate, generate_image, main, write_dataset
from fastrcnn.data.shapes_render import polygon_coverage


def rasterise(segmentation: list[list[float]], size: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, size, size))).astype(bool)


@pytest.mark.parametrize("image_size", [64, 192])
def test_annotations_are_exact(image_size: int) -> None:
    parts = 0
    for index in range(25):
        generated = generate_image(5, "train", index, image_size=image_size)
        assert generated.pixels.shape == (image_size, image_size, 3)
        assert 1 <= len(generated.shapes) <= 6
        for shape in generated.shapes:
            annotation = annotate(shape)
            mask = rasterise(annotation["segmentation"], image_size)
            assert (mask & shape.visible).sum() / (mask | shape.visible).sum() > 0.97
            assert annotation["area"] == mask.sum()
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in annotation["segmentation"]])
            assert points.min() >= 0
            assert points.max() <= image_size
            x, y, w, h = annotation["bbox"]
            assert np.allclose([x, y], points.min(axis=0), atol=0.006)
            assert np.allclose([x + w, y + h], points.max(axis=0), atol=0.011)
            assert shape.visible.sum() >= 0.4 * shape.full.sum() > 0
            parts = max(parts, len(annotation["segmentation"]))
    assert parts > 1  # something was cut into several parts


def test_visible_pixels_of_objects_do_not_overlap_and_show_the_object() -> None:
    for index in range(10):
        generated = generate_image(1, "val", index)
        assert sum(shape.visible.astype(int) for shape in generated.shapes).max() == 1
        for below, above in zip(generated.shapes[:-1], generated.shapes[1:], strict=True):
            assert not (below.visible & above.full).any()
            assert np.array_equal(above.visible, above.full) or above is not generated.shapes[-1]


def test_objects_differ_from_what_surrounds_them() -> None:
    """The annotated pixels are where the picture changes: moving a mask elsewhere must fit worse."""
    contrasts, moved = [], []
    for index in range(20):
        generated = generate_image(2, "train", index)
        pixels = generated.pixels.astype(float)
        free = ~np.any([shape.full for shape in generated.shapes], axis=0)
        background = pixels[free].mean(axis=0)
        for shape in generated.shapes:
            contrasts.append(np.abs(pixels[shape.visible].mean(axis=0) - background).sum())
            elsewhere = np.roll(shape.visible, 96, axis=(0, 1)) & free
            if elsewhere.sum() > 100:
                moved.append(np.abs(pixels[elsewhere].mean(axis=0) - background).sum())
    assert np.median(contrasts) > 2 * np.median(moved)


def test_the_same_seed_gives_the_same_picture() -> None:
    first, second = generate_image(0, "train", 3), generate_image(0, "train", 3)
    assert np.array_equal(first.pixels, second.pixels)
    assert [annotate(s) for s in first.shapes] == [annotate(s) for s in second.shapes]
    others = [generate_image(1, "train", 3), generate_image(0, "val", 3), generate_image(0, "train", 4)]
    assert not any(np.array_equal(first.pixels, other.pixels) for other in others)


def test_pictures_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for index in range(4):
        generated = generate_image(0, "train", index)
        digest.update(generated.pixels.tobytes())
        digest.update(json.dumps([annotate(shape) for shape in generated.shapes]).encode())
    assert digest.hexdigest() == "92f3abae0256a7d608a584831271d032795582d8be7b6aa2d6e1c20619154d0d"


def test_all_classes_occur_in_all_sizes() -> None:
    names, areas = set(), []
    for index in range(40):
        for shape in generate_image(0, "train", index).shapes:
            names.add(shape.name)
            areas.append(float(np.sqrt(shape.full.sum())))
    assert names == set(CLASSES)
    assert min(areas) < 18
    assert max(areas) > 55


def test_write(tmp_path: Path) -> None:
    names = write_dataset(tmp_path / "shapes", num_train=6, num_val=3, image_size=96, seed=4)
    for split, count in (("train", 6), ("val", 3)):
        path = tmp_path / "shapes" / "annotations" / f"instances_{split}.json"
        assert names[split] == f"{path}@{tmp_path / 'shapes' / 'images'}"
        content = json.loads(path.read_text())
        assert content["info"]["num_images"] == count == len(content["images"])
        assert content["info"]["classes"] == list(CLASSES)
        dataset = Catalog().open(names[split], is_train=True, filter_empty=True)
        assert isinstance(dataset, CocoDataset)
        assert dataset.class_names[1:] == list(CLASSES)
        assert len(dataset) == count
        assert not any(dataset.dropped.values())
        assert dataset.num_instances == len(content["annotations"])
        for index in range(count):
            sample = dataset[index]
            generated = generate_image(4, split, index, image_size=96)
            # JPEG of quality 95 without chroma subsampling
            assert np.abs(sample.image.numpy().astype(int) - generated.pixels).mean() < 4
            for mask, shape in zip(sample.target.masks.decode().numpy(), generated.shapes, strict=True):
                assert (mask.astype(bool) & shape.visible).sum() / (mask.astype(bool) | shape.visible).sum() > 0.97
        coco = COCO(str(path))
        assert len(coco.getAnnIds()) == dataset.num_instances


def test_written_files_do_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", num_train=2, num_val=1, image_size=64)
    write_dataset(tmp_path / "more", num_train=4, num_val=0, image_size=64)
    for name in ("train_000000.jpg", "train_000001.jpg"):
        assert (tmp_path / "few" / "images" / name).read_bytes() == (tmp_path / "more" / "images" / name).read_bytes()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--num-train", "2", "--num-val", "1", "--image-size", "64"]
    (tmp_path / "notes.txt").write_text("mine")
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert main([*arguments, "--overwrite"]) == 0
    output = capsys.readouterr().out
    assert f"train: {tmp_path / 'annotations' / 'instances_train.json'}@{tmp_path / 'images'}" in output
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # A smaller data set over a larger one leaves no image of the larger one.
    assert main([*arguments, "--num-train", "1", "--overwrite"]) == 0
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["train_000000.jpg", "val_000000.jpg"]


def test_a_chosen_set_of_classes(tmp_path: Path) -> None:
    assert (
        main(
            [
                "--output",
                str(tmp_path),
                "--num-train",
                "3",
                "--num-val",
                "1",
                "--image-size",
                "64",
                "--classes",
                "star",
                "bar",
            ]
        )
        == 0
    )
    content = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["star", "bar"]
    assert {a["category_id"] for a in content["annotations"]} <= {1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ("star", "blob")}, "unknown class 'blob': choose from ellipse, "),
        ({"classes": ("star", "star")}, "each once"),
        ({"classes": ()}, "each once"),
        ({"image_size": 10}, "at least 64 pixels, got 10"),
        ({"num_train": -1}, "must not be negative"),
    ],
    ids=str,
)
def test_wrong_arguments_write_nothing(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "shapes", **arguments)
    assert not (tmp_path / "shapes").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "shapes").touch()
    with pytest.raises(DataError, match="exists and is not a folder"):
        write_dataset(tmp_path / "shapes")


def test_polygon_coverage() -> None:
    window = (slice(0, 10), slice(0, 12))
    box = np.array([[2.25, 3.0], [7.5, 3.0], [7.5, 6.0], [2.25, 6.0]])
    expected = np.zeros((10, 12))
    expected[3:6, 2] = 0.75
    expected[3:6, 3:7] = 1
    expected[3:6, 7] = 0.5
    np.testing.assert_allclose(polygon_coverage(box, window), expected)
    shifted = (slice(4, 9), slice(3, 8))
    np.testing.assert_allclose(polygon_coverage(box, shifted), expected[4:9, 3:8])
    # A pixel column at a time, against Pillow at sixteen times the size.
    star = np.array([[5, 0.5], [6.5, 4], [11, 4.5], [7.5, 6], [9, 9.5], [5, 7], [1.5, 9], [3, 6], [0.5, 4], [4, 4]])
    from PIL import ImageDraw

    large = Image.new("1", (12 * 64, 10 * 64))
    ImageDraw.Draw(large).polygon([tuple(point * 64) for point in star], fill=1)
    average = np.asarray(large, dtype=float).reshape(10, 64, 12, 64).mean(axis=(1, 3))
    np.testing.assert_allclose(polygon_coverage(star, window), average, atol=0.06)
    np.testing.assert_allclose(polygon_coverage(star, window).sum(), average.sum(), rtol=0.01)


def test_connected_parts() -> None:
    mask = np.array(
        [
            [1, 1, 0, 0, 1],
            [0, 1, 0, 0, 1],
            [0, 0, 1, 0, 0],
            [1, 0, 1, 1, 1],
        ],
        dtype=bool,
    )
    parts = _connected_parts(mask)
    assert [int(part.sum()) for part in parts] == [3, 2, 4, 1]
    assert np.array_equal(np.sum(parts, axis=0), mask)
    assert _connected_parts(np.zeros((3, 3), dtype=bool)) == []
