"""SGD with momentum in one launch: parameters, gradients and momentum as flat buffers.

The update is ``torch.optim.SGD``'s with dampening 0, element by element::

    g = g / grad_scale + weight_decay * p
    b = momentum * b + g                         d = g + momentum * b  (nesterov)  or  b
    p = p - lr * d

Learning rate, weight decay, momentum, gradient scale and the overflow flag are read where the parameters are, so that a
step waits for nothing and can be part of a captured graph. :class:`FusedSGD` keeps the parameters of a model as views
into one buffer; its ``state_dict`` is that of ``torch.optim.SGD``. After the multi-tensor SGD of NVIDIA's Apex and of
MLPerf's Mask R-CNN, which has a launch a few hundred tensors; here there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn_kernels import _library

BLOCK = 1024  # parameters of one group: what the kernels look up settings for
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the kernels' type codes


def _fused_sgd_reference(
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
    count = params.shape[0]
    group = block_groups.repeat_interleave(BLOCK, output_size=BLOCK * block_groups.shape[0])[:count]  # [n]
    lr, decay, momentum = settings.to(params.dtype)[group.clamp(min=0)].unbind(1)  # [n] each
    active = group >= 0  # [n]
    if found_inf is not None:
        active = active & (found_inf == 0)
    grad = grads.to(params.dtype)  # [n]
    if grad_scale is not None:
        grad = grad / grad_scale
    grad = torch.where(decay == 0, grad, torch.addcmul(grad, decay, params))  # [n]
    if momentum_buffer is not None:
        buffer = momentum_buffer * momentum + grad  # [n]
        grad = torch.addcmul(grad, buffer, momentum) if nesterov else buffer
        momentum_buffer.copy_(torch.where(active, buffer, momentum_buffer))
    params.copy_(torch.where(active, torch.addcmul(params, grad, lr, value=-1), params))
    if copy_out is not None:
        copy_out.copy_(torch.where(active, params.to(copy_out.dtype), copy_out))
    if step is not None:
        step.add_(1.0 if found_inf is None else (found_inf == 0).to(step.dtype).view(()))


def _fused_sgd_cpp(
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
    if params.dtype != torch.float32:
        raise TypeError(f"fused_sgd: the C++ kernel takes float32 parameters, got {params.dtype}")
    _library.extension().fused_sgd(
        params.data_ptr(),
        grads.data_ptr(),
        _DTYPES.index(grads.dtype),
        0 if momentum_buffer is None else momentum_buffer.data_ptr(),
        block_groups.data_ptr(),
        settings.data_ptr(),
        params.shape[0],
        nesterov,
        0 if grad_scale is None else grad_scale.data_ptr(),
        0 if found_inf is None else found_inf.data_ptr(),
        0 if copy_out is None else copy_out.data_ptr(),
        0 if copy_out is None else _DTYPES.index(copy_out.dtype),
        0 if step is None else step.data_ptr(),
        torch.get_num_threads(),
    )


def _fused_sgd_fake(*_: object) -> None:
    return None


_fused_sgd = _library.define(
    "fused_sgd(Tensor(a!) params, Tensor(b!)? momentum_buffer, Tensor grads, Tensor block_groups, Tensor settings, "
    "bool nesterov, Tensor? grad_scale, Tensor? found_inf, Tensor(c!)? copy_out, Tensor(d!)? step) -> ()",
    reference=_fused_sgd_reference,
    fake=_fused_sgd_fake,
    cpp=_fused_sgd_cpp,
    triton="fastrcnn_kernels.triton.optim:fused_sgd",
)


def fused_sgd(
    params: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor | None,
    block_groups: Tensor,
    settings: Tensor,
    *,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copy_out: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    """One step of SGD over flat buffers, in place; equal to ``torch.optim.SGD`` to one unit in the last place.

    Nothing is read on the host. All tensors are contiguous and on one device.

    Args:
        params: float32 [n]; the reference takes any floating type.
        grads: float32, float16 or bfloat16 [n]; left as it is.
        momentum_buffer: like ``params``, zeros before the first step; None for no momentum.
        block_groups: int32 [ceil(n / 1024)]: the group of each run of 1024 parameters; below 0 the run is left alone.
        settings: float32 [groups, 3]: learning rate, weight decay and momentum of each group.
        nesterov: Nesterov's momentum.
        grad_scale: float32, one element: gradients are divided by it (the loss scale of mixed precision).
        found_inf: float32, one element: if not 0 nothing at all is changed.
        copy_out: float16 or bfloat16 [n]: gets the new parameters, rounded.
        step: float32, one element: number of steps taken, increased by 1.

    Raises:
        ValueError: for shapes, layouts or devices that do not fit.
        TypeError: for other dtypes.
    """
    count = params.shape[0] if params.dim() == 1 else -1
    for name, tensor, dtypes, size in (
        ("params", params, (torch.float32, torch.float64), count),
        ("grads", grads, (*_DTYPES, params.dtype), count),
        ("momentum_buffer", momentum_buffer, (params.dtype,), count),
        ("block_groups", block_groups, (torch.int32,), -(-count // BLOCK)),
        ("settings", settings, (torch.float32,), -1),
        ("grad_scale", grad_scale, (torch.float32,), 1),
        ("found_inf", found_inf, (torch.float32,), 1),
        ("copy_out", copy_out, _DTYPES[1:], count),
        ("step", step, (torch.float32,), 1),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"fused_sgd: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        shaped = tensor.numel() == size if size == 1 else list(tensor.shape) == [size]
        if name == "settings":
            shaped = tensor.dim() == 2 and tensor.shape[1] == 3
        if not shaped or not tensor.is_contiguous():
            raise ValueError(
                f"fused_sgd: {name} has shape {list(tensor.shape)} and strides {list(tensor.stride())} for params "
                f"{list(params.shape)}"
            )
        if tensor.device != params.device:
            raise ValueError(f"fused_sgd: params are on {params.device} but {name} on {tensor.device}")
    _fused_sgd(params, momentum_buffer, grads, block_groups, settings, nesterov, grad_scale, found_inf, copy_out, step)


class ParameterArena:
    """Parameters as views into one buffer, and their gradients into another.

    Each parameter starts at a multiple of 1024 elements, so that a block belongs to one parameter; what lies between is
    zero and stays zero. Memory formats are kept: a channels_last weight is a channels_last view.

    Args:
        groups: the parameters of each group: all of one dtype (float32, float16 or bfloat16) and device, dense.

    Attributes:
        params: the float32 buffer that is trained: the parameters themselves, or for 16-bit parameters their float32
            masters.
        weights: the buffer of 16-bit parameters; None for float32.
        grads: the gradients, of the parameters' dtype. Each parameter's ``grad`` is a view into it.
        block_groups: int32, the group of each block of 1024.

    Raises:
        ValueError: for no parameters, a parameter in two places, mixed dtypes or devices, or an expanded parameter.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self.parameters = [parameter for group in groups for parameter in group]
        if not self.parameters:
            raise ValueError("ParameterArena: needs at least one parameter")
        if len({id(parameter) for parameter in self.parameters}) != len(self.parameters):
            raise ValueError("ParameterArena: a parameter occurs twice")
        first = self.parameters[0]
        if first.dtype not in _DTYPES:
            raise ValueError(f"ParameterArena: parameters must be float32, float16 or bfloat16, got {first.dtype}")
        self.offsets: list[int] = []
        self.blocks: list[int] = []
        end = 0
        for parameter in self.parameters:
            if parameter.dtype != first.dtype or parameter.device != first.device:
                raise ValueError(
                    f"ParameterArena: parameters of {first.dtype} on {first.device} and of {parameter.dtype} on "
                    f"{parameter.device} cannot share a buffer"
                )
            if not torch.ops.aten.is_non_overlapping_and_dense(parameter):
                raise ValueError(f"ParameterArena: a parameter of {list(parameter.shape)} is not dense")
            self.offsets.append(end)
            self.blocks.append(-(-parameter.numel() // BLOCK))
            end += self.blocks[-1] * BLOCK
        flat = first.new_zeros(end)
        self.grads = first.new_zeros(end)
        members = [index for index, group in enumerate(groups) for _ in group]
        table = [member for member, blocks in zip(members, self.blocks, strict=True) for _ in range(blocks)]
        self.block_groups = torch.tensor(table, dtype=torch.int32).to(first.device)
        self.grad_views = self.views(self.grads)
        with torch.no_grad():
            for parameter, view, grad in zip(self.parameters, self.views(flat), self.grad_views, strict=True):
                view.copy_(parameter)
                parameter.data = view
                if parameter.grad is not None:
                    grad.copy_(parameter.grad)
                parameter.grad = grad
        self.weights = None if flat.dtype == torch.float32 else flat
        self.params = flat if self.weights is None else flat.float()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The part of each parameter in a buffer of the arena's length, shaped and strided as the parameter."""
        return [
            buffer.as_strided(p.size(), p.stride(), buffer.storage_offset() + offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
        ]

    def zero_grad(self) -> None:
        """Zero all gradients with one fill, and make each parameter's ``grad`` a view again."""
        self.grads.zero_()
        for parameter, view in zip(self.parameters, self.grad_views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view


class FusedSGD(torch.optim.SGD):
    """``torch.optim.SGD`` in one launch; the parameters become views into one buffer.

    Constructor, ``param_groups`` and ``state_dict`` are those of ``torch.optim.SGD``: checkpoints go both ways,
    learning rate schedulers work, and so does ``torch.amp.GradScaler`` (the kernel divides and
    looks at the overflow flag). A learning rate may be a tensor on the device. A 16-bit parameter is trained in float32
    and rounded; its float32 master is in the state as ``master``.

    ``zero_grad`` fills the gradients with zeros whatever ``set_to_none`` says, because they have their place in the
    buffer. A parameter whose ``grad`` is None is left alone, as in PyTorch; a gradient that is another tensor is copied
    into the buffer.

    Raises:
        ValueError: for a dampening, ``maximize``, groups that differ in ``nesterov``, or parameters that an
            :class:`ParameterArena` cannot hold.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3, **settings: Any) -> None:
        self.arena: ParameterArena | None = None
        super().__init__(params, lr, **settings)
        for group in self.param_groups:
            if group["dampening"] != 0 or group["maximize"]:
                raise ValueError("FusedSGD: dampening and maximize are not supported")
            if group["nesterov"] != self.param_groups[0]["nesterov"]:
                raise ValueError("FusedSGD: nesterov must be the same in all groups")
        self.arena = ParameterArena([group["params"] for group in self.param_groups])
        buffer = self.arena.params
        self._momentum = torch.zeros_like(buffer) if any(g["momentum"] for g in self.param_groups) else None
        self._momentum_views = [] if self._momentum is None else self.arena.views(self._momentum)
        self._master_views = [] if self.arena.weights is None else self.arena.views(buffer)
        self._settings = buffer.new_zeros((len(self.param_groups), 3))
        self._uploaded: dict[tuple[int, int], float] = {}
        self._skipped: list[int] = []
        self._block_groups = self.arena.block_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.arena is not None:
            raise ValueError("FusedSGD: the buffer is laid out; give all groups to the constructor")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert self.arena is not None
        self.arena.zero_grad()

    @torch.no_grad()
    def upload_settings(self) -> None:
        """Bring learning rate, weight decay and momentum of the groups to the device, as far as they changed.

        :meth:`step` does it itself. Where steps are replayed by a CUDA graph, call it before each replay: the graph
        reads the numbers where this leaves them. Waits for nothing, and changes nothing that a launched step still
        reads.
        """
        for row, group in enumerate(self.param_groups):
            for column, name in enumerate(("lr", "weight_decay", "momentum")):
                value = group[name]
                if isinstance(value, Tensor):
                    self._settings[row, column].copy_(value.view(()))
                elif self._uploaded.get((row, column)) != value:
                    # An argument of a launch: memory of the host could be written over before it was read.
                    self._settings[row, column].fill_(value)
                    self._uploaded[row, column] = value

    @torch.no_grad()
    def collect_grads(self) -> None:
        """Bring the gradients into the arena, where ``arena.grads`` has them all in a row.

        Each parameter's ``grad`` becomes the view into it. Blocks of parameters without a gradient are left out of the
        step. :meth:`step` does it itself; call it to clip the gradients or to average them over processes before.
        """
        assert self.arena is not None
        skipped, targets, sources = [], [], []
        for index, (parameter, view) in enumerate(zip(self.arena.parameters, self.arena.grad_views, strict=True)):
            grad = parameter.grad
            if grad is None:
                skipped.append(index)
            elif grad is not view and grad.data_ptr() != view.data_ptr():
                targets.append(view)
                sources.append(grad)
                parameter.grad = view
        if targets:
            torch._foreach_copy_(targets, sources)
        if skipped != self._skipped:
            self._skipped = skipped
            self._block_groups = self.arena.block_groups.clone()
            for index in skipped:
                begin = self.arena.offsets[index] // BLOCK
                self._block_groups[begin : begin + self.arena.blocks[index]] = -1
                self.arena.grad_views[index].zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters. ``closure``, where given, recomputes the loss and is returned."""
        assert self.arena is not None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.collect_grads()
        self.upload_settings()
        fused_sgd(
            self.arena.params,
            self.arena.grads,
            self._momentum,
            self._block_groups,
            self._settings,
            nesterov=self.param_groups[0]["nesterov"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            copy_out=self.arena.weights,
        )
        if len(self.state) < len(self.arena.parameters) - len(self._skipped):
            self._publish(set(self._skipped))
        return loss

    def _publish(self, left_out: set[int]) -> None:
        """Show the momentum (and masters) as the state of the parameters, as ``torch.optim.SGD`` does once stepped."""
        assert self.arena is not None
        for index, parameter in enumerate(self.arena.parameters):
            if index in left_out:
                continue
            if self._momentum_views:
                self.state[parameter]["momentum_buffer"] = self._momentum_views[index]
            if self._master_views:
                self.state[parameter]["master"] = self._master_views[index]

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the float32 masters from the parameters, after 16-bit parameters were changed from outside."""
        assert self.arena is not None
        if self.arena.weights is not None:
            self.arena.params.copy_(self.arena.weights)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a ``state_dict`` of this class or of ``torch.optim.SGD``; what it lacks starts from zero."""
        assert self.arena is not None
        super().load_state_dict(dict(state_dict))
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        self.state.clear()
        self._uploaded.clear()
        left_out = set()
        for position, index in enumerate(order):
            saved = state_dict["state"].get(index, {})
            momentum, master = saved.get("momentum_buffer"), saved.get("master")
            if self._momentum_views:
                view = self._momentum_views[position]
                view.zero_() if momentum is None else view.copy_(momentum)
            if self._master_views and master is not None:
                self._master_views[position].copy_(master)
            if momentum is None and master is None:
                left_out.add(position)
        self._publish(left_out)
