"""Balanced sampling of positives and negatives with a counter-based random generator.

maskrcnn-benchmark draws ``randperm(n)[:k]`` of the positives and of the negatives of each image, which needs their
indices and counts on the host. Here entry i of an image has a random 32-bit key that is a function of
(seed of the image, i) alone, and the sample is the k entries with the smallest keys: the same law, no host
synchronisation, and one draw whatever the device, the number of images in the batch, or the padding behind the
entries. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrcnn_kernels import _library

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ABSENT = torch.iinfo(torch.int64).max

Word = Tensor | int


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word], *, rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four random 32-bit words for each counter.

    Args:
        counter: four 32-bit words, each an int64 tensor or a Python int in [0, 2**32); they broadcast.
        key: two 32-bit words, likewise. At least one of the six must be a tensor.
        rounds: 10 is the published, Crush-resistant number.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, and >> copies the sign: the low 64 bits are right all the same, and the mask drops
        # the copies. The low halves need no mask of their own here: they only meet an xor before the next one.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) ^ (c1 ^ k0)) & _WORD, ((product0 >> 32) ^ (c3 ^ k1)) & _WORD
        c1, c3 = product1, product0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD  # type: ignore[return-value]


def image_seeds_reference(image_ids: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The specification of :func:`image_seeds`; ``seed`` and ``step`` have no dimensions."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    counter = (image_ids & _WORD, (image_ids >> 32) & _WORD, step & _WORD, stream & _WORD)
    low, high, _, _ = philox4x32(counter, key)  # [N] each
    return low | (high << 32)  # [N]


def random_keys(seeds: Tensor, count: int) -> Tensor:
    """The sampler's random keys: entry i takes word i % 4 of Philox4x32-10 at counter (i // 4, 0, 0, 0).

    Args:
        seeds: int64 [N], the Philox keys.
        count: number of entries A of each image.

    Returns:
        int64 [N, A] with values in [0, 2**32).
    """
    counter = torch.arange((count + 3) // 4, device=seeds.device)  # [ceil(A / 4)]
    key = ((seeds & _WORD).unsqueeze(1), ((seeds >> 32) & _WORD).unsqueeze(1))  # [N, 1] each
    words = philox4x32((counter, 0, 0, 0), key)  # [N, ceil(A / 4)] each
    return torch.stack(words, dim=-1).flatten(1)[:, :count]  # [N, A]


def _smallest(keys: Tensor, count: int) -> Tensor:
    """The ``count`` smallest of each row in ascending order, padded with ``_ABSENT``."""
    found = keys.topk(min(count, keys.shape[-1]), largest=False, sorted=True).values  # [..., min(count, A)]
    # Not F.pad: it takes its value as a float, which _ABSENT does not fit.
    absent = found.new_full((*found.shape[:-1], count - found.shape[-1]), _ABSENT)
    return torch.cat([found, absent], dim=-1)  # [..., count]


def sample_balanced_reference(
    labels: Tensor, seeds: Tensor, size: int, most_positives: int, first_positive: int, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of :func:`sample_balanced`; ``size`` is B."""
    num_images, num_entries = labels.shape
    positive, negative = labels >= first_positive, labels == first_positive - 1  # [N, A]
    if count is not None:
        present = torch.arange(num_entries, device=labels.device) < count.unsqueeze(1)  # [N, A]
        positive, negative = positive & present, negative & present  # [N, A]
    num_pos = positive.sum(dim=1).clamp(max=most_positives)  # [N]
    num_neg = torch.minimum(negative.sum(dim=1), size - num_pos)  # [N]

    # Key and index in one number: the order is total, and topk brings the index along.
    index = torch.arange(num_entries, device=labels.device)  # [A]
    keys = (random_keys(seeds, num_entries) << 31) | index  # [N, A]
    positives = _smallest(torch.where(positive, keys, _ABSENT), most_positives)  # [N, most_positives]
    negatives = _smallest(torch.where(negative, keys, _ABSENT), size)  # [N, B]

    slot = torch.arange(size, device=labels.device).expand(num_images, size)  # [N, B]
    is_pos = slot < num_pos.unsqueeze(1)  # [N, B]
    source = torch.where(is_pos, slot, most_positives + slot - num_pos.unsqueeze(1))  # [N, B]
    drawn = torch.cat([positives, negatives], dim=1).gather(1, source) & 0x7FFFFFFF  # [N, B]
    num_sampled = num_pos + num_neg  # [N]
    indices = torch.where(slot < num_sampled.unsqueeze(1), drawn, -1)  # [N, B]
    return indices, num_pos, num_sampled


def _image_seeds_cpp(image_ids: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    image_ids = image_ids.to(torch.int64).contiguous()
    seeds = torch.empty_like(image_ids)
    _library.extension().image_seeds(
        image_ids.data_ptr(),
        image_ids.numel(),
        int(seed) & 0xFFFFFFFFFFFFFFFF,
        int(step) & _WORD,
        stream & _WORD,
        seeds.data_ptr(),
    )
    return seeds


def _image_seeds_triton(image_ids: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    from fastrcnn_kernels.triton import sampler as launcher

    return launcher.image_seeds(image_ids, seed, step, stream)


def _image_seeds_fake(image_ids: Tensor, *_: object) -> Tensor:
    return image_ids.new_empty(image_ids.shape, dtype=torch.int64)


def _for_kernels(labels: Tensor, first_positive: int) -> Tensor:
    """Labels in one of the types that the kernels read: int8, int32 or int64, in which ``first_positive`` fits."""
    if labels.dtype not in (torch.int8, torch.int32, torch.int64):
        labels = labels.to(torch.int64)
    limits = torch.iinfo(labels.dtype)
    if not limits.min < first_positive <= limits.max:
        labels = labels.to(torch.int64)
    return labels.contiguous()


def _sample_balanced_cpp(
    labels: Tensor, seeds: Tensor, size: int, most_positives: int, first_positive: int, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    labels, seeds = _for_kernels(labels, first_positive), seeds.to(torch.int64).contiguous()
    count = None if count is None else count.contiguous()
    num_images, num_entries = labels.shape
    indices = torch.empty((num_images, size), dtype=torch.int64)
    num_pos = torch.empty((num_images,), dtype=torch.int64)
    num_sampled = torch.empty((num_images,), dtype=torch.int64)
    _library.extension().sample_balanced(
        labels.data_ptr(),
        labels.element_size(),
        seeds.data_ptr(),
        0 if count is None else count.data_ptr(),
        num_images,
        num_entries,
        size,
        most_positives,
        first_positive,
        indices.data_ptr(),
        num_pos.data_ptr(),
        num_sampled.data_ptr(),
        torch.get_num_threads(),
    )
    return indices, num_pos, num_sampled


def _sample_balanced_triton(
    labels: Tensor, seeds: Tensor, size: int, most_positives: int, first_positive: int, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from fastrcnn_kernels.triton import sampler as launcher

    if size > launcher.MOST_DRAWN:
        return sample_balanced_reference(labels, seeds, size, most_positives, first_positive, count)
    return launcher.sample_balanced(
        _for_kernels(labels, first_positive), seeds.contiguous(), size, most_positives, first_positive,
        None if count is None else count.contiguous(),
    )  # fmt: skip


def _sample_balanced_fake(labels: Tensor, seeds: Tensor, size: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    num_images = labels.shape[0]
    return (
        labels.new_empty((num_images, size), dtype=torch.int64),
        labels.new_empty((num_images,), dtype=torch.int64),
        labels.new_empty((num_images,), dtype=torch.int64),
    )


_image_seeds = _library.define(
    "image_seeds(Tensor image_ids, Tensor seed, Tensor step, int stream) -> Tensor",
    reference=image_seeds_reference,
    fake=_image_seeds_fake,
    cpp=_image_seeds_cpp,
    triton="fastrcnn_kernels.sampler:_image_seeds_triton",
)
_sample_balanced = _library.define(
    "sample_balanced(Tensor labels, Tensor seeds, SymInt size, SymInt most_positives, int first_positive, "
    "Tensor? count=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference=sample_balanced_reference,
    fake=_sample_balanced_fake,
    cpp=_sample_balanced_cpp,
    triton="fastrcnn_kernels.sampler:_sample_balanced_triton",
)


def _scalar(value: int | Tensor, device: torch.device) -> Tensor:
    """An int64 tensor without dimensions; numbers of 64 bits without a sign are taken as what they are in 64 bits."""
    if isinstance(value, Tensor):
        return value.to(torch.int64)
    # full, not tensor: a CUDA graph can capture it.
    return torch.full((), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def image_seeds(seed: int | Tensor, step: int | Tensor, image_ids: Tensor, stream: int) -> Tensor:
    """A seed for each image of a batch, a function of (seed, step, image, stream) and of nothing else.

    Args:
        seed: of the run; a Python int or an int64 tensor with no dimensions, 64 bits used.
        step: of the training, likewise, 32 bits used. A tensor may live on the device and is not read on the host.
        image_ids: int64 [N], any numbers that tell the images of the data set apart.
        stream: tells the uses of one image in one step apart (RPN, box head), 32 bits used.

    Returns:
        int64 [N], uniform over all 64-bit values.
    """
    device = image_ids.device
    return _image_seeds(image_ids, _scalar(seed, device), _scalar(step, device), stream)


def sample_balanced(
    labels: Tensor,
    batch_size_per_image: int,
    positive_fraction: float,
    seeds: Tensor,
    *,
    first_positive: int = 1,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positives and negatives of each image at random, without replacement.

    ``num_pos = min(#positives, int(B * positive_fraction))`` and ``num_neg = min(#negatives, B - num_pos)``, as in
    maskrcnn-benchmark's BalancedPositiveNegativeSampler; each subset of that size is equally likely (up to
    collisions of 32-bit keys, which the lower index wins).

    Args:
        labels: integer [N, A]: >= 1 positive, 0 negative, < 0 ignored.
        batch_size_per_image: B.
        positive_fraction: largest fraction of positives.
        seeds: int64 [N], from ``image_seeds``.
        first_positive: the label from which an entry is positive; the one before it is the negative, those below are
            ignored. With 0 what ``match_boxes`` gives is drawn from directly: -1 is the background there.
        count: int64 [N], not read on the host: the entries of an image from this one on are padding and not drawn.

    Returns:
        ``indices`` int64 [N, B]: the positives, then the negatives, each in random order, then -1;
        ``num_pos`` int64 [N]; ``num_sampled`` int64 [N], positives and negatives together.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, a negative size or a fraction outside [0, 1].
    """
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(f"labels must be integers of the shape [N, A], got {labels.dtype} {list(labels.shape)}")
    if seeds.shape != labels.shape[:1]:
        raise ValueError(f"seeds must have the shape [{labels.shape[0]}], got {list(seeds.shape)}")
    if batch_size_per_image < 0 or not 0 <= positive_fraction <= 1:
        raise ValueError(
            f"batch_size_per_image must be >= 0 and positive_fraction in [0, 1], "
            f"got {batch_size_per_image} and {positive_fraction}"
        )
    if count is not None and (count.shape != labels.shape[:1] or count.dtype != torch.int64):
        raise ValueError(f"count must be int64 [{labels.shape[0]}], got {count.dtype} {list(count.shape)}")
    most_positives = int(batch_size_per_image * positive_fraction)
    return _sample_balanced(labels, seeds, batch_size_per_image, most_positives, first_positive, count)
