"""What loading or converting weights did, and the error where it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 5  # names of each list in the text; all of them are in the attributes


class WeightsError(ValueError):
    """Weights that cannot be loaded or written; one line that says which file, which name and what to do."""


@dataclass(frozen=True)
class WeightsReport:
    """What loading did.

    Attributes:
        path: the file, or the name that it was fetched by.
        kind: whose file it is: ``maskrcnn_benchmark`` (fastrcnn's names are the same), ``detectron2``, ``torchvision``,
            ``imagenet`` (a classifier of torchvision), ``caffe2``.
        loaded: model names that were filled.
        converted: what was changed on the way, one sentence each.
        missing: model names (parameters and buffers) that the file does not have; they keep their initial values.
        unused: names of the file, in maskrcnn-benchmark's form, that no part of the model took.
        ignored: names of the file that are of no use here, each with the reason.
        mismatched: model names whose shape differs in the file, with both shapes; they were not loaded.
        notes: what the user should know or set.
    """

    path: str
    kind: str = "maskrcnn_benchmark"
    loaded: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.path} ({self.kind}): {len(self.loaded)} tensors loaded, {len(self.missing)} of the model not in "
            f"the file, {len(self.unused)} of the file not in the model, {len(self.mismatched)} of another shape"
        ]
        lines += [f"  converted: {entry}" for entry in self.converted]
        for title in ("missing", "unused", "mismatched", "ignored"):
            names: list[str] = getattr(self, title)
            if names:
                more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {title}: {', '.join(names[:SHOWN])}{more}")
        lines += [f"  note: {entry}" for entry in self.notes]
        return "\n".join(lines)
