"""``python -m fastrcnn.predict``: detections of a trained model on any images, as JSON and as pictures.

From Python::

    predictor = Predictor(model, cfg, class_names)
    found = predictor(image)                # BoxList in the image's pixels, best first
    picture = predictor.draw(image, found)  # a Pillow image
    for frame, found in predictor.video("clip.mp4"): ...
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from fastrcnn.build import build_catalog, build_model, gives_proposals, load_model_weights, num_classes
from fastrcnn.config import Config, load_config
from fastrcnn.data.dataset import DataError
from fastrcnn.data.image import read_image
from fastrcnn.engine.command import UsageError, make_parser, run_command
from fastrcnn.engine.distributed import pick_device
from fastrcnn.engine.outputs import write_json
from fastrcnn.evaluate import find_weights
from fastrcnn.evaluation import RleMasks
from fastrcnn.predictor import Predictor
from fastrcnn.structures import BoxList
from fastrcnn.visualize import class_name

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
EXIF_ORIENTATION = 0x0112

EXAMPLES = """\
  python -m fastrcnn.predict --weights output/model_final.pth --input photos/ --output found
  python -m fastrcnn.predict --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml --weights mask_rcnn.pth \\
      --input a.jpg b.png --output found --threshold 0.7 MODEL.DEVICE cpu

Writes found/predictions.json (a COCO annotation file whose annotations have scores) and found/images/NAME.jpg.
An image that cannot be read is reported and left out; the exit code is then 1.
"""


def read_upright(path: str | Path) -> Tensor:
    """Read an image file as uint8 RGB [H, W, 3], turned as its EXIF orientation says.

    The data sets ignore the orientation because annotations are in file coordinates; a photograph straight from a
    camera has none, and is looked at upright.

    Raises:
        DataError: as :func:`fastrcnn.data.image.read_image`.
    """
    pixels = read_image(path)
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError):  # damaged metadata of a readable image
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(0)
    return pixels.contiguous()


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The image files that ``--input`` names: files as they are, the images directly in a folder by name.

    Raises:
        UsageError: a path that does not exist, or a folder without images.
    """
    images: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
            )
            if not inside:
                raise UsageError(f"--input {name}: the folder holds no image ({', '.join(sorted(SUFFIXES))})")
            images += inside
        elif path.exists():
            images.append(path)
        else:
            raise UsageError(f"--input {name}: no such file or folder")
    return list(dict.fromkeys(images))


def name_pictures(images: Sequence[Path], folder: Path) -> list[Path]:
    """One file in ``folder`` for each image: its name with ``.jpg``, numbered where names repeat."""
    taken: set[str] = set()
    pictures = []
    for image in images:
        name, number = image.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{image.stem}_{number}"
        taken.add(name.lower())
        pictures.append(folder / f"{name}.jpg")
    return pictures


def check_output(directory: Path, images: Sequence[Path], pictures: Sequence[Path], overwrite: bool) -> None:
    """Refuse, before any work, to write over an input or (without ``overwrite``) over anything.

    Raises:
        UsageError: with the first file in the way.
    """
    for parent in (directory, directory / "images"):
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"--output {directory}: {parent} is a file")
    inputs = {image.resolve() for image in images}
    for path in (directory / "predictions.json", *pictures):
        if path.resolve() in inputs:
            raise UsageError(f"--output {directory}: would write over the input {path}; choose another folder")
        if path.exists() and not overwrite:
            raise UsageError(f"--output {directory}: {path} exists; choose another folder or add --overwrite")


def read_labels(path: Path) -> list[str]:
    """Class names by label from a ``labels.json``.

    Either the names in a list, or ``{number: name}`` in the order of the labels (maskrcnn-benchmark writes category
    ids, with their gaps). ``__background__`` is put first if it is not there.

    Raises:
        UsageError: another content.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    names = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: holds no class names (a list, or an object of number and name)")
    return names if names[0] == "__background__" else ["__background__", *names]


def find_class_names(cfg: Config, weights: Path) -> list[str] | None:
    """Class names from ``labels.json`` beside the weights, else those of the configured data sets.

    None where neither is there or has as many classes as the model. Proposals are all called ``object``.
    """
    if gives_proposals(cfg):
        return ["__background__", "object"]
    beside = weights.parent / "labels.json"
    if beside.exists():
        names = read_labels(beside)
        if len(names) == num_classes(cfg):
            return names
        print(f"warning: {beside} names {len(names)} classes, the model has other ones: not used", file=sys.stderr)
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            source = build_catalog(cfg).resolve(dataset)
        except DataError:
            continue
        known = None if callable(source) else source.class_names()  # the data set need not be on this machine
        if known is not None and len(known) == num_classes(cfg):
            return known
    return None


def load_predictor(cfg: Config, weights: str | Path, threshold: float, *, allow_partial: bool = False) -> Predictor:
    """Build the model, fill all of it from ``weights`` and look up its class names.

    Raises:
        UsageError, ConfigError, DeviceError, WeightsError: in one line.
    """
    pick_device(cfg.MODEL.DEVICE)
    model = build_model(cfg)
    report = load_model_weights(cfg, model, weights, allow_partial=allow_partial, complete=True)
    for note in (report,) if allow_partial else report.notes:
        print(f"warning: {note}", file=sys.stderr)
    return Predictor(model, cfg, find_class_names(cfg, Path(weights)), threshold=threshold)


class Predictions:
    """The content of ``predictions.json``: a COCO annotation file whose annotations are detections with scores."""

    def __init__(self, names: Sequence[str] | None, num_classes: int) -> None:
        self.names = names
        self.failed: list[dict[str, str]] = []
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories: list[dict[str, Any]] = [{"id": i, "name": class_name(i, names)} for i in range(1, num_classes)]

    def add(self, path: Path, found: BoxList, rles: Sequence[dict[str, Any]] | None, picture: str | None) -> None:
        """One image and its detections, in pixels of the image."""
        width, height = found.size
        image_id = len(self.images) + 1
        self.images.append(
            {"id": image_id, "file_name": str(path), "width": width, "height": height, "picture": picture}
        )
        corners, boxes = found.convert("xyxy").boxes.tolist(), found.convert("xywh").boxes.tolist()
        labels = found.labels.tolist() if found.labels is not None else []
        scores = found.scores.tolist() if found.scores is not None else []
        if found.keypoints is not None and found.keypoints.skeleton is not None:
            skeleton = found.keypoints.skeleton
            for category in self.categories:
                category["keypoints"] = list(skeleton.names)
                category["skeleton"] = [[a + 1, b + 1] for a, b in skeleton.connections]
        for i, (label, score) in enumerate(zip(labels, scores, strict=True)):
            entry = {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "file_name": str(path),
                "category_id": label,
                "label_name": class_name(label, self.names),
                "score": score,
                "bbox": boxes[i],
                "box_xyxy": corners[i],
                "area": boxes[i][2] * boxes[i][3],
                "iscrowd": 0,
            }
            if found.keypoints is not None:
                entry["keypoints"] = found.keypoints.points[i].flatten().tolist()
                entry["num_keypoints"] = len(found.keypoints.points[i])
                if found.keypoints.scores is not None:
                    entry["keypoint_scores"] = found.keypoints.scores[i].tolist()
            if rles is not None:
                entry["segmentation"] = rles[i]
                entry["area"] = int(coco_mask.area(rles[i]))
            self.annotations.append(entry)

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "categories": self.categories,
            "annotations": self.annotations,
            "failed": self.failed,
        }


def predict_images(
    predictor: Predictor,
    images: Sequence[Path],
    pictures: Sequence[Path | None],
    predictions: Predictions,
) -> None:
    """Detect on each image, draw it where ``pictures`` has a file, and add it to ``predictions``.

    An image that cannot be read is reported and left out; the others go on.
    """
    for path, picture in zip(images, pictures, strict=True):
        start = time.perf_counter()
        try:
            image = read_upright(path)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            predictions.failed.append({"file_name": str(path), "error": str(error)})
            continue
        found = predictor(image)
        rles = predictor.rles(found)
        if picture is not None:
            masks = None if rles is None else RleMasks(rles)
            predictor.draw(image, found, masks).save(picture, quality=92)
        predictions.add(path, found, rles, None if picture is None else f"{picture.parent.name}/{picture.name}")
        labels = found.labels.tolist() if found.labels is not None else []
        counts = Counter(class_name(label, predictor.class_names) for label in labels)
        what = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        print(f"{path}: {what} ({time.perf_counter() - start:.2f} s)", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m fastrcnn.predict", "Find objects on images with a trained model.", EXAMPLES)
    parser.add_argument("--weights", metavar="FILE", help="weights or checkpoint (default: the newest of OUTPUT_DIR)")
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="image files, or folders of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="where predictions.json and images/ go")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score to report (default: %(default)s)")
    parser.add_argument("--allow-partial", action="store_true", help="load what fits of the weights")
    parser.add_argument("--no-images", action="store_true", help="write predictions.json only")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict. Returns the exit code (``--help`` lists them)."""
    return run_command(lambda: predict(parse_arguments(argv)))


def predict(args: argparse.Namespace) -> int:
    """Check everything, then predict; raises what :func:`fastrcnn.engine.command.run_command` understands."""
    if not 0 <= args.threshold <= 1:
        raise UsageError(f"--threshold {args.threshold}: must lie in [0, 1]")
    output = Path(args.output).expanduser()
    images = find_images(args.input)
    pictures = [] if args.no_images else name_pictures(images, output / "images")
    check_output(output, images, pictures, args.overwrite)
    config_file = args.config_file
    if config_file is None and args.weights and (beside := Path(args.weights).parent / "config.yml").exists():
        config_file = beside
    cfg = load_config(config_file, args.opts)
    predictor = load_predictor(cfg, find_weights(cfg, args.weights), args.threshold, allow_partial=args.allow_partial)
    try:
        (output if args.no_images else output / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written ({error.strerror})") from error

    predictions = Predictions(predictor.class_names, num_classes(cfg))
    try:
        predict_images(predictor, images, pictures or [None] * len(images), predictions)
    finally:  # what is done is kept, whatever happened at the next image
        write_json(output / "predictions.json", predictions.to_dict())
    total = f"{len(predictions.annotations)} objects on {len(predictions.images)} images"
    print(f"{total}: {output / 'predictions.json'}" + ("" if args.no_images else f", {output / 'images'}"))
    if predictions.failed:
        print(f"error: {len(predictions.failed)} of {len(images)} images could not be read", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
