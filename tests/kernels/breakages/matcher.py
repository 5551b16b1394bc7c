"""Breakages of the matcher."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/matcher_reference.py"
TRITON = "kernels/fastrcnn_kernels/triton/matcher.py"
CPP = "kernels/csrc/matcher.cpp"
KERNELS = "kernels/csrc/matcher_kernels.h"
TESTS = "tests/kernels/test_matcher.py::"
ANCHORS = "tests/kernels/test_match_anchors.py::"

BREAKAGES = [
    Breakage(REFERENCE, "keep = best >= high_threshold", "keep = best > high_threshold",
             TESTS + "test_thresholds -k reference"),
    Breakage(REFERENCE, "torch.where(best < low_threshold,", "torch.where(best <= low_threshold,",
             TESTS + "test_thresholds -k reference"),
    Breakage(REFERENCE, "target = torch.where(pairs.valid, best_of_gt, math.inf)",
             "target = torch.where(best_of_gt > 0, best_of_gt, math.inf)",
             TESTS + "test_low_quality_restores_the_own_best_ground_truth -k reference"),
    Breakage(TRITON, "better = iou > best", "better = iou >= best",
             TESTS + "test_first_ground_truth_wins_a_tie -k triton"),
    Breakage(TRITON, "return tl.div_rn(shared, union)", "return shared * (1.0 / union)",
             TESTS + "test_equals_exact_arithmetic -k triton"),
    Breakage(TRITON, "tl.max((chunk_bits == 0).to(tl.int32), 0)", "tl.max((chunk_bits < 0).to(tl.int32), 0)",
             TESTS + "test_low_quality_restores_the_own_best_ground_truth -k triton"),
    Breakage(TRITON, "matched = tl.where(inside, matched, -2)", "matched = tl.where(inside, matched, -1)",
             ANCHORS + "test_outside_anchors_take_part_in_the_matching -k triton"),
    Breakage(TRITON, "first_cell = tl.where(past, first_cell + per_cell, first_cell)",
             "first_cell = tl.where(past, first_cell + 1, first_cell)",
             ANCHORS + "test_outside_anchors_take_part_in_the_matching -k triton"),
    Breakage(CPP, "if (open > 0) summary.tiles", "if (open > 1) summary.tiles",
             TESTS + "test_every_tie_of_the_best_is_matched -k cpp"),
    Breakage(KERNELS, "const Int<T> better = iou > scores.best[group];",
             "const Int<T> better = iou >= scores.best[group];",
             TESTS + "test_first_ground_truth_wins_a_tie -k cpp"),
]  # fmt: skip
