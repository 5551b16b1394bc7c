"""Names of data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrcnn.data import Catalog, CityscapesSource, CocoSource, ConcatDataset, DataError, VocSource
from fastrcnn.data.catalog import BENCHMARK_SOURCES
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
    entry = Catalog().resolve(name)
    assert isinstance(entry, CocoSource)
    assert entry.image_folder == Path("datasets") / images
    assert entry.annotation_file == Path("datasets") / annotations
    monkeypatch.setenv("FASTRCNN_DATASETS", "/big/disk")
    assert Catalog().resolve(name) == CocoSource(Path("/big/disk") / images, Path("/big/disk") / annotations)
    assert Catalog("other").resolve(name) == CocoSource(Path("other") / images, Path("other") / annotations)


@pytest.mark.parametrize(
    ("name", "annotations", "images"),
    [
        ("a/b.json@c/d", "a/b.json", "c/d"),
        ("/x@y/b.json@/c@d/e", "/x@y/b.json", "/c@d/e"),
        ("../b.json@.", "../b.json", "."),
    ],
)
def test_files_given_by_hand(name: str, annotations: str, images: str) -> None:
    entry = Catalog().resolve(name)
    assert isinstance(entry, CocoSource)
    assert (str(entry.annotation_file), str(entry.image_folder)) == (annotations, images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_2017_trian", "did you mean 'coco_2017_train'"),
        ("coco_2014_minval", "did you mean 'coco_2014_minival'"),
        ("zzz", "known are .*coco_2017_val"),
        ("a/b.json", "has no image folder: write a/b.json@IMAGE_FOLDER"),
        ("a/b.json@", "unknown data set"),
        ("voc:VOC2007", "write voc:FOLDER@SPLIT"),
        ("cityscapes:@val", "write cityscapes:FOLDER@SPLIT"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        Catalog().resolve(name)
    assert repr(name) in str(error.value)


def test_other_forms_given_by_hand() -> None:
    assert Catalog().resolve("voc:/d/VOC2007@trainval") == VocSource(Path("/d/VOC2007"), "trainval")
    assert Catalog().resolve("voc:/d@2/VOC@t") == VocSource(Path("/d@2/VOC"), "t")
    assert Catalog().resolve("cityscapes:c@val") == CityscapesSource(Path("c"), "val", "poly")
    assert Catalog().resolve("cityscapes-masks:c@val") == CityscapesSource(Path("c"), "val", "mask")


def test_open(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    name = f"{coco_folder.annotations}@{coco_folder.images}"
    assert len(Catalog().open(name, is_train=False)) == 7
    assert len(Catalog().open((name,), is_train=True, filter_empty=True)) == 6
    both = Catalog().open([name, name], is_train=True)
    assert isinstance(both, ConcatDataset)
    assert len(both) == 14
    with pytest.raises(DataError, match="no data set is named"):
        Catalog().open((), is_train=True)


def test_register(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    catalog, asked = Catalog(), []

    def open_it(is_train: bool) -> object:
        asked.append(is_train)
        return CocoSource(coco_folder.images, coco_folder.annotations).open("x", is_train=is_train, filter_empty=False)

    catalog.register("by_function", open_it)  # type: ignore[arg-type]
    catalog.register("by_source", CocoSource(coco_folder.images, coco_folder.annotations))
    catalog.register("by_text", f"{coco_folder.annotations}@{coco_folder.images}")
    for name in ("by_function", "by_source", "by_text"):
        assert len(catalog.open(name, is_train=True)) == 7
    assert asked == [True]
    for taken in ("by_source", "coco_2017_val"):
        with pytest.raises(DataError, match=f"'{taken}' cannot be registered: the name is taken"):
            catalog.register(taken, "a.json@b")
    with pytest.raises(DataError, match="did you mean 'by_function'"):
        catalog.resolve("by_funktion")
    other = catalog.copy()
    other.register("only_there", "a.json@b")
    assert "only_there" not in catalog
    assert "by_text" not in Catalog(), "there is no global state"


def test_a_catalog_data_set_that_is_not_there_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotation file .*instances_val2017\.json does not exist"):
        Catalog(tmp_path).open("coco_2017_val", is_train=False)


def test_the_thirty_names() -> None:
    """Those of maskrcnn-benchmark's paths_catalog.py."""
    splits = ("train", "val", "minival", "valminusminival")
    names = {f"coco_2017_{s}" for s in splits[:2]}
    names |= {f"{prefix}coco_2014_{s}" for prefix in ("", "keypoints_") for s in splits}
    years = ("2007_train", "2007_val", "2012_train", "2012_val")
    names |= {f"voc_{year}{style}" for year in years for style in ("", "_cocostyle")}
    names |= {"voc_2007_test", "voc_2007_test_cocostyle", "voc_2012_test"}
    names |= {f"cityscapes_fine_instanceonly_seg_{s}_cocostyle" for s in ("train", "val", "test")}
    names |= {f"cityscapes_{mode}_instance_{s}" for mode in ("poly", "mask") for s in splits[:3]}
    assert set(BENCHMARK_SOURCES) == names
    assert len(names) == 30
    assert Catalog("d").resolve("voc_2012_val") == VocSource(Path("d/voc/VOC2012"), "val")
    minival = Catalog("d").resolve("cityscapes_mask_instance_minival")
    assert minival == CityscapesSource(Path("d/cityscapes"), "val", "mask", 10)
