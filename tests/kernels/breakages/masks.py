"""Mask targets, pasting and run lengths."""

from __future__ import annotations

from tests.kernels.breakages import Breakage

PACKAGE = "kernels/fastrcnn_kernels"
POLYGONS = "tests/kernels/test_rasterize.py"
BITMAPS = "tests/kernels/test_rasterize_bitmaps.py"
PASTE = "tests/kernels/test_paste.py"
RLE = "tests/kernels/test_paste_rle.py"

BREAKAGES = [
    Breakage(
        f"{PACKAGE}/triton/rasterize.py",
        "filled = filled | tl.reduce(toggled, 0, _xor)",
        "filled = filled ^ tl.reduce(toggled, 0, _xor)",
        f"{POLYGONS}::test_rasterize_polygons_unites_polygons_and_fills_one_by_even_odd[triton-cpu]",
    ),
    Breakage(
        f"{PACKAGE}/triton/rasterize.py",
        "corner_x = tl.maximum(x1, 0.0)",
        "corner_x = x1",
        f"{POLYGONS}::test_rasterize_polygons_hand_computed[triton-cpu]",
    ),
    Breakage(
        f"{PACKAGE}/triton/rasterize.py",
        "row = (v + 7) // 5 - 1",
        "row = (v + 8) // 5 - 1",
        f"{POLYGONS}::test_rasterize_polygons_equals_pycocotools[triton-cpu-integers-28]",
    ),
    Breakage(
        "kernels/csrc/rasterize.cpp",
        "const double step = at - a.x + (slope < 0 ? 1.0 : 0.0);",
        "const double step = at - a.x;",
        f"{POLYGONS}::test_rasterize_polygons_equals_pycocotools[cpp-cpu-integers-28]",
    ),
    Breakage(
        f"{PACKAGE}/paste.py",
        "corners if continuous else corners[::-1]",
        "corners",
        f"{PASTE}::test_sums_round_as_the_peers[reference-cpu-maskrcnn_benchmark]",
    ),
    Breakage(
        f"{PACKAGE}/triton/paste.py",
        "return first, last - first + 1, start, tl.where(finite, stop, start)",
        "return first, last - first, start, tl.where(finite, stop, start)",
        f"{PASTE}::test_equals_maskrcnn_benchmark[triton-cpu-28-1]",
    ),
    Breakage(
        f"{PACKAGE}/triton/paste.py",
        "pixels = (drawn & (value >= threshold)).to(tl.uint8)",
        "pixels = (drawn & (value > threshold)).to(tl.uint8)",
        f"{PASTE}::test_at_the_threshold[triton-cpu]",
    ),
    Breakage(
        "kernels/csrc/paste.h",
        "const float w00 = a0 * b0, w01 = a0 * b1, w10 = a1 * b0, w11 = a1 * b1;",
        "const float w00 = a0 * b0, w01 = a1 * b0, w10 = a0 * b1, w11 = a1 * b1;",
        f"{PASTE}::test_equals_detectron2[cpp-cpu-28]",
    ),
    Breakage(
        f"{PACKAGE}/triton/paste_rle.py",
        "count + on, mask=columns < width)",
        "count, mask=columns < width)",
        f"{RLE}::test_full_columns_run_on[triton-cpu-maskrcnn_benchmark]",
    ),
    Breakage(
        f"{PACKAGE}/paste_rle.py",
        "values[3:] -= runs[1:-2]",
        "values[2:] -= runs[:-2]",
        f"{RLE}::test_equals_pycocotools[reference-cpu-28-maskrcnn_benchmark]",
    ),
    Breakage(
        "kernels/csrc/paste_rle.cpp",
        "if (on) toggles.add(start + region.rows());",
        "if (on) toggles.add(start + region.rows() - 1);",
        f"{RLE}::test_full_columns_run_on[cpp-cpu-maskrcnn_benchmark]",
    ),
    Breakage(
        f"{PACKAGE}/triton/rasterize_bitmaps.py",
        "((fraction == 0.5) & odd)",
        "(fraction == 0.5)",
        f"{BITMAPS}::test_corners_between_pixels_are_rounded_half_to_even -k triton",
    ),
    Breakage(
        "kernels/csrc/rasterize_bitmaps.cpp",
        "} else if (all && y.all_present[row] && x.all_present[column]) {",
        "} else if (all) {",
        f"{BITMAPS}::test_equals_detectron2[cpp-cpu-5]",
    ),
]
