"""The JSON of a run as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.report import machine_line
from benchmarks.train_step.measure import PHASES

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def number(key: str, form: str = ".1f", scale: float = 1.0) -> Callable[[Row], str]:
    """The cell of ``row[key]``; empty where it is absent."""
    return lambda row: "" if row.get(key) is None else format(row[key] * scale if scale != 1 else row[key], form)


def phase(name: str) -> Callable[[Row], str]:
    return lambda row: format(row["phases_ms"][name], ".1f") if name in row.get("phases_ms", {}) else ""


WHERE: list[Column] = [
    ("layout", lambda row: row.get("layout", "")),
    ("batch", lambda row: str(row["batch_size"])),
    ("side", lambda row: row["side"]),
    ("mode", lambda row: row["mode"]),
    ("dtype", lambda row: row["dtype"]),
]
SPEED: list[Column] = [("img/s", number("images_per_second", ".2f")), ("ms a step", number("ms_per_step"))]
COSTS: list[Column] = [
    ("operators", number("operators", "d")),
    ("kernels", number("kernels", "d")),
    ("host syncs", number("host_syncs", "d")),
    ("peak MB", number("peak_bytes", ".0f", 1e-6)),
]
STATISTICS: list[Column] = [
    ("GFLOP an image", number("gflop_per_image", ".0f")),
    ("MFU %", number("mfu_percent")),
    ("positives", number("mean_positives")),
    ("ground truths", number("mean_ground_truths")),
]
WHY: list[Column] = [("why not", lambda row: row.get("reason", ""))]
TRAIN = [*WHERE, *SPEED, *((name, phase(name)) for name in PHASES), *COSTS, *STATISTICS, *WHY]
ABLATION = [
    *WHERE[1:], *SPEED, ("times slower", number("slower", ".2f")), *COSTS, ("positives", number("mean_positives")),
    ("loss difference", number("loss_difference", ".1e")), *WHY,
]  # fmt: skip
INFERENCE = [*WHERE, *SPEED, ("detections", number("detections_per_image", ".0f")), *WHY]


def table(columns: Sequence[Column], rows: Iterable[Row]) -> list[str]:
    """A Markdown table; a ``|`` within a cell is replaced."""
    lines = [f"| {' | '.join(name for name, _ in columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row).replace('|', '/') for _, cell in columns)} |")
    return lines


def ratios(rows: Sequence[Row]) -> list[Row]:
    """For each layout and batch size: our best, torchvision's first form and best, and the ratios."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.get("images_per_second"):
            groups.setdefault((row["layout"], row["batch_size"]), []).append(row)
    found = []
    for (layout, batch_size), group in groups.items():
        ours = [row for row in group if row["side"].startswith("ours")]
        peers = [row for row in group if row["side"].startswith("torchvision")]
        if not ours or not peers:
            continue

        def speed(row: Row) -> float:
            return float(row["images_per_second"])

        best, rival = max(ours, key=speed), max(peers, key=speed)
        plain = next((row for row in peers if row["side"] == "torchvision"), None)
        same = [row for row in ours if row["dtype"] == "float32"]
        found.append(
            {
                "layout": layout,
                "batch_size": batch_size,
                "ours": f"{best['mode']} {best['dtype']}",
                "ours_images_per_second": speed(best),
                "torchvision_best": f"{rival['side']} {rival['dtype']}",
                "over_best": speed(best) / speed(rival),
                "over_float32": max(map(speed, same)) / speed(plain) if same and plain else None,
                "mfu_percent": best.get("mfu_percent"),
            }
        )
    return found


RATIOS: list[Column] = [
    ("layout", lambda row: row["layout"]),
    ("batch", lambda row: str(row["batch_size"])),
    ("our best", lambda row: row["ours"]),
    ("img/s", number("ours_images_per_second", ".2f")),
    ("torchvision's best", lambda row: row["torchvision_best"]),
    ("ours / best", number("over_best", ".2f")),
    ("float32: ours / torchvision", number("over_float32", ".2f")),
    ("MFU %", number("mfu_percent")),
]


PROFILE: list[Column] = [
    ("kernel", lambda row: row["name"]),
    ("kind", lambda row: row["kind"]),
    ("calls a step", number("calls", ".1f")),
    ("ms a step", number("ms", ".3f")),
    ("%", number("percent")),
]


def markdown(result: dict[str, Any]) -> str:
    """All of a run's tables, each after a line that says what it is."""
    lines = [machine_line(result["machine_info"]), ""]
    for title, columns, rows in (
        ("Ours against torchvision, training", RATIOS, ratios(result.get("train", []))),
        ("Training step", TRAIN, result.get("train", [])),
        ("Ablation: what a step costs without one optimisation", ABLATION, result.get("ablation", [])),
        ("Ours against torchvision, detection", RATIOS, ratios(result.get("inference", []))),
        ("Detection", INFERENCE, result.get("inference", [])),
    ):
        if rows:
            lines += [f"## {title}", "", *table(columns, rows), ""]
    for entry in result.get("profile", []):
        what = f"{entry['side']}, batch {entry['batch_size']}, {entry['mode']}, {entry['dtype']}"
        lines += [f"## Where the milliseconds go: {what}", ""]
        if "reason" in entry:
            lines += [entry["reason"], ""]
            continue
        lines += [*table(PROFILE[1:], entry["kinds"]), "", *table(PROFILE, entry["kernels"]), ""]
    lines += [f"- {note}" for note in result.get("notes", [])]
    return "\n".join(lines).rstrip() + "\n"
