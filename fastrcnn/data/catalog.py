"""Names of data sets: maskrcnn-benchmark's, those of the configuration, and files given by hand.

There is no global registry: a :class:`Catalog` is an object that is handed to whoever looks names up.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fastrcnn.data.cityscapes import CLASSES as CITYSCAPES_CLASSES
from fastrcnn.data.cityscapes import CityscapesDataset
from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.coco_file import read_json
from fastrcnn.data.dataset import ConcatDataset, DataError, DetectionDataset
from fastrcnn.data.voc import CLASSES as VOC_CLASSES
from fastrcnn.data.voc import VocDataset

ROOT_VARIABLE = "FASTRCNN_DATASETS"
DEFAULT_ROOT = "datasets"

Opener = Callable[[bool], DetectionDataset]


class Source(Protocol):
    """Where a data set lies and how it is opened."""

    @property
    def marker(self) -> Path:
        """A file or folder without which the data set is not there."""
        ...

    def under(self, root: Path) -> Source:
        """With relative paths taken relative to ``root``."""
        ...

    def open(self, name: str, *, is_train: bool, filter_empty: bool) -> DetectionDataset:
        """The data set. ``is_train`` leaves out what is ground truth for the evaluation only.

        Raises:
            DataError: files are missing or faulty.
        """
        ...

    def class_names(self) -> list[str] | None:
        """``__background__`` and the classes, where they are known without reading all of it; else None."""
        ...


@dataclass(frozen=True)
class CocoSource:
    """A COCO annotation file and a folder of images."""

    image_folder: Path
    annotation_file: Path

    @property
    def marker(self) -> Path:
        return self.annotation_file

    def under(self, root: Path) -> CocoSource:
        return CocoSource(root / self.image_folder, root / self.annotation_file)

    def open(self, name: str, *, is_train: bool, filter_empty: bool) -> CocoDataset:
        return CocoDataset(
            self.annotation_file, self.image_folder, remove_images_without_annotations=filter_empty, name=name
        )

    def class_names(self) -> list[str] | None:
        try:
            _, content = read_json(self.annotation_file)
            categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        except (DataError, KeyError, TypeError):
            return None
        return ["__background__", *(name for _, name in sorted(categories.items()))]


@dataclass(frozen=True)
class VocSource:
    """A Pascal VOC folder and the name of a file of its ``ImageSets/Main``; ``classes`` of own data."""

    folder: Path
    split: str
    classes: tuple[str, ...] = ()

    @property
    def marker(self) -> Path:
        return self.folder / "ImageSets" / "Main" / f"{self.split}.txt"

    def under(self, root: Path) -> VocSource:
        return replace(self, folder=root / self.folder)

    def open(self, name: str, *, is_train: bool, filter_empty: bool) -> VocDataset:
        return VocDataset(
            self.folder,
            self.split,
            keep_difficult=not is_train,
            remove_images_without_annotations=filter_empty,
            class_names=self.classes or None,
            name=name,
        )

    def class_names(self) -> list[str] | None:
        return ["__background__", *(self.classes or VOC_CLASSES)]


@dataclass(frozen=True)
class CityscapesSource:
    """The folder that holds ``leftImg8bit`` and ``gtFine``.

    ``mode``: ``poly`` reads the polygons, ``mask`` the images of instance ids; ``mini``: only that many images.
    """

    folder: Path
    split: str
    mode: str = "poly"
    mini: int | None = None

    @property
    def marker(self) -> Path:
        return self.folder / "gtFine" / self.split

    def under(self, root: Path) -> CityscapesSource:
        return replace(self, folder=root / self.folder)

    def open(self, name: str, *, is_train: bool, filter_empty: bool) -> CityscapesDataset:
        return CityscapesDataset(
            self.folder / "leftImg8bit",
            self.folder / "gtFine",
            self.split,
            mode=self.mode,
            mini=self.mini,
            remove_images_without_annotations=filter_empty,
            name=name,
        )

    def class_names(self) -> list[str] | None:
        return ["__background__", *CITYSCAPES_CLASSES]


def _benchmark_sources() -> dict[str, Source]:
    """The thirty names of maskrcnn-benchmark's ``paths_catalog.py``; paths relative to the root of the data sets."""
    found: dict[str, Source] = {}

    def coco(name: str, images: str, annotations: str) -> None:
        found[name] = CocoSource(Path(images), Path(annotations))

    for split in ("train", "val"):
        coco(f"coco_2017_{split}", f"coco/{split}2017", f"coco/annotations/instances_{split}2017.json")
    for split in ("train", "val", "minival", "valminusminival"):
        images = "coco/train2014" if split == "train" else "coco/val2014"
        coco(f"coco_2014_{split}", images, f"coco/annotations/instances_{split}2014.json")
        coco(f"keypoints_coco_2014_{split}", images, f"coco/annotations/person_keypoints_{split}2014.json")
    for year in (2007, 2012):
        for split in ("train", "val", "test"):
            folder = f"voc/VOC{year}"
            found[f"voc_{year}_{split}"] = VocSource(Path(folder), split)
            if (year, split) != (2012, "test"):
                annotations = f"{folder}/Annotations/pascal_{split}{year}.json"
                coco(f"voc_{year}_{split}_cocostyle", f"{folder}/JPEGImages", annotations)
    for split in ("train", "val", "test"):
        coco(
            f"cityscapes_fine_instanceonly_seg_{split}_cocostyle",
            "cityscapes/images",
            f"cityscapes/annotations/instancesonly_filtered_gtFine_{split}.json",
        )
    for mode in ("poly", "mask"):
        for name, split, mini in (("train", "train", None), ("val", "val", None), ("minival", "val", 10)):
            found[f"cityscapes_{mode}_instance_{name}"] = CityscapesSource(Path("cityscapes"), split, mode, mini)
    return dict(sorted(found.items()))


BENCHMARK_SOURCES: Mapping[str, Source] = _benchmark_sources()
FORMS = "ANNOTATIONS.json@IMAGE_FOLDER, voc:FOLDER@SPLIT or cityscapes:FOLDER@SPLIT"


def datasets_root() -> Path:
    """The folder of the benchmark's data sets: the environment variable FASTRCNN_DATASETS, or ``datasets``."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


class Catalog:
    """Data sets by name: maskrcnn-benchmark's thirty, and what is registered.

    Example::

        catalog = Catalog()
        catalog.register("street", CityscapesSource(Path("/data/street"), "train"))
        catalog.register("own", lambda is_train: OwnDataset(augmented=is_train))
        fastrcnn.train.main(["--config-file", "c.yaml", "DATASETS.TRAIN", "('own',)"], catalog=catalog)

    Args:
        root: of the benchmark's data sets; :func:`datasets_root` at the time of the look-up by default.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = None if root is None else Path(root)
        self._registered: dict[str, Source | Opener] = {}

    def register(self, name: str, source: Source | Opener | str) -> None:
        """Give a data set a name.

        Args:
            name: not yet taken.
            source: where it lies; or a function that opens it, of one argument: whether for training; or one of the
                forms that :meth:`resolve` takes.

        Raises:
            DataError: the name is taken, or the text is not of a known form.
        """
        if name in self:
            raise DataError(f"data set {name!r} cannot be registered: the name is taken")
        self._registered[name] = self.resolve(source) if isinstance(source, str) else source

    def copy(self) -> Catalog:
        """Another catalog with the same names; registering there changes nothing here."""
        other = Catalog(self.root)
        other._registered = dict(self._registered)
        return other

    def __contains__(self, name: str) -> bool:
        return name in self._registered or name in BENCHMARK_SOURCES

    def __iter__(self) -> Iterator[str]:
        return iter([*self._registered, *BENCHMARK_SOURCES])

    def resolve(self, name: str) -> Source | Opener:
        """Where a data set lies.

        Args:
            name: a registered name, one of maskrcnn-benchmark's, or (paths as given) ``ANNOTATIONS.json@IMAGE_FOLDER``,
                ``voc:FOLDER@SPLIT``, ``cityscapes:FOLDER@SPLIT`` or ``cityscapes-masks:FOLDER@SPLIT``.

        Raises:
            DataError: ``name`` is none of these; the message has the nearest known name.
        """
        if name in self._registered:
            return self._registered[name]
        if name in BENCHMARK_SOURCES:
            return BENCHMARK_SOURCES[name].under(self.root if self.root is not None else datasets_root())
        return self._given_by_hand(name)

    def _given_by_hand(self, name: str) -> Source:
        kind, _, rest = name.partition(":")
        if kind in ("voc", "cityscapes", "cityscapes-masks"):
            folder, _, split = rest.rpartition("@")
            if not folder or not split:
                raise DataError(f"data set {name!r}: write {kind}:FOLDER@SPLIT")
            if kind == "voc":
                return VocSource(Path(folder), split)
            return CityscapesSource(Path(folder), split, "mask" if kind == "cityscapes-masks" else "poly")
        # The folder may hold an @ of its own, and so may the file: what separates them follows ".json".
        annotations, separator, images = name.partition(".json@")
        if separator and annotations and images:
            return CocoSource(Path(images), Path(annotations + ".json"))
        if name.endswith(".json"):
            raise DataError(f"data set {name!r} has no image folder: write {name}@IMAGE_FOLDER")
        nearest = difflib.get_close_matches(name, list(self), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(self)}"
        raise DataError(f"unknown data set {name!r}: {hint} Any other is given as {FORMS}")

    def open(self, names: str | Sequence[str], *, is_train: bool, filter_empty: bool = False) -> DetectionDataset:
        """The data set called ``names``, or several joined.

        Args:
            is_train: leave out what only the evaluation needs (VOC's difficult objects).
            filter_empty: leave out images without ground truth.

        Raises:
            DataError: an unknown name, faulty files, or data sets whose classes differ.
        """
        names = [names] if isinstance(names, str) else list(names)
        if not names:
            raise DataError(f"no data set is named: give a name of the catalog, {FORMS}")
        datasets: list[DetectionDataset] = []
        for name in names:
            source = self.resolve(name)
            if callable(source):
                datasets.append(source(is_train))
            else:
                datasets.append(source.open(name, is_train=is_train, filter_empty=filter_empty))
        return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
