"""What every Triton launcher shares: the record that the compile-for-GPU test reads, and the device guard."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch


class CompileCase(NamedTuple):
    """One specialisation of a kernel that its launcher launches; ``COMPILE_CASES`` of a module lists them.

    The launcher takes its constants and options from the same function or table, so that what the test compiles
    for sm_80, sm_90 and sm_100 is what runs there.

    Attributes:
        label: short and unique in the module: it names the test.
        kernel: the ``@triton.jit`` function.
        signature: Triton's type of each run-time argument by name (``*fp32``, ``i32``, ``fp32``). Pointers are
            taken as 16-byte aligned, which is what torch's allocator gives.
        constexprs: the value of each ``tl.constexpr`` argument by name.
        options: launch options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
