"""The doctor: what it reports, and that it finds a kernel that is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import pytest
import torch

import fastrcnn_kernels as kernels
from fastrcnn import doctor
from fastrcnn_kernels import _library


@pytest.fixture(scope="module")
def printed() -> tuple[int, str]:
    """Exit code and output of ``--json``: the one run with every back-end: Triton's interpreter takes long."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = doctor.main(["--json"])
    return code, output.getvalue()


@pytest.fixture
def compiled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the Triton kernels where only the interpreter could run them."""
    monkeypatch.setattr(_library, "interpreting", lambda: False)


def statuses() -> dict[tuple[str, str], str]:
    return {(t["operator"], t["backend"]): t["status"] for t in doctor.self_test() if t["device"] == "cpu"}


def test_main_json(printed: tuple[int, str]) -> None:
    code, text = printed
    findings = json.loads(text)
    assert code == 0
    assert findings["agree"] is True
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["devices"][0].startswith("cpu: ")
    assert findings["operators"]["cpu"] == kernels.backend_report("cpu")
    for test in findings["self_test"]:
        available = findings["operators"][test["device"]][test["operator"]][test["backend"]] == "available"
        assert test["status"] == ("ok" if available else "not available"), test
    assert {t["operator"] for t in findings["self_test"] if t["status"] == "ok"} == {"nms", "roi_align"}


def test_main_text(
    printed: tuple[int, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = json.loads(printed[1])
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for part in ("torch ", "compiler", "operators on cpu", "nms cpu reference", "all available kernels agree"):
        assert part in text
    for name in kernels.backend_report("cpu"):
        assert f"  {name} " in text


def test_main_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--jason"])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def replace_kernel(monkeypatch: pytest.MonkeyPatch, name: str, backend: str, function: Any) -> None:
    monkeypatch.setitem(_library._RESOLVED, (name, backend), function)


@pytest.mark.usefixtures("compiled_only")
def test_a_wrong_nms_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if kernels.backend_report("cpu")["nms"]["cpp"] != "available":
        pytest.skip("the C++ kernels are not built")
    right = _library._resolve(_library._OPERATORS["nms"], "cpp")
    replace_kernel(monkeypatch, "nms", "cpp", lambda *args, **kwargs: right(*args, **kwargs).flip(0))
    assert statuses()["nms", "cpp"] == "differs"
    assert statuses()["nms", "reference"] == "ok"
    assert doctor.main([]) == 1
    assert "KERNELS DISAGREE" in capsys.readouterr().out


@pytest.mark.usefixtures("compiled_only")
def test_a_failing_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.backend_report("cpu")["nms"]["cpp"] != "available":
        pytest.skip("the C++ kernels are not built")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("illegal instruction\nat 0x0")

    replace_kernel(monkeypatch, "nms", "cpp", fail)
    (result,) = [t for t in doctor.self_test() if (t["operator"], t["backend"], t["device"]) == ("nms", "cpp", "cpu")]
    assert (result["status"], result["detail"]) == ("failed", "RuntimeError: illegal instruction")


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("wrong", ["roi_align", "roi_align_backward"])
def test_a_wrong_roi_align_is_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Only float32 is made wrong: the expected values are the reference's in float64."""
    right = _library._resolve(_library._OPERATORS[wrong], "reference")

    def change(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        outputs = found if isinstance(found, (list, tuple)) else [found]
        changed = [o * 1.001 if o.dtype == torch.float32 else o for o in outputs]
        return type(found)(changed) if isinstance(found, (list, tuple)) else changed[0]

    replace_kernel(monkeypatch, wrong, "reference", change)
    assert statuses()["roi_align", "reference"] == "differs"
    assert statuses()["nms", "reference"] == "ok"


def test_compiler_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "does not run" in doctor.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor.compiler().startswith("none found")
    found = doctor.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "not installed" not in found["numpy"]
