"""Names of data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrcnn.data import ConcatDataset, DataError, load_dataset
from fastrcnn.data.catalog import CATALOG, resolve
from tests.data.conftest import CocoFolder


@pytest.mark.parametrize(
    ("name", "images", "annotations"),
    [
        ("coco_2017_train", "coco/train2017", "coco/annotations/instances_train2017.json"),
        ("coco_2014_train", "coco/train2014", "coco/annotations/instances_train2014.json"),
        ("coco_2014_minival", "coco/val2014", "coco/annotations/instances_minival2014.json"),
        (
            "keypoints_coco_2014_valminusminival",
            "coco/val2014",
            "coco/annotations/person_keypoints_valminusminival2014.json",
        ),
        ("voc_2007_test_cocostyle", "voc/VOC2007/JPEGImages", "voc/VOC2007/Annotations/pascal_test2007.json"),
        (
            "cityscapes_fine_instanceonly_seg_val_cocostyle",
            "cityscapes/images",
            "cityscapes/annotations/instancesonly_filtered_gtFine_val.json",
        ),
    ],
)
def test_names_of_maskrcnn_benchmark(monkeypatch: pytest.MonkeyPatch, name: str, images: str, annotations: str) -> None:
    monkeypatch.delenv("FASTRCNN_DATASETS", raising=False)
    entry = resolve(name)
    assert entry.image_folder == Path("datasets") / images
    assert entry.annotation_file == Path("datasets") / annotations
    monkeypatch.setenv("FASTRCNN_DATASETS", "/big/disk")
    assert resolve(name).image_folder == Path("/big/disk") / images
    assert resolve(name, "other").image_folder == Path("other") / images


@pytest.mark.parametrize(
    ("name", "annotations", "images"),
    [
        ("a/b.json@c/d", "a/b.json", "c/d"),
        ("/x@y/b.json@/c@d/e", "/x@y/b.json", "/c@d/e"),
        ("../b.json@.", "../b.json", "."),
    ],
)
def test_files_given_by_hand(name: str, annotations: str, images: str) -> None:
    entry = resolve(name)
    assert (str(entry.annotation_file), str(entry.image_folder)) == (annotations, images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_2017_trian", "did you mean 'coco_2017_train'"),
        ("coco_2014_minval", "did you mean 'coco_2014_minival'"),
        ("zzz", "known are .*coco_2017_val"),
        ("a/b.json", "has no image folder: write a/b.json@IMAGE_FOLDER"),
        ("a/b.json@", "unknown data set"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        resolve(name)
    assert repr(name) in str(error.value)


def test_load(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    name = f"{coco_folder.annotations}@{coco_folder.images}"
    assert len(load_dataset(name)) == 7
    assert len(load_dataset((name,), remove_images_without_annotations=True)) == 6
    both = load_dataset([name, name])
    assert isinstance(both, ConcatDataset)
    assert len(both) == 14
    with pytest.raises(DataError, match="no data set is named"):
        load_dataset(())


def test_a_catalog_data_set_that_is_not_there_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotation file .*instances_val2017\.json does not exist"):
        load_dataset("coco_2017_val", root=tmp_path)


def test_the_catalog_holds_the_names() -> None:
    assert len(CATALOG) == 18
