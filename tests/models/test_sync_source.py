"""No line of the training path makes the host wait for a GPU, read from the source; exceptions are listed with reasons.

``test_no_sync.py`` is the twin that runs a step and watches.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.models.sync_source import Finding, findings

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "kernels/fastrcnn_kernels"
# The step, the model, the operators: their public functions, references and launchers.
PATTERNS = (
    "fastrcnn/engine/step*.py", "fastrcnn/models/*.py", "fastrcnn/structures/padded.py", "fastrcnn/structures/views.py",
    f"{KERNELS}/*.py", f"{KERNELS}/triton/*.py",
)  # fmt: skip

DETECTS = "gives detections, in evaluation"
ONCE = "runs once, when the model is made"
CPU_ONLY = "takes CPU tensors only; reading one costs nothing"
NOT_IN_TRAINING = "an operator whose result has no fixed shape, or of inference: no training step calls it"
# (files, functions): why they may wait. Both are patterns.
ALLOWED = {
    ("fastrcnn/models/*.py", "*.__init__"): ONCE,
    ("fastrcnn/models/*.py", "*.forward_test"): DETECTS,
    ("fastrcnn/models/box_head.py", "BoxHead.candidates"): DETECTS,
    ("fastrcnn/models/retinanet.py", "RetinaNet._number_to_keep"): DETECTS,
    ("fastrcnn/models/retinanet.py", "RetinaNet._candidates"): DETECTS,
    ("fastrcnn/models/augmentation.py", "TestTimeAugmentation.*"): DETECTS,
    ("fastrcnn/models/detector.py", "GeneralizedRCNN.forward"): (
        "pads targets that were given as BoxLists, whose polygons live on the host; a training loop hands over Targets"
    ),
    ("fastrcnn/models/mask_head.py", "MaskHead.forward_train"): (
        "POSITIVES_ONLY: on a CPU the number of positives costs nothing and saves most of the head; False on a GPU"
    ),
    ("fastrcnn/models/keypoint_head.py", "KeypointHead.forward_train"): "POSITIVES_ONLY, as in the mask head",
    ("fastrcnn/structures/padded.py", "Targets.from_boxlists"): "pads on the host, before the copy to the device",
    ("fastrcnn/structures/padded.py", "_offsets"): "pads on the host, before the copy to the device",
    ("fastrcnn/structures/padded.py", "Proposals.to_boxlists"): "gives proposals, in evaluation",
    (f"{KERNELS}/*.py", "*_cpp"): CPU_ONLY,
    (f"{KERNELS}/anchors.py", "cell_anchors"): ONCE,
    (f"{KERNELS}/regions.py", "level_areas"): "a table of host numbers, computed on the CPU, once for a model",
    (f"{KERNELS}/keypoints.py", "_cubic_taps"): "of keypoints from heat maps, in evaluation",
    (f"{KERNELS}/optim.py", "ParameterArena.__init__"): "runs once, when the optimizer is made",
    (f"{KERNELS}/preprocess.py", "preprocess_images"): "sizes of the images, which are known to the host",
    (f"{KERNELS}/preprocess_arena.py", "_rows"): "reference and C++; the Triton kernel reads its table on the device",
    (f"{KERNELS}/triton/preprocess.py", "_table"): "of preprocess_images, from pageable memory; a step has an arena",
    (f"{KERNELS}/winograd.py", "_filter_matrix"): "CPU only, and once",
    (f"{KERNELS}/roi_align_reference.py", "_dense_weights"): "sampling ratio 0 in the reference; the kernels do not",
    (f"{KERNELS}/roi_align_reference.py", "_adaptive_windows"): "sampling ratio 0 in the reference; the kernels do not",
    (f"{KERNELS}/rasterize_bitmaps.py", "*"): "the reference of bitmap targets goes one mask at a time",
    (f"{KERNELS}/boxes.py", "remove_small_boxes"): NOT_IN_TRAINING,
    (f"{KERNELS}/nms.py", "_resolve_fixed_point"): "the reference of NMS, which repeats until nothing changes",
    (f"{KERNELS}/nms.py", "batched_nms_reference"): NOT_IN_TRAINING,
    (f"{KERNELS}/paste.py", "*"): NOT_IN_TRAINING,
    (f"{KERNELS}/paste_rle.py", "*"): NOT_IN_TRAINING,
    (f"{KERNELS}/soft_nms.py", "*"): NOT_IN_TRAINING,
    (f"{KERNELS}/triton/nms.py", "nms"): NOT_IN_TRAINING,
    (f"{KERNELS}/triton/nms.py", "batched_nms"): NOT_IN_TRAINING,
    (f"{KERNELS}/triton/paste_rle.py", "*"): NOT_IN_TRAINING,
    (f"{KERNELS}/triton/soft_nms.py", "*"): NOT_IN_TRAINING,
}


def on_the_path() -> Iterator[tuple[str, Finding]]:
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}):
        for finding in findings(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(ROOT)), finding


def allowance(path: str, finding: Finding) -> tuple[str, str] | None:
    return next((key for key in ALLOWED if fnmatch(path, key[0]) and fnmatch(finding.function, key[1])), None)


def test_nothing_waits_that_has_no_reason() -> None:
    waiting = [
        f"{path}:{finding.line} {finding.function}: {finding.what}"
        for path, finding in on_the_path()
        if allowance(path, finding) is None
    ]
    assert not waiting, (
        "the host would wait for a GPU on the training path, or a shape depend on data:\n  "
        + "\n  ".join(waiting)
        + "\n"
        "Keep the number on the device (a padded result and its count, torch.where, gather, torch.full), or say in "
        "ALLOWED of this file why it may wait."
    )


def test_each_reason_is_needed() -> None:
    used = {allowance(path, finding) for path, finding in on_the_path()}
    unneeded = [f"{path} {function}" for path, function in ALLOWED if (path, function) not in used]
    assert unneeded == [], "these wait no more: take them out of ALLOWED"


def test_the_files_are_there() -> None:
    for pattern in PATTERNS:
        assert list(ROOT.glob(pattern)), pattern


WAITING = {
    "item": "x.sum().item()",
    "tolist": "x.tolist()",
    "cpu": "self.count.cpu()",
    "to_cpu": "x.to('cpu')",
    "to_cpu_keyword": "x.to(device='cpu')",
    "numpy": "x.detach().numpy()",
    "nonzero": "torch.nonzero(x)",
    "nonzero_method": "(x > 0).nonzero()",
    "where_of_one": "torch.where(x > 0)",
    "unique": "x.unique()",
    "masked_select": "torch.masked_select(x, x > 0)",
    "bool": "bool(x.any())",
    "int": "int(x[0])",
    "float": "float(x.max())",
    "if": "y = 1 if x.sum() > 3 else 0",
    "if_not": "if not x.any():\n        pass",
    "if_and": "if n > 3 and x[0] > 0:\n        pass",
    "while": "while x[0] < 3:\n        x = x + 1",
    "assert": "assert (x > 0).all()",
    "through_a_name": "y = x * 2\n    z = y.sum()\n    if z > 0:\n        pass",
    "mask": "x[x > 0]",
    "mask_by_name": "keep = (x > 0) & (x < 3)\n    return x[keep]",
    "mask_inverted": "keep = torch.isfinite(x)\n    return x[~keep]",
    "mask_stored": "keep = x > 0\n    x[:, keep] = 0",
    "tensor": "torch.tensor([1.0], device=x.device)",
    "as_tensor": "torch.as_tensor([1.0], device=x.device)",
    "new_tensor": "x.new_tensor([1.0])",
    "synchronize": "torch.cuda.synchronize()",
    "stream": "torch.cuda.current_stream().synchronize()",
    "repeat_interleave": "torch.repeat_interleave(x, x)",
}  # fmt: skip

HARMLESS = {
    "shape": "if x.shape[0] > 3:\n        pass",
    "size": "if x.numel() == 0 or x.dim() != 2:\n        pass",
    "dtype": "if x.dtype == torch.float64 and x.is_cuda:\n        pass",
    "none": "if x is None:\n        pass",
    "contiguous": "if not x.is_contiguous():\n        pass",
    "where": "torch.where(x > 0, x, 0)",
    "gather": "x[x.argmax(0)]",
    "slice": "x[: n]",
    "compare": "keep = x > 0\n    return keep.sum()",
    "int": "int(n)",
    "length": "bool(len(x))",
    "full": "torch.full((), 3, device=x.device)",
    "repeat_interleave": "torch.repeat_interleave(x, x, output_size=n)",
    "to_own_device": "x.to(x.device)",
}


def source(body: str) -> str:
    return f"class A:\n  def f(self, x: Tensor, n: int) -> None:\n    {body}\n"


@pytest.mark.parametrize("name", WAITING)
def test_finds(name: str) -> None:
    found = list(findings(source(WAITING[name])))
    assert found
    assert {finding.function for finding in found} == {"A.f"}


@pytest.mark.parametrize("name", HARMLESS)
def test_lets_pass(name: str) -> None:
    assert not list(findings(source(HARMLESS[name])))


def test_leaves_out_what_runs_on_the_device() -> None:
    assert not list(findings("@triton.jit\ndef kernel(x: Tensor):\n    if x > 0:\n        x.item()\n"))
