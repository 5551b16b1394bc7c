"""The RPN's losses on its sampled anchors, and their gradient through the head at the sampled positions alone.

    pytest benchmarks/bench_rpn_loss.py
    FASTRCNN_BENCH_SMALL=1 pytest benchmarks/bench_rpn_loss.py --benchmark-disable     the correctness gate alone

Two 800 x 1344 images, five levels of 256 channels, three anchors a position: 268,569 anchors, 256 sampled an image.
``torch``: eager PyTorch as torchvision computes the losses, all levels' outputs in one list and a choice from it (only
the sampled positives are encoded, where torchvision encodes every anchor); with the head, autograd through its
convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_mask_loss import close_in_norm
from benchmarks.harness import OURS, SMALL, measure, provider_call
from fastrcnn_kernels import rpn_head_loss, rpn_head_outputs, rpn_loss
from fastrcnn_kernels.rpn_loss import forward_reference

STRIDES = [4, 8, 16] if SMALL else [4, 8, 16, 32, 64]
SIZES = [(6, 9), (3, 5), (2, 3)] if SMALL else [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
IMAGES, ANCHORS = 2, 3
CHANNELS, SAMPLED, POSITIVES, GTS = (8, 16, 4, 3) if SMALL else (256, 256, 64, 20)
BETA = 1.0 / 9


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    channels_last: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{'nhwc' if self.channels_last else 'nchw'}"

    def maps(self, channels: int, device: torch.device, seed: int, scale: float = 1.0) -> list[Tensor]:
        """For each level [IMAGES, channels, H, W]."""
        g = torch.Generator().manual_seed(seed)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        maps = [scale * torch.randn(IMAGES, channels, h, w, generator=g) for h, w in SIZES]
        return [m.to(device, self.dtype).contiguous(memory_format=layout).requires_grad_() for m in maps]


CASES = [Case(torch.float32, False), Case(torch.float32, True), Case(torch.bfloat16, True)]


@lru_cache(maxsize=1)
def make_sample(device: torch.device) -> tuple[dict[str, Any], list[Tensor], Tensor]:
    """What both losses need: sampled anchors and ground truth, the cells of the levels, and all anchors."""
    g = torch.Generator().manual_seed(1)
    ratio = torch.tensor([0.5, 1.0, 2.0])
    half = torch.stack([1 / ratio.sqrt(), ratio.sqrt()], 1).repeat(1, 2) / 2 * torch.tensor([-1.0, -1, 1, 1])  # [A, 4]
    cells = [8 * stride * half for stride in STRIDES]
    anchors = []
    for (h, w), stride, cell in zip(SIZES, STRIDES, cells, strict=True):
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        anchors.append((torch.stack([x, y, x, y], -1).view(-1, 1, 4) + cell).flatten(0, 1))
    total = sum(len(a) for a in anchors)
    corner = torch.rand(IMAGES, GTS, 2, generator=g) * 600
    sample = {
        "indices": torch.stack([torch.randperm(total, generator=g)[:SAMPLED] for _ in range(IMAGES)]),
        "num_positive": torch.full((IMAGES,), POSITIVES),
        "num_sampled": torch.full((IMAGES,), SAMPLED),
        "matched_idxs": torch.randint(GTS, (IMAGES, total), generator=g),
        "gt_boxes": torch.cat([corner, corner + 16 + 200 * torch.rand(IMAGES, GTS, 2, generator=g)], 2),
    }
    return {k: v.to(device) for k, v in sample.items()}, [c.to(device) for c in cells], torch.cat(anchors).to(device)


def in_one_list(maps: list[Tensor], values: int) -> Tensor:
    """torchvision's ``permute_and_flatten`` of each level, concatenated: [images, anchors, values]."""
    flat = []
    for m in maps:
        images, channels, height, width = m.shape
        split = m.view(images, channels // values, values, height, width).permute(0, 3, 4, 1, 2)
        flat.append(split.reshape(images, -1, values))
    return torch.cat(flat, 1)


def eager_loss(objectness: list[Tensor], deltas: list[Tensor], sample: dict[str, Any], anchors: Tensor) -> Tensor:
    image = torch.arange(IMAGES, device=anchors.device)[:, None]
    indices, positive = sample["indices"], sample["indices"][:, :POSITIVES]
    logits = in_one_list(objectness, 1)[image, indices, 0].float()
    labels = (torch.arange(SAMPLED, device=anchors.device) < POSITIVES).float().expand_as(logits)
    gt, box = sample["gt_boxes"][image, sample["matched_idxs"][image, positive]], anchors[positive]
    size, gt_size = box[..., 2:] - box[..., :2], gt[..., 2:] - gt[..., :2]
    centre, gt_centre = box[..., :2] + 0.5 * size, gt[..., :2] + 0.5 * gt_size
    wanted = torch.cat([(gt_centre - centre) / size, (gt_size / size).log()], -1)
    predicted = in_one_list(deltas, 4)[image, positive].float()
    box_loss = functional.smooth_l1_loss(predicted, wanted, beta=BETA, reduction="sum") / indices.numel()
    return torch.stack([functional.binary_cross_entropy_with_logits(logits, labels), box_loss])


@pytest.mark.parametrize("provider", [*OURS, "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rpn_loss(benchmark: Any, device: torch.device, case: Case, provider: str) -> None:
    """From the head's outputs to both losses and the dense gradients of the outputs."""
    sample, cells, anchors = make_sample(device)
    objectness, deltas = case.maps(ANCHORS, device, 0), case.maps(4 * ANCHORS, device, 1)
    leaves = [*objectness, *deltas]
    compiled, normaliser = torch.compile(forward_reference), torch.tensor(IMAGES * SAMPLED, device=device)

    def step(losses: Tensor) -> list[Tensor]:
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    def ours() -> list[Tensor]:
        losses = rpn_loss(objectness, deltas, **sample, cells=cells, strides=STRIDES, beta=BETA)
        return step(torch.stack(losses))

    call = provider_call(
        provider, ("rpn_loss", "rpn_loss_backward"), device, ours=ours,
        torch=lambda: step(eager_loss(objectness, deltas, sample, anchors)),
        compiled=lambda: step(
            compiled(objectness, deltas, torch.stack(cells), STRIDES, *sample.values(), normaliser, BETA, 0)[0]
        ),
    )  # fmt: skip
    outputs = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    measure(
        benchmark, call, truth=ours, equal=close_in_norm(1e-2 if case.dtype == torch.bfloat16 else 1e-4),
        group=f"rpn-loss-{case}", provider=provider, device=device, bytes=outputs, anchors=len(anchors),
        sampled=SAMPLED,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["backward", "both"])
@pytest.mark.parametrize("provider", ["reference", "cpp", "triton", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rpn_head_loss(benchmark: Any, device: torch.device, case: Case, provider: str, mode: str) -> None:
    """The gradient in all levels' features and the head's parameters; ``both``: with the head and the losses before."""
    if case.dtype == torch.bfloat16 and device.type == "cpu" and not SMALL:
        pytest.skip("bfloat16 convolutions of this size take minutes on a CPU")
    sample, cells, anchors = make_sample(device)
    features = case.maps(CHANNELS, device, 2)
    g = torch.Generator().manual_seed(3)
    shapes = [(CHANNELS, CHANNELS, 3, 3), (CHANNELS,), (ANCHORS, CHANNELS, 1, 1), (ANCHORS,)]
    shapes += [(4 * ANCHORS, CHANNELS, 1, 1), (4 * ANCHORS,)]
    parameters = [(0.01 * torch.randn(shape, generator=g)).to(device).requires_grad_() for shape in shapes]
    leaves = [*features, *parameters]

    def sparse() -> Tensor:
        with torch.no_grad():
            objectness, deltas = rpn_head_outputs(features, *(p.to(case.dtype) for p in parameters))
        losses = rpn_head_loss(
            features, *parameters, objectness, deltas, **sample, cells=cells, strides=STRIDES, beta=BETA
        )
        return torch.stack(losses)

    def dense() -> Tensor:
        return eager_loss(*rpn_head_outputs(features, *(p.to(case.dtype) for p in parameters)), sample, anchors)

    # Of the gradient alone: what the forward leaves is computed once.
    sparse_losses, dense_losses = (sparse, dense) if mode == "both" else (lru_cache(sparse), lru_cache(dense))

    def step(losses: Tensor) -> list[Tensor]:
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves, retain_graph=mode == "backward")]

    def ours() -> list[Tensor]:
        return step(sparse_losses())

    call = provider_call(
        provider, ("rpn_head_loss", "rpn_patches", "rpn_scatter_patches"), device, ours=ours,
        torch=lambda: step(dense_losses()),
    )  # fmt: skip
    # Convolutions in reduced precision, on a GPU in TF32, put other units of the hidden layer below zero.
    exact = case.dtype == torch.float32 and device.type == "cpu"
    positions = IMAGES * sum(h * w for h, w in SIZES)
    products = CHANNELS * (9 * CHANNELS + 5 * ANCHORS)  # of one position
    written = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    measure(
        benchmark, call, truth=ours, equal=close_in_norm(1e-3 if exact else 5e-2),
        group=f"rpn-head-loss-{case}-{mode}", provider=provider, device=device,
        bytes=written * (2 if mode == "both" else 1),
        flops=2 * products * (3 * IMAGES * SAMPLED + (positions if mode == "both" else 0)),
        rounds=2 if provider == "torch" else 3, anchors=len(anchors), sampled=SAMPLED,
    )  # fmt: skip
