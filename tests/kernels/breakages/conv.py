"""Breakages of the fused convolution: reference, Winograd in C++, Triton."""

from tests.kernels.breakages import Breakage

SHARED = "kernels/fastrcnn_kernels/conv.py"
WINOGRAD = "kernels/fastrcnn_kernels/winograd.py"
CPP = "kernels/csrc/conv.cpp"
TRITON = "kernels/fastrcnn_kernels/triton/conv.py"
TESTS = "tests/kernels/test_conv.py::"
EXACT = TESTS + "test_forward_and_gradients_in_float64"

BREAKAGES = [
    Breakage(SHARED, "_scaled(grad_weight, scale).contiguous(memory_format=_layout(weight)) if wanted[1]",
             "grad_weight.contiguous(memory_format=_layout(weight)) if wanted[1]", EXACT + " -k reference"),
    Breakage(SHARED, "grad_x = torch.zeros_like(x)", "grad_x = torch.ones_like(x)", EXACT + " -k cpp"),
    Breakage(SHARED, "top, left = i * dilation[0], j * dilation[1]", "top, left = i, j", EXACT + " -k cpp"),
    Breakage(SHARED, "(grad_residual if out is not None else grad) if of_residual", "grad if of_residual",
             EXACT + " -k reference"),
    Breakage(WINOGRAD, "weight.flip(2, 3).transpose(0, 1)", "weight.flip(2).transpose(0, 1)", EXACT + " -k cpp"),
    Breakage(WINOGRAD, "total.baddbmm_(v.transpose(1, 2), d)", "torch.bmm(v.transpose(1, 2), d, out=total)",
             TESTS + "test_several_runs_of_tiles"),
    Breakage(CPP, "const T even = d4 - 4 * d2, odd = d3 - 4 * d1,", "const T even = d4 - 4 * d2, odd = d3 - 2 * d1,",
             EXACT + " -k cpp"),
    Breakage(CPP, "constexpr int kBorder = kSide == 6 ? 1 : 0;", "constexpr int kBorder = kSide == 6 ? 1 : 1;",
             EXACT + " -k cpp"),
    Breakage(CPP, "width = std::min<int64_t>(4, m.width - left);", "width = std::min<int64_t>(4, m.width - left + 1);",
             EXACT + " -k cpp"),
    Breakage(TRITON, "through = residual if residual.numel() else scaled", "through = scaled", EXACT + " -k triton"),
    Breakage(TRITON, "norm.scale_shift(out, scale, bias, residual, relu, out)",
             "norm.scale_shift(out, None, bias, residual, relu, out)", EXACT + " -k triton"),
]  # fmt: skip
