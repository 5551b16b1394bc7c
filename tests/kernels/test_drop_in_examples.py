"""The examples of docs/drop-in run as they stand, where the peer is installed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "drop-in"
PEERS = ("torchvision", "detectron2", "mmcv")


def test_there_is_one_for_each_peer() -> None:
    from fastrcnn_kernels import patch

    assert patch.__module__ == "fastrcnn_kernels.patch"
    assert {path.stem for path in FOLDER.glob("*.md")} == {*PEERS, "README"}


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_example(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    # mmcv.ops fails to import in mmcv-lite, detectron2 where one of its dependencies is absent.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(
            "mmcv.ops" if peer == "mmcv" else peer, reason=f"{peer} is not installed", exc_type=ImportError
        )
        (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / f"{peer}.md").read_text(), re.DOTALL)
        exec(compile(code, f"docs/drop-in/{peer}.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert printed.startswith(f"{peer}: ")
    assert not printed.startswith(f"{peer}: 0 symbols")
