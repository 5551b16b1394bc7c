"""The number of operator calls and launches of a training step is a documented figure, and may only fall."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.operator_calls import Call, Census, census_of_a_step, table, totals

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
HEADING = "## Operator calls a step"
COLUMNS = ("calls: dense", "calls: rest", "launches: dense", "launches: rest")


def documented() -> dict[str, tuple[int, ...]]:
    """The figures of each phase in docs/kernels.md."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"{HEADING}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {phase: tuple(map(int, figures)) for phase, *figures in rows[2:]}


@pytest.fixture(scope="module")
def census() -> Census:
    pytest.importorskip("triton", reason="the launches inside the operators are those of their Triton launchers")
    return census_of_a_step()


def test_the_counts_only_fall(census: Census) -> None:
    calls, launches = totals(census.calls), totals(census.launches)
    written = documented()
    higher = [
        f"{phase}, {name}: {now}, documented {before}"
        for phase in launches | calls
        for name, now, before in zip(
            COLUMNS,
            (*calls.get(phase, (0, 0)), *launches.get(phase, (0, 0))),
            written.get(phase, (0, 0, 0, 0)),
            strict=True,
        )
        if now > before
    ]
    assert not higher, (
        f"a training step does more than {DOCUMENT.name} says:\n  " + "\n  ".join(higher) + "\n"
        "See which with `python -m benchmarks.operator_calls --each PHASE`. To lower it: put what is computed around "
        "an operator of fastrcnn_kernels into that operator, compute once what does not change, write a result where "
        f"it is used. New table, should the rise be worth it (say why in {DOCUMENT.name}):\n{table(census)}"
    )


def test_each_operator_of_the_training_path_is_seen(census: Census) -> None:
    """The census looks where it must: into our operators, into the backward, and at every phase."""
    ours = {call.operator for call in census.calls}
    assert {"generate_proposals", "match_anchors", "sample_balanced", "rpn_head_loss", "roi_align"} <= ours
    assert {"roi_align_backward", "box_head_loss_backward", "mask_loss_backward", "rasterize_polygons"} <= ours
    kernels = {(call.within, call.operator) for call in census.launches}
    assert {("roi_align", "_forward_kernel"), ("roi_align_backward", "_backward_kernel")} <= kernels
    phases = {call.phase for call in census.launches}
    expected = {"backbone", "rpn", "sampling", "box head", "mask head"}
    assert expected <= phases
    assert {f"{phase}, gradient" for phase in expected - {"sampling"}} <= phases
    dense = Counter({"forward": 0, "backward": 0})
    for call, n in census.calls.items():
        dense["backward" if "gradient" in call.phase else "forward"] += n * call.dense
    assert dense["forward"] > 60
    assert dense["backward"] > 60


def test_views_and_allocations_are_free_and_the_rest_is_not() -> None:
    census = Census()
    with census:
        x = torch.empty(2, 3).zero_()
        x.t().reshape(-1).unsqueeze(0).expand(4, 6)  # the reshape of a transposed tensor copies
        torch.mm(x, x.t())
    assert census.calls == census.launches
    assert census.calls == {
        Call("step", "zero_", ""): 1,
        Call("step", "clone", ""): 1,
        Call("step", "mm", ""): 1,
    }
