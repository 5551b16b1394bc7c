"""Breakages of the box coder."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/box_coder_reference.py"
TRITON = "kernels/fastrcnn_kernels/triton/box_coder.py"
CPP = "kernels/csrc/box_coder.cpp"
TESTS = "tests/kernels/test_box_coder.py::"
GRADIENT = "tests/kernels/test_box_coder_gradient.py::"
MATH = "tests/kernels/test_box_coder_math.py::"
PROPOSALS = "tests/kernels/test_decode_proposals.py::"

BREAKAGES = [
    Breakage(REFERENCE, "corners = [x - half_width, y - half_height, x + half_width - box_offset,",
             "corners = [x - half_width, y - half_height, x + half_width,",
             TESTS + "test_decode_golden -k reference"),
    Breakage(REFERENCE, "torch.where(dw <= clip, grown_x * width / ww, 0)",
             "torch.where(dw < clip, grown_x * width / ww, 0)",
             GRADIENT + "test_gradient_is_that_of_the_reference -k reference"),
    Breakage(TRITON, "p = p * r + 8.3334519073e-3", "p = p * r + 8.4334519073e-3",
             MATH + "test_exponential -k triton"),
    Breakage(TRITON, "subnormal = x < 1.17549435e-38", "subnormal = x < 0.0",
             MATH + "test_logarithm -k triton"),
    Breakage(TRITON, "delta = (row % first_rows) * k + (index - row * k)", "delta = index",
             TESTS + "test_class_specific_deltas_and_broadcast -k triton"),
    Breakage(TRITON, "image = sizes_ptr + (index // per_image) * 2", "image = sizes_ptr",
             PROPOSALS + "test_decode_proposals -k triton"),
    Breakage(TRITON, "grad_w = tl.where(dw <= CLIP,", "grad_w = tl.where(dw == dw,",
             GRADIENT + "test_gradient_is_that_of_the_reference -k triton"),
    Breakage(CPP, "dw <= c.clip ? grown_x * width / c.ww : T(0)", "dw < c.clip ? grown_x * width / c.ww : T(0)",
             GRADIENT + "test_gradient_is_that_of_the_reference -k cpp"),
    Breakage(CPP, "const int64_t a = begin % period_a, b = begin % period_b;",
             "const int64_t a = begin % period_a, b = 0;",
             TESTS + "test_broadcast_shapes -k cpp"),
]  # fmt: skip
