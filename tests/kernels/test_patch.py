"""``patch``: what it swaps, checks, reports and puts back. The peers' own tables: ``test_patch_<peer>.py``."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch

import fastrcnn_kernels
from fastrcnn_kernels import patch as patch_function
from fastrcnn_kernels.patch import Patch, Swap, close, close_with_gradient, patch


def theirs(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    """The peer's operator."""
    return x * scale


def other(x: torch.Tensor) -> torch.Tensor:
    return x - 1


class Coder:
    offset = 3

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.offset


calls: list[str] = []


def ours(x: torch.Tensor, scale: float = 2.0, *, original: object) -> torch.Tensor:
    calls.append("ours")
    return scale * x


def wrong(x: torch.Tensor, *, original: object) -> torch.Tensor:
    return x - 2


def our_encode(self: Coder, x: torch.Tensor, *, original: object) -> torch.Tensor:
    calls.append("encode")
    return x + self.offset


def check(original: object, replacement: object) -> None:
    close_with_gradient(original, replacement, [torch.rand(3)])


def check_encode(original: object, replacement: object) -> None:
    x = torch.rand(3)
    close(replacement(Coder(), x), original(Coder(), x))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package with a function, a class, and a user who imported the function under another name."""
    module, user, table = (types.ModuleType(n) for n in ("fakepeer", "a_user", "fastrcnn_kernels.patches.fakepeer"))
    module.scale, module.other, module.Coder = theirs, other, Coder
    user.scale_it = theirs
    table.SWAPS = [
        Swap("fakepeer:scale", ours, check),
        Swap("fakepeer:other", wrong, check),
        Swap("fakepeer:Coder.encode", our_encode, check_encode),
        Swap("fakepeer:absent", ours, check),
    ]
    table.KEPT = {"fakepeer:sampler": "it draws at random"}
    for m in (module, user, table):
        monkeypatch.setitem(sys.modules, m.__name__, m)
    monkeypatch.setattr(sys.modules["fastrcnn_kernels.patch"], "PEERS", ("fakepeer",))
    calls.clear()
    encode = Coder.encode
    yield module
    assert Coder.encode is encode, "a test left the class patched"


def test_is_exported() -> None:
    assert fastrcnn_kernels.patch is patch_function is patch


def test_swaps_everywhere_and_puts_back(peer: types.ModuleType) -> None:
    user, coder = sys.modules["a_user"], Coder()
    handle = patch("fakepeer")
    assert handle.swapped == ["fakepeer:scale", "fakepeer:Coder.encode"]
    assert "a_user.scale_it" in handle.outcomes[0].places
    calls.clear()
    assert torch.equal(user.scale_it(torch.ones(2), 3.0), torch.full((2,), 3.0))
    assert torch.equal(coder.encode(torch.zeros(1)), torch.tensor([3.0]))  # an object that existed before
    assert calls == ["ours", "encode"]
    assert user.scale_it.__doc__ == theirs.__doc__
    handle.unpatch()
    handle.unpatch()
    assert peer.scale is user.scale_it is theirs
    calls.clear()
    coder.encode(torch.zeros(1))
    assert not calls


def test_what_differs_is_left_alone(peer: types.ModuleType) -> None:
    with patch("fakepeer") as handle:
        assert peer.other is other
        assert "the results differ" in handle.kept["fakepeer:other"]
        assert "no such symbol" in handle.kept["fakepeer:absent"]
        assert handle.kept["fakepeer:sampler"] == "it draws at random"
        report = handle.report()
    assert "2 symbols swapped, 3 not" in report
    assert "fakepeer.sampler: not swapped: it draws at random" in report
    assert peer.scale is theirs


def test_a_gradient_that_differs_is_noticed(peer: types.ModuleType) -> None:
    def detached(x: torch.Tensor, scale: float = 2.0, *, original: object) -> torch.Tensor:
        return scale * (x.detach() + 0 * x)

    sys.modules["fastrcnn_kernels.patches.fakepeer"].SWAPS = [Swap("fakepeer:scale", detached, check)]
    with patch("fakepeer") as handle:
        assert "differ" in handle.kept["fakepeer:scale"]


def test_a_comparison_that_fails_to_run_is_reported(peer: types.ModuleType) -> None:
    def broken(x: torch.Tensor, scale: float = 2.0, *, original: object) -> torch.Tensor:
        raise RuntimeError("no compiler")

    sys.modules["fastrcnn_kernels.patches.fakepeer"].SWAPS = [Swap("fakepeer:scale", broken, check)]
    with patch("fakepeer") as handle:
        assert handle.kept["fakepeer:scale"] == "the comparison did not run: RuntimeError: no compiler"


def test_with_restores_after_an_error(peer: types.ModuleType) -> None:
    with pytest.raises(KeyError), patch("fakepeer"):
        raise KeyError
    assert peer.scale is theirs


def test_twice_is_an_error(peer: types.ModuleType) -> None:
    with patch("fakepeer"), pytest.raises(RuntimeError, match="patched already"):
        patch("fakepeer")
    with patch("fakepeer") as again:
        assert again.swapped


def test_a_later_replacement_is_left_to_its_owner(peer: types.ModuleType) -> None:
    handle = patch("fakepeer")
    peer.scale = other
    handle.unpatch()
    assert peer.scale is other


def test_what_we_do_not_take_goes_to_the_peer(peer: types.ModuleType) -> None:
    with patch("fakepeer"):
        calls.clear()
        assert peer.scale(torch.ones(2, device="meta")).device.type == "meta"
        traced = torch.jit.trace(lambda x: peer.scale(x), torch.ones(2), check_trace=False)
        assert torch.equal(traced(torch.ones(2)), torch.full((2,), 2.0))
        assert not calls


def test_the_comparison_leaves_the_generator_alone(peer: types.ModuleType) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with patch("fakepeer"):
        assert torch.equal(torch.rand(3), expected)


def test_unknown_and_absent_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="choose one of torchvision, detectron2, mmcv"):
        patch("tensorflow")
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError):
        patch("mmcv")


def test_repr(peer: types.ModuleType) -> None:
    with patch("fakepeer") as handle:
        assert isinstance(handle, Patch)
        assert repr(handle) == "<Patch of fakepeer: 2 symbols swapped, 3 not>"
