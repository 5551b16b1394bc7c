"""``python -m fastrcnn.data.cityscapes``: Cityscapes' instances as COCO annotation files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrcnn.data.cityscapes.files import find_pairs, instances_of, read_ids
from fastrcnn.data.cityscapes.labels import EVALUATED
from fastrcnn.data.dataset import DataError
from fastrcnn.outlines import mask_to_polygon

EXAMPLES = """\
  python -m fastrcnn.data.cityscapes --root datasets/cityscapes --output datasets/cityscapes/annotations

reads ROOT/gtFine/SPLIT/CITY/*_instanceIds.png and ROOT/leftImg8bit, and writes
OUTPUT/instancesonly_filtered_gtFine_SPLIT.json with the eight classes of the benchmark. File names are CITY/NAME, for
the image folder leftImg8bit/SPLIT; with --flat NAME alone, for the one folder cityscapes/images of the catalog's
cityscapes_fine_instanceonly_seg_*_cocostyle.
"""


def convert(root: Path, split: str, *, flat: bool = False) -> dict[str, Any]:
    """The instances of a split in COCO's format.

    Polygons are the exact outline of the pixels (:func:`fastrcnn.outlines.mask_to_polygon`), boxes count both end
    pixels, areas are numbers of pixels. Category ids are 1 to 8 in the order of Cityscapes' ids (maskrcnn-benchmark:
    in the order in which the classes are first met).

    Raises:
        DataError: a file is missing or damaged.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, path in find_pairs(root / "leftImg8bit", root / "gtFine", split, "mask"):
        ids = read_ids(path)
        image = {"id": len(images) + 1, "height": ids.shape[0], "width": ids.shape[1]}
        images.append({**image, "file_name": Path(name).name if flat else Path(name).as_posix()})
        for class_name, mask in instances_of(ids):
            if class_name not in EVALUATED:
                continue
            outline = mask_to_polygon(mask)
            low, high = outline.min(axis=0), outline.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": 1 + EVALUATED.index(class_name),
                    "segmentation": [outline.reshape(-1).tolist()],
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(EVALUATED, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Returns the exit code: 0, 1 for faulty data, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrcnn.data.cityscapes",
        description="Write Cityscapes' instances as COCO annotation files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", required=True, type=Path, help="folder with leftImg8bit and gtFine")
    parser.add_argument("--output", required=True, type=Path, help="folder of the annotation files")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="default: train val")
    parser.add_argument("--flat", action="store_true", help="file names without the city")
    args = parser.parse_args(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for split in args.splits:
            content = convert(args.root, split, flat=args.flat)
            path = args.output / f"instancesonly_filtered_gtFine_{split}.json"
            path.write_text(json.dumps(content))
            print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} instances")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
