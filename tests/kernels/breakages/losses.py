"""Breakages of the elementwise losses, the IoU losses and the box head's losses."""

from tests.kernels.breakages import Breakage

PYTHON, TRITON, CPP = "kernels/fastrcnn_kernels/", "kernels/fastrcnn_kernels/triton/", "kernels/csrc/"
SMOOTH, FOCAL = "tests/kernels/test_losses.py::", "tests/kernels/test_focal_loss.py::"
BOXES, HEAD = "tests/kernels/test_box_losses.py::", "tests/kernels/test_box_head_loss.py::"

BREAKAGES = [
    Breakage(PYTHON + "losses.py", "slope = (difference / beta).clamp(-1, 1)", "slope = difference.clamp(-1, 1)",
             SMOOTH + "test_gradient_equals_loops -k reference"),
    Breakage(PYTHON + "losses.py", "(labels >= 0)[..., None]", "(labels > 0)[..., None]",
             FOCAL + "test_labels_equal_loops -k reference"),
    Breakage(CPP + "losses.cpp", "if (labels[row] >= 0) continue;", "if (labels[row] >= -1) continue;",
             FOCAL + "test_labels_equal_loops -k cpp"),
    Breakage(CPP + "losses.cpp", "cross_entropy * (f.gamma * (T(1) - t - t) * ratio)",
             "f.gamma * cross_entropy * (T(1) - t - t) * ratio", FOCAL + "test_large_logits -k cpp"),
    Breakage(TRITON + "losses.py", "(tl.log(rounded) + (e - (rounded - 1.0)) * inverse)", "tl.log(rounded)",
             FOCAL + "test_small_losses_keep_their_digits -k triton"),
    Breakage(TRITON + "losses.py", "label == at % CLASSES + 1", "label == at % CLASSES",
             FOCAL + "test_labels_equal_loops -k triton"),
    Breakage(PYTHON + "box_losses.py", "return torch.where(a == b, 0.5, (a > b).to(a.dtype))",
             "return (a > b).to(a.dtype)", BOXES + "test_equals_autograd_on_ties_and_odd_boxes -k reference"),
    Breakage(CPP + "box_losses.cpp", "by_overlap = -(T(1) + iou) / divisor", "by_overlap = -T(1) / divisor",
             BOXES + "test_equals_loops -k cpp"),
    Breakage(TRITON + "box_losses.py", "top = tl.where(far, -1.0,", "top = tl.where(far, 1.0,",
             BOXES + "test_equals_loops -k triton"),
    Breakage(PYTHON + "box_head_loss.py", "return torch.where(positive[:, None], differences, 0), columns",
             "return differences, columns", HEAD + "test_equals_loops -k reference"),
    Breakage(CPP + "box_head_loss.cpp", "if (label >= 0 && label < p.classes) to[label] -= classifier_scale;",
             "if (label > 0 && label < p.classes) to[label] -= classifier_scale;", HEAD + "test_equals_loops -k cpp"),
    Breakage(TRITON + "box_head_loss.py", "return row * classes * 4 + label * 4", "return row * classes * 4",
             HEAD + "test_equals_loops -k triton"),
    Breakage(TRITON + "box_head_loss.py", "other=float(\"nan\")).to(COMPUTE)", "other=0.0).to(COMPUTE)",
             HEAD + "test_label_that_is_no_class -k triton"),
]  # fmt: skip
