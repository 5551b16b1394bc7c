"""nms, batched_nms and nms_padded against the reference, ``torch.compile`` of it, and torchvision where installed.

pytest benchmarks/bench_nms.py                          time everything
pytest benchmarks/bench_nms.py --benchmark-disable      run each once: the correctness gate alone
FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_nms.py   small inputs
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from benchmarks.cases import NMS_CASES, NmsCase, random_boxes
from benchmarks.harness import PROVIDERS, Call, assert_equal, measure, provider_call, torchvision
from fastrcnn_kernels.nms import batched_nms_reference, nms_padded_reference, nms_reference

REFERENCES = {"nms": nms_reference, "batched_nms": batched_nms_reference, "nms_padded": nms_padded_reference}


def make_inputs(case: NmsCase, device: torch.device) -> tuple[Any, ...]:
    """The positional arguments of the public function."""
    if case.function == "nms_padded":
        rows = [random_boxes(case.boxes, case.layout, seed, device) for seed in range(case.groups)]
        boxes, scores = (torch.stack(column) for column in zip(*rows, strict=True))
        return boxes, scores, case.threshold, case.max_output
    boxes, scores = random_boxes(case.boxes, case.layout, 0, device)
    if case.function == "nms":
        return boxes, scores, case.threshold
    return boxes, scores, torch.arange(case.boxes, device=device) % case.groups, case.threshold


def torchvision_call(case: NmsCase, inputs: tuple[Any, ...]) -> Call:
    """The same result with torchvision: one call a segment and a padded copy for ``nms_padded``."""
    if case.function != "nms_padded":
        return lambda: getattr(torchvision().ops, case.function)(*inputs)
    boxes, scores, threshold, max_output = inputs

    def padded() -> tuple[Tensor, Tensor]:
        keep = torch.full((boxes.shape[0], max_output), -1, device=boxes.device)
        count = torch.empty(boxes.shape[0], dtype=torch.int64, device=boxes.device)
        for segment in range(boxes.shape[0]):
            kept = torchvision().ops.nms(boxes[segment], scores[segment], threshold)[:max_output]
            keep[segment, : kept.numel()] = kept
            count[segment] = kept.numel()
        return keep, count

    return padded


def compiled_call(case: NmsCase, inputs: tuple[Any, ...]) -> Call:
    compiled = torch.compile(REFERENCES[case.function])

    def call() -> Any:
        if case.boxes > 256 and case.function == "nms_padded":
            pytest.skip("the reference walks every row in Python: its graph of thousands of steps takes minutes")
        return compiled(*inputs, 0)

    return call


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", NMS_CASES, ids=lambda case: case.label)
def bench_nms(benchmark: Any, device: torch.device, case: NmsCase, provider: str) -> None:
    inputs = make_inputs(case, device)
    function = getattr(fastrcnn_kernels, case.function)
    total = case.boxes * (case.groups if case.function == "nms_padded" else 1)
    measure(
        benchmark,
        provider_call(
            provider,
            case.function,
            device,
            ours=lambda: function(*inputs),
            compiled=compiled_call(case, inputs),
            torchvision=torchvision_call(case, inputs),
        ),
        truth=lambda: function(*inputs),
        equal=assert_equal,
        group=case.label,
        provider=provider,
        device=device,
        # Boxes, scores and groups in, indices out.
        bytes=total * (16 + 4 + (8 if case.function == "batched_nms" else 0)) + 8 * total,
        shape=list(inputs[0].shape),
        dtype=str(inputs[0].dtype),
        threshold=case.threshold,
    )
