"""Breakages of the RoIAlign kernels; those of the reference are in ``test_roi_align_levels.py``."""

from tests.kernels.breakages import Breakage

FORWARD = "kernels/fastrcnn_kernels/triton/roi_align.py"
BACKWARD = "kernels/fastrcnn_kernels/triton/roi_align_backward.py"
PLAN = "kernels/csrc/roi_align_plan.cpp"
CPP_BACKWARD = "kernels/csrc/roi_align_backward.cpp"
TESTS = "tests/kernels/test_roi_align.py::"
ORACLE = TESTS + "test_forward_and_gradient_match_oracle -k triton"

BREAKAGES = [
    Breakage(FORWARD, "inside = (at >= -1.0) & (at <= extent)", "inside = (at >= 0.0) & (at <= extent)", ORACLE),
    Breakage(FORWARD, "wx = fx if corner % 2 == 1 else 1.0 - fx", "wx = fx if corner % 2 == 0 else 1.0 - fx", ORACLE),
    Breakage(FORWARD, "y_low = tl.minimum(y.to(tl.int32), height - 1)", "y_low = y.to(tl.int32) + 1", ORACLE),
    Breakage(FORWARD, "live = (image >= 0.0)", "live = (image >= -9.0)",
             TESTS + "test_padding_has_no_gradient -k triton"),
    Breakage(BACKWARD, "w = tl.where(in_bins[None, :], wy * wx * norm, 0.0)",
             "w = tl.where(in_bins[None, :], wy * wx, 0.0)", ORACLE),
    Breakage(BACKWARD, "needed = in_bins & (tl.max(w, axis=0) > 0.0)", "needed = in_bins",
             TESTS + "test_a_nan_gradient_stays_near -k triton"),
    Breakage(BACKWARD, "touches & (lanes > next_lane)", "touches & (lanes > next_lane + 1)", ORACLE),
    Breakage(PLAN, "if (at < 0) at = 0;", "if (at < 0) at = -at;", TESTS + "test_hand_computed_borders -k cpp"),
    Breakage(PLAN, "if (!p.aligned && extent < 1) extent = 1;", "if (!p.aligned && extent < 0) extent = 0;",
             TESTS + "test_forward_and_gradient_match_oracle -k cpp"),
    Breakage(CPP_BACKWARD, "r.y.pixel.front() >= band.bottom", "r.y.pixel.front() >= band.bottom - 1",
             TESTS + "test_forward_and_gradient_match_oracle -k cpp"),
]  # fmt: skip
