"""Pascal VOC folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrcnn.data import Catalog, DataError, VocDataset, dataset_to_coco

OBJECT = """<object><name>{name}</name>{difficult}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>
<ymax>{y2}</ymax></bndbox></object>"""
DIFFICULT = "<difficult>1</difficult>"


def voc_object(name: str, x1: float, y1: float, x2: float, y2: float, difficult: str = "") -> str:
    return OBJECT.format(name=name, x1=x1, y1=y1, x2=x2, y2=y2, difficult=difficult)


def write_voc(folder: Path, images: dict[str, list[str]], split: str = "train") -> Path:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, objects in images.items():
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        text = f"<annotation>{size}{''.join(objects)}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        pixels = np.full((48, 64, 3), len(name) * 9, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    return folder


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(
        tmp_path,
        {
            "000005": [
                voc_object("Cat ", 1, 1, 20, 30),
                voc_object("person", 10.5, 5, 64, 48, DIFFICULT),
                voc_object("dog", 30, 30, 40, 40, "<difficult>0</difficult>"),
            ],
            "000007": [],
            "2008_000001": [voc_object("bus", 5, 5, 25, 25, DIFFICULT)],
        },
    )


def test_load(voc: Path) -> None:
    dataset = VocDataset(voc, "train")
    assert len(dataset) == 3
    assert dataset.num_classes == 21
    assert dataset.class_names[8] == "cat"
    sample = dataset[0]
    assert tuple(sample.image.shape) == (48, 64, 3)
    assert sample.target.boxes.tolist() == [[0, 0, 19, 29], [29, 29, 39, 39]], "VOC counts pixels from 1"
    assert sample.target.labels is not None
    assert sample.target.labels.tolist() == [8, 12]
    assert dataset.image_info(2) == {"id": 3, "height": 48, "width": 64, "file_name": "2008_000001.jpg"}
    assert len(dataset.target(2)) == 0


def test_difficult_objects_are_for_the_evaluation(voc: Path) -> None:
    dataset = VocDataset(voc, "train", keep_difficult=True)
    objects, difficult = dataset.ground_truth(0)
    assert difficult.tolist() == [False, True, False]
    assert objects.boxes.tolist()[1] == [9.5, 4, 63, 47]
    assert len(Catalog().open(f"voc:{voc}@train", is_train=False)) == 3
    assert len(Catalog().open(f"voc:{voc}@train", is_train=True, filter_empty=True)) == 1
    ids = [image["id"] for image in dataset_to_coco(dataset)["images"]]
    assert ids == [1, 2, 3]


def test_own_classes(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object("bolt", 1, 1, 9, 9)]})
    assert VocDataset(tmp_path, "train", class_names=["nut", "bolt"]).target(0).labels.tolist() == [2]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"a\.xml: object 1 \(bolt\): unknown class; known are aeroplane"):
        VocDataset(tmp_path, "train")


def test_several_years_joined(voc: Path, tmp_path: Path) -> None:
    other = write_voc(tmp_path / "2012", {"x": [voc_object("car", 2, 2, 30, 30)]}, split="val")
    both = Catalog().open((f"voc:{voc}@train", f"voc:{other}@val"), is_train=True)
    assert len(both) == 4
    assert both[3].target.labels.tolist() == [7]  # type: ignore[union-attr]
    truth = dataset_to_coco(both)
    assert [image["id"] for image in truth["images"]] == [1, 2, 3, 4], "ids that two sets share are new ones"
    assert truth["annotations"][-1]["bbox"] == [1, 1, 29, 29]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", r"000005\.xml: not valid XML: .* line 1, column"),
        ("<annotation/>", r"000005\.xml: the image has no size/width"),
        (
            "<annotation><size><width>64</width><height>x</height></size></annotation>",
            r"the image: size/height is 'x', not a number",
        ),
        ("SIZE<object><name>cat</name></object>", r"object 1 \(cat\) has no bndbox/xmin"),
        (f"SIZE{voc_object('', 1, 1, 2, 2)}", r"object 1 \(without a name\): unknown class"),
        (f"SIZE{voc_object('cat', 9, 1, 2, 2)}", r"object 1 \(cat\): the box ends before it begins"),
        (f"SIZE{voc_object('cat', float('nan'), 1, 2, 2)}", r"xmin is 'nan'"),
    ],
)
def test_faulty_annotations_are_named(voc: Path, text: str, message: str) -> None:
    if text.startswith("SIZE"):
        size = "<size><width>64</width><height>48</height></size>"
        text = f"<annotation>{size}{text.removeprefix('SIZE')}</annotation>"
    (voc / "Annotations/000005.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        VocDataset(voc, "train")


def test_missing_files_are_named(voc: Path) -> None:
    with pytest.raises(DataError, match=r"split file .*val\.txt does not exist"):
        VocDataset(voc, "val")
    for text, message in (
        ("", "names no image"),
        ("000005 -1\n", r"train\.txt:1: expected one image name, got '000005 -1'"),
        ("000005\n000005\n", "names image 000005 twice"),
        ("000006\n", r"JPEGImages has no image 000006 \(of train\.txt\)"),
    ):
        (voc / "ImageSets/Main/train.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            VocDataset(voc, "train")
    (voc / "ImageSets/Main/train.txt").write_text("000005\n")
    (voc / "Annotations/000005.xml").unlink()
    with pytest.raises(DataError, match=r"annotation file .*000005\.xml does not exist"):
        VocDataset(voc, "train")
    shutil.rmtree(voc / "JPEGImages")
    with pytest.raises(DataError, match=r"has no folder JPEGImages: it is not a Pascal VOC"):
        VocDataset(voc, "train")


def test_an_image_of_another_size_is_named(voc: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(voc / "JPEGImages/000005.jpg")
    with pytest.raises(DataError, match=r"000005\.jpg is 9x9 pixels, but its annotation says 64x48"):
        VocDataset(voc, "train")[0]


def test_sample(shared_data: Path) -> None:
    folder = shared_data / "format-samples/datumaro-voc_dataset/voc_dataset1"
    dataset = VocDataset(folder, "train")
    assert [dataset.class_names[i] for i in dataset.target(0).labels.tolist()] == ["cat", "person"]  # type: ignore[union-attr]
    assert dataset[0].target.boxes.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
