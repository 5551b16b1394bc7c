"""The quicker interpreter: the same numbers, `triton.language` as it was after a launch, and less repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton import language  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fastrcnn_kernels import roi_align, set_backend  # noqa: E402
from fastrcnn_kernels._library import interpreting  # noqa: E402
from tests.interpreter import look_up_types_once, prepare_once_a_launch  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="Triton kernels are compiled here, not interpreted"),
    pytest.mark.skipif(not hasattr(interpreter, "_LangPatchScope"), reason="another version of Triton's interpreter"),
]


def plain(name: str) -> Any:
    """Triton's own function, below the replacement that the session installed."""
    function = getattr(interpreter, name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["original"].cell_contents if "original" in cells else function


def pooled() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 2, 6, 8, generator=generator)
    return roi_align(features, torch.tensor([[0.0, 1.0, 1.0, 20.0, 18.0]]), (2, 2), 0.25, 2, True)


def test_the_same_numbers_with_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = plain("_patch_lang")

    def counted(fn: Any) -> Any:
        calls.append(fn)
        return original(fn)

    monkeypatch.setattr(interpreter, "_get_np_dtype", plain("_get_np_dtype"))
    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    with set_backend("triton"):
        expected, plainly = pooled(), len(calls)
    monkeypatch.setattr(interpreter, "_get_np_dtype", look_up_types_once(interpreter))
    monkeypatch.setattr(interpreter, "_patch_lang", prepare_once_a_launch(interpreter, language))
    calls.clear()
    with set_backend("triton"):
        for _ in range(2):
            assert torch.equal(pooled(), expected)
    assert 0 < 4 * len(calls) <= plainly


def test_the_language_is_as_before_after_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_patch_lang", plain("_patch_lang"))
    monkeypatch.setattr(interpreter, "_patch_lang", prepare_once_a_launch(interpreter, language))
    before = {name: getattr(language, name) for name in ("load", "store", "arange", "sum")}
    with set_backend("triton"):
        pooled()
    assert {name: getattr(language, name) for name in before} == before


@pytest.mark.parametrize(
    "name", ["int1", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_types(name: str) -> None:
    original, quick = plain("_get_np_dtype"), look_up_types_once(interpreter)
    scalar = getattr(language, name)
    for kind in (scalar, language.block_type(scalar, [4]), language.pointer_type(scalar)):
        assert quick(kind) == original(kind) == quick(kind)
    pointers = language.block_type(language.pointer_type(scalar), [4])
    assert quick(pointers) == original(pointers)
