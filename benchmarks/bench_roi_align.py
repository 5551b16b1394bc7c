"""Multi-level RoIAlign against the reference, ``torch.compile`` of it, and torchvision where installed.

    pytest benchmarks/bench_roi_align.py                          time everything
    pytest benchmarks/bench_roi_align.py --benchmark-disable      run each once: the correctness gate alone
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_roi_align.py   small inputs

torchvision selects and scatters the regions of each level, as its ``MultiScaleRoIAlign`` does; it has no bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import HEIGHT, SMALL, WIDTH
from benchmarks.harness import PROVIDERS, Call, assert_close, measure, provider_call, torchvision
from fastrcnn_kernels import assign_levels, multiscale_roi_align
from fastrcnn_kernels import roi_align_reference as reference

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@dataclass(frozen=True)
class Case:
    """Regions of a pyramid of a batch of 800 x 1333 images, padded to a multiple of 32."""

    images: int
    channels: int
    rois: int
    size: int
    ratio: int
    dtype: torch.dtype
    channels_last: bool

    @property
    def label(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        maps = f"N{self.images}-C{self.channels}-K{self.rois}"
        return f"roi_align-{maps}-{self.size}x{self.size}-r{self.ratio}-{dtype}-{layout}"

    def inputs(self, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Features, rois, levels and an upstream gradient. Sides are log-normal about 80 pixels, as in COCO."""
        random = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        height, width = (-(-extent // 32) * 32 for extent in (HEIGHT, WIDTH))
        features = [
            torch.randn(self.images, self.channels, height >> i, width >> i, generator=random)
            .to(device, self.dtype)
            .contiguous(memory_format=layout)
            .requires_grad_()
            for i in range(2, 6)
        ]
        side = torch.exp(torch.randn(self.rois, 1, generator=random) + 4.4).clamp(8, 900)
        stretch = torch.exp(torch.randn(self.rois, 1, generator=random) * 0.2)
        extent = torch.tensor([WIDTH, HEIGHT])
        centre = torch.rand(self.rois, 2, generator=random) * extent
        half = torch.cat([side * stretch, side / stretch], 1) / 2
        boxes = torch.cat([(centre - half).clamp(min=0), torch.minimum(centre + half, extent - 1.0)], 1)
        image = torch.arange(self.rois) * self.images // max(1, self.rois)
        rois = torch.cat([image[:, None].float(), boxes], 1).to(device)
        shape = (self.rois, self.channels, self.size, self.size)
        grad = torch.randn(shape, generator=random).to(device, self.dtype).contiguous(memory_format=layout)
        return features, rois, assign_levels(rois[:, 1:]), grad


CASES = (
    [Case(1, 8, 16, 7, 2, torch.float32, False), Case(1, 8, 16, 7, 0, torch.float32, True)]
    if SMALL
    else [
        Case(2, 256, 1024, 7, 2, torch.float32, False),
        Case(2, 256, 1024, 7, 2, torch.float32, True),
        Case(2, 256, 256, 14, 2, torch.float32, False),
        Case(2, 256, 1024, 7, 2, torch.bfloat16, True),
        Case(2, 256, 256, 14, 2, torch.bfloat16, True),
        Case(2, 256, 1024, 7, 0, torch.float32, False),
    ]
)


def torchvision_call(case: Case, features: list[Tensor], rois: Tensor, levels: Tensor) -> Call:
    """What torchvision's MultiScaleRoIAlign does, with our levels: select, pool and scatter level by level."""

    def call() -> Tensor:
        if case.dtype == torch.bfloat16:
            pytest.skip("torchvision has no bfloat16 kernel")
        out = features[0].new_zeros(case.rois, case.channels, case.size, case.size)
        for level, scale in enumerate(SCALES):
            index = torch.where(levels == level)[0]
            out[index] = torchvision().ops.roi_align(features[level], rois[index], case.size, scale, case.ratio)
        return out

    return call


def compiled_call(case: Case, features: list[Tensor], rois: Tensor, levels: Tensor, mode: str) -> Call:
    compiled = torch.compile(reference.forward)

    def call() -> Tensor:
        if case.ratio <= 0:
            pytest.skip("with an adaptive grid the reference walks the regions in Python")
        if mode == "both" and not SMALL:
            pytest.skip("the gradient of the compiled reference keeps every pixel gathered: several gigabytes")
        return compiled(features, rois, levels, SCALES, case.size, case.size, case.ratio, False)

    return call


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def bench_roi_align(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    features, rois, levels, grad = case.inputs(device)

    def run(pooled: Call) -> Call:
        def call() -> list[Tensor]:
            if mode == "forward":
                with torch.no_grad():
                    return [pooled()]
            out = pooled()
            return [out.detach(), *torch.autograd.grad(out, features, grad)]

        return call

    ours = run(lambda: multiscale_roi_align(features, rois, levels, case.size, SCALES, case.ratio))
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    pooled = case.rois * case.channels * case.size**2
    pixels = sum(f.numel() for f in features)
    measure(
        benchmark,
        provider_call(
            provider,
            ("roi_align", "roi_align_backward"),
            device,
            ours=ours,
            compiled=run(compiled_call(case, features, rois, levels, mode)),
            torchvision=run(torchvision_call(case, features, rois, levels)),
        ),
        truth=ours,
        equal=assert_close(tolerance, tolerance),
        group=f"{case.label}-{mode}",
        provider=provider,
        device=device,
        # Pooled regions out; backward, their gradient in and the gradient of every pixel out. Features read once.
        bytes=case.dtype.itemsize * (pixels + pooled + (pixels + pooled if mode == "both" else 0)),
        # Four taps a sample, a product and a sum each; backward the same again.
        flops=8 * pooled * max(1, case.ratio) ** 2 * (2 if mode == "both" else 1),
        target=("torchvision", 4) if case.dtype == torch.float32 else None,
        shape=[list(f.shape) for f in features],
        rois=case.rois,
        dtype=str(case.dtype),
    )
