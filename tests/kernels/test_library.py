"""The operator registry: back-end choice, errors, the report, and the census of back-ends that must be here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastrcnn_kernels
from fastrcnn_kernels import _library, backend_report, get_backend, nms, set_backend
from tests.kernels.helpers import required_backends

# Operators that are complete: all three implementations. One that loses an implementation fails the census.
COMPLETE = ["batched_nms", "nms", "nms_padded"]


@pytest.fixture(autouse=True)
def restore_backend():
    former = get_backend()
    yield
    set_backend(former)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]), torch.tensor([0.5, 0.9, 0.7])


@pytest.mark.parametrize("name", sorted(_library._OPERATORS))
def test_census(name: str) -> None:
    """Every implementation that an operator declares can run on this machine, or the suite is red.

    ``FASTRCNN_BUILD_EXT=0`` in the environment says that the C++ kernels are left out on purpose.
    """
    declared = set(_library._OPERATORS[name].implementations)
    rows = [backend_report("cpu")[name]]
    if torch.cuda.is_available():
        rows.append(backend_report("cuda")[name])
    for backend in declared & required_backends():
        reasons = [row[backend] for row in rows]
        assert "available" in reasons, f"{name}: back-end {backend} is absent: {reasons}"
        assert callable(_library._resolve(_library._OPERATORS[name], backend))


@pytest.mark.parametrize("name", COMPLETE)
def test_census_of_complete_operators(name: str) -> None:
    assert set(_library._OPERATORS[name].implementations) == set(_library.BACKENDS)


def test_census_sees_an_absent_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_EXTENSION_MISSING", "the C++ extension is not built (for a test)")
    monkeypatch.delenv("FASTRCNN_BUILD_EXT", raising=False)
    with pytest.raises(AssertionError, match=r"back-end cpp is absent.*not built"):
        test_census("nms")


def test_set_backend_takes_effect_and_is_restored() -> None:
    set_backend("auto")
    with set_backend("reference"):
        assert get_backend() == "reference"
        with set_backend("cpp"):
            assert get_backend() == "cpp"
        assert get_backend() == "reference"
    assert get_backend() == "auto"
    set_backend("reference")
    assert get_backend() == "reference"


def test_set_backend_is_restored_after_an_error() -> None:
    set_backend("auto")
    with pytest.raises(KeyError), set_backend("reference"):
        raise KeyError
    assert get_backend() == "auto"


def test_set_backend_rejects_other_names() -> None:
    set_backend("auto")
    with pytest.raises(ValueError, match="unknown back-end 'cuda': choose one of auto, reference, cpp, triton"):
        set_backend("cuda")
    assert get_backend() == "auto"


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_the_forced_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    ran = []
    for name in _library.BACKENDS:
        marked = torch.tensor([_library.BACKENDS.index(name)])
        monkeypatch.setitem(_library._RESOLVED, ("nms", name), lambda *_, m=marked, n=name: ran.append(n) or m.clone())
    monkeypatch.setattr(_library, "_EXTENSION_MISSING", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with set_backend(backend):
        assert nms(*sample(), 0.5).item() == _library.BACKENDS.index(backend)
    assert ran == [backend]


def test_auto_falls_back_and_a_forced_backend_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_EXTENSION_MISSING", "the C++ extension is not built (for a test)")
    with set_backend("auto"):
        assert nms(*sample(), 0.5).tolist() == [1, 2]
        assert backend_report("cpu")["nms"]["auto"] == "reference"
    with set_backend("cpp"), pytest.raises(RuntimeError, match=r"nms: back-end 'cpp' cannot run here: .*not built"):
        nms(*sample(), 0.5)


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with set_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        nms(*sample(), 0.5)


def test_missing_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_EXTENSION", None)
    monkeypatch.setattr(_library, "_EXTENSION_MISSING", "the C++ extension is not built (x); install a C++17 compiler")
    with pytest.raises(RuntimeError, match="install a C\\+\\+17 compiler"):
        _library.extension()


def test_report_names_every_operator_and_back_end() -> None:
    report = backend_report("cpu")
    assert set(COMPLETE) <= set(report)
    for row in report.values():
        assert set(row) == {"reference", "cpp", "triton", "auto"}
        assert row["reference"] == "available"
    assert "CPU tensors" in backend_report("cuda")["nms"]["cpp"]


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("cuda", 1)])
def test_environment_variable(value: str, code: int) -> None:
    program = "import fastrcnn_kernels as k; print(k.get_backend())"
    environment = {**os.environ, "FASTRCNN_BACKEND": value}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == code, run.stderr
    if code:
        assert "FASTRCNN_BACKEND='cuda': choose one of auto, reference, cpp, triton" in run.stderr
    else:
        assert run.stdout.strip() == value


def test_import_is_light() -> None:
    """Neither triton nor numpy-heavy packages are imported before they are used."""
    program = (
        "import sys, torch; before = set(sys.modules); import fastrcnn_kernels; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    unwanted = {"triton", "torchvision", "pycocotools", "PIL", "fastrcnn", "cv2", "scipy"}
    loaded = set(eval(run.stdout.strip().splitlines()[-1]))
    assert not loaded & unwanted, loaded & unwanted


def test_public_list_is_what_it_says() -> None:
    for name in fastrcnn_kernels.__all__:
        assert getattr(fastrcnn_kernels, name).__doc__, f"{name} has no docstring"
