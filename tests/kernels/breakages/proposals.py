"""Breakages of generate_proposals, multiclass_nms and soft_nms."""

from __future__ import annotations

from tests.kernels.breakages import Breakage

_TESTS = "tests/kernels/test_{}.py::{}"
_PACKAGE = "kernels/fastrcnn_kernels/"


def _case(path: str, old: str, new: str, family: str, test: str) -> Breakage:
    return Breakage(path, old, new, _TESTS.format(family, test))


BREAKAGES = [
    _case(_PACKAGE + "proposals.py", "logits.permute(0, 2, 3, 1).reshape", "logits.reshape",
          "proposals", "test_other_counts[reference-cpu-3-2]"),
    _case(_PACKAGE + "proposals.py", "rank = torch.where(large, rank, -math.inf)", "rank = rank + 0 * large",
          "proposals", "test_special_values[reference-cpu]"),
    _case("kernels/csrc/proposals.cpp", "position % step * count + position / step", "position",
          "proposals", "test_other_counts[cpp-cpu-3-2]"),
    _case("kernels/csrc/topk.h", "if (!rising) std::sort", "if (false) std::sort",
          "proposals", "test_many_anchors_cpp"),
    _case(_PACKAGE + "triton/topk.py", "(equal_before < quota))", "(equal_before < 0))",
          "proposals", "test_saturated_and_equal_logits[triton-cpu-0.0-False]"),
    _case(_PACKAGE + "triton/topk.py", "tl.where(score != score, -1, key).to(tl.uint32, bitcast=True)",
          "key.to(tl.uint32, bitcast=True)", "proposals", "test_special_values[triton-cpu]"),
    _case(_PACKAGE + "triton/proposals.py", "(column[None, :] < row[:, None])", "(column[None, :] > row[:, None])",
          "proposals", "test_saturated_and_equal_logits[triton-cpu-0.0-False]"),
    _case(_PACKAGE + "multiclass_nms.py", "present = scores > score_threshold", "present = scores >= score_threshold",
          "multiclass_nms", "test_against_loops -k reference"),
    _case("kernels/csrc/multiclass_nms.cpp", "index % p.classes != p.background", "true",
          "multiclass_nms", "test_batch_with_counts[cpp-cpu]"),
    _case(_PACKAGE + "soft_nms.py", "torch.where(iou > threshold, 1 - iou, 1)", "torch.where(iou > threshold, 0, 1)",
          "soft_nms", "test_hand_computed[reference-cpu]"),
    _case("kernels/csrc/soft_nms.cpp", "iou[i] > T(0) ? decay : T(1)", "decay",
          "soft_nms", "test_special_values[cpp-cpu-gaussian]"),
    _case(_PACKAGE + "triton/soft_nms.py", "tl.where(score >= min_score, score, gone)", "score",
          "soft_nms", "test_hand_computed[triton-cpu]"),
]  # fmt: skip
