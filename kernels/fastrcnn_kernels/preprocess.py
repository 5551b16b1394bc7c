"""Images into network input: resized, flipped, normalised, padded to one batch.

maskrcnn-benchmark does this with Pillow and torchvision, one image at a time: ``Resize``, ``RandomHorizontalFlip``,
``ToTensor``, ``Normalize``, ``to_image_list``. Here the image stays uint8 until the one pass that writes the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn_kernels import _library


def _resize_image_reference(image: Tensor, height: int, width: int) -> Tensor:
    # The permuted view is a channels_last batch of one, for which PyTorch has a vectorised uint8 kernel.
    batch = image.permute(2, 0, 1)[None]
    resized = F.interpolate(batch, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    resized = resized[0].permute(1, 2, 0).contiguous()
    # An operator must not return its argument.
    return resized.clone() if resized.data_ptr() == image.data_ptr() else resized


def _resize_image_fake(image: Tensor, height: int, width: int) -> Tensor:
    return image.new_empty((height, width, 3))


_resize_image = _library.define(
    "resize_image(Tensor image, SymInt height, SymInt width) -> Tensor",
    reference=_resize_image_reference,
    fake=_resize_image_fake,
)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image, bilinear with anti-aliasing when it shrinks, as Pillow's ``BILINEAR`` and torch's ``antialias``.

    Within one grey level of Pillow (maskrcnn-benchmark resizes with Pillow); both work in fixed point.

    Args:
        image: uint8 [H, W, 3]. Any channel order.
        size: (height, width) wanted.

    Returns:
        uint8 [height, width, 3], contiguous.

    Raises:
        ValueError: for another shape or dtype, or a side of no pixels.
    """
    _check_image("resize_image", image)
    if min(size) < 1:
        raise ValueError(f"resize_image: size must be at least 1x1, got {tuple(size)}")
    return _resize_image(image, int(size[0]), int(size[1]))


def _preprocess_images_reference(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    flip: Sequence[bool],
    height: int,
    width: int,
) -> Tensor:
    device = images[0].device
    batch = torch.zeros((len(images), 3, height, width), dtype=torch.float32, device=device)
    for image, mirrored, canvas in zip(images, flip, batch, strict=True):
        target = canvas[:, : image.shape[0], : image.shape[1]]
        pixels = image.flip(1) if mirrored else image
        for channel, mean, std in zip(range(3), pixel_mean, pixel_std, strict=True):
            plane = target[channel]  # [h, w]
            plane.copy_(pixels[:, :, 2 - channel if to_bgr255 else channel])
            if not to_bgr255:
                plane.div_(255.0)
            plane.sub_(mean)
            if std != 1.0:
                plane.div_(std)
    return batch


def _preprocess_images_fake(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    flip: Sequence[bool],
    height: int,
    width: int,
) -> Tensor:
    return images[0].new_empty((len(images), 3, height, width), dtype=torch.float32)


_preprocess_images = _library.define(
    "preprocess_images(Tensor[] images, float[] pixel_mean, float[] pixel_std, bool to_bgr255, bool[] flip, "
    "SymInt height, SymInt width) -> Tensor",
    reference=_preprocess_images_reference,
    fake=_preprocess_images_fake,
)


def preprocess_images(
    images: Sequence[Tensor],
    *,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    size_divisible: int,
    flip: Sequence[bool] | None = None,
    pad_to: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Flip, order channels, normalise and batch images.

    The order of maskrcnn-benchmark: values, minus ``pixel_mean``, divided by ``pixel_std``, each step in float32; then
    zero padding at the bottom and the right, so that padding is 0 **after** normalisation. For ``to_bgr255`` it
    divides by 255 and multiplies by 255 again; in float32 that gives every grey level back exactly, so both are left
    out here.

    Args:
        images: uint8 [h, w, 3] each, RGB, of one device; already resized.
        pixel_mean: three values in the order of the output channels: BGR on the scale 0 to 255 with ``to_bgr255``, RGB
            on the scale 0 to 1 without.
        pixel_std: the same; not 0.
        to_bgr255: maskrcnn-benchmark's ``INPUT.TO_BGR255``: BGR in 0 to 255 instead of RGB in 0 to 1.
        size_divisible: height and width of the batch are rounded up to a multiple of it; 0 and 1 do not round.
        flip: whether to mirror each image left to right; default none.
        pad_to: (height, width) that the batch shall have; default as large as the largest image. Rounded up as well.

    Returns:
        float32 [N, 3, H, W] on the device of the images, and int64 [N, 2], (height, width) of each image, on the
        same device.

    Raises:
        ValueError: no images, another shape or dtype, an image that exceeds ``pad_to``, wrong numbers of values.
    """
    images = list(images)
    if not images:
        raise ValueError("preprocess_images: needs at least one image")
    for image in images:
        _check_image("preprocess_images", image)
    mirrored = [False] * len(images) if flip is None else [bool(f) for f in flip]
    if len(mirrored) != len(images):
        raise ValueError(f"preprocess_images: {len(mirrored)} flips for {len(images)} images")
    for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        if len(values) != 3:
            raise ValueError(f"preprocess_images: {name} must have 3 values, got {len(values)}")
    if 0.0 in [float(s) for s in pixel_std]:
        raise ValueError(f"preprocess_images: pixel_std must not be 0, got {list(pixel_std)}")

    sizes = [(int(image.shape[0]), int(image.shape[1])) for image in images]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if pad_to is not None:
        if height > pad_to[0] or width > pad_to[1]:
            raise ValueError(f"preprocess_images: an image of {height}x{width} does not fit pad_to {tuple(pad_to)}")
        height, width = pad_to
    step = max(1, size_divisible)
    height, width = -(-height // step) * step, -(-width // step) * step
    batch = _preprocess_images(
        images, [float(m) for m in pixel_mean], [float(s) for s in pixel_std], to_bgr255, mirrored, height, width
    )
    return batch, torch.tensor(sizes, dtype=torch.int64).to(batch.device)


def _check_image(operator: str, image: Tensor) -> None:
    if image.dim() != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(
            f"{operator}: an image must be uint8 [height, width, 3], not empty, got {image.dtype} {tuple(image.shape)}"
        )
