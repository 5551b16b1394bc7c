"""Breakages of the deformable convolution: reference, C++ and Triton."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/deform_conv_reference.py"
CPP = "kernels/csrc/deform_conv.cpp"
FORWARD = "kernels/fastrcnn_kernels/triton/deform_conv.py"
BACKWARD = "kernels/fastrcnn_kernels/triton/deform_conv_backward.py"
TESTS = "tests/kernels/test_deform_conv.py::"
ORACLE = TESTS + "test_forward_and_gradients_match_oracle"
FIRST = " -k triton and (0-C4 or 3-C6)"

BREAKAGES = [
    Breakage(REFERENCE, "outside = (y < -1) |", "outside = (y < 0) |", ORACLE + " -k reference"),
    Breakage(REFERENCE, "grad_y += inner * corner.weight_dy", "grad_y += inner * corner.weight_dx",
             ORACLE + " -k reference"),
    Breakage(CPP, "if (y < T(-1) || y >= height", "if (y < T(0) || y >= height",
             TESTS + "test_hand_computed_samples -k cpp"),
    Breakage(CPP, "s.weight_dx[i] = i % 2 ? wy[i / 2] : -wy[i / 2];", "s.weight_dx[i] = i % 2 ? wy[i / 2] : wy[i / 2];",
             TESTS + "test_gradcheck -k cpp"),
    Breakage(FORWARD, "pixel = tl.where(valid, row, 0.0).to(tl.int64) * width",
             "pixel = tl.where(valid, row, 0.0).to(tl.int64) * height", ORACLE + FIRST),
    Breakage(FORWARD, "far_y = tl.where(outside, 0.0, far_y)", "far_y = tl.where(outside, 0.0, 1.0 - far_y)",
             ORACLE + FIRST),
    Breakage(BACKWARD, "for step in range(tl.max(count, axis=0)):", "for step in range(tl.min(count, axis=0)):",
             ORACLE + FIRST),
    Breakage(BACKWARD, "seated = (outside == 0) & (low_y == low_y)", "seated = (outside == 0) & (low_y > 0)",
             ORACLE + FIRST),
]  # fmt: skip
