"""Images to network input against what maskrcnn-benchmark does today: Pillow, then torch, an image at a time.

pytest benchmarks/bench_preprocess.py                        time everything
pytest benchmarks/bench_preprocess.py --benchmark-disable    run each once: the correctness gate alone
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import OURS, SMALL, assert_equal, measure, provider_call
from fastrcnn_kernels import preprocess_images, resize_image

MEAN, STD = [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]

# before, after, of each image
CASES = (
    {"two-24x32": [((24, 32), (40, 53))] * 2}
    if SMALL
    else {
        "two-480x640": [((480, 640), (800, 1067))] * 2,
        "480x640-and-427x640": [((480, 640), (800, 1067)), ((427, 640), (800, 1199))],
        "two-1200x1600": [((1200, 1600), (800, 1067))] * 2,
        "sixteen-480x640": [((480, 640), (800, 1067))] * 16,
    }
)
OUTPUTS = {
    "float32": {},
    "bfloat16-nhwc4": {"dtype": torch.bfloat16, "memory_format": torch.channels_last, "channels": 4},
}


def make_images(case: str) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (*before, 3), dtype=np.uint8)) for before, _ in CASES[case]]


def by_pillow_and_torch(images: list[Image.Image], sizes: list[tuple[int, int]], **output: Any) -> Tensor:
    """Resize, ToTensor, Normalize and to_image_list of maskrcnn-benchmark."""
    tensors = []
    for image, (height, width) in zip(images, sizes, strict=True):
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
        values = values[[2, 1, 0]] * 255
        tensors.append(values.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None]))
    height, width = (-(-max(t.shape[axis] for t in tensors) // 32) * 32 for axis in (1, 2))
    batch = torch.zeros((len(tensors), output.get("channels", 3), height, width))
    for canvas, values in zip(batch, tensors, strict=True):
        canvas[:3, : values.shape[1], : values.shape[2]].copy_(values)
    layout = output.get("memory_format", torch.contiguous_format)
    return batch.to(output.get("dtype", torch.float32), memory_format=layout)


@pytest.mark.parametrize("provider", [*OURS, "pillow"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("case", CASES)
def bench_preprocess_images(benchmark: Any, device: torch.device, case: str, output: str, provider: str) -> None:
    images = make_images(case)
    sizes = [after for _, after in CASES[case]]
    moved, pillow = [image.to(device) for image in images], [Image.fromarray(image.numpy()) for image in images]

    def ours() -> Tensor:
        style = {"pixel_mean": MEAN, "pixel_std": STD, "to_bgr255": True, "size_divisible": 32}
        return preprocess_images(moved, sizes=sizes, **style, **OUTPUTS[output])[0]

    def peer() -> Tensor:
        return by_pillow_and_torch(pillow, sizes, **OUTPUTS[output]).to(device)

    call = provider_call(provider, "preprocess_images", device, ours=ours, pillow=peer)
    out = ours()
    traffic = sum(image.numel() for image in images) + out.numel() * out.element_size()
    measure(
        benchmark,
        call,
        truth=ours,
        equal=assert_equal,
        group=f"preprocess_images-{case}-{output}",
        provider=provider,
        device=device,
        bytes=traffic,
        target=("pillow", 6),
    )


@pytest.mark.parametrize("provider", [*OURS, "pillow"])
@pytest.mark.parametrize("case", CASES)
def bench_resize_image(benchmark: Any, device: torch.device, case: str, provider: str) -> None:
    image, size = make_images(case)[0], CASES[case][0][1]
    moved, pillow = image.to(device), Image.fromarray(image.numpy())

    def ours() -> Tensor:
        return resize_image(moved, size)

    def peer() -> Tensor:
        return torch.from_numpy(np.array(pillow.resize(size[::-1], Image.Resampling.BILINEAR)))

    call = provider_call(provider, "resize_image", device, ours=ours, pillow=peer)
    measure(
        benchmark,
        call,
        truth=ours,
        equal=assert_equal,
        group=f"resize_image-{case}",
        provider=provider,
        device=device,
        bytes=image.numel() + 3 * size[0] * size[1],
        target=("pillow", 3),
    )
