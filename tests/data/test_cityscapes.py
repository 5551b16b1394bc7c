"""Cityscapes: polygons, images of ids, and the conversion to COCO's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from fastrcnn.data import Catalog, CityscapesDataset, CocoDataset, DataError
from fastrcnn.data.cityscapes.__main__ import main

SIZE = (60, 80)  # height, width


def write_cityscapes(root: Path, split: str = "train", count: int = 3) -> Path:
    """Images of a car, a person behind a second car, a group of cars, a caravan and void; the last has no instance."""
    for number in range(count):
        ids = np.full(SIZE, 7, dtype=np.uint16)
        objects = [{"label": "road", "polygon": [[0, 0], [79, 0], [79, 59], [0, 59]]}]
        if number < count - 1 or count == 1:
            ids[5:25, 10:40] = 26001
            ids[20:50, 50:60] = 24000
            ids[30:40, 45:70] = 26002
            ids[50:60, 0:20] = 26
            ids[0:5, 60:80] = 29001
            ids[0:5, 0:20] = 4
            rectangles = [("car", 10, 5, 39, 24), ("person", 50, 20, 59, 49), ("car", 45, 30, 69, 39)]
            rectangles += [("cargroup", 0, 50, 19, 59), ("caravan", 60, 0, 79, 4)]
            objects += [
                {"label": label, "polygon": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}
                for label, x1, y1, x2, y2 in rectangles
            ]
        name = f"town_{number:06d}_000019"
        for folder in (root / "leftImg8bit" / split / "town", root / "gtFine" / split / "town"):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(root / "gtFine" / split / "town" / f"{name}_gtFine_instanceIds.png")
        content = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": objects}
        (root / "gtFine" / split / "town" / f"{name}_gtFine_polygons.json").write_text(json.dumps(content))
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "leftImg8bit" / split / "town" / f"{name}_leftImg8bit.png")
    return root


def open_set(root: Path, mode: str, **kwargs: object) -> CityscapesDataset:
    return CityscapesDataset(root / "leftImg8bit", root / "gtFine", "train", mode=mode, **kwargs)  # type: ignore[arg-type]


def names(dataset: CityscapesDataset, index: int) -> list[str]:
    labels = dataset.target(index).labels
    assert labels is not None
    return [dataset.class_names[i] for i in labels.tolist()]


def test_polygons(tmp_path: Path) -> None:
    dataset = open_set(write_cityscapes(tmp_path), "poly")
    assert dataset.num_classes == 11
    assert len(dataset) == 3
    assert names(dataset, 0) == ["car", "person", "car", "caravan"]
    target = dataset[0].target
    assert target.boxes.tolist()[1] == [50, 20, 59, 49]
    assert target.masks is not None
    assert int(target.masks.decode()[1].sum()) == 9 * 29, "the whole person, behind the car too"  # type: ignore[union-attr]


def test_instance_ids(tmp_path: Path) -> None:
    dataset = open_set(write_cityscapes(tmp_path), "mask")
    assert names(dataset, 0) == ["person", "car", "car", "caravan"], "in the order of the ids; no group"
    target = dataset.target(0)
    assert target.boxes.tolist()[0] == [50, 20, 59, 49]
    assert target.masks is not None
    masks = target.masks.decode()  # type: ignore[union-attr]
    assert masks.sum(dim=(1, 2)).tolist() == [200, 600, 250, 100], "the person without what the car covers"
    labels, rles, boxes, ignored = dataset.ground_truth(0)
    assert [int(coco_mask.area(rle)) for rle in rles] == [200, 600, 250, 100]
    assert len(labels) == len(boxes) == 4
    car, person = dataset.class_names.index("car"), dataset.class_names.index("person")
    assert int(coco_mask.area(ignored[person])) == 100, "void"
    assert int(coco_mask.area(ignored[car])) == 300, "void and the group of cars"


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_empty_images_and_the_mini_set(tmp_path: Path, mode: str) -> None:
    write_cityscapes(tmp_path, count=7)
    assert len(open_set(tmp_path, mode, remove_images_without_annotations=True)) == 6
    mini = open_set(tmp_path, mode, mini=3)
    assert [mini.image_info(i)["id"] for i in range(len(mini))] == [1, 4, 7], "every third, as there"
    assert len(mini.target(2)) == 0
    kind = "cityscapes" if mode == "poly" else "cityscapes-masks"
    assert len(Catalog().open(f"{kind}:{tmp_path}@train", is_train=True, filter_empty=True)) == 6


def test_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The converted file holds the same pixels as the images of ids, without caravans."""
    root = write_cityscapes(tmp_path / "city")
    assert main(["--root", str(root), "--output", str(tmp_path / "out"), "--splits", "train"]) == 0
    path = tmp_path / "out" / "instancesonly_filtered_gtFine_train.json"
    assert f"{path}: 3 images, 6 instances" in capsys.readouterr().out
    coco = CocoDataset(path, root / "leftImg8bit" / "train")
    assert coco.class_names[1:] == ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    original, converted = open_set(root, "mask").target(0), coco[0].target
    assert converted.boxes.tolist() == original.boxes.tolist()[:3]
    assert (converted.masks.decode() == original.masks.decode()[:3]).all()  # type: ignore[union-attr]
    assert main(["--root", str(root), "--output", str(tmp_path / "out"), "--splits", "train", "--flat"]) == 0
    assert json.loads(path.read_text())["images"][0]["file_name"] == "town_000000_000019_leftImg8bit.png"
    assert main(["--root", str(root), "--output", str(tmp_path / "out"), "--splits", "val"]) == 1
    assert "leftImg8bit/val does not exist" in capsys.readouterr().err


def test_faults_are_named(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    polygons = root / "gtFine/train/town/town_000000_000019_gtFine_polygons.json"
    for text, message in (
        ("{", r"polygons\.json: not valid JSON"),
        ("{}", "needs imgWidth, imgHeight and a list objects"),
        (
            '{"imgWidth": 80, "imgHeight": 60, "objects": [{"label": "car"}]}',
            r"objects\[0\] needs a label and a polygon",
        ),
        (
            '{"imgWidth": 80, "imgHeight": 60, "objects": [{"label": "car", "polygon": []}]}',
            r"objects\[0\] \(car\) has an empty polygon",
        ),
    ):
        polygons.write_text(text)
        with pytest.raises(DataError, match=message):
            open_set(root, "poly")
    polygons.unlink()
    with pytest.raises(DataError, match=r"polygons\.json does not exist \(for image"):
        open_set(root, "poly")
    ids = root / "gtFine/train/town/town_000000_000019_gtFine_instanceIds.png"
    ids.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"instanceIds\.png is not an image"):
        open_set(root, "mask")
    Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(ids)
    with pytest.raises(DataError, match="is a colour image"):
        open_set(root, "mask")
    with pytest.raises(DataError, match="mode must be poly or mask"):
        open_set(root, "boxes")


def test_sample(shared_data: Path) -> None:
    """Images of 5 x 1 pixels with a truck of one pixel, one of two, and a train."""
    root = shared_data / "format-samples/datumaro-cityscapes_dataset/train_dataset"
    dataset = CityscapesDataset(root / "leftImg8bit", root / "gtFine", "test", mode="mask")
    assert [names(dataset, i) for i in range(len(dataset))] == [["truck", "truck"], ["train"]]
    assert dataset[0].target.boxes.tolist() == [[2, 0, 2, 0], [3, 0, 4, 0]]
    labels, masks, _, _ = dataset.ground_truth(1)
    assert dataset.class_names[labels[0]] == "train"
    assert int(coco_mask.area(masks[0])) == 2
