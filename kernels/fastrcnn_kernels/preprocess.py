"""Images into network input: resized, flipped, normalised, padded to one batch.

maskrcnn-benchmark does this with Pillow and torchvision, one image at a time: ``Resize``, ``RandomHorizontalFlip``,
``ToTensor``, ``Normalize``, ``to_image_list``. Here the image stays uint8 until the one pass that writes the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn_kernels import _library

_PRECISION = 22  # bits of a weight, as in Pillow
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the kernels' type codes


def _weights(size: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Pillow's coefficients of one axis: which inputs make an output, and how much of each in units of 2^-22.

    Returns:
        int64 [taps, wanted] indices and int32 [taps, wanted] weights; where an output has fewer taps, weight 0.
    """
    scale = size / wanted
    support = max(scale, 1.0)  # one pixel of the coarser grid to either side: antialiasing
    centre = (torch.arange(wanted, dtype=torch.float64) + 0.5) * scale  # [wanted]
    first = (centre - support + 0.5).long().clamp_(min=0)  # [wanted]
    last = (centre + support + 0.5).long().clamp_(max=size)  # [wanted]
    taps = torch.arange(math.ceil(support) * 2 + 1)[:, None] + first  # [taps, wanted]
    distance = ((taps - centre + 0.5) * (1.0 / support)).abs_()  # [taps, wanted]
    weight = torch.where(taps < last, (1.0 - distance).clamp_(min=0.0), 0.0)  # [taps, wanted]
    total = torch.zeros_like(centre)
    for tap in weight:  # added one by one, in Pillow's order
        total += tap
    share = weight / torch.where(total == 0, 1.0, total)  # [taps, wanted]
    return taps.clamp_(max=size - 1), (share * (1 << _PRECISION) + 0.5).int()


def resize_axis(image: Tensor, wanted: int, axis: int) -> Tensor:
    """uint8 [H, W, 3] with ``axis`` (0 or 1) resized; grey levels are rounded, as between Pillow's two passes."""
    if image.shape[axis] == wanted:
        return image
    index, weight = (t.to(image.device) for t in _weights(image.shape[axis], wanted))  # [taps, wanted] each
    values = image.int()
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total: Tensor | int = 1 << (_PRECISION - 1)
    for at, share in zip(index, weight, strict=True):
        total = values.index_select(axis, at) * share.view(shape) + total
    return (total >> _PRECISION).to(torch.uint8)  # type: ignore[union-attr]


def _resize_image_reference(image: Tensor, height: int, width: int) -> Tensor:
    resized = resize_axis(resize_axis(image, width, 1), height, 0).contiguous()
    # An operator must not return its argument.
    return resized.clone() if resized.data_ptr() == image.data_ptr() else resized


def _packed(image: Tensor) -> Tensor:
    """The image with its pixels side by side in each row, which is what the kernels read; rows may be apart."""
    return image if image.stride(2) == 1 and image.stride(1) == 3 else image.contiguous()


def _resize_image_cpp(image: Tensor, height: int, width: int) -> Tensor:
    image = _packed(image)
    out = torch.empty((height, width, 3), dtype=torch.uint8)
    rows, columns = image.shape[:2]
    description = (image.data_ptr(), rows, columns, image.stride(0), height, width, 0)
    _library.extension().resize_image(description, out.data_ptr(), False, torch.get_num_threads())
    return out


def _resize_image_fake(image: Tensor, height: int, width: int) -> Tensor:
    return image.new_empty((height, width, 3))


_resize_image = _library.define(
    "resize_image(Tensor image, SymInt height, SymInt width) -> Tensor",
    reference=_resize_image_reference,
    fake=_resize_image_fake,
    cpp=_resize_image_cpp,
    triton="fastrcnn_kernels.triton.preprocess:resize_image",
)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image as Pillow's ``BILINEAR`` does, to the bit: with antialiasing when it shrinks.

    maskrcnn-benchmark resizes with Pillow. First along x, then along y, weights rounded to 22 bits, grey levels rounded
    after each pass. Since version 13 Pillow takes y first where the height shrinks by more than twice as many pixels as
    the width; there it differs from this and from its own former self by at most one grey level.

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


def normalise(
    pixels: Tensor, target: Tensor, pixel_mean: Sequence[float], pixel_std: Sequence[float], to_bgr255: bool
) -> None:
    """uint8 [h, w, 3] into float32 [channels, h, w], each step in float32; a fourth channel stays as it is."""
    for channel, mean, std in zip(range(3), pixel_mean, pixel_std, strict=True):
        plane = target[channel]  # [h, w]
        plane.copy_(pixels[:, :, 2 - channel if to_bgr255 else channel])
        if not to_bgr255:
            plane.div_(255.0)
        plane.sub_(mean)
        if std != 1.0:
            plane.div_(std)


def _preprocess_images_reference(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    flip: Sequence[bool],
    sizes: Sequence[int],
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    device = images[0].device
    batch = torch.zeros((len(images), channels, height, width), dtype=torch.float32, device=device)
    targets = zip(images, flip, sizes[::2], sizes[1::2], batch, strict=True)
    for image, mirrored, h, w, canvas in targets:
        target = canvas[:, :h, :w]
        pixels = resize_axis(resize_axis(image, w, 1), h, 0)  # [h, w, 3]
        pixels = pixels.flip(1) if mirrored else pixels
        normalise(pixels, target, pixel_mean, pixel_std, to_bgr255)
    return batch.to(dtype, memory_format=memory_format_of(channels_last))


def memory_format_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _preprocess_images_fake(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    flip: Sequence[bool],
    sizes: Sequence[int],
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        (len(images), channels, height, width),
        dtype=dtype,
        device=images[0].device,
        memory_format=memory_format_of(channels_last),
    )


def _preprocess_images_cpp(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    to_bgr255: bool,
    flip: Sequence[bool],
    sizes: Sequence[int],
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    images = [_packed(image) for image in images]
    batch = torch.empty(
        (len(images), channels, height, width), dtype=dtype, memory_format=memory_format_of(channels_last)
    )
    _library.extension().preprocess_images(
        [
            (image.data_ptr(), image.shape[0], image.shape[1], image.stride(0), h, w, mirrored)
            for image, h, w, mirrored in zip(images, sizes[::2], sizes[1::2], flip, strict=True)
        ],
        pixel_mean,
        pixel_std,
        to_bgr255,
        height,
        width,
        channels,
        DTYPES.index(dtype),
        channels_last,
        batch.data_ptr(),
        False,
        torch.get_num_threads(),
    )
    return batch


_preprocess_images = _library.define(
    "preprocess_images(Tensor[] images, float[] pixel_mean, float[] pixel_std, bool to_bgr255, bool[] flip, "
    "SymInt[] sizes, SymInt height, SymInt width, int channels, ScalarType dtype, bool channels_last) -> Tensor",
    reference=_preprocess_images_reference,
    fake=_preprocess_images_fake,
    cpp=_preprocess_images_cpp,
    triton="fastrcnn_kernels.triton.preprocess:preprocess_images",
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
    sizes: Sequence[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    channels: int = 3,
) -> tuple[Tensor, Tensor]:
    """Resize, flip, order channels, normalise and batch images: on a GPU in one launch.

    The order of maskrcnn-benchmark: resize with Pillow (see :func:`resize_image`), mirror, then values, minus
    ``pixel_mean``, divided by ``pixel_std``, each step in float32; then zero padding at the bottom and the right, so
    that padding is 0 **after** normalisation. For ``to_bgr255`` it divides by 255 and multiplies by 255 again; in
    float32 that gives every grey level back exactly, so both are left out here.

    Args:
        images: uint8 [h, w, 3] each, RGB, of one device. Views into one buffer are as good as separate tensors.
        pixel_mean: three values in the order of the output channels: BGR on the scale 0 to 255 with ``to_bgr255``, RGB
            on the scale 0 to 1 without.
        pixel_std: the same; not 0.
        to_bgr255: maskrcnn-benchmark's ``INPUT.TO_BGR255``: BGR in 0 to 255 instead of RGB in 0 to 1.
        size_divisible: height and width of the batch are rounded up to a multiple of it; 0 and 1 do not round.
        flip: whether to mirror each image left to right; default none.
        pad_to: (height, width) that the batch shall have; default as large as the largest image. Rounded up as well.
        sizes: (height, width) that each image is resized to; default as they are.
        dtype: of the batch: float32, or float16 or bfloat16, rounded from float32 at the end.
        memory_format: ``torch.contiguous_format`` or ``torch.channels_last``.
        channels: 3, or 4 for a fourth channel of zeros: pixels are then aligned, for a first convolution that is padded
            to four input channels.

    Returns:
        ``dtype`` [N, channels, H, W] on the device of the images, and int64 [N, 2], (height, width) of each image in
        it, on the same device.

    Raises:
        ValueError: no images, another shape or dtype, an image that exceeds ``pad_to``, wrong numbers of values, a size
            of no pixels, another ``dtype``, ``memory_format`` or number of channels.
    """
    images = list(images)
    if not images:
        raise ValueError("preprocess_images: needs at least one image")
    for image in images:
        _check_image("preprocess_images", image)
    mirrored = [False] * len(images) if flip is None else [bool(f) for f in flip]
    if len(mirrored) != len(images):
        raise ValueError(f"preprocess_images: {len(mirrored)} flips for {len(images)} images")
    if sizes is None:
        wanted = [(int(image.shape[0]), int(image.shape[1])) for image in images]
    else:
        wanted = [(int(h), int(w)) for h, w in sizes]
        if len(wanted) != len(images):
            raise ValueError(f"preprocess_images: {len(wanted)} sizes for {len(images)} images")
        if min(min(size) for size in wanted) < 1:
            raise ValueError(f"preprocess_images: sizes must be at least 1x1, got {wanted}")
    check_constants("preprocess_images", pixel_mean, pixel_std, dtype, memory_format, channels)

    height, width = max(h for h, _ in wanted), max(w for _, w in wanted)
    if pad_to is not None:
        if height > pad_to[0] or width > pad_to[1]:
            raise ValueError(f"preprocess_images: an image of {height}x{width} does not fit pad_to {tuple(pad_to)}")
        height, width = pad_to
    step = max(1, size_divisible)
    height, width = -(-height // step) * step, -(-width // step) * step
    batch = _preprocess_images(
        images,
        [float(m) for m in pixel_mean],
        [float(s) for s in pixel_std],
        to_bgr255,
        mirrored,
        [side for size in wanted for side in size],
        height,
        width,
        channels,
        dtype,
        memory_format == torch.channels_last,
    )
    return batch, torch.tensor(wanted, dtype=torch.int64).to(batch.device)


def check_constants(
    operator: str,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    channels: int,
) -> None:
    """Raises ValueError for what no kernel of the family takes."""
    for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        if len(values) != 3:
            raise ValueError(f"{operator}: {name} must have 3 values, got {len(values)}")
    if 0.0 in [float(s) for s in pixel_std]:
        raise ValueError(f"{operator}: pixel_std must not be 0, got {list(pixel_std)}")
    if dtype not in DTYPES:
        raise ValueError(f"{operator}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"{operator}: memory_format must be contiguous or channels_last, got {memory_format}")
    if channels not in (3, 4):
        raise ValueError(f"{operator}: channels must be 3 or 4, got {channels}")


def _check_image(operator: str, image: Tensor) -> None:
    if image.dim() != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(
            f"{operator}: an image must be uint8 [height, width, 3], not empty, got {image.dtype} {tuple(image.shape)}"
        )
