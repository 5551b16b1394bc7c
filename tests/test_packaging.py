"""What is installed is what is in the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORAGE = {"fastrcnn": ROOT / "fastrcnn", "fastrcnn_kernels": ROOT / "kernels" / "fastrcnn_kernels"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in the standard library from 3.11 on")
def test_every_package_is_listed() -> None:
    """An install that is not editable has the packages of pyproject.toml and no others."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in STORAGE.items()
        for path in folder.rglob("__init__.py")
    }
    assert sorted(listed) == sorted(found)
