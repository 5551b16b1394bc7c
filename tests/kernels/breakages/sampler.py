"""Breakages of the balanced sampler and of the seeds of the images."""

from tests.kernels.breakages import Breakage

REFERENCE = "kernels/fastrcnn_kernels/sampler.py"
TRITON = "kernels/fastrcnn_kernels/triton/sampler.py"
CPP = "kernels/csrc/sampler.cpp"
TESTS = "tests/kernels/test_sampler.py::"

BREAKAGES = [
    Breakage(REFERENCE, "_ROUNDS = 10", "_ROUNDS = 9", TESTS + "test_random_keys_equal_loops"),
    Breakage(REFERENCE, "num_neg = torch.minimum(negative.sum(dim=1), size - num_pos)",
             "num_neg = torch.minimum(negative.sum(dim=1), num_pos * 0 + size - most_positives)",
             TESTS + "test_counts -k reference"),
    Breakage(REFERENCE, "low | (high << 32)", "low | (high << 31)",
             TESTS + "test_image_seeds_equal_loops -k reference"),
    Breakage(TRITON, "key = words[part].to(tl.uint32, bitcast=True).to(tl.int64)",
             "key = words[part].to(tl.int32, bitcast=True).to(tl.int64)",
             TESTS + "test_equals_loops -k triton"),
    Breakage(TRITON, "if (gathered < wanted) | (gathered > ROOM):", "if gathered > ROOM:",
             TESTS + "test_what_the_triton_kernel_gathers_does_not_show -k triton"),
    Breakage(TRITON, "limit = tl.where(below < wanted, higher, limit)",
             "limit = tl.where(below <= wanted, higher, limit)",
             TESTS + "test_what_the_triton_kernel_gathers_does_not_show -k triton"),
    Breakage(TRITON, "mask=(slot >= sampled) & (slot < size)", "mask=(slot > sampled) & (slot < size)",
             TESTS + "test_counts -k triton"),
    Breakage(TRITON, "high = ((ids >> 32) & 0xFFFFFFFF)", "high = ((ids >> 31) & 0xFFFFFFFF)",
             TESTS + "test_image_seeds_equal_loops -k triton"),
    Breakage(CPP, "std::sort(items.begin(), items.begin() + count);", "std::sort(items.begin(), items.begin());",
             TESTS + "test_equals_loops -k cpp"),
    Breakage(CPP, "std::min(all.negatives.total, size - positives)",
             "std::min(all.negatives.total, size - most_positives)", TESTS + "test_counts -k cpp"),
]  # fmt: skip
