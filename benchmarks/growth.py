"""How time and memory of four operators grow over four decades of input, with the exponent fitted.

    python -m benchmarks.growth [--output FOLDER] [--seconds 5]

matching (ground truths against 268,569 anchors), NMS (boxes), RoIAlign (regions) and rasterisation (vertices in all)
run at sizes ten to the power of a half apart; a size whose run would take longer than ``--seconds`` ends its row. The
exponent b of ``time ~ size ** b`` is the slope of the last decade, where overhead no longer counts. Writes growth.json,
growth.md and growth.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import fastrcnn_kernels as kernels
from benchmarks.cases import HEIGHT, WIDTH, random_boxes
from benchmarks.harness import peak_memory

SIZES = [round(10 ** (power / 2)) for power in range(2, 11)]  # 10 ... 100,000
REPEATS = 3


@dataclass(frozen=True)
class Point:
    """One size of one operator: seconds of the fastest of a few runs, bytes at the peak beyond the inputs."""

    operator: str
    size: int
    seconds: float
    peak_bytes: int | None


def matching(size: int, device: torch.device) -> Callable[[], object]:
    gt_boxes, _ = random_boxes(size, "uniform", 0, device)
    cells, grids = [], []
    for stride, side in ((4, 32), (8, 64), (16, 128), (32, 256), (64, 512)):
        cells.append(kernels.cell_anchors(stride, [side], [0.5, 1, 2]).to(device))
        grids.append((-(-800 // stride), 1344 // stride))
    count = torch.tensor([size], device=device)
    anchors = torch.cat(list(kernels.grid_anchors(cells, grids, [4, 8, 16, 32, 64])))
    return lambda: kernels.match_boxes(
        gt_boxes[None],
        count,
        anchors,
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )


def suppression(size: int, device: torch.device) -> Callable[[], object]:
    boxes, scores = random_boxes(size, "clustered", 0, device)
    return lambda: kernels.nms(boxes, scores, 0.7)


def pooling(size: int, device: torch.device) -> Callable[[], object]:
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    features = [torch.randn(1, 16, 800 >> i, 1344 >> i, device=device) for i in range(2, 6)]
    boxes, _ = random_boxes(size, "uniform", 0, device)
    boxes = kernels.clip_boxes_to_image(boxes, (HEIGHT, WIDTH))
    rois = torch.cat([boxes.new_zeros(size, 1), boxes], dim=1)
    levels = kernels.assign_levels(boxes)
    return lambda: kernels.multiscale_roi_align(features, rois, levels, 7, scales, 2)


def rasterisation(size: int, device: torch.device) -> Callable[[], object]:
    """128 regions whose instances have ``size`` vertices together."""
    regions = min(128, max(1, size // 3))
    each = max(3, size // regions)
    rng = np.random.default_rng(0)
    angle = np.sort(rng.random((regions, each)), axis=1) * 2 * math.pi
    reach = 100 * (0.6 + 0.4 * rng.random((regions, each)))
    points = 400 + np.stack([np.cos(angle), np.sin(angle)], axis=2) * reach[..., None]
    vertices = torch.from_numpy(points.reshape(-1, 2).astype(np.float32)).to(device)
    offsets = torch.arange(regions + 1, device=device)
    boxes = torch.tensor([[300.0, 300, 500, 500]], device=device).expand(regions, 4).contiguous()
    return lambda: kernels.rasterize_polygons(
        vertices, offsets * each, offsets, offsets[:-1], boxes, 28, max_vertices=each, max_polygons=1
    )


OPERATORS: dict[str, Callable[[int, torch.device], Callable[[], object]]] = {
    "match_boxes": matching,
    "nms": suppression,
    "multiscale_roi_align": pooling,
    "rasterize_polygons": rasterisation,
}
UNITS = {
    "match_boxes": "ground truths (268,569 anchors)",
    "nms": "boxes",
    "multiscale_roi_align": "regions (16 channels)",
    "rasterize_polygons": "vertices (128 regions)",
}


def run(operator: str, device: torch.device, seconds: float) -> list[Point]:
    """The points of one operator, smallest first, until a run would exceed ``seconds``."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    points: list[Point] = []
    for size in SIZES:
        if points and points[-1].seconds * 10 > seconds * 3 and points[-1].seconds > seconds / 10:
            break
        call = OPERATORS[operator](size, device)
        call()
        with peak_memory(device) as memory:
            call()
        best = math.inf
        for _ in range(REPEATS):
            start = clock()
            call()
            best = min(best, clock() - start)
        points.append(Point(operator, size, best, memory["bytes"]))
    return points


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size), least squares, over the last decade of sizes."""
    pairs = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if s * 10.5 > sizes[-1] and v > 0]
    if len(pairs) < 2:
        return math.nan
    x, y = np.array(pairs).T
    return float(np.polyfit(x, y, 1)[0])


def markdown(results: dict[str, list[Point]]) -> str:
    lines = ["| operator | input | size | ms | peak MB |", "|---|---|---|---|---|"]
    for operator, points in results.items():
        for p in points:
            peak = "" if p.peak_bytes is None else f"{p.peak_bytes / 1e6:.1f}"
            lines.append(f"| {operator} | {UNITS[operator]} | {p.size:,} | {1e3 * p.seconds:.3f} | {peak} |")
    lines += ["", "| operator | exponent of time, last decade | exponent of memory |", "|---|---|---|"]
    for operator, points in results.items():
        sizes = [p.size for p in points]
        memory = exponent(sizes, [p.peak_bytes or 0 for p in points])
        lines.append(f"| {operator} | {exponent(sizes, [p.seconds for p in points]):.2f} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def chart(results: dict[str, list[Point]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for operator, points in results.items():
        sizes = [p.size for p in points]
        slope = exponent(sizes, [p.seconds for p in points])
        left.loglog(sizes, [1e3 * p.seconds for p in points], marker="o", label=f"{operator}: size^{slope:.2f}")
        drawn = [(p.size, p.peak_bytes / 1e6) for p in points if p.peak_bytes]
        if drawn:
            right.loglog(*zip(*drawn, strict=True), marker="o", label=operator)
    left.set(xlabel="size", ylabel="ms, fastest of three")
    right.set(xlabel="size", ylabel="MB at the peak, outputs included")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(True, which="major", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/growth"))
    parser.add_argument("--seconds", type=float, default=5.0, help="longest run of one size")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {operator: run(operator, device, args.seconds) for operator in OPERATORS}
    args.output.mkdir(parents=True, exist_ok=True)
    stored = {operator: [asdict(p) for p in points] for operator, points in results.items()}
    (args.output / "growth.json").write_text(json.dumps(stored, indent=1))
    (args.output / "growth.md").write_text(markdown(results))
    chart(results, args.output / "growth.png")
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
