"""torchvision's Mask R-CNN on our operators: the same losses, gradients and detections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrcnn_kernels import patch

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=160, max_size=224, box_score_thresh=0.01
    )


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 150, 200, generator=generator), torch.rand(3, 180, 140, generator=generator)]
    targets = []
    for image, count in zip(images, (3, 1), strict=True):
        height, width = image.shape[1:]
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.5, height * 0.5])
        boxes = torch.cat([corner, corner + 30 + torch.rand(count, 2, generator=generator) * 40], 1)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(1, count + 1), "masks": masks})
    return images, targets


def train_step(model: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(2)
    losses = model(*batch())
    sum(losses.values()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in losses.items()}, grads


def test_every_symbol_is_swapped_or_kept_for_a_stated_reason() -> None:
    from fastrcnn_kernels.patches.torchvision import KEPT, SWAPS

    with patch("torchvision") as handle:
        assert handle.swapped == [swap.symbol for swap in SWAPS], handle.report()
        assert set(handle.kept) == set(KEPT)
        assert "torchvision.ops.roi_align" in handle.outcomes[6].places


def test_training_step(model: Any) -> None:
    losses, grads = train_step(model)
    with patch("torchvision"):
        patched_losses, patched_grads = train_step(model)
    assert patched_losses == pytest.approx(losses, rel=1e-4, abs=1e-4)
    assert set(grads) == set(patched_grads)
    for name, grad in grads.items():
        # Sums over the whole image in another order: elements that cancel differ, the gradient as a whole does not.
        assert (patched_grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-7, name


@torch.no_grad()
def test_detections(model: Any) -> None:
    model.eval()
    images, _ = batch()
    expected = model(images)
    with patch("torchvision"):
        found = model(images)
    assert sum(len(e["boxes"]) for e in expected) > 10
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours["masks"], theirs["masks"], rtol=1e-4, atol=1e-4)
