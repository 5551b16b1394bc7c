"""sample_balanced against the reference, its compiled form, and torchvision's BalancedPositiveNegativeSampler.

pytest benchmarks/bench_sampler.py                          time everything
pytest benchmarks/bench_sampler.py --benchmark-disable      run each once: the correctness gate alone
FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_sampler.py   small inputs

torchvision draws from torch's generator, so its sample is another one of the same law: that its counts and kinds are
right is all there is to compare. Ours are equal, index for index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import PROVIDERS, SMALL, Call, assert_equal, measure, provider_call, torchvision
from fastrcnn_kernels import sample_balanced
from fastrcnn_kernels.sampler import sample_balanced_reference


@dataclass(frozen=True)
class Case:
    """One draw of ``size`` out of ``entries`` in each of ``images``.

    Attributes:
        fraction: largest fraction of positives drawn.
        positives: in each image; as many again, and one in a hundred, are ignored.
    """

    images: int
    entries: int
    size: int
    fraction: float
    positives: int

    def __str__(self) -> str:
        return f"{self.images}x{self.entries}-{self.size}-of-{self.positives}"


CASES = (
    [Case(2, 3000, 64, 0.5, 20), Case(2, 3000, 64, 0.5, 200), Case(2, 40, 64, 0.5, 5)]
    if SMALL
    else [
        Case(2, 268_569, 256, 0.5, 80),  # an RPN: all positives are drawn
        Case(2, 268_569, 256, 0.5, 5000),
        Case(2, 2020, 512, 0.25, 300),  # a box head
        Case(16, 268_569, 256, 0.5, 80),
        Case(2, 4_000_000, 256, 0.5, 1000),
    ]
)


def make_labels(case: Case, device: torch.device) -> Tensor:
    """1 positive, 0 negative, -1 ignored, in random places. int64 [images, entries]"""
    random = torch.Generator().manual_seed(0)
    labels = torch.zeros(case.images, case.entries, dtype=torch.int64)
    ignored = case.positives + case.entries // 100
    for row in labels:
        places = torch.randperm(case.entries, generator=random)
        row[places[: case.positives]] = 1
        row[places[case.positives : case.positives + ignored]] = -1
    return labels.to(device)


def assert_same_law(labels: Tensor) -> Any:
    """The check of a peer's sample, positives and negatives as indices into all labels: kinds, counts, none twice."""
    flat, entries = labels.flatten(), labels.shape[1]

    def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
        _indices, num_pos, num_sampled = expected
        wanted = (num_pos, num_sampled - num_pos)
        for drawn, label, count in zip(found, (1, 0), wanted, strict=True):
            assert (flat[drawn] == label).all(), "an entry of another kind was drawn"
            assert drawn.unique().numel() == drawn.numel()
            assert torch.equal((drawn // entries).bincount(minlength=len(labels)), count)

    return check


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_sampler(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    labels = make_labels(case, device)
    seeds = torch.arange(case.images, device=device) * 0x123456789ABCDEF

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return sample_balanced(labels, case.size, case.fraction, seeds)

    others: dict[str, Call] = {}
    if provider == "compiled":
        reference = torch.compile(sample_balanced_reference)
        most_positives = int(case.size * case.fraction)
        others["compiled"] = lambda: reference(labels, seeds, case.size, most_positives, 1)
    if provider == "torchvision":
        utils = torchvision("torchvision.models.detection._utils")
        sampler = utils.BalancedPositiveNegativeSampler(case.size, case.fraction)

        def peer() -> tuple[Tensor, Tensor]:
            # Its masks become indices where the loss is computed, as in its RPN.
            positives, negatives = sampler(list(labels))
            return torch.where(torch.cat(positives))[0], torch.where(torch.cat(negatives))[0]

        others["torchvision"] = peer
    measure(
        benchmark,
        provider_call(provider, "sample_balanced", device, ours=ours, **others),
        truth=ours,
        equal=assert_same_law(labels) if provider == "torchvision" else assert_equal,
        group=f"sampler-{case}",
        provider=provider,
        device=device,
        # Labels in, indices out.
        bytes=8 * case.images * (case.entries + case.size),
        rounds=20 if provider == "torchvision" else None,
        shape=str(case),
    )
