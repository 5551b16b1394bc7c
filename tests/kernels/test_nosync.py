"""forbid_host_sync catches each way to make the host wait, and lets the rest pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.kernels.nosync import HostSync, forbid_host_sync

X = torch.arange(6.0)
MASK = X > 2
BYTES = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.uint8)
META = torch.empty(3, device="meta")


def _put(mask: torch.Tensor) -> None:
    X.clone()[mask] = X[:3]


SYNCHRONISING: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "local_scalar_dense": lambda: torch.ops.aten._local_scalar_dense(X[0]),
    "bool": lambda: bool(MASK.any()),
    "int": lambda: int(X[1]),
    "float": lambda: float(X[1]),
    "index": lambda: [0, 1, 2][torch.tensor(1)],
    "range": lambda: range(torch.tensor(3)),
    "if": lambda: 1 if X.sum() > 3 else 0,
    "is_nonzero": lambda: torch.is_nonzero(X[1]),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: MASK.nonzero(),
    "argwhere": lambda: torch.argwhere(MASK),
    "where_of_one": lambda: torch.where(MASK),
    "masked_select": lambda: torch.masked_select(X, MASK),
    "index_bool": lambda: X[MASK],
    "index_bool_2d": lambda: X.view(2, 3)[MASK.view(2, 3)],
    "index_bool_second": lambda: X.view(1, 6)[:, MASK],
    "index_uint8": lambda: torch.ops.aten.index(X, [BYTES]),
    "index_put_bool": lambda: torch.ops.aten.index_put(X, [MASK], X[:3]),
    "index_put_bool_": lambda: _put(MASK),
    "unique": lambda: torch.unique(X),
    "unique_dim": lambda: torch.unique(X.view(2, 3), dim=0),
    "unique_consecutive": lambda: torch.unique_consecutive(X),
    "bincount": lambda: torch.bincount(torch.arange(3)),
    "repeat_interleave": lambda: torch.repeat_interleave(X, torch.arange(6)),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "to_cpu": lambda: X.to("cpu"),
    "to_cpu_keyword": lambda: X.to(device="cpu", dtype=torch.float64),
    "device_to_host": lambda: META.to(torch.device("cpu")),
    "device_to_host_copy": lambda: torch.empty(3).copy_(META),
}

HARMLESS: dict[str, Callable[[], object]] = {
    "where": lambda: torch.where(MASK, X, 0.0),
    "masked_fill": lambda: X.masked_fill(MASK, 1.0),
    "gather": lambda: X.gather(0, torch.arange(3)),
    "index_int": lambda: X[torch.arange(3)],
    "slice": lambda: X[1:3],
    "topk": lambda: X.topk(2),
    "sort": lambda: X.sort(),
    "to_dtype": lambda: X.to(torch.float64),
    "to_own_device": lambda: X.to(X.device),
    "repeat_interleave": lambda: torch.repeat_interleave(X, torch.ones(6, dtype=torch.int64), output_size=6),
    "cross_entropy": lambda: functional.cross_entropy(X.view(2, 3), torch.arange(2)),
    "conv": lambda: functional.conv1d(X.view(1, 1, 6), torch.ones(1, 1, 3)),
}


@pytest.mark.parametrize("name", SYNCHRONISING)
def test_forbids(name: str) -> None:
    with pytest.raises(HostSync), forbid_host_sync():
        SYNCHRONISING[name]()


@pytest.mark.parametrize("name", HARMLESS)
def test_lets_pass(name: str) -> None:
    with forbid_host_sync(allow_constants=False):
        HARMLESS[name]()


def test_sees_backward() -> None:
    """A custom gradient that reads data is found when backward runs inside the block."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * grad[0].item()

    x = X.clone().requires_grad_()
    with pytest.raises(HostSync), forbid_host_sync():
        Reads.apply(x).sum().backward()
    with forbid_host_sync():
        (x * 2).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: torch.tensor([1.0]), id="tensor"),
        pytest.param(lambda: torch.as_tensor([1.0]), id="as_tensor"),
        pytest.param(lambda: X.new_tensor([1.0]), id="new_tensor"),
    ],
)
def test_constants(build: Callable[[], object]) -> None:
    with forbid_host_sync():
        build()
    with pytest.raises(HostSync, match="CUDA graph"), forbid_host_sync(allow_constants=False):
        build()


def test_ends_with_the_block() -> None:
    with pytest.raises(HostSync), forbid_host_sync():
        X.tolist()
    assert X.tolist() == [0, 1, 2, 3, 4, 5]
    assert X[MASK].numel() == 3
