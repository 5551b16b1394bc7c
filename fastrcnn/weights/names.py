"""Tables of names: pairs of patterns that rename in both directions.

In a pattern ``<n>``, ``<n+1>``, ``<3n-2>`` stand for a number that depends on n, ``<i>`` and ``<j>`` for numbers that
are the same on both sides, ``<p>`` for the last part of a name, ``<rest>`` for any end. All of them may be absent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TOKEN = re.compile(r"<(?:(\d*)n([+-]\d+)?|(i|j|p|rest))>")
PARTS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>\w+)", "rest": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Pattern:
    """One side of a pair."""

    text: str

    def match(self, name: str) -> dict[str, str] | None:
        """The values of the placeholders if ``name`` fits, ``n`` solved for."""
        expression, last = "", 0
        factor, shift = 1, 0
        for token in TOKEN.finditer(self.text):
            expression += re.escape(self.text[last : token.start()])
            if token[3]:
                expression += PARTS[token[3]]
            else:
                factor, shift = int(token[1] or 1), int(token[2] or 0)
                expression += r"(?P<n>\d+)"
            last = token.end()
        found = re.fullmatch(expression + re.escape(self.text[last:]), name)
        if found is None:
            return None
        values = found.groupdict()
        if "n" in values:
            number, remainder = divmod(int(values["n"]) - shift, factor)
            if remainder or number < 0:
                return None
            values["n"] = str(number)
        return values

    def fill(self, values: dict[str, str]) -> str:
        def value(token: re.Match[str]) -> str:
            if token[3]:
                return values[token[3]]
            return str(int(token[1] or 1) * int(values["n"]) + int(token[2] or 0))

        return TOKEN.sub(value, self.text)


class NameTable:
    """Pairs (their pattern, our pattern); the first that fits decides."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.pairs = [(Pattern(theirs), Pattern(ours)) for theirs, ours in pairs]

    def to_ours(self, name: str) -> str | None:
        """maskrcnn-benchmark's name of theirs; None if no pattern fits."""
        return self._rename(name, [(theirs, ours) for theirs, ours in self.pairs])

    def to_theirs(self, name: str) -> str | None:
        """Their name of maskrcnn-benchmark's; None if no pattern fits."""
        return self._rename(name, [(ours, theirs) for theirs, ours in self.pairs])

    @staticmethod
    def _rename(name: str, pairs: Sequence[tuple[Pattern, Pattern]]) -> str | None:
        for source, target in pairs:
            values = source.match(name)
            if values is not None:
                return target.fill(values)
        return None
