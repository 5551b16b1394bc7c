"""One-line breakages of the kernels, each with the test that must catch it; ``run.py`` applies them."""

from __future__ import annotations

from typing import NamedTuple


class Breakage(NamedTuple):
    """A line broken on purpose.

    Attributes:
        path: file of the repository.
        old: a piece of that file that occurs in it exactly once.
        new: what it is replaced by.
        test: node id of the test that must fail then; ``-k EXPRESSION`` may follow it.
    """

    path: str
    old: str
    new: str
    test: str
