"""Names of data sets: maskrcnn-benchmark's, and ``ANNOTATIONS.json@IMAGE_FOLDER`` for all others."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.dataset import ConcatDataset, DataError

ROOT_VARIABLE = "FASTRCNN_DATASETS"
DEFAULT_ROOT = "datasets"


@dataclass(frozen=True)
class CatalogEntry:
    """Where a data set lies; relative paths are relative to the root of the data sets."""

    image_folder: Path
    annotation_file: Path


def _entries() -> dict[str, CatalogEntry]:
    """maskrcnn-benchmark's entries in COCO format (its ``paths_catalog.py``)."""
    entries: dict[str, tuple[str, str]] = {}
    for split in ("train", "val"):
        entries[f"coco_2017_{split}"] = (f"coco/{split}2017", f"coco/annotations/instances_{split}2017.json")
        for year in (2007, 2012):
            entries[f"voc_{year}_{split}_cocostyle"] = (
                f"voc/VOC{year}/JPEGImages",
                f"voc/VOC{year}/Annotations/pascal_{split}{year}.json",
            )
    entries["voc_2007_test_cocostyle"] = ("voc/VOC2007/JPEGImages", "voc/VOC2007/Annotations/pascal_test2007.json")
    for split in ("train", "val", "minival", "valminusminival"):
        images = "coco/train2014" if split == "train" else "coco/val2014"
        entries[f"coco_2014_{split}"] = (images, f"coco/annotations/instances_{split}2014.json")
        entries[f"keypoints_coco_2014_{split}"] = (images, f"coco/annotations/person_keypoints_{split}2014.json")
    for split in ("train", "val", "test"):
        entries[f"cityscapes_fine_instanceonly_seg_{split}_cocostyle"] = (
            "cityscapes/images",
            f"cityscapes/annotations/instancesonly_filtered_gtFine_{split}.json",
        )
    return {
        name: CatalogEntry(Path(images), Path(annotations)) for name, (images, annotations) in sorted(entries.items())
    }


CATALOG = _entries()


def datasets_root() -> Path:
    """The folder of the catalog's data sets: the environment variable FASTRCNN_DATASETS, or ``datasets``."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def resolve(name: str, root: str | Path | None = None) -> CatalogEntry:
    """The files of a data set.

    Args:
        name: a name of the catalog, or ``ANNOTATIONS.json@IMAGE_FOLDER`` (paths as given).
        root: of the catalog's data sets; :func:`datasets_root` by default.

    Raises:
        DataError: ``name`` is neither; the message has the nearest name of the catalog.
    """
    if name in CATALOG:
        base = Path(root) if root is not None else datasets_root()
        entry = CATALOG[name]
        return CatalogEntry(base / entry.image_folder, base / entry.annotation_file)
    # The folder may hold an @ of its own, and so may the file: what separates them follows ".json".
    annotations, separator, images = name.partition(".json@")
    if separator and annotations and images:
        return CatalogEntry(Path(images), Path(annotations + ".json"))
    if name.endswith(".json"):
        raise DataError(f"data set {name!r} has no image folder: write {name}@IMAGE_FOLDER")
    nearest = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(CATALOG)}"
    raise DataError(f"unknown data set {name!r}: {hint} Any other is given as ANNOTATIONS.json@IMAGE_FOLDER")


def load_dataset(
    names: str | Sequence[str], *, remove_images_without_annotations: bool = False, root: str | Path | None = None
) -> CocoDataset | ConcatDataset:
    """The data set called ``names``, or several joined.

    Raises:
        DataError: an unknown name, faulty files, or data sets whose classes differ.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError("no data set is named: give a name of the catalog or ANNOTATIONS.json@IMAGE_FOLDER")
    datasets = []
    for name in names:
        entry = resolve(name, root)
        datasets.append(
            CocoDataset(
                entry.annotation_file,
                entry.image_folder,
                remove_images_without_annotations=remove_images_without_annotations,
                name=name,
            )
        )
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
