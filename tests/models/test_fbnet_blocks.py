"""The blocks of FBNet and its batch normalisation against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrcnn.models.batch_norm import BatchNorm2d
from fastrcnn.models.fbnet_archs import Block
from fastrcnn.models.fbnet_blocks import BLOCK_KINDS, BlockStyle, InvertedResidual, side_behind

# name: (kernel sizes of the depthwise convolutions, expansion, groups, squeeze and excitation)
KINDS = {
    "ir_k1": ([], 4, 1, False),
    "ir_k5": ([5], 4, 1, False),
    "ir_k7_e3": ([7], 3, 1, False),
    "shuffle": ([3], 4, 4, False),
    "ir_k3_s2": ([3], 1, 2, False),
    "ir_k5_s4_se": ([5], 4, 4, True),
    "ir_k3_e6_se": ([3], 6, 1, True),
    "ir_k33_e3": ([3, 3], 3, 1, False),
    "ir_k7_sep": ([7, 7], 4, 1, False),
}


def normed(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Batch statistics, biased; weight and bias of the norm where there is one."""
    if f"{name}.bn.weight" not in state:
        return x
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    scale, shift = state[f"{name}.bn.weight"][:, None, None], state[f"{name}.bn.bias"][:, None, None]
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


@pytest.mark.parametrize("stride", [1, 2, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compute_what_they_are_called_after(kind, stride):
    torch.manual_seed(0)
    kernels, expansion, groups, squeeze = KINDS[kind]
    style = BlockStyle(norm=BatchNorm2d, width_divisor=8, depthwise_norm=False, depthwise_relu=False)
    block = InvertedResidual(16, Block(kind, 4, 16, stride), style).double()
    for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    state = block.state_dict()
    x = torch.randn(3, 16, 6, 5, dtype=torch.float64)

    out = normed(state, "pw", F.conv2d(x, state["pw.conv.weight"], groups=groups)).relu()
    assert out.shape[1] == 16 * expansion
    if groups > 1:
        # channel c of group g goes to place c * groups + g
        out = torch.stack(out.chunk(groups, dim=1), dim=2).flatten(1, 2)
    if stride < 0:
        out = out.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for number, kernel in enumerate(kernels, start=1):
        name = "dw" if len(kernels) == 1 else f"dw.dw{number}"
        step = max(stride, 1) if number == 1 else 1
        weight = state[f"{name}.conv.weight"]
        assert tuple(weight.shape) == (16 * expansion, 1, kernel, kernel)
        out = F.conv2d(out, weight, stride=step, padding=kernel // 2, groups=len(weight))
        if number < len(kernels):  # the last one has neither norm nor ReLU here
            out = normed(state, name, out).relu()
    out = normed(state, "pwl", F.conv2d(out, state["pwl.conv.weight"], groups=groups))
    if stride == 1:
        out = out + x
    if squeeze:
        weights = out.mean((2, 3))
        weights = (weights @ state["se4.op.1.weight"][:, :, 0, 0].T + state["se4.op.1.bias"]).relu()
        weights = (weights @ state["se4.op.3.weight"][:, :, 0, 0].T + state["se4.op.3.bias"]).sigmoid()
        out = out * weights[:, :, None, None]
    torch.testing.assert_close(block(x), out, rtol=1e-9, atol=1e-9)
    assert side_behind([(0, 0, Block(kind, 4, 16, stride))], 6) == out.shape[2]


def test_every_kind_of_upstream_is_there():
    """All the names of its table of primitives, but the three that its builder cannot build."""
    assert len(BLOCK_KINDS) == 36
    for kind in BLOCK_KINDS:
        block = InvertedResidual(16, Block(kind, 4, 32, 1), BlockStyle(norm=BatchNorm2d))
        assert tuple(block(torch.randn(2, 16, 7, 7)).shape) == (2, 32, 7, 7)


@pytest.mark.parametrize(
    ("width", "divisor", "expected"),
    [(33, 1, 33), (32, 8, 32), (33.9, 8, 32), (36, 8, 40), (35, 8, 32), (11, 8, 8), (12, 8, 16), (3, 8, 64)],
)
def test_widths_are_multiples_of_the_divisor(width, divisor, expected):
    """Halves go up; what would round to nothing becomes the divisor squared, which is upstream's slip."""
    assert BlockStyle(norm=BatchNorm2d, width_divisor=divisor).width(width) == expected


def test_blocks_refuse_what_they_cannot_do():
    style = BlockStyle(norm=BatchNorm2d)
    with pytest.raises(ValueError, match="stride 3 is none of"):
        InvertedResidual(16, Block("ir_k3", 4, 16, 3), style)
    with pytest.raises(ValueError, match="cannot divide 18 channels into 4"):
        InvertedResidual(18, Block("ir_k3_s4", 4, 16, 1), style)


def test_rectangular_enlargement():
    block = InvertedResidual(8, Block("ir_k3", 1, 8, (-2, -1)), BlockStyle(norm=BatchNorm2d))
    assert tuple(block(torch.randn(2, 8, 3, 5)).shape) == (2, 8, 6, 5)


# --- batch normalisation ---------------------------------------------------------------------------------------------


def pair() -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    ours, theirs = BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_statistics_are_those_of_the_real_rows():
    torch.manual_seed(0)
    ours, theirs = pair()
    for real in ([0, 2, 3], [1], [0, 1, 2, 3, 4]):
        values = torch.randn(5, 4, 3, 2, dtype=torch.float64) * 3 + 1
        x, alone = values.clone().requires_grad_(), values[real].clone().requires_grad_()
        valid = torch.zeros(5, dtype=torch.bool)
        valid[real] = True
        out, expected = ours(x, valid), theirs(alone)
        torch.testing.assert_close(out[real], expected)
        assert out.isfinite().all()
        weights = torch.randn_like(expected)
        (out[real] * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad[real], alone.grad)
        assert not x.grad[~valid].any()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_without_a_real_row_nothing_moves():
    ours, _ = pair()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for x, valid in [(torch.ones(2, 4, 3, 3), torch.zeros(2, dtype=torch.bool)), (torch.ones(0, 4, 3, 3), None)]:
        out = ours(x.double(), valid)
        assert out.isfinite().all()
        out.sum().backward()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluation_uses_the_running_statistics():
    ours, theirs = pair()
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    ours(x)
    theirs(x)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x, torch.tensor([True, False, False])), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_in_float32(dtype):
    norm = BatchNorm2d(4)
    x = torch.randn(6, 4, 5, 5) + 10
    out = norm(x.to(dtype), torch.ones(6, dtype=torch.bool))
    assert out.dtype == dtype
    torch.testing.assert_close(norm.running_mean, 0.1 * x.to(dtype).float().mean((0, 2, 3)))
