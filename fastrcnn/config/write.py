"""Writing a configuration as YAML."""

from __future__ import annotations

from typing import Any

import yaml

from fastrcnn.config.describe import is_own, leaves, lookup
from fastrcnn.config.schema import Config


def dump_config(cfg: Config, *, own_keys: bool = True) -> str:
    """``cfg`` as YAML, in the order of the schema. :func:`load_config` reads it back to an equal configuration.

    Args:
        cfg: the configuration.
        own_keys: False leaves out the keys that maskrcnn-benchmark does not have, so that it can read the file.
    """
    tree: dict[str, Any] = {}
    for name, field in leaves().items():
        if own_keys or not is_own(field):
            *parents, leaf = name.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            value = lookup(cfg, name)
            if isinstance(field.default, int) and isinstance(value, float) and value.is_integer():
                value = int(value)  # a whole number upstream, whose reader refuses 2.0 there
            section[leaf] = value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Lists on one line; no anchors, which a reader would not expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
