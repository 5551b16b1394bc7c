"""Breakages of the RPN's losses and of their sparse gradient through the head: reference, C++ and Triton."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/rpn_loss.py"
HEAD_REFERENCE = "kernels/fastrcnn_kernels/rpn_head_loss.py"
CPP = "kernels/csrc/rpn_loss.cpp"
HEAD_CPP = "kernels/csrc/rpn_head_loss.cpp"
TRITON = "kernels/fastrcnn_kernels/triton/rpn_loss.py"
HEAD_TRITON = "kernels/fastrcnn_kernels/triton/rpn_head_loss.py"
TESTS = "tests/kernels/test_rpn_loss.py::"
ORACLE = TESTS + "test_losses_and_dense_gradients"
SPARSE = TESTS + "test_sparse_equals_dense"
ONE_POSITION = SPARSE + "[triton-cpu-one-position-nchw]"

BREAKAGES = [
    Breakage(REFERENCE, "positive = (slot < num_positive[:, None]) & sampled",
             "positive = (slot <= num_positive[:, None]) & sampled", ORACLE + "[reference-cpu-mixed]"),
    Breakage(HEAD_REFERENCE, "inside = here[..., None] & (y >= 0)", "inside = here[..., None]",
             SPARSE + "[reference-cpu-corners-nchw]"),
    Breakage(HEAD_REFERENCE, "grad_hidden = torch.ops.aten.threshold_backward(grad_outputs @ predictors, hidden, 0)",
             "grad_hidden = grad_outputs @ predictors", SPARSE + "[reference-cpu-mixed-nchw]"),
    Breakage(CPP, "const bool positive = b < num_positive[n];", "const bool positive = b < num_positive[0];",
             ORACLE + "[cpp-cpu-mixed]"),
    Breakage(HEAD_CPP, "if (i == 0 || entries[i].pixel != entries[i - 1].pixel)",
             "if (i == 0 || entries[i].row != entries[i - 1].row)", SPARSE + "[cpp-cpu-neighbours-nchw]"),
    Breakage(TRITON, "positive = sampled & (slot < num_positive)", "positive = sampled & (slot <= num_positive)",
             ORACLE + "[triton-cpu-mixed]"),
    Breakage(TRITON, "y = (position // width * stride)", "y = (position % width * stride)",
             ORACLE + "[triton-cpu-all-positive]"),
    Breakage(HEAD_TRITON, "if (key != before) & (key != _NO_PIXEL)", "if key != _NO_PIXEL", ONE_POSITION),
    Breakage(HEAD_TRITON, "at = channel * 9 + source % 9", "at = channel * 9 + 8 - source % 9", ONE_POSITION),
]  # fmt: skip
