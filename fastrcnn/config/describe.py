"""The schema in words: what each key takes, for error messages and for docs/configuration.md."""

from __future__ import annotations

import functools
import types
import typing
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo

from fastrcnn.config.schema import Config, Section

# Accepted, so that maskrcnn-benchmark's files load, and read by nothing. Setting one of them warns.
KEYS_WITHOUT_EFFECT: dict[str, str] = {
    "PATHS_CATALOG": "a config cannot run Python code; name data sets in DATASETS.OWN",
    "AMP_VERBOSE": "apex is not used; DTYPE selects the precision",
    "MODEL.ROI_MASK_HEAD.MLP_HEAD_DIM": "the mask head has no fully connected layer; CONV_LAYERS sets its widths",
    "MODEL.ROI_KEYPOINT_HEAD.MLP_HEAD_DIM": "the keypoint head has no fully connected layer; see CONV_LAYERS",
}


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Full name of each section ("MODEL.RPN") and its class, in the order of the schema."""
    found: dict[str, type[Section]] = {}

    def visit(model: type[Section], prefix: str) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found[prefix + name] = field.annotation
                visit(field.annotation, f"{prefix}{name}.")

    visit(Config, "")
    return found


@functools.cache
def leaves() -> dict[str, FieldInfo]:
    """Full name of each key ("MODEL.RPN.NMS_THRESH") and its field, in the order of the schema."""
    found: dict[str, FieldInfo] = {}

    def visit(model: type[Section], prefix: str) -> None:
        for name, field in model.model_fields.items():
            if f"{prefix}{name}" in sections():
                visit(sections()[f"{prefix}{name}"], f"{prefix}{name}.")
            else:
                found[prefix + name] = field

    visit(Config, "")
    return found


def lookup(cfg: Config, name: str) -> Any:
    """The value of the key with this full name."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return value


def is_own(field: FieldInfo) -> bool:
    """Whether maskrcnn-benchmark does not have this key."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("own"))


def expected(field: FieldInfo) -> str:
    """What a key takes, as words that follow "expected": "a whole number >= 1", "one of A, B"."""
    return _describe(field.annotation, list(field.metadata))


def example(field: FieldInfo) -> str:
    """The default as it would be written on a command line."""
    return render(field.default)


def render(value: object) -> str:
    """A value as configs write it: strings bare, sequences as Python tuples."""
    if isinstance(value, str):
        return value if value else '""'
    if isinstance(value, float):
        return f"{value:.6g}" if float(f"{value:.6g}") == value else repr(value)
    if isinstance(value, tuple):
        inner = ", ".join(repr(item) if isinstance(item, str) else render(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value)


def _describe(annotation: Any, metadata: list[Any], plural: bool = False) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *extra = typing.get_args(annotation)
        for item in extra:
            metadata = metadata + (item.metadata if isinstance(item, FieldInfo) else [item])
        return _describe(inner, metadata, plural)
    if origin is Literal:
        choices = [str(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice, []) for choice in typing.get_args(annotation))
    if origin is tuple:
        return _describe_tuple(typing.get_args(annotation), metadata)
    pattern = next((item.pattern for item in metadata if getattr(item, "pattern", None)), None)
    if pattern == r"^(cpu|cuda(:\d+)?)$":
        return "cpu, cuda or cuda:N"
    singular, many = {
        bool: ("True or False", "values True or False"),
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("a string", "strings"),
    }.get(annotation, ("a value", "values"))
    if annotation is str and any(getattr(item, "min_length", 0) for item in metadata):
        singular, many = "a non-empty string", "non-empty strings"
    return (many if plural else singular) + _bounds(metadata)


def _describe_tuple(items: tuple[Any, ...], metadata: list[Any]) -> str:
    if len(items) == 2 and items[1] is Ellipsis:
        least = " one or more" if any(getattr(item, "min_length", 0) for item in metadata) else ""
        if typing.get_origin(items[0]) is tuple:
            return (
                f"a list of lists, each of {_describe_tuple(typing.get_args(items[0]), []).removeprefix('a list of ')}"
            )
        return f"a list of{least} {_describe(items[0], [], plural=True)}"
    kinds = [_describe(item, [], plural=True) for item in items]
    if len(set(kinds)) == 1:
        return f"a list of {len(items)} {kinds[0]}"
    return "a list of " + ", ".join(_describe(item, []) for item in items)


def _bounds(metadata: list[Any]) -> str:
    bound = {name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}
    if "ge" in bound and "le" in bound:
        return f" from {bound['ge']} to {bound['le']}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(
        f"{' and' if index else ''} {signs[name]} {value}" for index, (name, value) in enumerate(bound.items())
    )


def markdown() -> str:
    """docs/configuration.md."""
    lines = [INTRODUCTION]
    groups: dict[str, list[str]] = {}
    for name in leaves():
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    for group in ["", *sections()]:
        if group not in groups:
            continue
        lines += [f"## {group or 'Top level'}", ""]
        if group:
            lines += [(sections()[group].__doc__ or "").strip(), ""]
        lines += ["| Key | Default | Takes | What it does |", "|---|---|---|---|"]
        for name in groups[group]:
            field = leaves()[name]
            mark = " (ours)" if is_own(field) else ""
            effect = ". **No effect.**" if name in KEYS_WITHOUT_EFFECT else ""
            cells = (
                f"`{name}`{mark}",
                f"`{example(field)}`",
                expected(field),
                f"{field.description}{effect}",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += ["## Keys without effect", "", "Accepted so that existing files load. Setting one warns.", ""]
    lines += ["| Key | Why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in KEYS_WITHOUT_EFFECT.items()]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Configuration

<!-- Written by `python -m fastrcnn.config --markdown > docs/configuration.md`; edit fastrcnn/config/describe.py. -->

The keys are those of maskrcnn-benchmark, with the same names and defaults, so its YAML files work unchanged. Keys
marked *(ours)* are additions. A run is configured by one YAML file and by keys on the command line, which win:

    python -m fastrcnn.train --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml \\
        SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025 SOLVER.STEPS "(480000, 640000)" MODEL.DEVICE=cpu

* Lists are written `(4, 8, 16)` (a list of one: `(16,)`) or `[4, 8, 16]`; the names in a list have quotes:
  `"('coco_2014_train',)"`. `1e-3` is a number, also where YAML takes it for text.
* `_BASE_: other.yaml` at the top of a file reads that file first; the path is relative to the file it stands in.
* An unknown key, a value of the wrong kind, a key twice in a file and keys that contradict each other are errors. The
  message names the key, and the file and line.
* `python -m fastrcnn.config FILE [KEY VALUE ...]` prints the effective configuration. A run writes the same text to
  `OUTPUT_DIR/config.yml`.
* `MODEL.DEVICE` is `cuda`, as upstream. Where PyTorch sees no CUDA device the commands stop with exit code 2 and say to
  add `MODEL.DEVICE cpu`; nothing falls back silently.
"""
