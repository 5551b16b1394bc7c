"""Keys that the configuration allows because maskrcnn-benchmark has them, and that no code here acts on yet."""

from __future__ import annotations

from typing import Any

from fastrcnn.config import Config, ConfigError


def refuse_what_is_not_built(cfg: Config) -> None:
    """Keys that the configuration allows because maskrcnn-benchmark has them, and that no code here acts on yet."""
    rules: list[tuple[str, Any, list[Any]]] = [
        ("TEST.BBOX_AUG.ENABLED", cfg.TEST.BBOX_AUG.ENABLED, [False]),
    ]
    for key, value, built in rules:
        if value not in built:
            choices = " or ".join(str(choice) for choice in built)
            raise ConfigError(f"{key} {value!r} is not built by this version; choose {choices}")
