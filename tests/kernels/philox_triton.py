"""Triton's own Philox, as the oracle of the sampler's keys. A file of its own: it is skipped where triton is absent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _randint4x_kernel(seed_ptr, out_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), offset)
    tl.store(out_ptr + 4 * offset, a)
    tl.store(out_ptr + 4 * offset + 1, b)
    tl.store(out_ptr + 4 * offset + 2, c)
    tl.store(out_ptr + 4 * offset + 3, d)


def randint4x(seed: int, count: int, device: str) -> torch.Tensor:
    """[count, 4] words of Philox4x32-10 with the 64-bit key ``seed`` at the counters 0, 1, ...; count a power of 2."""
    out = torch.empty(count, 4, dtype=torch.int32, device=device)
    _randint4x_kernel[(1,)](torch.tensor([seed], device=device), out, BLOCK=count)
    return out
