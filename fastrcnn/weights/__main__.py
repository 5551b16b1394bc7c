"""``python -m fastrcnn.weights SOURCE DEST --to FORMAT``: convert a file of weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastrcnn.weights.content import Weights
from fastrcnn.weights.download import local_path
from fastrcnn.weights.pixels import CAFFE2, TORCHVISION
from fastrcnn.weights.recognise import read_weights
from fastrcnn.weights.report import SHOWN, WeightsError
from fastrcnn.weights.write import FORMATS, convert_pixels, write_weights

PIXELS = {"bgr255": CAFFE2, "rgb01": TORCHVISION}

EPILOG = """\
examples:
  python -m fastrcnn.weights model_final.pth mask_rcnn_d2.pkl --to detectron2
  python -m fastrcnn.weights maskrcnn_resnet50_fpn_coco.pth ours.pth --to maskrcnn_benchmark --pixels bgr255
  python -m fastrcnn.weights catalog://ImageNetPretrained/MSRA/R-50 R-50.safetensors --to safetensors
  python -m fastrcnn.weights model_final.pth

SOURCE is a file, an http(s):// address, or a catalog:// name of maskrcnn-benchmark. Without DEST it is described.
Formats: fastrcnn and safetensors change names alone and note the source, so that a model of any convention can load
them; maskrcnn_benchmark, detectron2 and torchvision have the names and layouts of those. docs/weights.md has the table.
exit codes: 0 done, 2 the file cannot be read, converted or written (one line on stderr)
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastrcnn.weights",
        description="Convert a file of weights between fastrcnn, maskrcnn-benchmark, detectron2 and torchvision.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="the weights to read")
    parser.add_argument("dest", metavar="DEST", nargs="?", help="the file to write")
    parser.add_argument("--to", choices=FORMATS, help="whose file to write")
    parser.add_argument("--pixels", choices=PIXELS, help="convert the stem to be fed so (default: as it was trained)")
    parser.add_argument("--from-pixels", choices=PIXELS, help="how SOURCE was trained, where it does not tell")
    parser.add_argument("--allow-partial", action="store_true", help="leave out what the format has no place for")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST")
    arguments = parser.parse_args(argv)
    if (arguments.dest is None) != (arguments.to is None):
        parser.error("DEST and --to go together")
    return arguments


def convert(arguments: argparse.Namespace) -> None:
    """Read, convert, write and tell."""
    path = local_path(arguments.source)
    if arguments.dest is not None and Path(arguments.dest).exists() and not arguments.overwrite:
        raise WeightsError(f"{arguments.dest}: exists; pass --overwrite or another name")
    weights = read_weights(path)
    describe(arguments.source, weights)
    if arguments.from_pixels:
        weights.pixels = PIXELS[arguments.from_pixels]
    if arguments.pixels:
        for sentence in convert_pixels(weights, PIXELS[arguments.pixels]):
            print(f"  converted: {sentence}")
    if arguments.dest is None:
        return
    for sentence in write_weights(weights, Path(arguments.dest), arguments.to, allow_partial=arguments.allow_partial):
        print(f"  {sentence}")
    if arguments.to == "torchvision" and (weights.pixels is None or weights.pixels.to_bgr255):
        seen = "unknown pixels" if weights.pixels is None else str(weights.pixels)
        print(f"note: the stem was trained with {seen}; torchvision feeds {TORCHVISION}: see --pixels rgb01")
    print(f"{arguments.dest}: written as {arguments.to}")


def describe(source: str, weights: Weights) -> None:
    """Print what was read."""
    if not weights.tensors:
        raise WeightsError(f"{source}: none of its {len(weights.unknown)} names is known, the first is "
                           f"{next(iter(weights.unknown), 'none')}")  # fmt: skip
    numbers = sum(value.numel() for value in weights.tensors.values())
    what = "a classifier's body" if weights.body_only else "a detector"
    print(f"{source}: {weights.kind}, {what}, {len(weights.tensors)} tensors, {numbers:,} numbers")
    print(f"  pixels: {weights.pixels or 'the file does not tell'}")
    if weights.stride_in_1x1 is not None:
        print(f"  stride in the 1x1 convolution: {weights.stride_in_1x1}")
    for sentence in weights.converted:
        print(f"  converted: {sentence}")
    for title, names in (("ignored", weights.ignored), ("unknown", list(weights.unknown))):
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"  {title}: {', '.join(names[:SHOWN])}{more}")
    if weights.training_state:
        print(f"  not carried over: {', '.join(weights.training_state)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        convert(arguments)
    except WeightsError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
