"""The exponential and the logarithm of the box coder: within one unit in the last place, as bits."""

from __future__ import annotations

import math

import torch

from fastrcnn_kernels import (
    decode_boxes,
    encode_boxes,
)

EXPONENTS = [0.0, -0.0, 1e-30, -1e-8, 0.34, 0.35, 1.0, -1.0, 4.1351666, -5.86889, 20.0, -20.0, 88.0, 88.8, 90.0, -87.0]


EXPONENTS += [-88.0, -100.0, -103.9, -104.5, -1000.0, math.inf, -math.inf]


def test_exponential(device: torch.device) -> None:
    """With an anchor of side 1 at the origin and no offset, x2 - x1 is e^dw: within 1 ulp, also below the normals."""
    dw = torch.cat([torch.tensor(EXPONENTS), torch.linspace(-104, 89, 2001)]).to(device)
    deltas = torch.stack([dw * 0, dw * 0, dw, dw * 0], dim=1).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    anchors = torch.tensor([[-1.0, -1.0, 1.0, 1.0]], device=device).expand(len(dw), 4)
    right = decode_boxes(deltas, anchors, clip=math.inf)[:, 2].double()  # e^dw
    truth = dw.double().exp()
    exact = truth.float()
    ulp = torch.maximum(exact.double() * 2.0**-23, torch.full_like(truth, 2.0**-149))
    assert bool(((right - truth).abs() <= ulp)[exact < 1e38].all())
    assert bool(right[exact.isinf()].isinf().all())


def test_logarithm(device: torch.device) -> None:
    """With an anchor of side 1, tw is the logarithm of a width: within 1 ulp, also next to 1 and below the normals."""
    special = [1.0, 0.5, 2.0, 0.70710677, 0.7071068, 1.4142135, 1.4142137, 1e-45, 1e-38, 1.2e-38, 3e38, math.inf, 0.0]
    near = 1 + torch.arange(-60, 60) * 2.0**-23
    widths = torch.cat([torch.tensor([*special, -1.0, math.nan]), near, torch.logspace(-44, 38, 2001)]).to(device)
    boxes = torch.stack([widths * 0, widths * 0, widths, widths * 0 + 1], dim=1).nan_to_num(nan=0.0, posinf=math.inf)
    boxes[:, 2] = widths
    anchors = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    actual = encode_boxes(boxes, anchors)[:, 2].double()
    truth = widths.double().log()
    assert torch.equal(actual.isnan(), truth.isnan())
    finite = truth.isfinite()
    assert torch.equal(actual[~finite & ~truth.isnan()], truth[~finite & ~truth.isnan()])
    assert bool(((actual - truth).abs() <= truth.abs() * 2.0**-23)[finite].all())
