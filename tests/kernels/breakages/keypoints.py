"""Breakages of the keypoint operators."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/keypoints.py"
TRITON = "kernels/fastrcnn_kernels/triton/keypoints.py"
CPP = "kernels/csrc/keypoints.cpp"
TESTS = "tests/kernels/test_keypoints.py::"

BREAKAGES = [
    Breakage(REFERENCE, "torch.where(points == high[:, None], float(size - 1), place)", "place",
             TESTS + "test_keypoint_targets_by_hand -k reference"),
    Breakage(REFERENCE, "valid = valid & seen.any(1, keepdim=True)", "valid = valid & seen",
             TESTS + "test_keypoint_targets -k reference"),
    Breakage(REFERENCE, "_CUBIC = -0.75", "_CUBIC = -0.5", TESTS + "test_keypoints_from_heatmaps -k reference"),
    Breakage(TRITON, "(ox >= left) & (ox <= right)", "(ox > left) & (ox <= right)",
             TESTS + "test_keypoint_targets_within -k triton"),
    Breakage(TRITON, "index = tl.min(tl.where(wanted, place, 2147483647))",
             "index = tl.max(tl.where(wanted, place, -1))", TESTS + "test_keypoints_from_heatmaps -k triton"),
    Breakage(TRITON, "nothing = tl.where(finite, 0.0, float(\"nan\"))", "nothing = tl.where(finite, 0.0, 0.0)",
             TESTS + "test_boxes_that_are_not_finite -k triton"),
    Breakage(CPP, "if (!(highest > peak.value)) continue;", "if (!(highest >= peak.value)) continue;",
             TESTS + "test_keypoints_from_heatmaps -k cpp"),
    Breakage(CPP, "constexpr double kNegative = 0.4454;", "constexpr double kNegative = -0.3;",
             TESTS + "test_large_maps_equal_the_reference"),
]  # fmt: skip
