"""Every distinct convolution of the network, forward and both gradients, in milliseconds and TFLOP/s.

    python -m benchmarks.convs [--batch-size 2] [--dtypes float32,bfloat16] [--output output/convs]
    python -m benchmarks.convs --compare benchmarks/results/<device>/convs.json      exits with 1 where one got slower

The convolutions are collected by hooks while the model of ``--config-file`` runs on the meta device, so that they are
those of the model and not those of a list; the mask head's are those of ``--positives`` regions an image. Each runs in
NCHW and in channels_last with torch's operator (cuDNN, oneDNN), and with ours where ``fastrcnn_kernels`` has one, whose
result is compared with torch's first. Writes ``convs.json`` and ``convs.md``: the rows, and their sum over a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrcnn_kernels as kernels
from benchmarks.machine import describe
from benchmarks.report import machine_line
from benchmarks.train_step.sides import DTYPES, known_key
from benchmarks.train_step.tables import Column, number, table
from fastrcnn.build import build_model
from fastrcnn.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "dgrad", "wgrad")
PROVIDERS = ("torch", "ours") if hasattr(kernels, "conv2d") else ("torch",)
# Of ours from torch's, of norms: a pass is rounded in the type, Winograd's also between its steps.
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SLOWER = 1.1  # by what a time has to grow to be called slower

Row = dict[str, Any]


@dataclass(frozen=True)
class Convolution:
    """One convolution of the model on one size of map.

    Attributes:
        name: of the first module that has it. times: how many times a step has it.
        input: [N, C, H, W]. weight: as the module holds it.
        dgrad, wgrad: whether training needs the gradient for the input, for the weight.
    """

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    transposed: bool
    dgrad: bool
    wgrad: bool
    times: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(value for name, value in asdict(self).items() if name not in ("name", "times"))

    def flops(self, output: Tensor) -> int:
        """Of one pass: a multiplication with its addition is two."""
        kernel = self.weight[2] * self.weight[3]
        pixels = self.input[0] * self.input[2] * self.input[3] if self.transposed else output[:, 0].numel()
        return 2 * pixels * self.weight[0] * self.weight[1] * kernel

    def __str__(self) -> str:
        kind = "transposed " if self.transposed else ""
        n, c, h, w = self.input
        out = self.weight[1] * self.groups if self.transposed else self.weight[0]
        return f"{kind}{self.weight[2]}x{self.weight[3]}/{self.stride[0]} {c}->{out}, {n}x{h}x{w}"


def convolution_of(name: str, module: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> Convolution:
    pair: Callable[[Any], tuple[int, int]] = lambda value: (int(value[0]), int(value[1]))  # noqa: E731
    return Convolution(
        name=name,
        input=tuple(x.shape),
        weight=tuple(module.weight.shape),
        stride=pair(module.stride),
        padding=pair(module.padding),
        dilation=pair(module.dilation),
        groups=module.groups,
        transposed=isinstance(module, nn.ConvTranspose2d),
        dgrad=x.requires_grad,
        wgrad=module.weight.requires_grad,
    )


def distinct(found: Iterable[Convolution]) -> list[Convolution]:
    """Each once, in the order of the first, with the number of times that it occurs."""
    merged: dict[tuple[Any, ...], Convolution] = {}
    for one in found:
        before = merged.get(one.key)
        merged[one.key] = replace(before, times=before.times + 1) if before else one
    return list(merged.values())


def collect(
    config_file: Path, overrides: Sequence[str], batch_size: int, size: tuple[int, int], positives: int
) -> list[Convolution]:
    """The distinct convolutions of backbone, RPN and mask head for images of ``size`` (width, height)."""
    wanted = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHT", "", *overrides]
    if known_key(config_file, "MODEL.FUSED_CONVOLUTIONS", "False"):
        wanted += ["MODEL.FUSED_CONVOLUTIONS", "False"]  # a fused one does not run as a module of its own
    model = build_model(load_config(config_file, wanted)).to("meta").train()
    found: list[Convolution] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: found.append(convolution_of(name, module, inputs[0]))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_pre_hook(hook(name))
    width, height = size
    features = model.backbone(torch.empty(batch_size, 3, height, width, device="meta"))
    model.rpn.head(features)
    if "mask" in model.roi_heads:
        mask = model.roi_heads["mask"]
        pooled = mask.feature_extractor.pooler.resolution
        channels = features[0].shape[1]
        x = torch.empty(batch_size * positives, channels, pooled, pooled, device="meta", requires_grad=True)
        for name in mask.feature_extractor.names:
            x = torch.relu(mask.feature_extractor.get_submodule(name)(x))
        mask.predictor(x)
    return distinct(found)


def torch_calls(conv: Convolution, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, dict[str, Callable[[], Any]]]:
    """The output, a gradient of it, and torch's operator for each pass that training needs."""
    arguments = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.transposed, [0, 0], conv.groups)
    output = torch.ops.aten.convolution(x, weight, None, *arguments)
    gradient = torch.randn_like(output)

    def backward(mask: list[bool]) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(gradient, x, weight, None, *arguments, mask)

    calls: dict[str, Callable[[], Any]] = {"forward": lambda: torch.ops.aten.convolution(x, weight, None, *arguments)}
    if conv.dgrad:
        calls["dgrad"] = backward([True, False, False])
    if conv.wgrad:
        calls["wgrad"] = backward([False, True, False])
    return output, gradient, calls


def our_calls(conv: Convolution, x: Tensor, weight: Tensor, gradient: Tensor) -> dict[str, Callable[[], Any]]:
    """:func:`fastrcnn_kernels.conv2d` for each pass that training needs; nothing for what it does not do."""
    if conv.transposed:
        return {}
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)

    def backward(wanted: list[bool]) -> Callable[[], Any]:
        return lambda: torch.ops.fastrcnn_kernels.conv2d_backward(gradient, x, weight, None, None, *geometry, wanted)

    calls: dict[str, Callable[[], Any]] = {"forward": lambda: kernels.conv2d(x, weight, None, *geometry)}
    if conv.dgrad:
        calls["dgrad"] = backward([True, False, False, False])
    if conv.wgrad:
        calls["wgrad"] = backward([False, True, False, False])
    return calls


def difference(name: str, ours: Any, theirs: Any) -> float:
    """Norm of the difference of what a pass computes over the norm of torch's."""
    place = {"dgrad": 0, "wgrad": 1}.get(name)
    a, b = (ours, theirs) if place is None else (ours[place], theirs[place])
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def clock(call: Callable[[], Any], device: torch.device, seconds: float, warmup: int) -> float:
    """Median milliseconds of one call, from as many as fit in ``seconds``, at least three."""
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        times: list[float] = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)
    pairs = []
    torch.cuda.synchronize()
    began = time.perf_counter()
    while len(pairs) < 3 or (time.perf_counter() - began < seconds and len(pairs) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def measure(
    convolutions: Sequence[Convolution], device: torch.device, dtypes: Sequence[str], *, seconds: float, budget: float
) -> list[Row]:
    """A row for each convolution, type, layout and provider; what failed has ``reason`` in it."""
    rows: list[Row] = []
    began = time.monotonic()
    for dtype in dtypes:
        for conv in convolutions:
            for layout in LAYOUTS:
                for provider in PROVIDERS if not conv.transposed else PROVIDERS[:1]:
                    row = {
                        "conv": str(conv), "module": conv.name, "times": conv.times, "dtype": dtype, "layout": layout,
                        "provider": provider,
                    }  # fmt: skip
                    rows.append(row)
                    if time.monotonic() - began > budget:
                        row["reason"] = "not begun, the time was up"
                        continue
                    try:
                        row |= one_row(conv, device, DTYPES[dtype], LAYOUTS[layout], provider, seconds)
                    except RuntimeError as error:
                        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return rows


def one_row(
    conv: Convolution,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    provider: str,
    seconds: float,
) -> Row:
    """``gflop`` of a pass, and ``_ms`` and ``_tflops`` of each; of ours the largest ``difference`` from torch's.

    Raises:
        RuntimeError: ours computes something else.
    """
    torch.manual_seed(0)
    x = torch.randn(conv.input, device=device, dtype=dtype)
    weight = torch.randn(conv.weight, device=device, dtype=dtype) * 0.02
    x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
    output, gradient, calls = torch_calls(conv, x, weight)
    row: Row = {"gflop": conv.flops(output) / 1e9}
    if provider == "ours":
        theirs, calls = calls, our_calls(conv, x, weight, gradient)
        row["difference"] = max(difference(name, call(), theirs[name]()) for name, call in calls.items())
        limit = MOST_DIFFERENCE[dtype]
        if not row["difference"] <= limit:
            raise RuntimeError(f"ours differs from torch's by {row['difference']:.1e}, more than {limit:g}: not timed")
    for name, call in calls.items():
        row[f"{name}_ms"] = clock(call, device, seconds, warmup=3 if device.type == "cuda" else 1)
        row[f"{name}_tflops"] = row["gflop"] / row[f"{name}_ms"]
    return row


def sums(rows: Sequence[Row]) -> list[Row]:
    """For each type, layout and provider: milliseconds and TFLOP/s of all convolutions of a step together."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["layout"], row["provider"]), []).append(row)
    found = []
    for (dtype, layout, provider), group in groups.items():
        total: Row = {"dtype": dtype, "layout": layout, "provider": provider, "missing": 0}
        gflop = ms = 0.0
        for name in PASSES:
            done = [row for row in group if f"{name}_ms" in row]
            total[f"{name}_ms"] = sum(row["times"] * row[f"{name}_ms"] for row in done)
            work = sum(row["times"] * row["gflop"] for row in done)
            if total[f"{name}_ms"]:
                total[f"{name}_tflops"] = work / total[f"{name}_ms"]
            gflop, ms = gflop + work, ms + total[f"{name}_ms"]
        total["missing"] = sum("reason" in row for row in group)
        total["all_ms"], total["gflop"] = ms, gflop
        if ms:
            total["all_tflops"] = gflop / ms
        found.append(total)
    return found


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("conv", "dtype", "layout", "provider"))


def compare(old: Sequence[Row], new: Sequence[Row], slower: float = SLOWER) -> list[Row]:
    """The passes whose time grew by more than ``slower``, worst first."""
    before = {identity(row): row for row in old}
    found = []
    for row in new:
        for name in PASSES:
            was, now = before.get(identity(row), {}).get(f"{name}_ms"), row.get(f"{name}_ms")
            if was and now and now > was * slower:
                keys = ("conv", "dtype", "layout", "provider")
                found.append(
                    {**{k: row[k] for k in keys}, "pass": name, "was": was, "now": now, "times_slower": now / was}
                )
    return sorted(found, key=lambda row: -row["times_slower"])


def text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(key, ""))


def timings() -> list[Column]:
    return [
        column
        for name in PASSES
        for column in (
            (f"{name} ms", number(f"{name}_ms", ".3f")),
            (f"{name} TFLOP/s", number(f"{name}_tflops", ".2f")),
        )
    ]


def columns(*names: str) -> list[Column]:
    return [(name.replace("_", " "), text(name)) for name in names]


def markdown(result: dict[str, Any]) -> str:
    rows = [
        *columns("conv", "module", "times", "dtype", "layout", "provider"), *timings(),
        ("difference", number("difference", ".0e")), ("why not", text("reason")),
    ]  # fmt: skip
    together = [
        *columns("dtype", "layout", "provider"), *timings(), ("all ms", number("all_ms", ".2f")),
        ("all TFLOP/s", number("all_tflops", ".2f")), ("missing", text("missing")),
    ]  # fmt: skip
    slower = [
        *columns("conv", "dtype", "layout", "provider", "pass"), ("was ms", number("was", ".3f")),
        ("ms", number("now", ".3f")), ("times slower", number("times_slower", ".2f")),
    ]  # fmt: skip
    lines = [machine_line(result["machine_info"]), "", "## All convolutions of a step", ""]
    lines += table(together, result["sums"])
    if result.get("slower"):
        lines += ["", "## Slower than before", "", *table(slower, result["slower"])]
    return "\n".join([*lines, "", "## Each convolution", "", *table(rows, result["rows"])]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.train_step.__main__ import image_size, words

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", type=Path, default=ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml")
    add("--device", default="cuda" if gpu else "cpu")
    add("--batch-size", type=int, default=2)
    add("--size", type=image_size, default=(1344, 800), metavar="WxH")
    add("--positives", type=int, default=64, help="regions an image of the mask head (%(default)s)")
    add("--dtypes", type=words(tuple(DTYPES)), default=("float32", "bfloat16") if gpu else ("float32",))
    add("--seconds", type=float, default=0.05 if gpu else 0.2, help="for each pass; at least three calls (%(default)s)")
    add("--budget", type=float, default=float("inf"), help="seconds after which no further row begins")
    add("--compare", type=Path, help="a former convs.json: what got slower by more than a tenth is listed")
    add("--output", type=Path, default=ROOT / "output" / "convs")
    add("overrides", nargs="*", metavar="KEY VALUE")
    args = parser.parse_intermixed_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
    try:
        old = json.loads(args.compare.read_text())["rows"] if args.compare else []
        found = collect(args.config_file, args.overrides, args.batch_size, args.size, args.positives)
    except (ConfigError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = measure(found, device, args.dtypes, seconds=args.seconds, budget=args.budget)
    slower = compare(old, rows)
    result = {"machine_info": describe(), "rows": rows, "sums": sums(rows), "slower": slower}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "convs.json").write_text(json.dumps(result, indent=1))
    (args.output / "convs.md").write_text(markdown(result))
    print(markdown(result))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
