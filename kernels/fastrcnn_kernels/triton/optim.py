"""SGD with momentum over a flat buffer in one launch.

``_sgd_kernel``: a program updates one block of 1024 parameters, whose group it looks up. Bound by memory: 20 bytes a
parameter in float32, 884 MB for a ResNet-50-FPN of 44 million. Rounding is that of ``torch.optim.SGD``: weight decay
and the step are fused multiply-adds, the momentum is a product and a sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrcnn_kernels.triton._launch import CompileCase, device_guard


@triton.jit(do_not_specialize=["count"])
def _sgd_kernel(
    params_ptr,
    momentum_ptr,
    grads_ptr,
    groups_ptr,
    settings_ptr,
    scale_ptr,
    found_inf_ptr,
    copy_ptr,
    step_ptr,
    count,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    COPIED: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block. Grid: blocks. Pointers of what is switched off are not read."""
    block = tl.program_id(0).to(tl.int64)
    run = block >= 0
    if CHECKED:
        run = tl.load(found_inf_ptr) == 0.0
    if COUNTED:
        tl.store(step_ptr, tl.load(step_ptr) + 1.0, mask=run & (block == 0))
    group = tl.load(groups_ptr + block)
    if run & (group >= 0):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        lr = tl.load(settings_ptr + group * 3)
        decay = tl.load(settings_ptr + group * 3 + 1)
        param = tl.load(params_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grads_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            grad = tl.div_rn(grad, tl.load(scale_ptr))
        grad = tl.where(decay == 0.0, grad, tl.fma(param, decay, grad))
        if MOMENTUM:
            momentum = tl.load(settings_ptr + group * 3 + 2)
            buffer = tl.load(momentum_ptr + at, mask=inside, other=0.0) * momentum + grad
            tl.store(momentum_ptr + at, buffer, mask=inside)
            if NESTEROV:
                grad = tl.fma(buffer, momentum, grad)
            else:
                grad = buffer
        param = tl.fma(grad, -lr, param)
        tl.store(params_ptr + at, param, mask=inside)
        if COPIED:
            tl.store(copy_ptr + at, param.to(copy_ptr.dtype.element_ty), mask=inside)


_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _constants(
    momentum: bool, nesterov: bool, scaled: bool, checked: bool, copied: bool, counted: bool
) -> dict[str, Any]:
    switches = {"MOMENTUM": momentum, "NESTEROV": nesterov, "SCALED": scaled, "CHECKED": checked}
    return {**switches, "COPIED": copied, "COUNTED": counted, "BLOCK": 1024}


def fused_sgd(
    params: Tensor,
    momentum_buffer: Tensor | None,
    grads: Tensor,
    block_groups: Tensor,
    settings: Tensor,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    copy_out: Tensor | None,
    step: Tensor | None,
) -> None:
    """Launcher of ``fastrcnn_kernels::fused_sgd``."""
    if params.dtype != torch.float32:
        raise TypeError(f"fused_sgd: the Triton kernel takes float32 parameters, got {params.dtype}")
    if params.numel() == 0:
        if step is not None:
            step.add_(1.0 if found_inf is None else (found_inf == 0).float().view(()))
        return
    switched = [tensor is not None for tensor in (grad_scale, found_inf, copy_out, step)]
    with device_guard(params):
        _sgd_kernel[(block_groups.shape[0],)](
            params_ptr=params,
            momentum_ptr=params if momentum_buffer is None else momentum_buffer,
            grads_ptr=grads,
            groups_ptr=block_groups,
            settings_ptr=settings,
            scale_ptr=settings if grad_scale is None else grad_scale,
            found_inf_ptr=settings if found_inf is None else found_inf,
            copy_ptr=params if copy_out is None else copy_out,
            step_ptr=settings if step is None else step,
            count=params.shape[0],
            **_constants(momentum_buffer is not None, nesterov, *switched),
            **_OPTIONS,
        )


def _case(label: str, grads: str, copy: str | None, *switches: bool) -> CompileCase:
    signature = {
        "params_ptr": "*fp32",
        "momentum_ptr": "*fp32",
        "grads_ptr": f"*{grads}",
        "groups_ptr": "*i32",
        "settings_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "found_inf_ptr": "*fp32",
        "copy_ptr": f"*{copy or 'fp32'}",
        "step_ptr": "*fp32",
        "count": "i32",
    }
    constants = _constants(*switches[:4], copy is not None, *switches[4:])
    return CompileCase(label, _sgd_kernel, signature, constants, _OPTIONS)


COMPILE_CASES = [
    _case("fp32", "fp32", None, True, False, False, False, False),
    _case("fp32-nesterov-scaled", "fp32", None, True, True, True, True, True),
    _case("bf16", "bf16", "bf16", True, False, False, False, False),
    _case("fp16-scaled", "fp16", "fp16", True, False, True, True, False),
]
