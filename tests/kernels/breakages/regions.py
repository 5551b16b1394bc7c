"""Breakages of what is gathered for the second stage."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/regions.py"
TRITON = "kernels/fastrcnn_kernels/triton/regions.py"
CPP = "kernels/csrc/regions.cpp"
TESTS = "tests/kernels/test_regions.py::"

BREAKAGES = [
    Breakage(REFERENCE, "slot - first + room)", "slot - first + room + 1)",
             TESTS + "test_append_equals_loops -k reference"),
    Breakage(REFERENCE, "torch.where(positive, image * gt_capacity + matched_idxs, -1)",
             "torch.where(positive, image * slots + matched_idxs, -1)",
             TESTS + "test_gather_equals_loops -k reference"),
    Breakage(REFERENCE, ">= level", "> level", TESTS + "test_areas_are_where_the_level_changes"),
    Breakage(TRITON, "new = inside & (slot >= first) & (slot < last)",
             "new = inside & (slot >= first) & (slot <= last)", TESTS + "test_append_equals_loops -k triton"),
    Breakage(TRITON, "tl.where(valid, label, ignore_label.to(tl.int64))",
             "tl.where(positive, label, ignore_label.to(tl.int64))", TESTS + "test_gather_equals_loops -k triton"),
    Breakage(TRITON, "area >= tl.full([], AREA2, number)", "area > tl.full([], AREA2, number)",
             TESTS + "test_levels_equal_the_formula -k triton"),
    Breakage(CPP, "std::fill(score + first, score + last, T(1));", "std::fill(score, score + last, T(1));",
             TESTS + "test_append_equals_loops -k cpp"),
    Breakage(CPP, "positive_labels[place] = positive ? labels[row] : -1;", "positive_labels[place] = labels[row];",
             TESTS + "test_gather_equals_loops -k cpp"),
]  # fmt: skip
