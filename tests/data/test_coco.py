"""CocoDataset: what it yields, and one clear message for each fault."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fastrcnn.data import CocoDataset, DataError, DetectionDataset
from tests.data.conftest import CocoFolder


def load(folder: CocoFolder, *, train: bool = False) -> CocoDataset:
    folder.write()
    return CocoDataset(folder.annotations, folder.images, remove_images_without_annotations=train)


def test_images_come_in_the_order_of_their_ids(coco_folder: CocoFolder) -> None:
    dataset = load(coco_folder)
    assert [dataset.image_info(i)["id"] for i in range(len(dataset))] == [10, 20, 30, 40, 50, 60, 70]
    assert dataset.image_info(0) == {"id": 10, "height": 64, "width": 48, "file_name": "010.jpg"}
    with pytest.raises(IndexError):
        dataset.image_info(7)
    with pytest.raises(IndexError):
        dataset[-1]


def test_labels_are_contiguous_in_the_order_of_category_ids(coco_folder: CocoFolder) -> None:
    dataset = load(coco_folder)
    assert dataset.class_names == ["__background__", "car", "train", "cup"]
    assert dataset.label_to_category_id == {1: 3, 2: 7, 3: 90}
    assert dataset.num_classes == 4
    assert dataset[0].target.labels.tolist() == [1, 3]
    assert isinstance(dataset, DetectionDataset)


def test_sample(coco_folder: CocoFolder) -> None:
    dataset = load(coco_folder)
    sample = dataset[0]
    assert sample.image.dtype == torch.uint8
    assert tuple(sample.image.shape) == (64, 48, 3)
    assert (sample.image_id, sample.index) == (10, 0)
    assert sample.target.size == (48, 64)
    # x2 = x + w - 1
    assert sample.target.boxes.tolist() == [[4.5, 6.5, 14.5, 26.5], [20, 40, 29, 49]]
    assert [len(polygons) for polygons in sample.target.masks] == [2, 1]
    assert sample.target.masks.polygons[0][0].tolist() == [[4.5, 6.5], [15.5, 6.5], [15.5, 27.5]]


def test_masks_are_what_pycocotools_makes_of_the_file(coco_folder: CocoFolder) -> None:
    dataset = load(coco_folder)
    coco = COCO(str(coco_folder.annotations))
    for index in range(len(dataset)):
        target = dataset.target(index)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=dataset.image_info(index)["id"], iscrowd=0))
        expected = [coco.annToMask(annotation) for annotation in annotations]
        decoded = target.masks.decode().numpy()
        assert len(decoded) == len(expected)
        for mine, theirs in zip(decoded, expected, strict=True):
            assert np.array_equal(mine, theirs)


def test_compressed_rle(coco_folder: CocoFolder) -> None:
    before = load(coco_folder).target(6).masks.decode()
    annotation = coco_folder.annotation(4)
    rle = coco_mask.frPyObjects(annotation["segmentation"], 50, 50)
    annotation["segmentation"] = {"size": [50, 50], "counts": rle["counts"].decode()}
    assert torch.equal(load(coco_folder).target(6).masks.decode(), before)
    assert before.sum() == 120


def test_training_drops_images_without_annotation(coco_folder: CocoFolder) -> None:
    coco_folder.annotation(8)["bbox"] = [10, 20, 1, 20]  # image 40: its only box is one pixel wide
    dataset = load(coco_folder, train=True)
    assert [dataset.image_info(i)["id"] for i in range(len(dataset))] == [10, 20, 30, 60, 70]
    assert [len(dataset.target(i)) for i in range(len(dataset))] == [2, 1, 1, 1, 1]
    assert dataset[4].target.boxes.tolist() == [[24, 20, 33, 31]]
    assert len(load(coco_folder)) == 7


def test_an_image_of_crowds_only_is_not_trained_on_as_background(coco_folder: CocoFolder) -> None:
    coco_folder.annotation(6)["iscrowd"] = 1
    dataset = load(coco_folder, train=True)
    assert 20 not in [dataset.image_info(i)["id"] for i in range(len(dataset))]
    assert dataset.dropped["crowd regions"] == 2


def test_images_without_annotation_have_empty_targets(coco_folder: CocoFolder) -> None:
    target = load(coco_folder).target(4)
    assert len(target) == 0
    assert target.boxes.shape == (0, 4)
    assert target.labels.dtype == torch.int64
    assert len(target.masks) == 0


def test_boxes_are_clipped_to_the_image(coco_folder: CocoFolder) -> None:
    coco_folder.annotation(1)["bbox"] = [-5.5, 40, 200, 30]
    assert load(coco_folder).target(2).boxes.tolist() == [[0, 40, 63, 47]]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([10, 5, float("nan"), 30], "NaN"),
        ([float("inf"), 5, 20, 30], "NaN"),
        ([10, 5, 0, 30], "NaN"),
        ([10, 5, 20, -30], "NaN"),
        ([10, 5, 1, 30], "one pixel"),
        ([64, 5, 20, 30], "outside"),
        ([-30, 5, 20, 30], "outside"),
    ],
    ids=str,
)
def test_degenerate_boxes_are_dropped_and_counted(
    coco_folder: CocoFolder, caplog: pytest.LogCaptureFixture, box: list[float], reason: str
) -> None:
    coco_folder.annotation(1)["bbox"] = box
    with caplog.at_level(logging.INFO):
        dataset = load(coco_folder)
    assert len(dataset.target(2)) == 0
    assert dataset.num_instances == 6
    counted = {name: count for name, count in dataset.dropped.items() if count and name != "crowd regions"}
    assert list(counted.values()) == [1]
    assert reason in next(iter(counted))
    assert len(caplog.records) == 1
    assert next(iter(counted)) in caplog.text


@pytest.mark.parametrize(
    "polygon",
    [[1, 2, 3, 4], [], [10, 5, 30, 5, 30], [10, 5, 30, 5, 30, 35, 10], [10, 5, 30, float("nan"), 30, 35], ["a"] * 6],
    ids=["two points", "none", "odd and short", "odd", "NaN", "letters"],
)
def test_malformed_polygons_are_dropped_and_counted(coco_folder: CocoFolder, polygon: list[Any]) -> None:
    coco_folder.annotation(1)["segmentation"].insert(0, polygon)
    dataset = load(coco_folder)
    assert sum(count for reason, count in dataset.dropped.items() if "polygon" in reason) == 1
    assert [len(p) for p in dataset.target(2).masks.polygons] == [1]
    assert dataset.target(2).masks.polygons[0][0].tolist() == [[10, 5], [30, 5], [30, 35], [10, 35]]


def test_a_box_without_a_mask_is_kept_and_reported(coco_folder: CocoFolder, caplog: pytest.LogCaptureFixture) -> None:
    coco_folder.annotation(1)["segmentation"] = [[1, 2, 3, 4]]
    dataset = load(coco_folder)
    assert len(dataset.target(2)) == 1
    assert dataset.target(2).masks.decode().sum() == 0
    assert "1 instances have a box but no mask" in caplog.text


def test_a_file_of_boxes_only_has_no_masks(coco_folder: CocoFolder) -> None:
    for annotation in coco_folder.content["annotations"]:
        del annotation["segmentation"]
    dataset = load(coco_folder)
    assert not dataset.has_masks
    assert dataset[0].target.masks is None


def edit(folder: CocoFolder, fault: str) -> None:
    content = folder.content
    annotation = folder.annotation(1)
    match fault:
        case "category":
            annotation["category_id"] = 8
        case "image":
            annotation["image_id"] = 31
        case "no image id":
            del annotation["image_id"]
        case "no box":
            del annotation["bbox"]
        case "short box":
            annotation["bbox"] = [1, 2, 3]
        case "box of words":
            annotation["bbox"] = [1, 2, 3, "4"]
        case "flat polygon":
            annotation["segmentation"] = [1, 2, 3, 4, 5, 6]
        case "rle size":
            annotation["segmentation"] = {"size": [64, 48], "counts": [64 * 48]}
        case "rle sum":
            annotation["segmentation"] = {"size": [48, 64], "counts": [10, 10]}
        case "rle letters":
            annotation["segmentation"] = {"size": [48, 64], "counts": "\u00e9\u00e9"}
        case "rle counts":
            annotation["segmentation"] = {"size": [48, 64], "counts": [1.5, 10]}
        case "image id twice":
            content["images"].append(dict(content["images"][0]))
        case "image id word":
            content["images"][0]["id"] = "30"
        case "image size":
            content["images"][0]["height"] = 0
        case "file name":
            del content["images"][0]["file_name"]
        case "category twice":
            content["categories"].append({"id": 3, "name": "van"})
        case "no categories":
            content["categories"] = []
        case "no name":
            del content["categories"][0]["name"]
        case "no annotations":
            del content["annotations"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("category", "annotation 1 has category_id 8, which is not in 'categories'"),
        ("image", "annotation 1 refers to image 31, which is not in 'images'"),
        ("no image id", "annotation 1 needs an 'image_id' and a 'category_id'"),
        ("no box", "annotation 1 needs a 'bbox' of four numbers"),
        ("short box", "annotation 1 needs a 'bbox' of four numbers"),
        ("box of words", "annotation 1 needs a 'bbox' of four numbers"),
        ("flat polygon", "annotation 1 has a 'segmentation' that is neither"),
        ("rle size", r"annotation 1 has an RLE of size \[64, 48\], but its image is \[48, 64\]"),
        ("rle sum", "annotation 1 has an RLE of 20 pixels, but its image has 3072"),
        ("rle letters", "annotation 1 has an RLE whose 'counts' hold characters that no RLE has"),
        ("rle counts", "annotation 1 has an RLE whose 'counts' are neither"),
        ("image id twice", "image id 30 appears twice"),
        ("image id word", r"images\[0\] needs an integer 'id'"),
        ("image size", "image 30 needs a positive integer 'height' and 'width'"),
        ("file name", "image 30 needs a 'file_name'"),
        ("category twice", "category id 3 appears twice"),
        ("no categories", "'categories' is empty"),
        ("no name", r"categories\[0\] needs an integer 'id' and a 'name'"),
        ("no annotations", "needs a list 'annotations'"),
    ],
)
def test_faults_name_the_file_and_the_annotation(coco_folder: CocoFolder, fault: str, message: str) -> None:
    edit(coco_folder, fault)
    with pytest.raises(DataError, match=message) as error:
        load(coco_folder)
    assert str(coco_folder.annotations) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_rle_that_ends_early_is_found_when_it_is_read(coco_folder: CocoFolder) -> None:
    rle = coco_mask.frPyObjects({"size": [48, 64], "counts": [100, 3072 - 100]}, 48, 64)["counts"]
    coco_folder.annotation(1)["segmentation"] = {"size": [48, 64], "counts": rle[:-1].decode()}
    dataset = load(coco_folder)
    with pytest.raises(DataError, match="an RLE of image 30 cannot be decoded"):
        dataset[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [\n1,\n2', r"annotations\.json:3: not valid JSON"),
        (b"", r"annotations\.json:1: not valid JSON"),
        (b'{"a": "\xff\xfe"}', "not valid JSON: byte 7 is not UTF-8"),
        (b"[1, 2]", "expected an object with 'images'"),
    ],
    ids=["cut", "empty", "latin", "list"],
)
def test_files_that_are_not_coco_json(coco_folder: CocoFolder, content: bytes, message: str) -> None:
    coco_folder.write()
    coco_folder.annotations.write_bytes(content)
    with pytest.raises(DataError, match=message):
        CocoDataset(coco_folder.annotations, coco_folder.images)


def test_missing_annotation_file_and_folder(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    with pytest.raises(DataError, match=r"annotation file .*none\.json does not exist"):
        CocoDataset(coco_folder.folder / "none.json", coco_folder.images)
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist"):
        CocoDataset(coco_folder.annotations, coco_folder.folder / "nowhere")


def test_missing_images_are_found_before_training(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    (coco_folder.images / "020.jpg").unlink()
    (coco_folder.images / "060.jpg").unlink()
    with pytest.raises(DataError, match=r"2 of the 7 images of .* are missing; the first is .*020\.jpg"):
        CocoDataset(coco_folder.annotations, coco_folder.images)


def test_images_in_subfolders(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    coco_folder.content["images"][0]["file_name"] = "more/030.jpg"
    coco_folder.annotations.write_text(json.dumps(coco_folder.content))
    (coco_folder.images / "more").mkdir()
    (coco_folder.images / "030.jpg").rename(coco_folder.images / "more" / "030.jpg")
    assert tuple(CocoDataset(coco_folder.annotations, coco_folder.images)[2].image.shape) == (48, 64, 3)


def test_an_image_of_another_size_is_found_when_it_is_read(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    Image.new("RGB", (48, 64)).save(coco_folder.images / "030.jpg")
    dataset = load(coco_folder)
    with pytest.raises(DataError, match=r"030\.jpg is 48x64 pixels, but .* says 64x48 for image 30"):
        dataset[2]


def test_a_target_does_not_share_memory_with_the_data_set(coco_folder: CocoFolder) -> None:
    dataset = load(coco_folder)
    target = dataset.target(0)
    target.boxes.zero_()
    for polygons in target.masks.polygons:
        for polygon in polygons:
            polygon.zero_()
    again = dataset.target(0)
    assert again.boxes.abs().sum() > 0
    assert again.masks.polygons[0][0].abs().sum() > 0


def test_annotations_are_held_compactly(coco_folder: CocoFolder) -> None:
    one = coco_folder.annotation(1)
    coco_folder.content["annotations"] = [{**one, "id": i} for i in range(1, 5001)]
    dataset = load(coco_folder)
    # 16 bytes of box, 32 of vertices, and the offsets; a dictionary with lists would take over a kilobyte.
    assert len(pickle.dumps(dataset)) < 5000 * 120
    assert len(dataset.target(2)) == 5000


def test_the_fingerprint_follows_the_file(coco_folder: CocoFolder) -> None:
    first = load(coco_folder).fingerprint
    assert load(coco_folder).fingerprint == first
    coco_folder.annotation(1)["bbox"][0] += 1
    assert load(coco_folder).fingerprint != first


def test_real_faults(shared_data: Path, tmp_path: Path) -> None:
    """A published file with category id 0, polygons of two points, and crowds given as polygons."""
    source = shared_data / "defects" / "instances.json"
    content = json.loads(source.read_text())
    for image in content["images"]:
        (tmp_path / image["file_name"]).touch()
    dataset = CocoDataset(source, tmp_path)
    assert dataset.label_to_category_id[1] == 0
    assert dataset.class_names[1] == "Apple"
    assert {reason: count for reason, count in dataset.dropped.items() if count} == {
        "crowd regions": 4,
        "polygons of fewer than 3 points": 3,
    }
    assert dataset.num_instances == 87
    assert sum(len(dataset.target(i)) for i in range(len(dataset))) == 87


@pytest.mark.parametrize(("split", "images", "kept", "instances"), [("train", 92, 91, 820), ("val", 66, 64, 552)])
def test_real_photographs(shared_data: Path, split: str, images: int, kept: int, instances: int) -> None:
    folder = shared_data / "coco-cc"
    annotations = folder / "annotations" / f"instances_{split}.json"
    assert len(CocoDataset(annotations, folder / "images")) == images
    dataset = CocoDataset(annotations, folder / "images", remove_images_without_annotations=True)
    assert len(dataset) == kept
    assert dataset.num_instances == instances
    assert dataset.num_classes == 81
    coco = COCO(str(annotations))
    for index in range(0, kept, 9):
        sample = dataset[index]
        expected = coco.loadAnns(coco.getAnnIds(imgIds=sample.image_id, iscrowd=0))
        assert [dataset.label_to_category_id[i] for i in sample.target.labels.tolist()] == [
            a["category_id"] for a in expected
        ]
        height, width = sample.image.shape[:2]
        for mine, theirs in zip(sample.target.masks.decode().numpy(), expected, strict=True):
            # As in maskrcnn-benchmark polygons are float32, which moves those that lie exactly between two pixels.
            rounded = [np.float32(polygon).tolist() for polygon in theirs["segmentation"]]
            rle = coco_mask.merge(coco_mask.frPyObjects(rounded, height, width))
            assert np.array_equal(mine, coco_mask.decode(rle))
