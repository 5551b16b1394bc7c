"""What the tests of the configuration share."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrcnn.config import Config, load_config

OWN_KEYS = {
    "MODEL.CONVENTION": "maskrcnn_benchmark",
    "MODEL.CHANNELS_LAST": True,
    "MODEL.FUSED_CONVOLUTIONS": True,
    "MODEL.BACKBONE.FROZEN_BN_EPSILON": 0.0,
    "MODEL.RPN.SPARSE_BACKWARD": True,
    "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY": "auto",
    "MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY": "auto",
    "DATASETS.FILTER_EMPTY": True,
    "DATASETS.OWN": (),
    "DATALOADER.SHAPE_BUCKETS": "auto",
    "DATALOADER.DEVICE_PREPROCESSING": "auto",
    "SOLVER.SEED": 0,
    "SOLVER.CLIP_GRADIENTS": 0.0,
    "SOLVER.KEEP_CHECKPOINTS": 0,
    "SOLVER.LOG_PERIOD": 20,
    "STEP.GRAPH": "auto",
    "STEP.FUSED_OPTIMIZER": "auto",
    "STEP.MASK_SHARES": (0.25, 0.5, 0.75, 1.0),
    "TEST.VIS_IMAGES": 0,
    "TEST.EVAL_BACKEND": "pycocotools",
}


def upstream_defaults() -> dict[str, object]:
    """maskrcnn-benchmark's keys and defaults, copied from it (PATHS_CATALOG, a path there, is empty here)."""
    lines = (Path(__file__).parent / "upstream_defaults.txt").read_text().splitlines()
    return {name: ast.literal_eval(value) for name, value in (line.split(" = ", 1) for line in lines)}


def upstream_configs() -> dict[str, dict[str, object]]:
    """What each of maskrcnn-benchmark's 66 files sets to another value than the default, by its path in configs/.

    The file has a block for each: ``[NAME]``, or ``[NAME] like [EARLIER NAME]`` and then the differences, where
    ``default`` takes a setting back.
    """
    everything: dict[str, dict[str, object]] = {}
    settings: dict[str, object] = {}
    for line in (Path(__file__).parent / "upstream_configs.txt").read_text().splitlines():
        if line.startswith("["):
            name, _, base = line.removeprefix("[").removesuffix("]").replace("]", "").partition(" like [")
            settings = everything[name] = dict(everything[base]) if base else {}
            continue
        key, value = line.split(" = ", 1)
        if value == "default":
            del settings[key]
        else:
            settings[key] = ast.literal_eval(value)
    return everything


def lookup(cfg: Config, name: str) -> Any:
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return value


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return tree


def load_text(folder: Path, text: str, overrides: Sequence[object] = ()) -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)
