"""Breakages of the preprocessing kernels; those of the reference are in ``test_preprocess.py``."""

from tests.kernels.breakages import Breakage

TRITON = "kernels/fastrcnn_kernels/triton/preprocess.py"
CPP = "kernels/csrc/preprocess.cpp"
TESTS = "tests/kernels/test_preprocess.py::"
RESIZE = "tests/kernels/test_resize_image.py::"

BREAKAGES = [
    Breakage(TRITON, "red += (across_red >> _PRECISION) * y_weight", "red += (across_green >> _PRECISION) * y_weight",
             RESIZE + "test_resize_image_keeps_channels_apart -k triton"),
    Breakage(TRITON, "widening = tl.maximum(scale, 1.0)", "widening = tl.maximum(scale, 0.9)",
             RESIZE + "test_resize_image_equals_pillow -k triton"),
    Breakage(TRITON, "(share * 4194304.0 + 0.5)", "(share * 4194304.0)",
             RESIZE + "test_resize_image_equals_pillow -k triton"),
    Breakage(TRITON, "value = tl.where(drawn, value, 0.0)", "value = value + 0.0",
             TESTS + "test_preprocess_images_equals_maskrcnn_benchmark -k triton"),
    Breakage(TRITON, "tl.maximum(out_width - 1 - x, 0)", "tl.maximum(out_width - x, 0)",
             TESTS + "test_preprocess_images_equals_maskrcnn_benchmark -k triton"),
    Breakage(CPP, "if (d[6] & 1) mirror(image.x);", "",
             TESTS + "test_preprocess_images_equals_maskrcnn_benchmark -k cpp"),
    Breakage(CPP, "static_cast<int32_t>(0.5 + share", "static_cast<int32_t>(share",
             RESIZE + "test_resize_image_equals_pillow -k cpp"),
]  # fmt: skip
