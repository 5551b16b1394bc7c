"""Breakages of the frozen batch normalisation: reference, C++ and Triton."""

from tests.kernels.breakages import Breakage

SHARED = "kernels/fastrcnn_kernels/norm.py"
CPP = "kernels/csrc/norm.cpp"
TRITON = "kernels/fastrcnn_kernels/triton/norm.py"
TESTS = "tests/kernels/test_norm.py::"
HAND = TESTS + "test_hand_computed"

BREAKAGES = [
    Breakage(SHARED, "through = grad if out is None else torch.where(out > 0, grad, 0.0)",
             "through = grad if out is None else torch.where(out >= 0, grad, 0.0)", HAND + " -k reference"),
    Breakage(SHARED, "shift = bias.to(dtype) - running_mean.to(dtype) * scale",
             "shift = bias.to(dtype) + running_mean.to(dtype) * scale", HAND + " -k reference"),
    Breakage(SHARED, "(grad_residual if out is not None else grad) if wanted", "grad if wanted", HAND + " -k cpp"),
    Breakage(CPP, "return v < T(0) ? T(0) : v;", "return v > T(0) ? v : T(0);",
             TESTS + "test_nan_and_infinity -k cpp"),
    Breakage(CPP, "strip(pass, rows, line * width, width, rows ? 0 : line % channels);",
             "strip(pass, rows, line * width, width, 0);", TESTS + "test_larger_than_a_strip -k cpp"),
    Breakage(TRITON, "return tl.where(v < 0.0, 0.0, v)", "return tl.where(v > 0.0, v, 0.0)",
             TESTS + "test_nan_and_infinity -k triton"),
    Breakage(TRITON, "other=0.0).to(dtype) > 0.0, grad, 0.0)", "other=0.0).to(dtype) >= 0.0, grad, 0.0)",
             HAND + " -k triton"),
    Breakage(TRITON, "grad *= tl.load(scale_ptr + channel", "grad += tl.load(scale_ptr + channel",
             HAND + " -k triton"),
]  # fmt: skip
