"""The regions of a training step: appending, gathering and levels against the reference and its compiled form.

pytest benchmarks/bench_regions.py                          time everything
pytest benchmarks/bench_regions.py --benchmark-disable      run each once: the correctness gate alone
FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_regions.py   small inputs

torchvision does the same one image at a time, with indices whose number it reads from the device: there is no function
of its own to compare with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import SMALL, Call, assert_equal, measure, provider_call
from fastrcnn_kernels import append_boxes, assign_levels, gather_regions, regions

PROVIDERS = ["reference", "compiled", "cpp", "triton"]
# Images, proposals of each, ground truths, sampled, of which positive.
CASES = [(2, 100, 5, 32, 8)] if SMALL else [(2, 1000, 20, 512, 128), (16, 1000, 20, 512, 128)]


def make(case: tuple[int, ...], device: torch.device) -> dict[str, tuple[Any, ...]]:
    """The arguments of each operator."""
    images, room, gt, slots, most = case
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(images, room + gt, 2, generator=random) * 800
    boxes = torch.cat([corner, corner + torch.rand(images, room + gt, 2, generator=random) * 400], dim=2).to(device)
    count = torch.full((images,), room * 9 // 10, device=device)
    gt_count = torch.full((images,), gt, device=device)
    positive = torch.full((images,), most * 2 // 3, device=device)
    sampled = torch.full((images,), slots, device=device)
    indices = torch.randint(0, room + gt, (images, slots), generator=random).to(device)
    matched = torch.randint(0, gt, (images, room + gt), generator=random).to(device)
    labels = torch.randint(1, 81, (images, gt), generator=random).to(device)
    scores = torch.rand(images, room, generator=random).to(device)
    gt_boxes = boxes[:, room:].contiguous()
    return {
        "append_boxes": (boxes[:, :room].contiguous(), scores, count, gt_boxes, gt_count),
        "gather_regions": (boxes, gt_boxes, labels, matched, indices, positive, sampled, most, -100),
        "assign_levels": (boxes.flatten(0, 1), 2, 5, 224.0, 4, 1e-6, 0.0, 1),
    }


def public(operator: str, arguments: tuple[Any, ...]) -> Any:
    if operator == "append_boxes":
        return append_boxes(*arguments)
    if operator == "gather_regions":
        return gather_regions(*arguments[:7], most_positives=arguments[7], ignore_label=arguments[8])
    return assign_levels(arguments[0], box_offset=arguments[7])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
@pytest.mark.parametrize("operator", ["append_boxes", "gather_regions", "assign_levels"])
def bench_regions(benchmark: Any, device: torch.device, operator: str, case: tuple[int, ...], provider: str) -> None:
    arguments = make(case, device)[operator]
    reference = getattr(regions, f"{operator}_reference")
    others: dict[str, Call] = {}
    if provider == "compiled":
        compiled = torch.compile(reference)
        others["compiled"] = lambda: compiled(*arguments)
    read = sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))
    measure(
        benchmark,
        provider_call(provider, operator, device, ours=lambda: public(operator, arguments), **others),
        truth=lambda: reference(*arguments),
        equal=assert_equal,
        group=f"{operator}-{'x'.join(map(str, case))}",
        provider=provider,
        device=device,
        bytes=read,
        shape="x".join(map(str, case)),
    )
