"""Breakages of the mask loss with its last layer: reference, C++ and Triton."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/mask_loss.py"
CPP = "kernels/csrc/mask_loss.cpp"
TRITON = "kernels/fastrcnn_kernels/triton/mask_loss.py"
TESTS = "tests/kernels/test_mask_loss.py::"
ORACLE = TESTS + "test_loss_logits_and_gradients"
ABSENT = TESTS + "test_absent_regions_are_not_looked_at"

BREAKAGES = [
    Breakage(REFERENCE, "passes & ~(hidden <= 0) if relu", "passes & ~(hidden > 0) if relu", ORACLE + " -k reference"),
    Breakage(REFERENCE, "total = torch.where(labels[:, None, None] >= 0, loss, 0)",
             "total = torch.where(labels[:, None, None] > 0, loss, 0)", ORACLE + " -k reference"),
    Breakage(CPP, "out[p] = passed<Relu>(scaled, value);", "out[p] = scaled;", ORACLE + " -k cpp"),
    Breakage(CPP, "if (label < 0) {", "if (label < -1) {", ABSENT + " -k cpp"),
    Breakage(TRITON, "tl.load(bias_ptr + label)", "tl.load(bias_ptr)", TESTS + "test_hand_computed -k triton"),
    Breakage(TRITON, "grad = tl.where(h <= 0.0, 0.0, grad)", "grad = tl.where(h < -1.0, 0.0, grad)",
             ORACLE + " -k triton-cpu-one"),
    Breakage(TRITON, "loss = tl.where(inside, loss, 0.0)", "loss = loss + 0.0", ORACLE + " -k triton-cpu-odd"),
    Breakage(TRITON, "for start in range(0, regions, BLOCK_K)", "for start in range(0, BLOCK_K, BLOCK_K)",
             ORACLE + " -k triton-cpu-many-regions"),
]  # fmt: skip
