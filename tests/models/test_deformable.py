"""The deformable 3x3 of the residual blocks against loops in float64 that share nothing with the package."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastrcnn.config import ConfigError
from fastrcnn.models.deformable import Deformable, DeformableConv3x3
from fastrcnn.models.layers import frozen_batch_norm_factory
from fastrcnn.models.resnet import make_stage
from tests.kernels.deform_conv_oracle import oracle
from tests.models.inputs import small_model


def layer(deformable: Deformable, **kwargs: int) -> DeformableConv3x3:
    torch.manual_seed(0)
    conv = DeformableConv3x3(8, 4, deformable=deformable, **kwargs).double()
    torch.nn.init.normal_(conv.offset.weight, std=0.2)
    torch.nn.init.normal_(conv.offset.bias, std=0.5)
    return conv


@pytest.mark.parametrize("kwargs", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("deformable", [Deformable(), Deformable(True), Deformable(True, 2)], ids=str)
def test_output_and_gradients_are_those_of_the_loops(deformable, kwargs):
    conv = layer(deformable, **kwargs)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    out = conv(x)
    stride, dilation = kwargs.get("stride", 1), kwargs.get("dilation", 1)
    grad = torch.randn_like(out)
    out.backward(grad)

    seen = x.detach().requires_grad_()
    weight, bias = conv.offset.weight.detach().requires_grad_(), conv.offset.bias.detach().requires_grad_()
    predicted = F.conv2d(seen, weight, bias, stride, dilation, dilation)
    offset, mask = predicted[:, : 18 * deformable.groups], None
    if deformable.modulated:
        mask = predicted[:, 18 * deformable.groups :].sigmoid()
    expected = oracle(x.detach(), offset.detach(), None if mask is None else mask.detach(), conv.conv.weight.detach(),
                      None, grad, (stride,) * 2, (dilation,) * 2, (dilation,) * 2)  # fmt: skip
    torch.testing.assert_close(out, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(conv.conv.weight.grad, expected[3], rtol=1e-9, atol=1e-9)
    # the loops' gradients of offset and mask, on through the plain convolution that predicts them
    predictors = [offset] if mask is None else [offset, mask]
    slopes = [expected[2]] if mask is None else [expected[2], expected[4]]
    torch.autograd.backward(predictors, slopes)
    torch.testing.assert_close(conv.offset.weight.grad, weight.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(x.grad, expected[1] + seen.grad, rtol=1e-8, atol=1e-9)


def test_undisplaced_samples_make_it_a_convolution():
    for deformable, factor in ((Deformable(), 1.0), (Deformable(True), 0.5)):  # sigmoid(0)
        conv = layer(deformable, stride=2)
        torch.nn.init.zeros_(conv.offset.weight)
        torch.nn.init.zeros_(conv.offset.bias)
        x = torch.randn(1, 8, 9, 11, dtype=torch.float64)
        torch.testing.assert_close(conv(x), factor * F.conv2d(x, conv.conv.weight, stride=2, padding=1))


def test_initial_values():
    """Upstream's: both uniform by all input channels, the one that predicts the displacements wider (XavierFill)."""
    torch.manual_seed(0)
    conv = DeformableConv3x3(64, 64, deformable=Deformable(True), groups=4)
    for weight, bound in ((conv.conv.weight, 1 / math.sqrt(64 * 9)), (conv.offset.weight, math.sqrt(3 / (64 * 9)))):
        assert bound * 0.99 < weight.abs().max() <= bound
    assert not conv.offset.bias.any()
    assert conv.conv.bias is None


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="8 channels do not divide into 3 groups"):
        layer(Deformable(groups=3))
    with pytest.raises(ValueError, match="ResNet-18: basic blocks have no deformable"):
        make_stage(18, 2, 8, norm=frozen_batch_norm_factory(), width_per_group=8, deformable=Deformable())
    with pytest.raises(ConfigError, match="STAGE_WITH_DCN"):
        small_model("MODEL.RESNETS.STAGE_WITH_DCN", "(False, True, True, True)")
