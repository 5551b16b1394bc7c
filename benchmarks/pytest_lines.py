"""A pytest plugin that appends a JSON line for each test and each benchmark to a file as soon as it is over.

    pytest -p benchmarks.pytest_lines --lines results.jsonl ...

pytest writes its reports and pytest-benchmark its JSON at the end; what has run survives a time limit only in a file
that grows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", metavar="FILE", default=None, help="append a JSON line for each test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--lines")
    if path:
        config.pluginmanager.register(Lines(Path(path)), "lines")


class Lines:
    """Writes ``{"test", "outcome", "seconds", "reason"}`` and, for a benchmark, pytest-benchmark's row without data."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            self._write({**line, "reason": reason_of(report)})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        stats = getattr(benchmark, "stats", None)
        if call.when == "call" and report.passed and stats is not None:
            row = stats.as_dict(include_data=False)
            kept = {name: row[name] for name in ("name", "fullname", "group", "extra_info")}
            kept["stats"] = {name: row["stats"][name] for name in ("min", "median", "mean", "stddev", "rounds")}
            self._write({"benchmark": kept})
        return report


def reason_of(report: pytest.TestReport) -> str:
    """The last line of a failure or the reason of a skip; empty for what passed."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # path, line, reason of a skip
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(tests, benchmarks) of a file of lines; nothing where it is absent. A line cut short by a kill is left out."""
    tests: list[dict[str, Any]] = []
    benchmarks: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "benchmark" in found:
            benchmarks.append(found["benchmark"])
        else:
            tests.append(found)
    return tests, benchmarks
