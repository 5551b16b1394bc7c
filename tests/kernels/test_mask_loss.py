"""mask_loss and mask_class_logits: against scalar loops, the loss of all classes' logits, and torchvision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrcnn_kernels as fk
from fastrcnn_kernels import mask_class_logits, mask_loss, set_backend
from tests.kernels.helpers import ForbidSync, Guards, Place, assert_within_twice_torch

OPS = torch.ops.fastrcnn_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """Regions, channels, height and width of the features, classes, labels."""

    label: str
    labels: tuple[int, ...]
    channels: int = 5
    size: tuple[int, int] = (4, 4)
    classes: int = 4
    relu: bool = True
    channels_last: bool = False

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(len(self.label))
        regions = len(self.labels)
        hidden = torch.randn(regions, self.channels, *self.size, generator=random, dtype=torch.float64)
        weight = torch.randn(self.classes, self.channels, generator=random, dtype=torch.float64)
        bias = torch.randn(self.classes, generator=random, dtype=torch.float64)
        targets = (torch.rand(regions, *self.size, generator=random) < 0.4).to(torch.uint8)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            hidden.to(dtype).contiguous(memory_format=layout),
            weight.to(parameters),
            bias.to(parameters),
            torch.tensor(self.labels, dtype=torch.int64),
            targets,
        )


CASES = [
    Case("one", (2,)),
    Case("several", (1, 3, 3, 0, 2)),
    Case("absent", (-1, 3, -1, 1)),
    Case("all-absent", (-1, -7)),
    Case("no-regions", ()),
    Case("one-class-all", (2, 2, 2)),
    Case("channels-last", (1, 3, -1, 3), channels_last=True),
    Case("no-relu", (1, 3, -1, 3), relu=False),
    Case("no-relu-channels-last", (1, 3, -1, 3), relu=False, channels_last=True),
    Case("one-channel", (0, 1), channels=1),
    Case("one-pixel", (0, 1), size=(1, 1)),
    Case("odd", (2, 0), channels=7, size=(3, 5)),
    Case("odd-channels-last", (2, 0), channels=33, size=(5, 3), channels_last=True),
    Case("many-channels", (3, 1), channels=70, size=(2, 3)),
    Case("many-pixels", (1,), channels=3, size=(13, 17)),
    Case("many-regions", tuple(i % 5 - 1 for i in range(18)), channels=3, size=(2, 2)),
    Case("c4", (1, 2), channels=6, size=(14, 14)),
]


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor, relu: bool) -> list[Tensor]:
    """Loss (mean over present pixels), logits and gradients by scalar loops in float64."""
    h, w, b = hidden.double(), weight.double(), bias.double()
    regions, channels, height, width = h.shape
    grads = [torch.zeros_like(h), torch.zeros_like(w), torch.zeros_like(b)]
    logits = torch.zeros(regions, height, width, dtype=torch.float64)
    norm = max(1, sum(int(label) >= 0 for label in labels)) * height * width
    total = 0.0
    for k in range(regions):
        label = int(labels[k])
        if label < 0:
            continue
        for y in range(height):
            for x in range(width):
                values = [max(v, 0.0) if relu else v for v in h[k, :, y, x].tolist()]
                z = b[label].item() + sum(a * v for a, v in zip(w[label].tolist(), values, strict=True))
                t = int(targets[k, y, x])
                total += math.log1p(math.exp(-abs(z))) + max(z, 0) - z * t
                g = (1 / (1 + math.exp(-z)) - t) / norm
                logits[k, y, x] = z
                grads[2][label] += g
                for c in range(channels):
                    grads[1][label, c] += g * values[c]
                    grads[0][k, c, y, x] = 0.0 if relu and h[k, c, y, x] <= 0 else g * w[label, c].item()
    return [torch.tensor(total / norm, dtype=torch.float64), logits, *grads]


def run(inputs: tuple[Tensor, ...], relu: bool) -> list[Tensor]:
    hidden, weight, bias, labels, targets = inputs
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = mask_loss(*leaves, labels, targets, relu=relu)
    return [
        loss.detach(),
        mask_class_logits(hidden, weight, bias, labels, relu=relu),
        *torch.autograd.grad(loss, leaves),
    ]


def plain(inputs: tuple[Tensor, ...], relu: bool) -> list[Tensor]:
    """Plain PyTorch, in the features' type: all classes' logits, then a choice, in the weights' type beyond."""
    hidden, weight, bias, labels, targets = inputs
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    h, w, b = leaves[0].relu() if relu else leaves[0], leaves[1].to(hidden.dtype), leaves[2].to(hidden.dtype)
    logits = F.conv2d(h, w[:, :, None, None], b)
    logits = logits[torch.arange(len(labels)), labels.clamp(min=0)].to(weight.dtype)
    logits = torch.where((labels >= 0)[:, None, None], logits, 0)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    present = (labels >= 0)[:, None, None]
    loss = torch.where(present, loss, 0).sum() / (present.sum().clamp(min=1) * hidden.shape[2] * hidden.shape[3])
    return [loss.detach(), logits.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_loss_logits_and_gradients(place: Place, case: Case) -> None:
    index = CASES.index(case)
    interpreted = place == Place("triton", "cpu")
    for dtype in [DTYPES[index % 4]] if interpreted else DTYPES:
        inputs = case.inputs(dtype)
        expected = oracle(*inputs, case.relu)
        actual = run(tuple(t.to(place.device) for t in inputs), case.relu)
        names = ("loss", "logits", "gradient of hidden", "of weight", "of bias")
        for name, ours, truth, theirs in zip(names, actual, expected, plain(inputs, case.relu), strict=True):
            scale = truth.abs().max().item() if truth.numel() else 0.0
            atol = scale * {torch.float64: 1e-14, torch.float32: 5e-7}.get(ours.dtype, 2**-9)
            if dtype == torch.bfloat16 and interpreted:
                atol = scale * 2**-7  # Triton's interpreter truncates where a GPU rounds
            assert_within_twice_torch(ours, truth, theirs.to(ours.dtype), atol, f"{dtype}, {name}")
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        assert actual[2].is_contiguous(memory_format=layout)


def test_hand_computed(place: Place) -> None:
    """Two channels, one pixel: z = 2 * 3 - 1 * 4 + 0.5 = 2.5, the second class untouched."""
    hidden = torch.tensor([3.0, 4.0], device=place.device).view(1, 2, 1, 1).requires_grad_()
    weight = torch.tensor([[9.0, 9.0], [2.0, -1.0]], device=place.device, requires_grad=True)
    bias = torch.tensor([9.0, 0.5], device=place.device, requires_grad=True)
    labels = torch.tensor([1], device=place.device)
    loss = mask_loss(hidden, weight, bias, labels, torch.ones(1, 1, 1, dtype=torch.uint8, device=place.device))
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(-2.5)), rtol=1e-6, atol=0)
    loss.backward()
    slope = 1 / (1 + math.exp(-2.5)) - 1
    torch.testing.assert_close(hidden.grad.flatten().tolist(), [2 * slope, -slope], rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad.tolist(), [[0.0, 0.0], [3 * slope, 4 * slope]], rtol=1e-6, atol=0)
    torch.testing.assert_close(bias.grad.tolist(), [0.0, slope], rtol=1e-6, atol=0)


def test_torchvision(place: Place) -> None:
    """torchvision's maskrcnn_loss on all classes' logits; its mask targets are made of whole-box masks."""
    heads = pytest.importorskip("torchvision.models.detection.roi_heads", reason="torchvision is not installed")
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 6, 8, 8, generator=random)
    weight, bias = torch.randn(4, 6, generator=random), torch.randn(4, generator=random)
    boxes = torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16], [0, 8, 8, 16]])
    canvas = (torch.rand(3, 16, 16, generator=random) < 0.5).to(torch.uint8)
    labels, index = torch.tensor([1, 3, 2]), torch.arange(3)
    logits = F.conv2d(hidden, weight[:, :, None, None], bias)
    theirs = heads.maskrcnn_loss(logits, [boxes], [canvas], [labels], [index])
    targets = heads.project_masks_on_boxes(canvas, boxes, index, 8)
    assert set(targets.unique().tolist()) <= {0.0, 1.0}
    arguments = (hidden, weight, bias, labels, targets.to(torch.uint8))
    ours = mask_loss(*(t.to(place.device) for t in arguments))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)


def test_gradcheck(place: Place) -> None:
    random = torch.Generator().manual_seed(2)
    fast = place == Place("triton", "cpu")
    for layout, relu in ((torch.contiguous_format, True), (torch.channels_last, False)):
        hidden = torch.randn(3, 3, 2, 2, generator=random, dtype=torch.float64).contiguous(memory_format=layout)
        weight, bias = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((3, 3), (3,)))
        labels = torch.tensor([2, -1, 0], device=place.device)
        targets = torch.randint(2, (3, 2, 2), generator=random, dtype=torch.uint8).to(place.device)
        leaves = [t.to(place.device).requires_grad_() for t in (hidden, weight, bias)]

        def loss(h: Tensor, w: Tensor, b: Tensor, labels=labels, targets=targets, relu=relu) -> Tensor:
            return mask_loss(h, w, b, labels, targets, labels.new_tensor(7), relu=relu)

        assert torch.autograd.gradcheck(loss, leaves, fast_mode=fast)


def test_normaliser_and_scaled_gradient(place: Place) -> None:
    inputs = tuple(t.to(place.device) for t in CASES[1].inputs(torch.float64))
    hidden, weight, bias, labels, targets = inputs
    leaf = hidden.clone().requires_grad_()
    mean = mask_loss(leaf, weight, bias, labels, targets)
    for value in (torch.tensor(160), torch.tensor([160.0]), torch.tensor([[160]], dtype=torch.int32)):
        other = mask_loss(leaf, weight, bias, labels, targets, value.to(place.device))
        torch.testing.assert_close(other, mean / 2)  # 5 regions of 16 pixels
    (grad,) = torch.autograd.grad(mean, leaf)
    (scaled,) = torch.autograd.grad(mask_loss(leaf, weight, bias, labels, targets) * 65536.0, leaf)
    torch.testing.assert_close(scaled, grad * 65536.0)


def test_absent_regions_are_not_looked_at(place: Place) -> None:
    """NaN, infinite features and any label below zero: no trace in losses or gradients."""
    hidden, weight, bias, labels, targets = (t.to(place.device) for t in CASES[2].inputs(torch.float32))
    spoilt = hidden.clone()
    spoilt[0], spoilt[2] = math.nan, math.inf
    results = [run((h, weight, bias, labels, targets), True) for h in (hidden, spoilt)]
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)
    assert not results[1][2][0].any()
    assert not results[1][2][2].any()


def test_a_nan_stays_in_its_region(place: Place) -> None:
    for relu in (True, False):
        hidden, weight, bias, labels, targets = (t.to(place.device) for t in CASES[1].inputs(torch.float32))
        spoilt = hidden.clone()
        spoilt[0, 1, 2, 2] = math.nan  # of class 1
        loss, logits, grad_hidden, grad_weight, grad_bias = run((spoilt, weight, bias, labels, targets), relu)
        assert loss.isnan()
        assert logits.isnan().sum() == 1
        assert grad_hidden[1:].isfinite().all()
        assert grad_weight[[0, 2, 3]].isfinite().all()
        assert grad_weight[1].isnan().all()
        assert grad_bias.isnan().tolist() == [False, True, False, False]


def test_large_logits(place: Place) -> None:
    """Logits of hundreds neither overflow nor lose the loss; infinite ones give what PyTorch gives."""
    hidden = torch.tensor([400.0, -400, 30, -30, 0, 1e-6, -math.inf, math.inf]).view(1, 1, 2, 4)
    targets = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.uint8).view(1, 2, 4)
    leaf = hidden.to(place.device).requires_grad_()
    weight, bias = torch.ones(1, 1, device=place.device), torch.zeros(1, device=place.device)
    labels = torch.zeros(1, dtype=torch.int64, device=place.device)
    finite = slice(0, 6)
    loss = mask_loss(leaf[:, :, :1, :4], weight, bias, labels, targets[:, :1, :4].to(place.device))
    truth = F.binary_cross_entropy_with_logits(hidden[0, 0, :1].double(), targets[0, :1].double())
    torch.testing.assert_close(loss.double().cpu(), truth, rtol=1e-6, atol=0)
    logits = mask_class_logits(leaf, weight, bias, labels).flatten()
    assert torch.equal(logits[finite].cpu(), hidden.flatten()[finite])
    (grad,) = torch.autograd.grad(mask_loss(leaf, weight, bias, labels, targets.to(place.device)), leaf)
    slope = (hidden.double().sigmoid() - targets[:, None].double()) / 8
    torch.testing.assert_close(grad.double().cpu(), slope, rtol=1e-5, atol=1e-9)


def test_same_bits_every_time(place: Place) -> None:
    """Any number of threads, many regions of a class: bitwise the same gradient of the weights."""
    if place == Place("reference", "cuda"):
        pytest.skip("the reference adds with atomics on CUDA")
    hidden, weight, bias, labels, targets = (t.to(place.device) for t in CASES[15].inputs(torch.float32))
    results, threads = [], torch.get_num_threads()
    for number in (1, 2, 2):
        try:
            torch.set_num_threads(number)
            results.append(run((hidden, weight, bias, labels, targets), True))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_non_contiguous(place: Place) -> None:
    hidden, weight, bias, labels, targets = (t.to(place.device) for t in CASES[1].inputs(torch.float32))
    expected = run((hidden, weight, bias, labels, targets), True)
    strided = (
        hidden.flip(3).flip(3).transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([weight, weight], dim=2)[:, :, 1],
        torch.stack([bias, bias], dim=1)[:, 0],
        torch.stack([labels, labels], dim=1)[:, 1],
        torch.stack([targets, targets], dim=3)[..., 0],
    )
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(run(strided, True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    four = mask_loss(hidden, weight[:, :, None, None], bias, labels, targets.bool(), relu=True)
    torch.testing.assert_close(four, expected[0])


def test_guarded_buffers(place: Place, guarded: Guards) -> None:
    """Inputs between canaries, outputs poisoned and between canaries (autouse): kernels write only what is theirs."""
    for case in (CASES[11], CASES[12], CASES[4]):
        hidden, weight, bias, labels, targets = (guarded(t.to(place.device)) for t in case.inputs(torch.float32))
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        loss = mask_loss(*leaves, labels, targets, relu=True)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))
        assert loss.isfinite()


def test_no_host_sync() -> None:
    inputs = CASES[1].inputs(torch.float32)
    for backend in ("reference", "cpp"):
        with set_backend(backend), ForbidSync():
            run(inputs, True)


def test_opcheck(place: Place) -> None:
    for case in (CASES[0 if place == Place("triton", "cpu") else 6],):
        hidden, weight, bias, labels, targets = (t.to(place.device) for t in case.inputs(torch.float32))
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        norm = torch.tensor(9.0, device=place.device)
        torch.library.opcheck(OPS.mask_loss.default, (*leaves, labels, targets, norm, True))
        torch.library.opcheck(OPS.mask_class_logits.default, (hidden, weight, bias, labels, True))
        logits = mask_class_logits(hidden, weight, bias, labels, relu=True)
        arguments = (norm, hidden, weight, bias, labels, targets, norm, logits, True)
        torch.library.opcheck(OPS.mask_loss_backward.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    hidden, weight, bias, labels, targets = CASES[1].inputs(torch.float32)
    leaf = hidden.clone().requires_grad_()

    def step(h: Tensor) -> Tensor:
        return mask_loss(h * 2, weight, bias, labels, targets, relu=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), step(leaf))
    gradients = [torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, step)]
    torch.testing.assert_close(*gradients)


def test_wrong_arguments() -> None:
    hidden, weight, bias, labels, targets = CASES[1].inputs(torch.float32)
    for arguments, message in (
        ((hidden[0], weight, bias, labels, targets), "hidden must be"),
        ((hidden.int(), weight, bias, labels, targets), "hidden must be"),
        ((hidden, weight[:, 1:], bias, labels, targets), "weight must be"),
        ((hidden, weight, bias[1:], labels, targets), "bias must be"),
        ((hidden, weight, bias, labels[1:], targets), "labels must be"),
        ((hidden, weight, bias, labels.float(), targets), "labels must be"),
        ((hidden, weight, bias, labels, targets[:, 1:]), "targets must be"),
        ((hidden, weight, bias, labels, targets.float()), "targets must be"),
        ((hidden, weight, bias, labels, targets, torch.ones(2)), "normaliser must have one"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_loss(*arguments)


def test_a_label_that_is_no_class(place: Place) -> None:
    hidden, weight, bias, labels, targets = (t.to(place.device) for t in CASES[1].inputs(torch.float32))
    labels[2] = 4
    if place.backend == "triton":  # looking would stop the stream: the region is absent
        assert not mask_class_logits(hidden, weight, bias, labels)[2].any()
        return
    if place.device == "cpu":
        with pytest.raises(RuntimeError, match=r"label .* classes"):
            mask_loss(hidden, weight, bias, labels, targets)


def test_exported() -> None:
    assert {"mask_loss", "mask_class_logits"} <= set(fk.__all__)
