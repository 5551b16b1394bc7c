"""What a training step asks of the dispatcher and what it launches on a GPU, counted without one.

    python -m benchmarks.operator_calls [--config-file FILE] [--each PHASE] [KEY VALUE ...]

One step (forward, backward, optimizer) of a model of full depth and a few channels runs under a dispatch mode. Two
figures a phase: *calls* are what the host dispatches, an operator of ``fastrcnn_kernels`` being one; *launches* are
what a GPU is given: each operator of torch that computes something and, inside our operators, whose Triton launchers
run here with the kernels themselves left out, each kernel and each operator of torch around it. Views and allocations
are in neither. Convolutions and matrix products are counted by themselves. No shape of a step depends on its data, so
neither do the counts. Some operators of torch launch several kernels (a sort, the gradient of a convolution): seen as
one here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn.build import build_model
from fastrcnn.config import load_config
from fastrcnn.structures import BoxList, ImageList, SegmentationMask, Targets
from fastrcnn_kernels import _library

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml"

# All layers and levels, a few channels and boxes of each.
NARROW = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHT", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(16, 16, 16, 16)",
    "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32",
    "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "100", "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "100",
]  # fmt: skip

DENSE = {
    "convolution", "convolution_backward", "conv2d", "conv2d_backward", "addmm", "addmm_", "mm", "bmm", "baddbmm",
    "linear",
}  # fmt: skip
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = {"_unsafe_view", "set_", "resize_", "is_pinned", "_assert_async"}


class Call(NamedTuple):
    """``operator`` of torch, of ours or a Triton kernel, in ``phase``; ``within``: our operator that made it, or ""."""

    phase: str
    operator: str
    within: str

    @property
    def dense(self) -> bool:
        return self.operator in DENSE


class Census(TorchDispatchMode):
    """Counts what is dispatched and launched while it is entered; ``phase`` names where.

    Attributes:
        calls: dispatched by the host.
        launches: given to a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.launches: Counter[Call] = Counter()
        self._phases = ["step"]
        self._within = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        yield
        self._phases.pop()

    def _key(self, operator: str) -> Call:
        node = torch._C._current_autograd_node()
        return Call(node.metadata.get("phase", "backward") if node else self._phases[-1], operator, self._within)

    def count_kernel(self, name: str) -> None:
        self.launches[self._key(name)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        kwargs = kwargs or {}
        if namespace == _library.NAMESPACE:
            self.calls[self._key(name)] += 1
            return self._run_launcher(name, args, kwargs)
        if namespace == "aten" and name in ALLOCATE:
            # Kernels are left out: what they would have written must still be an index that is legal.
            return func(*args, **kwargs).zero_()
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if namespace == "aten" and not views and name not in FREE:
            key = self._key(name)
            self.launches[key] += 1
            if not self._within:
                self.calls[key] += 1
        return func(*args, **kwargs)

    def _run_launcher(self, name: str, args: Any, kwargs: Any) -> Any:
        operator = _library._OPERATORS[name]
        backend = "triton" if "triton" in operator.implementations else "reference"
        self._within, outer = self._within or name, self._within
        try:
            with self:
                return _library._resolve(operator, backend)(*args, **kwargs)
        finally:
            self._within = outer


@contextmanager
def _kernels_left_out(census: Census) -> Iterator[None]:
    from triton.runtime.jit import KernelInterface  # imported when used: not every machine has it

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: census.count_kernel(kernel.fn.__name__)

    with mock.patch.object(KernelInterface, "__getitem__", launcher):
        yield


def _mark(tensors: Any, phase: str) -> None:
    """Give the gradients of what was computed in ``phase`` its name; what has one keeps it."""
    values = (
        tensors.values() if isinstance(tensors, dict) else tensors if isinstance(tensors, list | tuple) else [tensors]
    )
    for value in values:
        if isinstance(value, dict | list | tuple):
            _mark(value, phase)
    nodes = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if "phase" not in node.metadata:
            node.metadata["phase"] = phase
            nodes += [parent for parent, _ in node.next_functions if parent is not None]


def _named(census: Census, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with census.phase(phase):
            result = function(*args, **kwargs)
        _mark(result, f"{phase}, gradient")
        return result

    return run


def batch(num_images: int = 2, side: int = 64, boxes: int = 3) -> tuple[ImageList, Targets]:
    """Black images with a few boxes and triangles each: what is in them changes no count."""
    one = torch.tensor([[4.0, 4.0, 40.0, 40.0]]).repeat(boxes, 1)
    triangle = [torch.tensor([[4.0, 4.0], [40.0, 4.0], [4.0, 40.0]])]
    target = BoxList(
        one, (side, side), labels=torch.ones(boxes, dtype=torch.int64),
        masks=SegmentationMask([triangle] * boxes, (side, side)),
    )  # fmt: skip
    images = ImageList(torch.zeros(num_images, 3, side, side), [(side, side)] * num_images)
    return images, Targets.from_boxlists([target] * num_images)


def census_of_a_step(config_file: Path = CONFIG, overrides: Sequence[str] = ()) -> Census:
    """Counts of one training step, after one that was not counted: caches are full, momentum exists."""
    torch.manual_seed(0)
    model = build_model(load_config(config_file, [*NARROW, *overrides]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, fused=True)
    images, targets = batch()
    census = Census()
    phases = {"backbone": (model, "features"), "rpn": (model.rpn, "forward")}
    if "box" in model.roi_heads:
        box = model.roi_heads["box"]
        phases |= {"sampling": (box, "sample"), "box head": (box, "forward_train")}
    for head in ("mask", "keypoint"):
        if head in model.roi_heads:
            phases[f"{head} head"] = (model.roi_heads[head], "forward_train")

    def step() -> None:
        losses = model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        with census.phase("optimizer"):
            optimizer.step()

    step()
    with ExitStack() as stack:
        for phase, (owner, name) in phases.items():
            stack.enter_context(mock.patch.object(owner, name, _named(census, getattr(owner, name), phase)))
        stack.enter_context(_kernels_left_out(census))
        stack.enter_context(census)
        step()
    return census


def totals(counts: Counter[Call]) -> dict[str, tuple[int, int]]:
    """For each phase in order: convolutions and matrix products, everything else."""
    result: dict[str, tuple[int, int]] = {}
    for call, n in counts.items():
        dense, rest = result.get(call.phase, (0, 0))
        result[call.phase] = (dense + n, rest) if call.dense else (dense, rest + n)
    return result


def table(census: Census) -> str:
    calls, launches = totals(census.calls), totals(census.launches)
    lines = ["| phase | calls: dense | calls: rest | launches: dense | launches: rest |", "|---|---|---|---|---|"]
    for phase in launches | calls:
        row = (*calls.get(phase, (0, 0)), *launches.get(phase, (0, 0)))
        lines.append(f"| {phase} | {' | '.join(map(str, row))} |")
    sums = [sum(t[i] for t in figures.values()) for figures in (calls, launches) for i in (0, 1)]
    return "\n".join([*lines, f"| sum | {' | '.join(map(str, sums))} |"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="operator calls and launches of one training step, by phase")
    parser.add_argument("--config-file", type=Path, default=CONFIG)
    parser.add_argument("--each", action="append", default=[], metavar="PHASE", help="list the launches of this phase")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys and their values")
    options = parser.parse_args(arguments)
    census = census_of_a_step(options.config_file, options.overrides)
    print(table(census))
    for phase in options.each:
        for call, n in census.launches.items():
            if call.phase == phase:
                print(f"{phase}: {n:4d} {call.operator}" + (f" (in {call.within})" if call.within else ""))


if __name__ == "__main__":
    main()
