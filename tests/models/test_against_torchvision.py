"""Bodies and pyramid against torchvision's with the same weights; skipped where torchvision is not installed."""

from __future__ import annotations

import pytest
import torch

from fastrcnn.models.fpn import FPN
from fastrcnn.models.layers import frozen_batch_norm_factory
from fastrcnn.models.resnet import ResNet

torchvision = pytest.importorskip("torchvision")


def ours_from_theirs(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision keeps the stem at the top, and its norms count batches."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        renamed[f"stem.{name}" if name.startswith(("conv1.", "bn1.")) else name] = value
    return renamed


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_resnet(depth):
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval().double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1)
    # eps 1e-5 is torchvision's; basic blocks have 64 channels in stage 2
    ours = ResNet(depth, norm=frozen_batch_norm_factory(1e-5), stride_in_1x1=False).eval().double()
    ours.load_state_dict(ours_from_theirs(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found = ours(x)
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage, features in zip(("layer1", "layer2", "layer3", "layer4"), found, strict=True):
            expected = getattr(theirs, stage)(expected)
            torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


def test_fpn():
    ops = torchvision.ops
    channels = [8, 16, 32, 64]
    pool = ops.feature_pyramid_network.LastLevelMaxPool()
    theirs = ops.FeaturePyramidNetwork(channels, 12, extra_blocks=pool).double()
    ours = FPN(channels, 12).double()
    state = {}
    for level in range(1, 5):
        for part in ("weight", "bias"):
            state[f"fpn_inner{level}.{part}"] = theirs.inner_blocks[level - 1][0].state_dict()[part]
            state[f"fpn_layer{level}.{part}"] = theirs.layer_blocks[level - 1][0].state_dict()[part]
    ours.load_state_dict(state)
    features = [torch.randn(2, c, 64 // 2**i, 96 // 2**i, dtype=torch.float64) for i, c in enumerate(channels)]
    with torch.no_grad():
        expected = list(theirs({str(i): f for i, f in enumerate(features)}).values())
        found = ours(features)
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
