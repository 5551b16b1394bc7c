"""Breakages of RoIPool: reference, C++ and Triton."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/roi_pool.py"
CPP = "kernels/csrc/roi_pool.cpp"
KERNELS = "kernels/csrc/roi_pool_kernels.h"
TRITON = "kernels/fastrcnn_kernels/triton/roi_pool.py"
TESTS = "tests/kernels/test_roi_pool.py::"
HAND = TESTS + "test_hand_computed_bins"
ORACLE = TESTS + "test_forward_and_gradient_equal_oracle"
SOME = ORACLE + " -k triton"

BREAKAGES = [
    Breakage(REFERENCE, "(scaled - whole).abs() >= 0.5", "(scaled - whole).abs() > 0.5", HAND + " -k reference"),
    Breakage(REFERENCE, "equal = (inside == best_x[..., pw : pw + 1]) & in_x[:, None, None, pw] & candidate",
             "equal = (inside == best_x[..., pw : pw + 1]) & in_x[:, None, None, pw]", ORACLE + " -k reference"),
    Breakage(CPP, "std::round(coordinate * scale)", "std::floor(coordinate * scale)", HAND + " -k cpp"),
    Breakage(KERNELS, "const Pixels higher = v > high[i];", "const Pixels higher = v >= high[i];", ORACLE + " -k cpp"),
    Breakage(TRITON, "up = tl.where(scaled < 0.0, -1.0, 1.0)", "up = 1.0", HAND + " -k triton"),
    Breakage(TRITON, "higher = value > best", "higher = value >= best", SOME),
    Breakage(TRITON, "near = (tl.load(reach) < top + TILE)", "near = (tl.load(reach) < top)", SOME),
]  # fmt: skip
