"""Draw a table and a chart from stored benchmarks.

    python -m benchmarks.report RESULTS.json [RESULTS.json ...] --output FOLDER

writes ``FOLDER/report.md`` (each group's providers, their ratios, GB/s, per cent of the roofline, peak memory; the
targets and their geometric mean) and ``FOLDER/report.png`` (how many times faster ours is than each peer). A group that
stands in several files is taken from the last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = ("triton", "cpp", "reference", "compiled")

Row = dict[str, Any]


def load(paths: Iterable[Path]) -> tuple[Row, dict[str, list[Row]]]:
    """The machine of the last file, and the rows of each group by increasing median."""
    machine: Row = {}
    groups: dict[str, list[Row]] = {}
    for path in paths:
        stored = json.loads(path.read_text())
        machine = stored.get("machine_info", {})
        fresh: dict[str, list[Row]] = {}
        for row in stored.get("benchmarks", []):
            fresh.setdefault(row["group"] or row["name"], []).append(row)
        groups.update(fresh)
    return machine, {
        name: sorted(rows, key=lambda row: row["stats"]["median"]) for name, rows in sorted(groups.items())
    }


def provider(row: Row) -> str:
    return row["extra_info"].get("provider", row["name"])


def kernel_row(rows: Sequence[Row]) -> Row | None:
    """Ours: the Triton kernel on a GPU, the C++ kernel on a CPU."""
    by_name = {provider(row): row for row in rows}
    return by_name.get("triton") or by_name.get("cpp")


def peers(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if provider(row) not in OURS]


def ratio(rows: Sequence[Row], peer: Row) -> float | None:
    """How many times faster our kernel's median is than the peer's."""
    ours = kernel_row(rows)
    return peer["stats"]["median"] / ours["stats"]["median"] if ours else None


def targets(groups: dict[str, list[Row]]) -> list[tuple[str, str, float, float]]:
    """(group, peer, factor asked, factor reached) of every group with a target and both sides."""
    found = []
    for name, rows in groups.items():
        ours = kernel_row(rows)
        wanted = ours["extra_info"].get("target") if ours else None
        if not wanted:
            continue
        for peer in peers(rows):
            reached = ratio(rows, peer)
            if provider(peer) == wanted[0] and reached is not None:
                found.append((name, wanted[0], float(wanted[1]), reached))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def machine_line(machine: Row) -> str:
    gpu = (machine.get("gpu") or {}).get("name")
    where = gpu or f"{machine.get('cpu_name', 'CPU')}, {machine.get('torch_threads')} threads"
    return f"{where}. torch {machine.get('torch')}, triton {machine.get('triton')}"


def markdown(machine: Row, groups: dict[str, list[Row]]) -> str:
    lines = [machine_line(machine), ""]
    wanted = targets(groups)
    if wanted:
        lines += ["| target | peer | asked | reached | |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | {peer} | {asked:g} | {reached:.1f} | {'' if reached >= asked else 'missed'} |"
            for name, peer, asked, reached in wanted
        ]
        mean = geometric_mean([reached for *_, reached in wanted])
        lines += ["", f"Geometric mean of the factors reached: {mean:.1f}.", ""]
    lines += ["| group | provider | median ms | min ms | ours faster | GB/s | % of roofline | peak MB |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, rows in groups.items():
        for row in rows:
            info, stats = row["extra_info"], row["stats"]
            factor = ratio(rows, row) if row in peers(rows) else None
            peak = info.get("peak_bytes")
            cells = [
                name,
                provider(row),
                f"{1e3 * stats['median']:.3f}",
                f"{1e3 * stats['min']:.3f}",
                f"{factor:.1f}" if factor else "",
                f"{info['bytes'] / stats['median'] / 1e9:.2f}" if info.get("bytes") else "",
                f"{info['roofline_percent']:.1f}" if "roofline_percent" in info else "",
                f"{peak / 1e6:.1f}" if peak is not None else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chart(machine: Row, groups: dict[str, list[Row]], path: Path) -> None:
    """A bar for each group and peer on a logarithmic axis: right of 1, ours is faster."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(name, peer, ratio(rows, peer)) for name, rows in groups.items() for peer in peers(rows)]
    drawn = [(f"{name}  ({provider(peer)})", factor) for name, peer, factor in bars if factor is not None]
    if not drawn:
        return
    drawn.reverse()  # the first group on top
    asked = {f"{name}  ({peer})": factor for name, peer, factor, _ in targets(groups)}
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.22 * len(drawn)))
    factors = [factor for _, factor in drawn]
    axes.barh(range(len(drawn)), factors, color=["#2a7fb8" if f >= 1 else "#c0392b" for f in factors])
    for index, (label, factor) in enumerate(drawn):
        axes.text(factor * 1.03, index, f"{factor:.1f}", va="center", fontsize=7)
        if label in asked:
            axes.plot([asked[label]] * 2, [index - 0.4, index + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(range(len(drawn)), [label for label, _ in drawn], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_ylim(-0.7, len(drawn) - 0.3)
    axes.set_xlim(right=max(factors) * 1.6)
    axes.set_xlabel("times faster than the peer (median); black: what was asked")
    axes.set_title(machine_line(machine), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    absent = [str(path) for path in args.results if not path.is_file()]
    if absent:
        print(f"error: no such file: {', '.join(absent)}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    machine, groups = load(args.results)
    (args.output / "report.md").write_text(markdown(machine, groups))
    chart(machine, groups, args.output / "report.png")
    print(args.output / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
