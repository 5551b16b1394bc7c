"""From a file and a command line to a checked :class:`Config`.

The steps: settings with the place where they stand (:mod:`fastrcnn.config.reader`, :func:`_parse_overrides`), the type
of the key (:func:`_coerce`), the schema's own checks, and, if one fails, a message that says where and what to do.
"""

from __future__ import annotations

import ast
import difflib
import re
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fastrcnn.config.checks import KeysDoNotFit
from fastrcnn.config.describe import KEYS_WITHOUT_EFFECT, example, expected, leaves, lookup, render, sections
from fastrcnn.config.reader import ConfigError, Setting, read_settings
from fastrcnn.config.schema import Config, Name
from fastrcnn.conventions import CONVENTIONS, KEYS

COMMAND_LINE = "command line"
_KEY_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
# What Python calls a number and YAML 1.1 a string: an exponent without both a dot and a sign.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class ConfigWarning(UserWarning):
    """A setting that is legal and does nothing, or probably not what was meant."""


def load_config(path: str | Path | None = None, overrides: Sequence[object] = ()) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Args:
        path: the file, or None for the defaults. Its ``_BASE_``, if any, is read first.
        overrides: ``["SOLVER.MAX_ITER", "100", "MODEL.DEVICE=cpu"]``: KEY VALUE pairs and KEY=VALUE, as they come from
            a command line; the last one wins. A VALUE that is no string is taken as it is.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: with one line that names the place (``FILE:LINE`` or ``command line``), the key, what was expected
            and what was found.
    """
    settings = read_settings(Path(path).expanduser()) if path is not None else []
    return _build({}, [*settings, *_parse_overrides(overrides)])


def with_overrides(cfg: Config, overrides: Sequence[object]) -> Config:
    """``cfg`` with some keys changed; ``overrides`` as in :func:`load_config`.

    Where ``MODEL.CONVENTION`` changes, keys at the default of the old convention go to that of the new one.
    """
    values = {name: lookup(cfg, name) for name in leaves()}
    settings = list(_parse_overrides(overrides))
    if any(setting.key == "MODEL.CONVENTION" for setting in settings):
        old = CONVENTIONS[cfg.MODEL.CONVENTION]
        for name, attribute in KEYS.items():
            if values[name] == getattr(old, attribute):
                del values[name]
    return _build(values, settings)


# --- the command line ------------------------------------------------------------------------------------------------


def _parse_overrides(overrides: Sequence[object]) -> Iterator[Setting]:
    words = list(overrides)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not isinstance(word, str):
            raise ConfigError(f"{COMMAND_LINE}: expected a key, got {word!r}; overrides are KEY VALUE pairs")
        name, equals, text = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(f"{COMMAND_LINE}: expected a key, got {word}; options stand before the KEY VALUE pairs")
        if not _KEY_PATTERN.fullmatch(name):
            raise ConfigError(f"{COMMAND_LINE}: expected a key such as SOLVER.MAX_ITER, got {_quote(word)}")
        if equals:
            yield Setting(name, text, text, COMMAND_LINE)
            continue
        _check_name(name, COMMAND_LINE)
        if position == len(words):
            raise ConfigError(f"{COMMAND_LINE}: {name} has no value; write {name} VALUE (overrides come in pairs)")
        value = words[position]
        position += 1
        if isinstance(value, str) and value.partition("=")[0] in leaves():
            raise ConfigError(
                f"{COMMAND_LINE}: {name} has no value; the next word is the key {value.partition('=')[0]}"
            )
        yield Setting(name, value, value if isinstance(value, str) else None, COMMAND_LINE)


# --- from text to the type of the key --------------------------------------------------------------------------------


def _coerce(setting: Setting, annotation: Any) -> object:
    """The value in the type that the key wants where that loses nothing, else as it was (and then refused)."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _coerce(setting, typing.get_args(annotation)[0])
    from_command_line = setting.where == COMMAND_LINE
    value, text = setting.value, setting.text
    if origin in (Union, types.UnionType):  # "auto", a bool or a list
        lists = [choice for choice in typing.get_args(annotation) if typing.get_origin(choice) is tuple]
        if lists and (text is None or text[:1] in ("(", "[")):
            return _coerce(setting, lists[0])
        word = text.strip("'\"") if text is not None else ""  # as in 'auto', which YAML and Python would read
        return _BOOLS.get(word.lower(), word) if text is not None else value
    if origin is tuple:
        if isinstance(value, str):
            value = _literal(value, from_command_line)
        return _coerce_items(value, annotation) if isinstance(value, (list, tuple)) else value
    if annotation is str or (origin is Literal and isinstance(typing.get_args(annotation)[0], str)):
        if text is None:
            return value
        unquoted = _literal(text, False) if from_command_line and text[:1] in ("'", '"') else text
        return unquoted if isinstance(unquoted, str) else text
    if annotation is bool:
        return _BOOLS.get(value.lower(), value) if isinstance(value, str) and from_command_line else value
    if from_command_line and isinstance(value, str):
        decoded = _literal(value.strip(), False)
        value = decoded if isinstance(decoded, (int, float)) else value
    return _number(value, int if origin is Literal else annotation)


def _coerce_items(values: Sequence[object], annotation: Any) -> object:
    """Lists become tuples, to any depth; numbers among them as :func:`_number`."""
    items: tuple[Any, ...] = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else (Any, ...)
    kinds = [items[0]] * len(values) if items[-1] is Ellipsis else [*items, *[Any] * len(values)][: len(values)]
    converted: list[object] = []
    for value, kind in zip(values, kinds, strict=True):
        if typing.get_origin(kind) is Annotated:
            kind = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)):
            converted.append(_coerce_items(value, kind))
        else:
            converted.append(_number(value, kind))
    return tuple(converted)


def _number(value: object, kind: Any) -> object:
    if kind not in (int, float):
        return value
    if isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _literal(text: str, yaml_too: bool) -> object:
    """A Python literal (or, on the command line, also a YAML list), else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    if yaml_too and text.strip().startswith("["):
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            pass
    return text


# --- putting it together ---------------------------------------------------------------------------------------------


def _build(values: dict[str, object], settings: Iterable[Setting]) -> Config:
    """Validate ``values`` (of a finished configuration) with ``settings`` on top."""
    latest: dict[str, Setting] = {}
    for setting in settings:
        _check_name(setting.key, setting.where)
        if setting.key in sections():
            if setting.is_section or (setting.value is None and setting.where != COMMAND_LINE):
                continue  # a section whose keys are all commented out is read by YAML as null
            first = next(name for name in leaves() if name.startswith(setting.key + "."))
            raise ConfigError(f"{setting.where}: {setting.key} is a section, not a key; set a key in it, as {first}")
        latest.pop(setting.key, None)  # the order of `latest` is that of the last word on each key
        latest[setting.key] = setting
        if setting.is_section:
            raise ConfigError(_wrong_value(setting, "a section"))
        values[setting.key] = _coerce(setting, leaves()[setting.key].annotation)
    convention = CONVENTIONS.get(str(values.get("MODEL.CONVENTION", Config().MODEL.CONVENTION)))
    if convention is not None:  # an unknown one is refused below
        for name, attribute in KEYS.items():
            values.setdefault(name, getattr(convention, attribute))
    try:
        cfg = Config.model_validate(_nest(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, latest)) from None
    _warn_of_other_conventions(cfg, latest)
    for name, reason in KEYS_WITHOUT_EFFECT.items():
        if name in latest and lookup(cfg, name) != leaves()[name].default:
            warnings.warn(f"{latest[name].where}: {name} has no effect: {reason}", ConfigWarning, stacklevel=3)
    return cfg


def _warn_of_other_conventions(cfg: Config, latest: dict[str, Setting]) -> None:
    """A file of maskrcnn-benchmark sets keys that another convention would give another value: that file wins."""
    convention = CONVENTIONS[cfg.MODEL.CONVENTION]
    if convention.name == "maskrcnn_benchmark":
        return
    for name, attribute in KEYS.items():
        usual = getattr(convention, attribute)
        set_in_file = name in latest and latest[name].where != COMMAND_LINE
        of_the_weights = name.startswith(("MODEL.", "INPUT."))  # the schedule and the padding are anyone's choice
        if set_in_file and of_the_weights and lookup(cfg, name) != usual:
            warnings.warn(
                f"{latest[name].where}: {name} {render(lookup(cfg, name))} is not what MODEL.CONVENTION "
                f"{convention.name} does, which is {render(usual)}",
                ConfigWarning,
                stacklevel=4,
            )


def _nest(values: dict[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return tree


def _check_name(name: str, where: str) -> None:
    if name in leaves() or name in sections():
        return
    parent = name.rpartition(".")[0]
    while parent:
        if parent in leaves():
            raise ConfigError(f"{where}: {parent} is a key, not a section; it takes {expected(leaves()[parent])}")
        parent = parent.rpartition(".")[0]
    raise ConfigError(f"{where}: unknown key {name}; {_advice(name)}")


def _advice(name: str) -> str:
    """What an unknown key was probably meant to be.

    First the key of the same last part (BASE_LR), then the one next to it in the section that was named, then the
    most similar full name. Full names alone would mislead: their common beginning counts as similarity.
    """
    known = [*leaves(), *sections()]
    parent, _, last = name.upper().rpartition(".")
    same_end = [key for key in known if key.rpartition(".")[2] == last]
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    beside = difflib.get_close_matches(last, siblings, n=1)
    others = [key for key in known if not name.upper().startswith(key + ".")]
    nearest = (
        difflib.get_close_matches(name.upper(), same_end, n=1, cutoff=0.0)
        or [f"{parent}.{key}" if parent else key for key in beside]
        or difflib.get_close_matches(name.upper(), others, n=1, cutoff=0.8)
    )
    if nearest:
        return f"did you mean {nearest[0]}?"
    if parent in sections():
        return f"{parent} has {', '.join(siblings)}"
    return "`python -m fastrcnn.config` prints all keys"


def _explain(error: ValidationError, latest: dict[str, Setting]) -> str:
    """One line for the first problem, in the order in which the keys were set."""
    order = {name: index for index, name in enumerate(latest)}
    problems: list[tuple[int, str]] = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, KeysDoNotFit):
            concerned = sorted((order[name], name) for name in cause.keys if name in latest)
            # The key set last, in a file or on the command line, is the likeliest culprit.
            return f"{latest[concerned[-1][1]].where}: {cause}" if concerned else str(cause)
        name = next(
            joined
            for count in range(1, len(detail["loc"]) + 1)
            if (joined := ".".join(str(part) for part in detail["loc"][:count])) in leaves()
        )
        problems.append((order[name], name))
    return _wrong_value(latest[min(problems)[1]])


def _wrong_value(setting: Setting, got: str | None = None) -> str:
    field = leaves()[setting.key]
    message = f"{setting.where}: {setting.key}: expected {expected(field)}, got {got or _got(setting)}"
    return message if got else message + _hint(setting, field)


def _got(setting: Setting) -> str:
    value = setting.value
    if value is None:
        return "nothing"
    if isinstance(value, str) and setting.where == COMMAND_LINE:
        literal = _literal(value, True)
        return _quote(value) if isinstance(literal, str) else _shorten(value)
    return f"the string {_quote(value)}" if isinstance(value, str) else _quote(value)


def _hint(setting: Setting, field: FieldInfo) -> str:
    """What to write instead, where that can be guessed; starts with "; "."""
    origin, value = typing.get_origin(field.annotation), setting.value
    if origin is Literal:
        choices = [str(choice) for choice in typing.get_args(field.annotation)]
        close = difflib.get_close_matches(str(value), choices, n=1)
        return f"; did you mean {close[0]}?" if close and len(choices) > 1 else ""
    if origin is tuple and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        literal = _literal(value, True) if isinstance(value, str) else value
        if isinstance(literal, (tuple, list)):
            return ""  # it was read as a list; an entry or their number is wrong
        names = typing.get_args(field.annotation)[0] == Name
        words = [word.strip(" \"'") for word in str(literal).strip("()[] ").split(",")]
        items = [repr(word) if names else word for word in words if word]
        readable = items and (names or all(re.fullmatch(r"[-+.\deE]+", item) for item in items))
        written = f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
        quoted = f'"{written}"' if setting.where == COMMAND_LINE else written
        return f"; write {quoted}" if readable else f'; write it like "{example(field)}"'
    if isinstance(value, str) and setting.where != COMMAND_LINE:
        literal = _literal(value, False)
        return "; remove the quotes" if isinstance(literal, (int, float)) or value.lower() in _BOOLS else ""
    if value is None and field.annotation is str:
        return '; write "" for an empty string'
    return ""


def _quote(value: object) -> str:
    return _shorten(repr(value))


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
