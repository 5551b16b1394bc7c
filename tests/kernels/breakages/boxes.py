"""Breakages of the pairwise measures and of the anchors."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/boxes_reference.py"
TRITON = "kernels/fastrcnn_kernels/triton/boxes.py"
CPP = "kernels/csrc/boxes.cpp"
TESTS = "tests/kernels/test_box_iou.py::"
ANCHORS = "tests/kernels/test_anchors.py::"

BREAKAGES = [
    Breakage(REFERENCE, "return intersection, area1 + area2 - intersection", "return intersection, area1 + area2",
             TESTS + "test_by_hand -k reference"),
    Breakage(REFERENCE, "(width * height).clamp(min=2 * torch", "(width * height).clamp(min=torch",
             TESTS + "test_degenerate -k reference"),
    Breakage(TRITON, "iou = divide(inter, union, COMPUTE)", "iou = inter * divide(union * 0 + 1, union, COMPUTE)",
             TESTS + "test_same_bits_as_the_reference -k triton and box_iou"),
    Breakage(TRITON, "second = batch * second_stride + column", "second = column",
             TESTS + "test_batch_dimensions -k triton"),
    Breakage(TRITON, "v = 0.40528473456935108578 * (turn * turn)", "v = 0.405 * (turn * turn)",
             TESTS + "test_equals_loops -k triton and complete"),
    Breakage(CPP, "whole_rows && (row + rows - i - 1) * columns >= kLanes ? padded : columns",
             "true ? padded : columns", TESTS + "test_same_bits_as_the_reference -k cpp"),
    Breakage(CPP, "const T hull = larger(span_x * span_y, T(2) * kSmallest);", "const T hull = span_x * span_y;",
             TESTS + "test_degenerate -k cpp"),
    Breakage("kernels/fastrcnn_kernels/triton/anchors.py", "block += triton.cdiv(count, _BLOCK)", "block += 1",
             ANCHORS + "test_grid_of_many_levels -k triton"),
    Breakage("kernels/csrc/anchors.cpp", "target += 4 * level.row() * level.height;", "target += 4 * level.row();",
             ANCHORS + "test_grid_of_many_levels -k cpp"),
]  # fmt: skip
