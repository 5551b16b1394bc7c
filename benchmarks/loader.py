"""Images a second that one core decodes and resizes, ours against torchvision and Pillow, and what padding costs.

    python -m benchmarks.loader [--photographs FOLDER] [--rate 300] [--rounds 7] [--output output/loader.json]

JPEG files of 640 x 480, generated (and, from ``--photographs``, by default those of ``$FASTRCNN_TEST_DATA``, real
ones of that size), go to the network's 800 x 1066 in one thread. The ways take turns within a round; the median round
counts, in processor time of the thread, so that other load on the machine counts little. The pixels of the ways that
are said to be equal are compared first. Where the device preprocesses, a worker decodes and nothing else; what the
step then does on a CPU is a line of its own.

The second table has the mean area that batches are padded to, relative to their images, over an epoch of COCO-like
image sizes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import describe
from fastrcnn.data import BatchSchedule, Normalization, ShapeBuckets, image
from fastrcnn.data.arena import ArenaCollate
from fastrcnn.data.collate import collate_train
from fastrcnn.data.dataset import Sample
from fastrcnn.data.sampler import aspect_ratio_groups
from fastrcnn.data.shapes import generate_image
from fastrcnn.data.transforms import Prepared, get_size
from fastrcnn.structures import BoxList
from fastrcnn_kernels import preprocess_arena, resize_image

SIZE, RESIZED, PADDED = (480, 640), (800, 1066), (800, 1088)
STYLE: dict[str, Any] = {"pixel_mean": (102.9801, 115.9465, 122.7717), "pixel_std": (1.0, 1.0, 1.0), "to_bgr255": True}
NORMALIZATION = Normalization(size_divisible=32, buckets=ShapeBuckets.of([800], 1333, 32))
# (height, width) and about how many of a thousand images have it: the commonest sizes of COCO's photographs, counted in
# 158 of them, and some of the rare ones.
COCO_SIZES = {
    (480, 640): 225,
    (427, 640): 190,
    (640, 480): 85,
    (640, 427): 60,
    (426, 640): 55,
    (375, 500): 60,
    (428, 640): 40,
    (425, 640): 40,
    (500, 375): 20,
    (333, 500): 30,
    (360, 640): 40,
    (640, 640): 30,
    (612, 612): 15,
    (640, 360): 10,
    (640, 512): 20,
    (512, 640): 20,
    (640, 619): 20,
    (300, 640): 15,
    (559, 640): 25,
}

Way = Callable[[Path], Any]


def generated(folder: Path, count: int) -> list[Path]:
    paths = []
    for index in range(count):
        paths.append(folder / f"{index}.jpg")
        picture = generate_image(0, "train", index, image_size=640).pixels
        Image.fromarray(np.asarray(picture)).resize(SIZE[::-1], Image.Resampling.BILINEAR).save(paths[-1], quality=90)
    return paths


def photographs(folder: Path | None, count: int) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*.jpg")) if folder is not None and folder.is_dir() else ():
        with Image.open(path) as opened:
            if opened.size == SIZE[::-1] and opened.mode == "RGB":
                found.append(path)
    return found[:count]


def with_pillow(path: Path) -> Tensor:
    """Our reader as it is where simplejpeg is not installed."""
    return torch.from_numpy(image._decode_with_pillow(path.read_bytes(), path))


def pillow(path: Path) -> Tensor:
    opened = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    return torch.from_numpy(np.array(opened.resize(RESIZED[::-1], Image.Resampling.BILINEAR)))


def target() -> BoxList:
    return BoxList(torch.tensor([[10.0, 10.0, 90.0, 90.0]]), RESIZED[::-1], labels=torch.tensor([1]))


def by_worker(path: Path) -> Any:
    """All that a worker does without the device: decode, resize, normalise, pad, pack."""
    pixels = resize_image(image.read_image(path), RESIZED)
    return collate_train([Sample(pixels, target(), 1, 0)], NORMALIZATION, 0)


def by_worker_for_the_device(path: Path) -> Any:
    """All that a worker does where the device preprocesses."""
    return ArenaCollate(NORMALIZATION)([Prepared(image.read_image(path), target(), RESIZED, 0, 1, 0)], 0)


def in_the_step() -> Way:
    pixels = torch.randint(0, 256, (3 * SIZE[0] * SIZE[1],), dtype=torch.uint8)
    table = torch.tensor([[0, *SIZE, *RESIZED, 0]])
    return lambda _: preprocess_arena(pixels, table, size=PADDED, **STYLE)


def torchvision_ways() -> dict[str, Way]:
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
        from torchvision.transforms.v2 import functional
    except ImportError:
        return {}

    def of_tensors(path: Path) -> Tensor:
        pixels = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
        return functional.resize(pixels, list(RESIZED), antialias=True)

    def of_pictures(path: Path) -> Tensor:
        opened = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        return functional.to_dtype(functional.to_image(functional.resize(opened, list(RESIZED))), torch.float32, True)

    def to_input(path: Path) -> Tensor:
        pixels = functional.to_dtype(of_tensors(path), torch.float32, scale=True)
        return functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    return {
        "torchvision: decode_jpeg, resize": of_tensors,
        "torchvision: Pillow, resize, to float": of_pictures,
        "torchvision: decode_jpeg, resize, to float, normalise": to_input,
    }


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {
        "ours: decode": image.read_image,
        "ours without simplejpeg: decode": with_pillow,
        "ours: decode, resize": lambda path: resize_image(image.read_image(path), RESIZED),
        "ours without simplejpeg: decode, resize": lambda path: resize_image(with_pillow(path), RESIZED),
        "ours: a worker's all (decode, resize, normalise, pad, pack)": by_worker,
        "ours: a worker's all where the device preprocesses": by_worker_for_the_device,
        "ours: preprocess_arena, the step's part, on a CPU": in_the_step(),
        "Pillow: decode, resize": pillow,
    }
    if image.simplejpeg is None:
        found = {name: way for name, way in found.items() if "without simplejpeg" not in name}
    return {**found, **torchvision_ways()}


def check_equal(paths: Sequence[Path]) -> None:
    """Raises AssertionError unless our two decoders and Pillow's resize give the same pixels."""
    for path in paths:
        pixels = image.read_image(path)
        assert torch.equal(pixels, with_pillow(path)), path
        assert torch.equal(resize_image(pixels, RESIZED), pillow(path)), path


def measure(paths: Sequence[Path], rounds: int) -> dict[str, float]:
    """Milliseconds of the processor an image of each way, the median of ``rounds``."""
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, way in ways().items():
            started = time.thread_time()
            for path in paths:
                way(path)
            if number:  # the first round warms up
                times.setdefault(name, []).append((time.thread_time() - started) / len(paths) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


class Sizes:
    """An epoch of images of which only the sizes are known."""

    def __init__(self, count: int, seed: int = 0) -> None:
        weights = np.array(list(COCO_SIZES.values()), dtype=np.float64)
        chosen = np.random.default_rng(seed).choice(len(weights), count, p=weights / weights.sum())
        self.sizes = [list(COCO_SIZES)[index] for index in chosen]

    def __len__(self) -> int:
        return len(self.sizes)

    def image_info(self, index: int) -> Any:
        height, width = self.sizes[index]
        return {"height": height, "width": width}


def padding(batch_size: int, count: int = 20_000) -> dict[str, Any]:
    """Mean padded area of an image, relative to its own, and how many sizes of batches there are."""
    dataset, buckets = Sizes(count), ShapeBuckets.of([800], 1333, 32)
    resized = [get_size(height, width, 800, 1333) for height, width in dataset.sizes]
    own = sum(h * w for h, w in resized) / count
    by_aspect, by_bucket = aspect_ratio_groups(dataset), buckets.groups(dataset, [800], 1333)
    largest = ShapeBuckets((), 32)
    whole = ShapeBuckets(((800, 1344), (1344, 800)), 32)
    rows: dict[str, Any] = {}
    for name, groups, rule in (
        ("to the largest image", by_aspect, largest),
        ("to 800x1344 or 1344x800", by_aspect, whole),
        ("to buckets, batches of one bucket", by_bucket, buckets),
        ("to buckets, batches of one orientation", by_aspect, buckets),
    ):
        schedule = BatchSchedule(groups, batch_size=batch_size)
        sizes = [rule.fit(resized[i] for i in batch) for batch in schedule.epoch_batches(0)]
        area = sum(h * w for h, w in sizes) / len(sizes)
        rows[name] = {"area": area / own, "sizes": len(set(sizes))}
    members = {}
    for index, (height, width) in enumerate((*buckets.sizes, (0, 0))):
        inside = [h * w for (h, w), group in zip(resized, by_bucket, strict=True) if group == index]
        if inside and height:
            fill = sum(inside) / len(inside) / (height * width)
            members[f"{height}x{width}"] = {"share": len(inside) / count, "filled": fill}
    return {"ways": rows, "buckets": members}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    test_data = Path(os.environ.get("FASTRCNN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
    parser.add_argument("--photographs", type=Path, default=test_data)
    parser.add_argument("--count", type=int, default=20, help="files of each kind")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", type=float, default=300.0, help="images a second that training wants")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": describe(), "milliseconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "generated": generated(Path(folder), options.count),
            "photographs": photographs(options.photographs, options.count),
        }
        for kind, paths in kinds.items():
            if not paths:
                print(f"\nNo {kind} of 640 x 480 under {options.photographs}: left out")
                continue
            check_equal(paths)
            rows = found["milliseconds"][kind] = measure(paths, options.rounds)
            print(f"\n| {kind}: {len(paths)} files, one thread | ms an image | images/s a core | cores for ", end="")
            print(f"{options.rate:g}/s |\n|---|---|---|---|")
            for name, milliseconds in rows.items():
                print(f"| {name} | {milliseconds:.2f} | {1e3 / milliseconds:.0f} | ", end="")
                print(f"{options.rate * milliseconds / 1e3:.1f} |")
    found["padding"] = {str(size): padding(size) for size in (2, 16)}
    for size, content in found["padding"].items():
        print(f"\n| {size} images a batch, padded | area / images' own | sizes |\n|---|---|---|")
        for name, row in content["ways"].items():
            print(f"| {name} | {row['area']:.3f} | {row['sizes']} |")
    print("\n| bucket | share of the images | filled |\n|---|---|---|")
    for name, row in found["padding"]["2"]["buckets"].items():
        print(f"| {name} | {row['share']:.1%} | {row['filled']:.1%} |")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
