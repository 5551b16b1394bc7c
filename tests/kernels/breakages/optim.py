"""Breakages of the fused SGD."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/optim.py"
TRITON = "kernels/fastrcnn_kernels/triton/optim.py"
CPP = "kernels/csrc/optim.cpp"
TESTS = "tests/kernels/test_optim.py::"

BREAKAGES = [
    Breakage(REFERENCE, "active = group >= 0", "active = group >= -1",
             TESTS + "test_blocks_below_zero_are_left_alone -k reference"),
    Breakage(REFERENCE, "skipped.append(index)", "pass", TESTS + "test_parameters_without_gradient_are_left_alone"),
    Breakage(REFERENCE, "view.zero_() if momentum is None else view.copy_(momentum)", "view.zero_()",
             TESTS + "test_checkpoints_go_both_ways"),
    Breakage(TRITON, "grad = tl.fma(buffer, momentum, grad)", "grad = buffer", TESTS + "test_fused_sgd -k triton"),
    Breakage(TRITON, "run & (group >= 0)", "run & (group >= -1)",
             TESTS + "test_blocks_below_zero_are_left_alone -k triton"),
    Breakage(TRITON, "tl.where(decay == 0.0, grad, tl.fma(param, decay, grad))", "tl.fma(param, decay, grad)",
             TESTS + "test_weight_decay_of_zero_ignores_the_parameter -k triton"),
    Breakage(CPP, "if (groups[block] < 0) continue;", "if (groups[block] < -1) continue;",
             TESTS + "test_blocks_below_zero_are_left_alone -k cpp"),
    Breakage(CPP, "if (kScaled) grad = _mm256_div_ps(grad, divisor);", "", TESTS + "test_fused_sgd -k cpp"),
]  # fmt: skip
