"""Who may import whom: every import statement of both packages, also those inside functions, against the layers.

The order is docs/decisions/0001-two-storeys.md's: a module imports from lower layers and from its own package only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fastrcnn": ROOT / "fastrcnn", "fastrcnn_kernels": ROOT / "kernels" / "fastrcnn_kernels"}

# Lower layers first. Entries of one layer are siblings: none imports another.
LAYERS = [
    ["fastrcnn_kernels.triton"],
    ["fastrcnn_kernels"],
    ["fastrcnn.outlines", "fastrcnn.files"],
    ["fastrcnn.structures", "fastrcnn.conventions"],
    ["fastrcnn.models", "fastrcnn.data", "fastrcnn.evaluation", "fastrcnn.weights", "fastrcnn.visualize"],
    ["fastrcnn.config"],
    ["fastrcnn.build"],
    ["fastrcnn.engine"],
    ["fastrcnn"],  # the public names, and the entry points
]
CONFIG_READERS = (
    "fastrcnn",
    *(f"fastrcnn.{n}" for n in ("train", "evaluate", "predict", "predictor", "doctor")),
)


def is_config(module: str) -> bool:
    """Whether the module is the configuration package or in it."""
    return module == "fastrcnn.config" or module.startswith("fastrcnn.config.")


def reads_config(module: str) -> bool:
    """Whether the module may see a configuration: `build` and the entry points may."""
    return module in CONFIG_READERS or module == "fastrcnn.build" or module.startswith("fastrcnn.build.")


def layer_of(module: str) -> tuple[int, str]:
    """(index of the layer, the entry of LAYERS) of a module; the longest entry that it lies under."""
    best = max(
        (entry for layer in LAYERS for entry in layer if module == entry or module.startswith(entry + ".")), key=len
    )
    return next(i for i, layer in enumerate(LAYERS) if best in layer), best


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """(module of this project, line) of every import; a string like "fastrcnn.x:f" or import_module counts too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else str(node.module)), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name in MODULES and "." in name:
                yield name, node.lineno


def violations(module: str, source: str) -> list[str]:
    index, entry = layer_of(module)
    found = []
    for target, line in imported(ast.parse(source), module):
        if target.split(".")[0] not in PACKAGES:
            continue
        target_index, target_entry = layer_of(target)
        if target_entry == entry:
            continue
        lazy = module.startswith("fastrcnn_kernels") and target_entry == "fastrcnn_kernels.triton"
        if target_index >= index and not lazy:
            found.append(f"{module}:{line} ({entry}) imports {target} ({target_entry})")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_upward(module):
    assert not violations(module, MODULES[module].read_text())


@pytest.mark.parametrize("module", sorted(m for m in MODULES if not reads_config(m) and not is_config(m)))
def test_only_build_and_entry_points_see_the_config(module):
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        # The error that becomes exit code 2 may be caught anywhere; it holds no configuration.
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name != "ConfigError"]
    assert not [f"line {line}: {name}" for name, line in imported(tree, module) if is_config(name)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastrcnn.models.rpn", "from fastrcnn.data import coco"),
        ("fastrcnn.structures", "import fastrcnn.models.rpn"),
        ("fastrcnn_kernels.nms", "def f():\n    from fastrcnn.structures import BoxList"),
        ("fastrcnn.build", "from fastrcnn.engine import trainer"),
        ("fastrcnn_kernels.triton.nms", "from fastrcnn_kernels import _library"),
    ],
)
def test_the_walk_finds_an_upward_import(module, source):
    assert violations(module, source)


def test_importing_the_operators_imports_nothing_else(tmp_path):
    """``import fastrcnn_kernels`` brings torch and neither triton nor anything of the detector."""
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules); import fastrcnn_kernels; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'fastrcnn', 'triton', 'pydantic', 'pycocotools', 'PIL', 'yaml', 'torchvision'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.strip() == "[]"
