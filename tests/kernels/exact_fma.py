"""A multiply-add that the interpreter rounds once, as a GPU does: its own rounds the product too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastrcnn_kernels._library import interpreting


@pytest.fixture(autouse=True)
def exact_fma(monkeypatch: pytest.MonkeyPatch) -> None:
    """For modules that import it: ``tl.fma`` of float32 through float64, where the product is exact."""
    if interpreting():
        from triton.runtime import interpreter

        def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
