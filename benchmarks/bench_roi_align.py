"""Multi-level RoIAlign against the reference, ``torch.compile`` of it, and torchvision where installed.

    pytest benchmarks/bench_roi_align.py                          time everything
    pytest benchmarks/bench_roi_align.py --benchmark-disable      run each once: the correctness gate alone
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_roi_align.py   small inputs

Every provider's result (and gradient) is compared with the C++ or Triton kernel's before it is timed. torchvision
selects and scatters the regions of each level, as its ``MultiScaleRoIAlign`` does; it has no bfloat16 on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from benchmarks.cases import HEIGHT, SMALL, WIDTH
from fastrcnn_kernels import assign_levels, multiscale_roi_align
from fastrcnn_kernels import roi_align_reference as reference

PROVIDERS = ["reference", "compiled", "cpp", "triton", "torchvision"]
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


def torchvision_call(case: Case, features: list[Tensor], rois: Tensor, levels: Tensor) -> Callable[[], Tensor]:
    """What torchvision's MultiScaleRoIAlign does, with our levels: select, pool and scatter level by level."""
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    if case.dtype == torch.bfloat16:
        pytest.skip("torchvision has no bfloat16 kernel")

    def call() -> Tensor:
        out = features[0].new_zeros(case.rois, case.channels, case.size, case.size)
        for level, scale in enumerate(SCALES):
            index = torch.where(levels == level)[0]
            out[index] = ops.roi_align(features[level], rois[index], case.size, scale, case.ratio)
        return out

    return call


def provider_call(
    provider: str, case: Case, features: list[Tensor], rois: Tensor, levels: Tensor
) -> Callable[[], Tensor]:
    """A call without arguments, or a skip with the reason."""
    if provider == "torchvision":
        return torchvision_call(case, features, rois, levels)
    if provider == "compiled":
        if case.ratio <= 0:
            pytest.skip("with an adaptive grid the reference walks the regions in Python")
        compiled = torch.compile(reference.forward)
        return lambda: compiled(features, rois, levels, SCALES, case.size, case.size, case.ratio, False)
    report = fastrcnn_kernels.backend_report(rois.device)["roi_align"]
    if report[provider] != "available":
        pytest.skip(report[provider])
    if provider == "triton" and rois.device.type == "cpu":
        pytest.skip("Triton's interpreter is for tests, not for timing")
    return lambda: multiscale_roi_align(features, rois, levels, case.size, SCALES, case.ratio)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def bench_roi_align(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    if provider == "compiled" and mode == "both" and not SMALL:
        pytest.skip("the gradient of the compiled reference keeps every pixel gathered: several gigabytes")
    features, rois, levels, grad = case.inputs(device)
    call = provider_call(provider, case, features, rois, levels)

    def run(pooled: Callable[[], Tensor]) -> list[Tensor]:
        if mode == "forward":
            with torch.no_grad():
                return [pooled()]
        out = pooled()
        return [out.detach(), *torch.autograd.grad(out, features, grad)]

    backend = provider if provider in fastrcnn_kernels.backend_report(device)["roi_align"] else "auto"
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    truth = run(lambda: multiscale_roi_align(features, rois, levels, case.size, SCALES, case.ratio))
    with fastrcnn_kernels.set_backend(backend):
        for ours, theirs in zip(truth, run(call), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)
        del truth
        pooled = case.rois * case.channels * case.size**2
        pixels = sum(f.numel() for f in features)
        benchmark.group = f"{case.label}-{mode}"
        benchmark.extra_info.update(
            shape=[list(f.shape) for f in features],
            rois=case.rois,
            dtype=str(case.dtype),
            # Pooled regions out; backward, their gradient in and the gradient of every pixel out. Features read once.
            bytes=case.dtype.itemsize * (pixels + pooled + (pixels + pooled if mode == "both" else 0)),
            device=str(device),
        )
        if provider in ("reference", "compiled"):
            benchmark.pedantic(lambda: run(call), rounds=3, iterations=1)
        else:
            benchmark(lambda: run(call))
