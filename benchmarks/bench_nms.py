"""nms, batched_nms and nms_padded against the reference, ``torch.compile`` of it, and torchvision where installed.

    pytest benchmarks/bench_nms.py                          time everything
    pytest benchmarks/bench_nms.py --benchmark-disable      run each once: the correctness gate alone
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_nms.py   small inputs

Every provider's result is compared with the C++ or Triton kernel's before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrcnn_kernels
from benchmarks.cases import NMS_CASES, NmsCase, random_boxes
from fastrcnn_kernels.nms import batched_nms_reference, nms_padded_reference, nms_reference

REFERENCES = {"nms": nms_reference, "batched_nms": batched_nms_reference, "nms_padded": nms_padded_reference}
PROVIDERS = ["reference", "compiled", "cpp", "triton", "torchvision"]


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


def torchvision_call(case: NmsCase, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """The same result with torchvision: one call a segment and a padded copy for ``nms_padded``."""
    ops = pytest.importorskip("torchvision", reason="torchvision is not installed").ops
    if case.function != "nms_padded":
        return lambda: getattr(ops, case.function)(*inputs)
    boxes, scores, threshold, max_output = inputs

    def padded() -> tuple[Tensor, Tensor]:
        keep = torch.full((boxes.shape[0], max_output), -1, device=boxes.device)
        count = torch.empty(boxes.shape[0], dtype=torch.int64, device=boxes.device)
        for segment in range(boxes.shape[0]):
            kept = ops.nms(boxes[segment], scores[segment], threshold)[:max_output]
            keep[segment, : kept.numel()] = kept
            count[segment] = kept.numel()
        return keep, count

    return padded


def provider_call(provider: str, case: NmsCase, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """A call without arguments, or a skip with the reason."""
    if provider == "torchvision":
        return torchvision_call(case, inputs)
    if provider == "compiled":
        if case.boxes > 256 and case.function == "nms_padded":
            pytest.skip(
                "the reference walks every row in Python: a graph of thousands of steps takes minutes to compile"
            )
        compiled = torch.compile(REFERENCES[case.function])
        return lambda: compiled(*inputs, 0)
    report = fastrcnn_kernels.backend_report(inputs[0].device)[case.function]
    if report[provider] != "available":
        pytest.skip(report[provider])
    if provider == "triton" and inputs[0].device.type == "cpu":
        pytest.skip("Triton's interpreter is for tests, not for timing")
    function = getattr(fastrcnn_kernels, case.function)

    def call() -> Any:
        with fastrcnn_kernels.set_backend(provider):
            return function(*inputs)

    return call


def assert_same(ours: Any, theirs: Any) -> None:
    """The gate: integers, so equal or wrong."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for a, b in pairs:
        assert torch.equal(a, b), "the provider's result is not the kernel's: nothing to time"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", NMS_CASES, ids=lambda case: case.label)
def bench_nms(benchmark: Any, device: torch.device, case: NmsCase, provider: str) -> None:
    inputs = make_inputs(case, device)
    call = provider_call(provider, case, inputs)
    assert_same(call(), getattr(fastrcnn_kernels, case.function)(*inputs))
    total = case.boxes * (case.groups if case.function == "nms_padded" else 1)
    benchmark.group = case.label
    benchmark.extra_info.update(
        shape=list(inputs[0].shape),
        dtype=str(inputs[0].dtype),
        threshold=case.threshold,
        # Boxes, scores and groups in, indices out: what no implementation can do without.
        bytes=total * (16 + 4 + (8 if case.function == "batched_nms" else 0)) + 8 * total,
        device=str(device),
    )
    if provider in ("reference", "compiled"):
        benchmark.pedantic(call, rounds=3, iterations=1)
    else:
        benchmark(call)
