"""The sampler against published Philox vectors, Triton's generator, a scalar re-implementation and statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrcnn_kernels import image_seeds, sample_balanced, sampler
from fastrcnn_kernels.sampler import philox4x32, random_keys
from tests.kernels.helpers import ForbidSync
from tests.kernels.nosync import forbid_host_sync

# kat_vectors of Random123 (Salmon et al.): rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
COLLISION = (922, 489, 1599)  # a seed and two entries, the lower first
SEEDS = torch.tensor([0, 1, -1, 0x123456789ABCDEF, -(2**63)])


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_sample(labels: list[int], size: int, fraction: float, seed: int) -> tuple[list[int], int, int]:
    """Sort all entries by (key, index) and take the first of each kind."""
    key = [seed % 2**32, (seed >> 32) % 2**32]
    order = sorted(range(len(labels)), key=lambda i: (scalar_philox([i // 4, 0, 0, 0], key)[i % 4], i))
    positives = [i for i in order if labels[i] >= 1][: int(size * fraction)]
    negatives = [i for i in order if labels[i] == 0][: size - len(positives)]
    drawn = positives + negatives
    return drawn + [-1] * (size - len(drawn)), len(positives), len(drawn)


Sample = Callable[..., tuple[torch.Tensor, ...]]


@pytest.fixture
def sample(device: torch.device) -> Sample:
    """``sample_balanced`` by each back-end: tensors go to its device and the results come back."""

    def on_device(
        labels: torch.Tensor, size: int, fraction: float, seeds: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, ...]:
        drawn = sample_balanced(labels.to(device), size, fraction, seeds.to(device), **arguments)
        assert all(tensor.device.type == device.type for tensor in drawn)
        return tuple(tensor.cpu() for tensor in drawn)

    return on_device


def random_labels(*shape: int, positive: float = 0.2, ignored: float = 0.3, seed: int = 0) -> torch.Tensor:
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return (u < positive).long() - (u > 1 - ignored).long()


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds: int, counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    k0, k1 = words(key)
    actual = philox4x32((c0, c1, c2, c3), (k0, k1), rounds=rounds)
    assert [int(word) for word in actual] == words(expected)
    assert scalar_philox(words(counter), words(key), rounds) == words(expected)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001])
def test_random_keys_equal_loops(count: int) -> None:
    expected = [
        [scalar_philox([i // 4, 0, 0, 0], [s % 2**32, (s >> 32) % 2**32])[i % 4] for i in range(count)]
        for s in SEEDS.tolist()
    ]
    assert random_keys(SEEDS, count).tolist() == expected


def test_random_keys_equal_triton() -> None:
    """``tl.randint4x(seed, i // 4)``: what a Triton twin of the sampler will call."""
    pytest.importorskip("triton")
    from tests.kernels.philox_triton import randint4x

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in SEEDS.tolist():
        actual = randint4x(seed, 64, device).cpu().long() & 0xFFFFFFFF
        assert torch.equal(actual.flatten(), random_keys(torch.tensor([seed]), 256)[0])


def test_image_seeds_depend_on_everything() -> None:
    ids = torch.tensor([0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**40, -1])
    seen: set[int] = set()
    cases = list(itertools.product((0, 1, 2**32, -5), (0, 1, 77), (0, 1)))
    for seed, step, stream in cases:
        seen |= set(image_seeds(seed, step, ids, stream).tolist())
    assert len(seen) == len(cases) * len(ids)


def test_image_seeds_accept_tensors() -> None:
    ids = torch.tensor([5, 9])
    for seed, step in ((3, 70_000), (-3, 0), (2**62, 1)):
        expected = image_seeds(seed, step, ids, 1)
        assert expected.dtype == torch.int64
        assert torch.equal(image_seeds(torch.tensor(seed), torch.tensor(step), ids, 1), expected)
        assert torch.equal(image_seeds(seed, torch.tensor(step), ids, 1), expected)


def test_image_seeds_mix() -> None:
    """Each changed bit of an argument changes half of the 64 bits of the seed (5 sigma over 256 images)."""
    ids = torch.arange(256)
    base = image_seeds(1234, 56, ids, 0)
    changed = [image_seeds(1234 ^ (1 << b), 56, ids, 0) for b in range(63)]
    changed += [image_seeds(1234, 56 ^ (1 << b), ids, 0) for b in range(32)]
    changed += [image_seeds(1234, 56, ids ^ (1 << b), 0) for b in range(63)]
    changed += [image_seeds(1234, 56, ids, 1 << b) for b in range(31)]
    for other in changed:
        difference = (base ^ other).unsqueeze(1) >> torch.arange(64) & 1
        assert abs(difference.double().mean().item() - 0.5) < 5 * 0.5 / (256 * 64) ** 0.5


@pytest.mark.parametrize(
    ("size", "fraction"), [(16, 0.5), (16, 0.25), (7, 0.5), (1, 0.5), (40, 1.0), (40, 0.0), (0, 0.5)]
)
@pytest.mark.parametrize("count", [1, 3, 41, 200])
def test_equals_loops(sample: Sample, count: int, size: int, fraction: float) -> None:
    labels = random_labels(len(SEEDS), count)
    indices, num_pos, num_sampled = sample(labels, size, fraction, SEEDS)
    assert indices.shape == (len(SEEDS), size)
    assert indices.dtype == num_pos.dtype == num_sampled.dtype == torch.int64
    for n, seed in enumerate(SEEDS.tolist()):
        expected = scalar_sample(labels[n].tolist(), size, fraction, seed)
        assert (indices[n].tolist(), int(num_pos[n]), int(num_sampled[n])) == expected


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        pytest.param(500, 5000, (128, 128), id="plenty"),
        pytest.param(10, 5000, (10, 246), id="few positives"),
        pytest.param(500, 50, (128, 50), id="few negatives: positives do not fill up"),
        pytest.param(0, 5000, (0, 256), id="no positives"),
        pytest.param(500, 0, (128, 0), id="no negatives"),
        pytest.param(0, 0, (0, 0), id="all ignored"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_counts(sample: Sample, positives: int, negatives: int, expected: tuple[int, int], dtype: torch.dtype) -> None:
    labels = torch.full((1, 6000), -1, dtype=dtype)
    labels[0, :positives] = 1
    labels[0, positives : positives + negatives] = 0
    indices, num_pos, num_sampled = sample(labels, 256, 0.5, torch.tensor([7]))
    assert (num_pos.item(), num_sampled.item() - num_pos.item()) == expected
    drawn = indices[0, : num_sampled.item()]
    assert labels[0, drawn].tolist() == [1] * expected[0] + [0] * expected[1]
    assert len(set(drawn.tolist())) == len(drawn), "without replacement"
    assert (indices[0, num_sampled.item() :] == -1).all()


def test_class_labels_are_positives(sample: Sample) -> None:
    labels = random_labels(2, 100)
    classes = torch.where(labels > 0, torch.arange(100) % 80 + 1, labels)
    for a, b in zip(sample(classes, 20, 0.5, SEEDS[:2]), sample(labels, 20, 0.5, SEEDS[:2]), strict=True):
        assert torch.equal(a, b)


def test_padding_does_not_change_the_draw(sample: Sample) -> None:
    labels = random_labels(2, 101)
    expected = sample(labels, 20, 0.5, SEEDS[:2])
    for extra in (1, 2, 3, 500):
        padded = torch.nn.functional.pad(labels, (0, extra), value=-1)
        for a, b in zip(sample(padded, 20, 0.5, SEEDS[:2]), expected, strict=True):
            assert torch.equal(a, b)


def test_other_images_do_not_change_the_draw(sample: Sample) -> None:
    labels = random_labels(5, 101)
    together = sample(labels, 20, 0.5, SEEDS)
    order = torch.tensor([3, 0, 4])
    for a, b in zip(sample(labels[order], 20, 0.5, SEEDS[order]), together, strict=True):
        assert torch.equal(a, b[order])


def test_equal_keys_go_to_the_lower_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "random_keys", lambda seeds, count: torch.full((len(seeds), count), 2**32 - 1))
    labels = torch.tensor([[0, 1, -1, 1, 0, 1, 0, 0]])
    indices, _, _ = sampler.sample_balanced_reference(labels, torch.tensor([0]), 5, 2, 1)
    assert indices.tolist() == [[1, 3, 0, 4, 6]]


def test_a_collision_goes_to_the_lower_index(sample: Sample) -> None:
    """Two entries of one seed have the same 32-bit key: both orders of equal keys would be seen."""
    seed, count = torch.tensor([COLLISION[0]]), COLLISION[2] + 1
    keys = random_keys(seed, count)[0]
    assert keys[COLLISION[1]] == keys[COLLISION[2]]
    for positive in (True, False):
        labels = torch.full((1, count), -1)
        labels[0, list(COLLISION[1:])] = 1 if positive else 0
        indices, num_pos, _ = sample(labels, 3, 1.0, seed)
        assert indices.tolist() == [[COLLISION[1], COLLISION[2], -1]]
        assert num_pos.item() == 2 * positive
        assert sample(labels, 1, 1.0, seed)[0].item() == COLLISION[1]


@pytest.mark.parametrize("margin", [-16.0, 1e6])
def test_what_the_triton_kernel_gathers_does_not_show(
    sample: Sample, backend: str, monkeypatch: pytest.MonkeyPatch, margin: float
) -> None:
    """Too few or too many entries gathered: the draw is then found by bisection."""
    if backend == "triton":
        from fastrcnn_kernels.triton import sampler as launcher

        monkeypatch.setattr(launcher, "_MARGIN", margin)
        monkeypatch.setattr(launcher, "_SLACK", 0.0)
    labels = random_labels(1, 1500, positive=0.005, ignored=0.1)
    expected = scalar_sample(labels[0].tolist(), 6, 0.5, 7)
    assert sample(labels, 6, 0.5, torch.tensor([7]))[0][0].tolist() == expected[0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool])
def test_types_of_labels(sample: Sample, dtype: torch.dtype) -> None:
    labels = random_labels(2, 90).clamp(min=0 if dtype in (torch.uint8, torch.bool) else -1)
    expected = sampler.sample_balanced_reference(labels, SEEDS[:2], 20, 10, 1)
    for a, b in zip(sample(labels.to(dtype), 20, 0.5, SEEDS[:2]), expected, strict=True):
        assert torch.equal(a, b)


def test_first_positive(sample: Sample) -> None:
    """What a matcher gives is drawn from as it is; large labels do not wrap."""
    labels = random_labels(2, 90)
    labels[0, 5] = 2**32
    labels[1, 7] = -(2**32)
    expected = sampler.sample_balanced_reference(labels, SEEDS[:2], 20, 10, 1)
    for a, b in zip(sample(labels - 1, 20, 0.5, SEEDS[:2], first_positive=0), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(sample(labels.to(torch.int8), 20, 0.5, SEEDS[:2], first_positive=300), [-1, 0, 0], strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_long_rows(threads: int) -> None:
    labels = random_labels(3, 70_001, positive=0.001, ignored=0.6)
    expected = sampler.sample_balanced_reference(labels, SEEDS[:3], 256, 128, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(sample_balanced(labels, 256, 0.5, SEEDS[:3]), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 33])
def test_image_seeds_equal_loops(device: torch.device, count: int) -> None:
    ids = torch.cat([torch.tensor([-1, 2**40 + 3]), torch.arange(count)])[:count]
    for seed, step, stream in ((0, 0, 0), (-5, 2**31 + 1, 7), (2**63 + 9, -1, 2**31)):
        key = [seed % 2**32, (seed >> 32) % 2**32]
        expected = []
        for i in ids.tolist():
            low, high, _, _ = scalar_philox([i % 2**32, (i >> 32) % 2**32, step % 2**32, stream % 2**32], key)
            value = low | high << 32
            expected.append(value - 2**64 if value >= 2**63 else value)
        assert image_seeds(seed, step, ids.to(device), stream).tolist() == expected


def test_opcheck(device: torch.device) -> None:
    labels, seeds = random_labels(2, 50).to(device), SEEDS[:2].to(device)
    torch.library.opcheck(torch.ops.fastrcnn_kernels.sample_balanced.default, (labels, seeds, 16, 8, 1))
    step = torch.tensor(3, device=device)
    torch.library.opcheck(torch.ops.fastrcnn_kernels.image_seeds.default, (seeds, step, step, 1))


def test_non_contiguous(sample: Sample) -> None:
    labels = random_labels(5, 101)
    strided = labels.T.contiguous().T
    for a, b in zip(sample(strided, 20, 0.5, SEEDS), sample(labels, 20, 0.5, SEEDS), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "a"), [(0, 10), (3, 0), (0, 0)])
def test_empty(sample: Sample, n: int, a: int) -> None:
    labels, seeds = torch.zeros(n, a, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    indices, num_pos, num_sampled = sample(labels, 8, 0.5, seeds)
    assert indices.shape == (n, 8)
    assert (indices == -1).all() if a == 0 else True
    assert num_pos.tolist() == num_sampled.tolist() == [0] * n
    assert image_seeds(0, 0, seeds, 0).shape == (n,)


Draw = Callable[[torch.Tensor], torch.Tensor]


def draw_three_of_six(seeds: torch.Tensor) -> torch.Tensor:
    """Six positives among other entries, three drawn: [N, 3] numbers from 0 to 5."""
    labels = torch.full((1, 20), -1)
    places = torch.tensor([0, 3, 4, 9, 13, 19])
    labels[0, places] = 1
    indices, _, _ = sample_balanced(labels.expand(len(seeds), 20), 3, 1.0, seeds)
    return torch.searchsorted(places, indices)


def chi_square(drawn: torch.Tensor) -> tuple[float, float]:
    """Of the 20 subsets (19 degrees of freedom) and of the 6 first ones drawn (5)."""
    subsets = torch.tensor(list(itertools.combinations(range(6), 3)))
    code = (subsets * torch.tensor([36, 6, 1])).sum(1)
    found = torch.searchsorted(code, (drawn.sort(dim=1).values * torch.tensor([36, 6, 1])).sum(1))
    result = []
    for values, kinds in ((found, 20), (drawn[:, 0], 6)):
        expected = len(drawn) / kinds
        observed = torch.bincount(values.clamp(max=kinds - 1), minlength=kinds)
        result.append(((observed - expected) ** 2 / expected).sum().item())
    return result[0], result[1]


# Upper 1e-4 quantiles of chi-square with 19 and 5 degrees of freedom.
LIMITS = (50.8, 25.7)


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(lambda n: torch.arange(n), id="seeds in a row"),
        pytest.param(lambda n: image_seeds(1, 2, torch.arange(n), 0), id="images"),
        pytest.param(
            lambda n: torch.cat([image_seeds(1, s, torch.tensor([4]), 0) for s in range(n // 10)]), id="steps"
        ),
        pytest.param(lambda n: torch.arange(n) << 32, id="high words in a row"),
    ],
)
def test_every_subset_is_equally_likely(seeds: Callable[[int], torch.Tensor]) -> None:
    subsets, firsts = chi_square(draw_three_of_six(seeds(20_000)))
    assert subsets < LIMITS[0]
    assert firsts < LIMITS[1]


def test_two_streams_are_independent() -> None:
    """How many of three drawn by one stream the other draws too: hypergeometric, 1 9 9 1 of 20."""
    ids = torch.arange(20_000)
    first, second = (draw_three_of_six(image_seeds(1, 2, ids, stream)) for stream in (0, 1))
    common = (first.unsqueeze(2) == second.unsqueeze(1)).sum((1, 2))
    expected = torch.tensor([1.0, 9.0, 9.0, 1.0]) / 20 * len(ids)
    observed = torch.bincount(common, minlength=4)
    assert ((observed - expected) ** 2 / expected).sum().item() < 21.1  # 1e-4 quantile, 3 degrees of freedom


def test_draw_from_many_is_uniform() -> None:
    """256 of 200,000 entries: 100 equal stretches are hit alike, over 8 images (99 degrees of freedom)."""
    labels = torch.zeros(8, 200_000, dtype=torch.int8)
    indices, _, _ = sample_balanced(labels, 256, 0.5, torch.arange(8))
    observed = torch.bincount(indices.flatten() // 2000, minlength=100)
    expected = 8 * 256 / 100
    assert ((observed - expected) ** 2 / expected).sum().item() < 160


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda seeds: torch.arange(3).expand(len(seeds), 3), id="always the first three"),
        pytest.param(lambda seeds: draw_three_of_six(seeds).sort(dim=1).values, id="in order of the index"),
        pytest.param(lambda seeds: draw_three_of_six(seeds % 50), id="few seeds"),
        pytest.param(lambda seeds: (seeds.unsqueeze(1) + torch.arange(3)) % 6, id="a window"),
        pytest.param(
            lambda seeds: draw_three_of_six(torch.where(seeds % 20 == 0, 0, seeds)), id="one draw in twenty repeated"
        ),
    ],
)
def test_the_statistics_reject(wrong: Draw) -> None:
    subsets, firsts = chi_square(wrong(torch.arange(20_000)))
    assert subsets > LIMITS[0] or firsts > LIMITS[1]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda labels, size: sample_balanced(labels, size, 0.51, SEEDS), id="fraction"),
        pytest.param(lambda labels, size: sample_balanced(labels, size, 0.5, SEEDS + 1), id="seed"),
        pytest.param(lambda labels, size: sample_balanced(labels.clamp(min=0), size, 0.5, SEEDS), id="ignored drawn"),
        pytest.param(lambda labels, size: sample_balanced(labels.flip(1), size, 0.5, SEEDS), id="reversed"),
    ],
)
def test_the_oracle_rejects(wrong: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]) -> None:
    labels = random_labels(len(SEEDS), 800)
    expected = [scalar_sample(row, 100, 0.5, seed) for row, seed in zip(labels.tolist(), SEEDS.tolist(), strict=True)]
    assert wrong(labels, 100)[0].tolist() != [indices for indices, _, _ in expected]


def test_no_host_sync(device: torch.device, backend: str) -> None:
    if backend == "cpp":
        pytest.skip("the C++ kernels read CPU memory")
    inputs = random_labels(2, 100), torch.tensor([4, 5]), torch.tensor(3)
    labels, ids, step = (tensor.to(device) for tensor in inputs)
    with ForbidSync(), forbid_host_sync(allow_constants=False):
        seeds = image_seeds(1, step, ids, 0)
        sample_balanced(labels, 16, 0.5, seeds)


@pytest.mark.slow
def test_compile_fullgraph(device: torch.device) -> None:
    def draw(labels: torch.Tensor, step: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sample_balanced(labels, 16, 0.5, image_seeds(1, step, ids, 0))

    labels, ids = random_labels(2, 101).to(device), torch.tensor([4, 5], device=device)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for number in (3, 4):
        step = torch.tensor(number, device=device)
        for actual, expected in zip(compiled(labels, step, ids), draw(labels, step, ids), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_balanced(torch.zeros(5), 4, 0.5, torch.zeros(1)), r"integers of the shape \[N, A\], got"),
        (lambda: sample_balanced(torch.zeros(2, 5).long(), 4, 0.5, SEEDS[:1]), r"seeds must .* \[2\], got \[1\]"),
        (lambda: sample_balanced(torch.zeros(1, 5).long(), 4, 1.5, SEEDS[:1]), "positive_fraction .* got 4 and 1.5"),
        (lambda: sample_balanced(torch.zeros(1, 5).long(), -1, 0.5, SEEDS[:1]), "batch_size_per_image .* got -1"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("first_positive", [0, 1])
@pytest.mark.parametrize("counts", [[0, 1, 40, 41, 200], [200] * 5, [0] * 5])
def test_entries_behind_the_count_are_not_drawn(sample: Sample, device: torch.device, counts: list[int],
                                                first_positive: int) -> None:  # fmt: skip
    """As if they were ignored: the same draw as from labels that say so."""
    labels = random_labels(len(SEEDS), 200)
    count = torch.tensor(counts)
    ignored = torch.where(torch.arange(200) < count[:, None], labels, -5)
    expected = sample(ignored, 16, 0.5, SEEDS, first_positive=first_positive)
    found = sample(labels, 16, 0.5, SEEDS, first_positive=first_positive, count=count.to(device))
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert ((found[0] < count[:, None]) | (found[0] < 0)).all()


def test_a_count_of_another_shape_or_type() -> None:
    labels = random_labels(2, 9)
    for count in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"count must be int64 \[2\]"):
            sample_balanced(labels, 4, 0.5, SEEDS[:2], count=count)
