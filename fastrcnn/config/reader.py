"""Reading a YAML file into settings that remember the line they stand on.

``yaml.safe_load`` keeps neither line numbers nor the text of a scalar and lets the last of two equal keys win;
so the node tree is walked here. Only safe tags are understood, as with ``safe_load``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used. The message is one line: where, which key, what was wrong, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a quoted key may hold line breaks


@dataclass(frozen=True)
class Setting:
    """One key with its value, as it was written.

    Attributes:
        key: full dotted name.
        value: the value as YAML (or the command line) gives it.
        text: the characters of a scalar; None for lists and for values that are not text.
        where: ``FILE:LINE`` or ``command line``.
        is_section: a mapping stood here; its content follows as settings of its own.
    """

    key: str
    value: object
    text: str | None
    where: str
    is_section: bool = False


def read_settings(path: Path, _below: tuple[Path, ...] = ()) -> list[Setting]:
    """Settings of a YAML file, those of the file that its ``_BASE_`` names first.

    Args:
        path: the file; a relative ``_BASE_`` is taken from its folder.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, not a mapping, a key twice, a circle of ``_BASE_``.
    """
    if path.resolve() in _below:
        raise ConfigError(f"{path}: _BASE_ leads back to this file")
    settings = list(_parse(path, _read_text(path)))
    bases = [setting for setting in settings if setting.key == "_BASE_"]
    if not bases:
        return settings
    base = bases[0].text
    if not base:
        raise ConfigError(f"{bases[0].where}: _BASE_ takes the name of one file, got {bases[0].value!r}")
    base_path = path.parent / Path(base).expanduser()
    if not base_path.is_file():
        raise ConfigError(f"{bases[0].where}: _BASE_ file {base_path} does not exist{_nearest_file(base_path)}")
    inherited = read_settings(base_path, (*_below, path.resolve()))
    return inherited + [setting for setting in settings if setting.key != "_BASE_"]


def _read_text(path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"config file {path} does not exist{_nearest_file(path)}")
    if path.is_dir():
        raise ConfigError(f"config file {path} is a folder; name a .yaml file in it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not a text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error


def _nearest_file(path: Path) -> str:
    """``; did you mean X?`` for the file of the most similar name in the same folder."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parse(path: Path, text: str) -> Iterator[Setting]:
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{path}:{_line(root)}: expected keys and values (KEY: value)")
            yield from _walk(loader, path, root, "", {})
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "syntax error").split())
        hint = "; indent with spaces, not tabs" if r"\t" in problem else ""
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}{hint}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: character {error.character!r} is not allowed") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _walk(
    loader: yaml.SafeLoader, path: Path, node: yaml.MappingNode, prefix: str, seen: dict[str, int]
) -> Iterator[Setting]:
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{_line(key_node)}: a key must be a name")
        name, line = prefix + key_node.value, _line(key_node)
        if key_node.tag != "tag:yaml.org,2002:merge":
            if name in seen:
                raise ConfigError(f"{path}:{line}: {name} stands here a second time (first in line {seen[name]})")
            seen[name] = line
    loader.flatten_mapping(node)
    merged = {key_node.value: (key_node, value_node) for key_node, value_node in node.value}
    for key_node, value_node in merged.values():
        name, where = prefix + key_node.value, f"{path}:{_line(key_node)}"
        if isinstance(value_node, yaml.MappingNode):
            yield Setting(name, {}, None, where, is_section=True)
            yield from _walk(loader, path, value_node, name + ".", seen)
            continue
        try:
            value = loader.construct_object(value_node, deep=True)
        except ValueError as error:  # a date that does not exist, for example
            raise ConfigError(f"{where}: {name}: cannot read the value: {error}") from error
        text = value_node.value if isinstance(value_node, yaml.ScalarNode) and value is not None else None
        yield Setting(name, value, text, where)
