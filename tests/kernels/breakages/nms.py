"""Breakages of the NMS kernels; those of the reference are in ``test_nms_mutations.py``."""

from tests.kernels.breakages import Breakage

TRITON = "kernels/fastrcnn_kernels/triton/nms.py"
CPP = "kernels/csrc/nms.cpp"
TESTS = "tests/kernels/test_nms.py::"

BREAKAGES = [
    Breakage(TRITON, "drops = (ratio > limit)", "drops = (ratio >= limit)",
             TESTS + "test_ratio_equal_to_threshold -k triton"),
    Breakage(TRITON, "ratio = tl.div_rn(inter, union)", "ratio = inter * (1.0 / union)",
             TESTS + "test_ratio_equal_to_threshold -k triton"),
    Breakage(TRITON, "(columns[None, :] > rows[:, None])", "(columns[None, :] > rows[:, None] + 1)",
             TESTS + "test_nms -k triton"),
    Breakage(TRITON, "union = area[:, None] + column_area[None, :] - inter",
             "union = area[:, None] + column_area[None, :]", TESTS + "test_nms -k triton"),
    Breakage(TRITON, "place = total + tl.cumsum(kept, axis=0) - kept", "place = total + tl.cumsum(kept, axis=0)",
             TESTS + "test_nms_padded -k triton"),
    Breakage(TRITON, "later = (word_lanes > word + 1)", "later = (word_lanes > word + 2)",
             TESTS + "test_nms -k triton"),
    Breakage(TRITON, "changing = new != kept", "changing = False & (new != kept)",
             TESTS + "test_chain -k triton"),
    Breakage(TRITON, "length = (ranked != -math.inf).sum(1)", "length = (ranked == ranked).sum(1)",
             TESTS + "test_nms_padded -k triton"),
    Breakage("kernels/csrc/nms.h", "kExact ? (inter / joined > limit)", "kExact ? (inter / joined >= limit)",
             TESTS + "test_ratio_equal_to_threshold -k cpp"),
    Breakage(CPP, "const T reach_x = grid.reach * (box.x2 - box.x1 + offset);", "const T reach_x = T(0);",
             TESTS + "test_many_boxes_cpp"),
    Breakage(CPP, "fresh.next = head;", "fresh.next = -1;",
             TESTS + "test_many_boxes_cpp"),
]  # fmt: skip
