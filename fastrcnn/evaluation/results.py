"""What an evaluation found, whatever kind of data set and benchmark it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("fastrcnn.evaluation")


class EvaluationError(ValueError):
    """Results or ground truth that cannot be evaluated; the message is one line and names the file or the entry."""


@dataclass(frozen=True)
class Results:
    """The numbers of an evaluation.

    Attributes:
        stats: for each task (``bbox``, ``segm``, ``keypoints``, ``box_proposal``, ``voc``) its numbers by name,
            fractions in [0, 1]; -1 where there is no ground truth to find. For COCO the numbers of pycocotools (``AP``,
            ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR1``, ...).
        per_class: for each task the AP of each class by name; None for a class without ground truth.
        headline: for each task the numbers that belong in a log; all where it is not named.
    """

    stats: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float | None]] = field(default_factory=dict)
    headline: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def metrics(self, kind: str) -> tuple[str, ...]:
        """The names of the numbers of ``kind`` that belong in a log."""
        return self.headline.get(kind) or tuple(self.stats[kind])

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries for json: ``{task: {stat: value, ..., "per_class": {name: AP or null}}}``."""
        return {kind: {**stats, "per_class": dict(self.per_class.get(kind, {}))} for kind, stats in self.stats.items()}

    def table(self, kind: str, columns: int = 3) -> str:
        """The AP of every class of ``kind`` in per cent, in columns; ``-`` where there is no ground truth."""
        classes = self.per_class.get(kind, {})
        cells = [(name, "-" if ap is None else f"{100 * ap:.1f}") for name, ap in classes.items()]
        width = max((len(name) for name, _ in cells), default=0)
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        return "\n".join("  ".join(f"{name:<{width}} {ap:>5}" for name, ap in row).rstrip() for row in rows)

    def __repr__(self) -> str:
        """maskrcnn-benchmark's: task, metric names, values."""
        lines = []
        for kind, stats in self.stats.items():
            names = self.metrics(kind)
            lines += [f"Task: {kind}", ", ".join(names), ", ".join(f"{stats[name]:.4f}" for name in names)]
        return "".join(line + "\n" for line in lines)


def check_expected(results: Results, expected: Sequence[Sequence[Any]], sigma_tol: float) -> bool:
    """Compare with ``TEST.EXPECTED_RESULTS`` and log one PASS or FAIL line each (maskrcnn-benchmark's).

    Args:
        results: what was found.
        expected: rows of (task, metric, mean, std) or (task, metric, (mean, std)), such as ("bbox", "AP", 0.38, 0.002).
        sigma_tol: a value passes within ``sigma_tol`` standard deviations of the mean, exclusive.

    Returns:
        Whether all pass.

    Raises:
        EvaluationError: a row of another form, or a task or metric that was not evaluated.
    """
    all_pass = True
    for row in expected:
        task, metric, *numbers = row
        if len(numbers) == 1 and isinstance(numbers[0], Sequence):
            numbers = list(numbers[0])
        if len(numbers) != 2:
            raise EvaluationError(f"TEST.EXPECTED_RESULTS: {list(row)!r} is not [task, metric, mean, std]")
        if metric not in results.stats.get(task, {}):
            known = "; ".join(f"{kind} {', '.join(stats)}" for kind, stats in results.stats.items())
            raise EvaluationError(f"TEST.EXPECTED_RESULTS: {task} {metric} was not evaluated (there are {known})")
        mean, std = float(numbers[0]), float(numbers[1])
        actual = results.stats[task][metric]
        low, high = mean - sigma_tol * std, mean + sigma_tol * std
        passed = low < actual < high
        all_pass &= passed
        logger.log(
            logging.INFO if passed else logging.ERROR,
            f"{'PASS' if passed else 'FAIL'}: {task} > {metric} sanity check (actual vs. expected): "
            f"{actual:.3f} vs. mean={mean:.4f}, std={std:.4}, range=({low:.4f}, {high:.4f})",
        )
    return all_pass
