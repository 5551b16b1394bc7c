"""rpn_loss against scalar loops, rpn_head_loss against dense autograd through the convolutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import rpn_head_loss, rpn_head_outputs, rpn_loss, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place, assert_within_twice_torch

# A program for each slot and tap of the scatter.
pytestmark = pytest.mark.interpreter_budget(128)

OPS = torch.ops.fastrcnn_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES, STRIDES = [(5, 6), (3, 3), (1, 2)], [4, 8, 16]
ANCHORS, CHANNELS, HIDDEN, GTS = 3, 4, 5, 3
TOTAL = ANCHORS * sum(h * w for h, w in SIZES)

Sample = dict[str, Tensor]
# name: slots of two images (anchor numbers over all levels, -1 empty), positives of each
SAMPLES: dict[str, tuple[list[list[int]], list[int]]] = {
    "mixed": ([[7, 30, 100, 64, 93], [55, 12, 119, 89, -1]], [2, 1]),
    "no-positives": ([[7, 30, 100], [1, 2, 3]], [0, 0]),
    "all-positive": ([[7, 30, 100], [95, 2, 118]], [3, 3]),
    "one-position": ([[45, 46, 47, 48], [44, 46, 45, 47]], [1, 4]),
    "corners": ([[0, 15, 75, 89, 90, 116, 117, 120], [17, 72, 98, 110, 122, 119, 88, 1]], [4, 4]),
    "neighbours": ([[21, 24, 27, 39, 42, 45], [91, 94, 97, 100, 103, 106]], [3, 6]),
    "empty-slots": ([[-1, -1], [-1, -1]], [0, 0]),
    "one-image-empty": ([[-1, -1], [5, 9]], [0, 1]),
    "no-slots": ([[], []], [0, 0]),
    "one": ([[33], [118]], [1, 0]),
}


def make_sample(name: str, device: str = "cpu") -> Sample:
    random = torch.Generator().manual_seed(len(name))
    slots, positives = SAMPLES[name]
    indices = torch.tensor(slots, dtype=torch.int64).view(2, -1)
    corner = torch.rand(2, GTS, 2, generator=random) * 20
    sample = {
        "indices": indices,
        "num_positive": torch.tensor(positives),
        "num_sampled": (indices >= 0).sum(1),
        "matched_idxs": torch.randint(-2, GTS, (2, TOTAL), generator=random),
        "gt_boxes": torch.cat([corner, corner + 3 + torch.rand(2, GTS, 2, generator=random) * 20], 2),
    }
    return {key: value.to(device) for key, value in sample.items()}


def make_cells(device: str = "cpu") -> list[Tensor]:
    # Whole and half pixels: sums with strides are exact in every type.
    base = torch.tensor([[-6.0, -3, 9, 6], [-4, -4, 7, 7], [-2.5, -6, 5.5, 9]])
    return [(base * (level + 1)).to(device) for level in range(len(SIZES))]


def make_maps(dtype: torch.dtype, channels_last: bool, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tuple(
        [
            torch.randn(2, count, h, w, generator=random, dtype=torch.float64)
            .to(dtype)
            .contiguous(memory_format=layout)
            for h, w in SIZES
        ]
        for count in (ANCHORS, 4 * ANCHORS)
    )  # type: ignore[return-value]


def oracle(
    objectness: list[Tensor], deltas: list[Tensor], sample: Sample, beta: float, offset: int, norm: float | None
) -> list[Tensor]:
    """Both losses and the dense gradients of their sum, by scalar loops in float64."""
    grads = [torch.zeros_like(m, dtype=torch.float64) for m in (*objectness, *deltas)]
    total = [0.0, 0.0]
    norm = norm or max(1, int(sample["num_sampled"].sum()))
    for n in range(2):
        for b, index in enumerate(sample["indices"][n].tolist()):
            if index < 0 or b >= sample["num_sampled"][n]:
                continue
            level, local = 0, index
            while local >= ANCHORS * SIZES[level][0] * SIZES[level][1]:
                local -= ANCHORS * SIZES[level][0] * SIZES[level][1]
                level += 1
            a, x, y = local % ANCHORS, local // ANCHORS % SIZES[level][1], local // ANCHORS // SIZES[level][1]
            positive = b < int(sample["num_positive"][n])
            z = objectness[level][n, a, y, x].item()
            total[0] += max(z, 0) - z * positive + math.log1p(math.exp(-abs(z)))
            grads[level][n, a, y, x] = (1 / (1 + math.exp(-z)) - positive) / norm
            if not positive:
                continue
            cell = make_cells()[level][a].tolist()
            s = STRIDES[level]
            ax1, ay1, ax2, ay2 = cell[0] + s * x, cell[1] + s * y, cell[2] + s * x, cell[3] + s * y
            gx1, gy1, gx2, gy2 = sample["gt_boxes"][n, sample["matched_idxs"][n, index].clamp(min=0)].tolist()
            aw, ah, gw, gh = ax2 - ax1 + offset, ay2 - ay1 + offset, gx2 - gx1 + offset, gy2 - gy1 + offset
            wanted = [
                (gx1 + gw / 2 - ax1 - aw / 2) / aw,
                (gy1 + gh / 2 - ay1 - ah / 2) / ah,
                math.log(gw / aw),
                math.log(gh / ah),
            ]
            for i in range(4):
                d = deltas[level][n, 4 * a + i, y, x].item() - wanted[i]
                total[1] += 0.5 * d * d / beta if abs(d) < beta else abs(d) - beta / 2
                slope = d / beta if abs(d) < beta else math.copysign(1.0, d)
                grads[len(SIZES) + level][n, 4 * a + i, y, x] = slope / norm
    return [torch.tensor(value / norm, dtype=torch.float64) for value in total] + grads


def run(
    maps: tuple[list[Tensor], list[Tensor]], sample: Sample, listed: bool, beta: float, offset: int, norm: float | None
) -> list[Tensor]:
    device = sample["indices"].device
    leaves = [[m.clone().to(device).requires_grad_() for m in group] for group in maps]
    cells = make_cells(str(device))
    where: dict[str, object] = {"cells": cells, "strides": STRIDES}
    if listed:
        shifts = [
            torch.tensor([[x * s, y * s] * 2 for y in range(h) for x in range(w)], dtype=torch.float32, device=device)
            for (h, w), s in zip(SIZES, STRIDES, strict=True)
        ]
        where = {"anchors": torch.cat([(s[:, None] + c).flatten(0, 1) for s, c in zip(shifts, cells, strict=True)])}
    normaliser = None if norm is None else torch.tensor(norm, device=device)
    losses = rpn_loss(*leaves, **sample, **where, beta=beta, box_offset=offset, normaliser=normaliser)
    flat = [leaf for group in leaves for leaf in group]
    return [loss.detach() for loss in losses] + list(torch.autograd.grad(sum(losses), flat))


@pytest.mark.parametrize("name", SAMPLES)
def test_losses_and_dense_gradients(place: Place, name: str) -> None:
    index = list(SAMPLES).index(name)
    interpreted = place == Place("triton", "cpu")
    for number, dtype in enumerate(DTYPES):
        if interpreted and number != index % 4:
            continue
        channels_last, listed, offset = bool((index + number) % 2), bool(index % 3 == 0), index % 2
        beta, norm = [(1 / 9, None), (1.0, 512.0), (0.0, None)][index % 3]
        maps = make_maps(dtype, channels_last)
        expected = oracle(*maps, make_sample(name), beta, offset, norm)
        actual = run(maps, make_sample(name, place.device), listed, beta, offset, norm)
        with set_backend("reference"):
            plain = run(maps, make_sample(name), listed, beta, offset, norm)
        for i, (ours, truth, theirs) in enumerate(zip(actual, expected, plain, strict=True)):
            scale = truth.abs().max().item()
            atol = scale * {torch.float64: 1e-13, torch.float32: 2e-6}.get(ours.dtype, 2**-8)
            assert_within_twice_torch(ours, truth, theirs, atol, f"{dtype}, result {i}")
            if i > 1:
                assert torch.equal(ours.cpu() != 0, truth != 0)
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert ours.is_contiguous(memory_format=layout)


Head = tuple[list[Tensor], list[Tensor]]


def make_head(dtype: torch.dtype, channels_last: bool, device: str) -> Head:
    """Features of each level, and weight and bias of the three convolutions (float32 beside half types)."""
    random = torch.Generator().manual_seed(9)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [torch.randn(2, CHANNELS, h, w, generator=random, dtype=torch.float64) for h, w in SIZES]
    shapes = [(HIDDEN, CHANNELS, 3, 3), (HIDDEN,), (ANCHORS, HIDDEN, 1, 1), (ANCHORS,), (4 * ANCHORS, HIDDEN, 1, 1),
              (4 * ANCHORS,)]  # fmt: skip
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [torch.randn(shape, generator=random, dtype=torch.float64).to(device, kind) for shape in shapes]
    return [f.to(device, dtype).contiguous(memory_format=layout).requires_grad_() for f in features], [
        p.requires_grad_() for p in parameters
    ]


def head_gradients(head: Head, sample: Sample, sparse: bool, scales: tuple[float, float] = (1.0, 2.0)) -> list[Tensor]:
    features, parameters = head
    dtype = features[0].dtype
    rules = {"cells": make_cells(str(features[0].device)), "strides": STRIDES, "box_offset": 1}
    if sparse:
        with torch.no_grad():
            maps = rpn_head_outputs(features, *(p.to(dtype) for p in parameters))
        losses = rpn_head_loss(features, *parameters, *maps, **sample, **rules)
    else:
        maps = rpn_head_outputs(features, *(p.to(dtype) for p in parameters))
        losses = rpn_loss(*maps, **sample, **rules)
    total = scales[0] * losses[0] + scales[1] * losses[1]
    return [loss.detach() for loss in losses] + list(torch.autograd.grad(total, [*features, *parameters]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", SAMPLES)
def test_sparse_equals_dense(place: Place, name: str, channels_last: bool) -> None:
    """Losses, and gradients of all levels' features and of all parameters, in float64."""
    if place == Place("triton", "cpu") and name not in ("mixed", "one-position", "empty-slots"):
        pytest.skip("the interpreter takes the cases that differ in kind")
    head, sample = make_head(torch.float64, channels_last, place.device), make_sample(name, place.device)
    with set_backend("reference"):
        dense = head_gradients(head, sample, sparse=False)
    sparse = head_gradients(head, sample, sparse=True)
    for i, (a, b) in enumerate(zip(sparse, dense, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=lambda text, i=i: f"result {i}: {text}")
        assert a.shape == b.shape
    if (sample["num_sampled"] > 0).any():
        assert all(g.any() for g in sparse[-6:-4])  # the convolution's
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(g.is_contiguous(memory_format=layout) for g in sparse[2:5])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sparse_gradient_in_narrow_types(place: Place, dtype: torch.dtype) -> None:
    interpreted = place == Place("triton", "cpu")
    for channels_last in (dtype == torch.float16,) if interpreted else (False, True):
        sample = make_sample("one" if interpreted else "neighbours", place.device)
        exact = make_head(torch.float64, channels_last, place.device)
        rounded = [f.detach().to(dtype) for f in exact[0]]
        head = [f.clone().requires_grad_() for f in rounded], make_head(dtype, channels_last, place.device)[1]
        truth = [f.double().requires_grad_() for f in rounded], [p.detach().double().requires_grad_() for p in head[1]]
        with set_backend("reference"):
            expected = head_gradients(truth, sample, sparse=False)
            plain = head_gradients(head, sample, sparse=False)
        actual = head_gradients(head, sample, sparse=True)
        for i, (ours, reference, theirs) in enumerate(zip(actual, expected, plain, strict=True)):
            eps = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
            assert_within_twice_torch(ours, reference, theirs, reference.abs().max().item() * eps, f"result {i}")


def test_same_bits_every_time(place: Place) -> None:
    """Rows that share pixels are added in the order of the slots, whatever the number of threads."""
    if place == Place("reference", "cuda"):
        pytest.skip("the reference adds with atomics on CUDA")
    indices = make_sample("neighbours", place.device)["indices"]
    random = torch.Generator().manual_seed(4)
    rows = torch.randn(indices.numel(), 9 * CHANNELS, generator=random).to(place.device)
    sizes = [extent for size in SIZES for extent in size]
    results, threads = [], torch.get_num_threads()
    for number in (1, 2, 2):
        try:
            torch.set_num_threads(number)
            results.append(OPS.rpn_scatter_patches(rows, indices, sizes, ANCHORS, False))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unused_outputs_do_not_matter(place: Place) -> None:
    """NaN and infinities at anchors that are not sampled, and in the boxes of negatives, leave no trace."""
    sample = make_sample("mixed", place.device)
    maps = make_maps(torch.float32, False)
    clean = run(maps, sample, False, 1 / 9, 1, None)
    spoilt = tuple([m.clone() for m in group] for group in maps)
    used = oracle(*maps, make_sample("mixed"), 1 / 9, 1, None)[2:]
    for m, grad in zip([*spoilt[0], *spoilt[1]], used, strict=True):
        m[grad == 0] = math.nan
    results = run(spoilt, sample, False, 1 / 9, 1, None)
    for a, b in zip(results, clean, strict=True):
        assert torch.equal(a, b)


def test_a_nan_that_is_sampled_shows(place: Place) -> None:
    sample = make_sample("mixed", place.device)
    objectness, deltas = make_maps(torch.float32, False)
    objectness[0][0, 1, 0, 2] = math.nan  # anchor 7
    loss, box, *_ = run((objectness, deltas), sample, False, 1 / 9, 1, None)
    assert loss.isnan()
    assert box.isfinite()


def test_no_ground_truth(place: Place) -> None:
    sample = make_sample("no-positives", place.device)
    sample["gt_boxes"] = sample["gt_boxes"][:, :0]
    results = run(make_maps(torch.float32, False), sample, False, 1 / 9, 1, None)
    assert results[0] > 0
    assert results[1] == 0
    assert all(r.isfinite().all() for r in results)


def test_gradcheck(place: Place) -> None:
    if place == Place("triton", "cpu"):
        pytest.skip("held against dense gradients above: numerical derivatives take the interpreter minutes")
    sample = make_sample("one-position", place.device)
    rules = {"cells": make_cells(place.device), "strides": STRIDES, "beta": 1.0}
    maps = [m.to(place.device).requires_grad_() for group in make_maps(torch.float64, True) for m in group]

    def loss(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return rpn_loss(leaves[:3], leaves[3:], **sample, **rules)

    assert torch.autograd.gradcheck(loss, maps, fast_mode=True)


def test_strided_maps(place: Place) -> None:
    """Outputs that are slices of one tensor, as a fused head makes them."""
    sample = make_sample("mixed", place.device)
    maps = make_maps(torch.float32, False)
    expected = run(maps, sample, False, 1 / 9, 1, None)
    wide = [torch.cat([d, o], 1).to(place.device) for o, d in zip(*maps, strict=True)]
    losses = rpn_loss(
        [w[:, 4 * ANCHORS :] for w in wide], [w[:, : 4 * ANCHORS] for w in wide], **sample,
        cells=make_cells(place.device), strides=STRIDES, beta=1 / 9, box_offset=1,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected[:2]))


def test_guarded_buffers(place: Place, guarded: Guards) -> None:
    """Inputs between canaries, outputs poisoned and between canaries (autouse): kernels write only what is theirs."""
    sample = {key: guarded(value) for key, value in make_sample("one", place.device).items()}
    features, parameters = make_head(torch.float32, False, place.device)
    head = [guarded(f) for f in features], [guarded(p) for p in parameters]
    for sparse in (True, False):
        assert all(r.isfinite().all() for r in head_gradients(head, sample, sparse))


def test_no_host_sync() -> None:
    head, sample = make_head(torch.float32, True, "cpu"), make_sample("mixed")
    for backend in ("reference", "cpp"):
        for sparse in (True, False):
            with set_backend(backend), ForbidSync():
                head_gradients(head, sample, sparse)


@pytest.mark.parametrize("name", ["rpn_loss", "rpn_head_loss", "parts"])
def test_opcheck(name: str) -> None:
    """Registration is one for all back-ends: looked at with the one in force."""
    sample = make_sample("one")
    features, parameters = make_head(torch.float32, False, "cpu")
    rest = (torch.stack(make_cells()), STRIDES, *sample.values(), torch.tensor(2.0), 1 / 9, 1)
    maps = make_maps(torch.float32, False)
    if name == "rpn_loss":
        leaves = [[m.clone().requires_grad_() for m in group] for group in maps]
        torch.library.opcheck(OPS.rpn_loss.default, (*leaves, *rest))
    elif name == "rpn_head_loss":
        torch.library.opcheck(OPS.rpn_head_loss.default, (features, *parameters, *maps, *rest))
    else:
        sizes, indices = [extent for size in SIZES for extent in size], sample["indices"]
        plain = [f.detach() for f in features]
        patches = OPS.rpn_patches(plain, indices, ANCHORS, False)
        slopes = (torch.ones(2), torch.randn(2, 1, 5), indices, sizes, ANCHORS, True, torch.bfloat16)
        for operator, arguments in (
            (OPS.rpn_patches, (plain, indices, ANCHORS, False)),
            (OPS.rpn_scatter_patches, (patches, indices, sizes, ANCHORS, False)),
            (OPS.rpn_loss_backward, slopes),
        ):
            torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks() -> None:
    sample = make_sample("mixed")
    features, parameters = make_head(torch.float32, False, "cpu")
    rules = {"cells": make_cells(), "strides": STRIDES}

    def step(*leaves: Tensor) -> Tensor:
        maps = rpn_head_outputs([f.detach() for f in leaves[:3]], *(p.detach() for p in leaves[3:]))
        return sum(rpn_head_loss(leaves[:3], *leaves[3:], *maps, **sample, **rules))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [*features, *parameters]
    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments() -> None:
    sample = make_sample("mixed")
    maps = make_maps(torch.float32, False)
    rules = {"cells": make_cells(), "strides": STRIDES}
    for change, message in (
        ({"indices": sample["indices"].int()}, "indices must be"),
        ({"num_positive": sample["num_positive"].float()}, "num_positive must be"),
        ({"matched_idxs": sample["matched_idxs"][:, 1:]}, "matched_idxs must be"),
        ({"gt_boxes": sample["gt_boxes"][0]}, "gt_boxes must be"),
        ({"anchors": torch.zeros(TOTAL, 4)}, "either anchors, or cells"),
        ({"cells": None, "anchors": torch.zeros(3, 4)}, "anchors must be"),
        ({"strides": STRIDES[1:]}, "cells and strides"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"normaliser": torch.ones(2)}, "normaliser must have one"),
    ):
        with pytest.raises(ValueError, match=message):
            rpn_loss(*maps, **{**sample, **rules, **change})
    with pytest.raises(ValueError, match="deltas must be"):
        rpn_loss(maps[0], maps[0], **sample, **rules)
    features, parameters = make_head(torch.float32, False, "cpu")
    with pytest.raises(ValueError, match="conv_bias must be"):
        rpn_head_loss(features, parameters[0], parameters[1][1:], *parameters[2:], *maps, **sample, **rules)
    with pytest.raises(ValueError, match="do not fit objectness"):
        rpn_head_loss(features[::-1], *parameters, *maps, **sample, **rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("images", "slots", "anchors"), [(2, 5, 3), (1, 70, 1), (3, 4, 15), (2, 0, 3)])
def test_output_gradients_equal_loops(device: torch.device, dtype: torch.dtype, images: int, slots: int,
                                      anchors: int) -> None:  # fmt: skip
    """Each slot's five numbers in the columns of its anchor; nothing in those of others, and nothing of empty slots."""
    random = torch.Generator().manual_seed(0)
    slopes = torch.randn(images, slots, 5, generator=random).to(dtype)
    grad = torch.tensor([1.5, -0.5], dtype=dtype)
    indices = torch.randint(-1, 50, (images, slots), generator=random)
    expected = torch.zeros(images * slots, 5 * anchors, dtype=dtype)
    for row, index in enumerate(indices.flatten().tolist()):
        if index >= 0:
            five = slopes.flatten(0, 1)[row]
            expected[row, index % anchors] = five[0] * grad[0]
            first = anchors + 4 * (index % anchors)
            expected[row, first : first + 4] = five[1:] * grad[1]
    operator = torch.ops.fastrcnn_kernels.rpn_output_gradients.default
    found = operator(slopes.to(device), grad.to(device), indices.to(device), anchors)
    assert torch.equal(found.cpu(), expected)


def test_output_gradients_opcheck() -> None:
    operator = torch.ops.fastrcnn_kernels.rpn_output_gradients.default
    torch.library.opcheck(operator, (torch.randn(2, 4, 5), torch.ones(2), torch.arange(8).view(2, 4) - 1, 3))
