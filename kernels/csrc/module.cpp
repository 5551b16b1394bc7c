// The Python module of the CPU kernels, and the only file that knows pybind11: it takes most of the time that a file
// which includes it needs to compile. A kernel is declared in one of the exports_*.h and bound here.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1")  // nothing here takes time when it runs: -O3 would only take longer to compile
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "exports_boxes.h"
#include "exports_losses.h"
#include "exports_maps.h"
#include "roi_align.h"

namespace py = pybind11;

namespace {

// Of a kernel that runs without the interpreter's lock. The small ones keep it: taking it back can take milliseconds.
const py::call_guard<py::gil_scoped_release> unlocked;

// A kernel that returns a string, returned as bytes.
template <typename... Arguments>
auto as_bytes(std::string (*kernel)(Arguments...)) {
  return [kernel](Arguments... arguments) {
    std::string text;
    {
      py::gil_scoped_release release;
      text = kernel(arguments...);
    }
    return py::bytes(text);
  };
}

void bind_boxes(py::module_& m) {
  m.def("grid_anchors", &kernels::grid_anchors, unlocked);
  m.def("pairwise_iou", &kernels::pairwise_iou, unlocked);
  py::class_<kernels::BoxCoderCall>(m, "BoxCoderCall").def(py::init<std::vector<double>, int, double, bool, int>());
  m.def("decode_boxes", &kernels::decode_boxes, unlocked);
  m.def("encode_boxes", &kernels::encode_boxes, unlocked);
  m.def("decode_proposals", &kernels::decode_proposals, unlocked);
  m.def("decode_boxes_backward", &kernels::decode_boxes_backward, unlocked);
  m.def("encode_boxes_backward", &kernels::encode_boxes_backward, unlocked);
  m.def("match_boxes", &kernels::match_boxes, unlocked);
  m.def("match_anchors", &kernels::match_anchors, unlocked);
  m.def("sample_balanced", &kernels::sample_balanced, unlocked);
  m.def("image_seeds", &kernels::image_seeds);
  m.def("append_boxes", &kernels::append_boxes);
  m.def("gather_regions", &kernels::gather_regions);
  m.def("assign_levels", &kernels::assign_levels);
  m.def("nms_segments", &kernels::nms_segments, unlocked);
  m.def("nms_groups", &kernels::nms_groups, unlocked);
  m.def("soft_nms", &kernels::soft_nms, unlocked);
  m.def("multiclass_nms", &kernels::multiclass_nms, unlocked);
  m.def("generate_proposals", &kernels::generate_proposals, unlocked);
}

void bind_losses(py::module_& m) {
  m.def("smooth_l1_forward", &kernels::smooth_l1_forward);
  m.def("smooth_l1_backward", &kernels::smooth_l1_backward);
  m.def("focal_loss_forward", &kernels::focal_loss_forward);
  m.def("focal_loss_backward", &kernels::focal_loss_backward);
  m.def("box_iou_loss_forward", &kernels::box_iou_loss_forward);
  m.def("box_iou_loss_backward", &kernels::box_iou_loss_backward);
  m.def("box_head_loss_forward", &kernels::box_head_loss_forward);
  m.def("box_head_loss_backward", &kernels::box_head_loss_backward);
  m.def("rpn_loss_forward", &kernels::rpn_loss_forward, unlocked);
  m.def("rpn_loss_backward", &kernels::rpn_loss_backward, unlocked);
  m.def("rpn_patches", &kernels::rpn_patches, unlocked);
  m.def("rpn_output_gradients", &kernels::rpn_output_gradients);
  m.def("rpn_scatter_patches", &kernels::rpn_scatter_patches, unlocked);
  m.def("mask_loss_forward", &kernels::mask_loss_forward, unlocked);
  m.def("mask_loss_backward", &kernels::mask_loss_backward, unlocked);
}

void bind_maps(py::module_& m) {
  py::class_<roi_align::Level>(m, "RoiAlignLevel").def(py::init<std::uintptr_t, int, int, double>());
  py::class_<roi_align::Problem>(m, "RoiAlignProblem")
      .def(py::init<std::vector<roi_align::Level>, int64_t, int64_t, int64_t, std::uintptr_t, std::uintptr_t, int, int,
                    int, bool, bool, int, int>());
  m.def("roi_align_forward", &kernels::roi_align_forward, unlocked);
  m.def("roi_align_backward", &kernels::roi_align_backward, unlocked);
  m.def("roi_pool_forward", &kernels::roi_pool_forward, unlocked);
  m.def("roi_pool_backward", &kernels::roi_pool_backward, unlocked);
  using Pair = std::array<int64_t, 2>;
  py::class_<kernels::DeformConvProblem>(m, "DeformConvProblem")
      .def(py::init([](const std::array<int64_t, 8>& sizes, Pair stride, Pair padding, Pair dilation, int64_t groups,
                       int64_t offset_groups, std::uintptr_t input, std::uintptr_t offset, std::uintptr_t mask,
                       int threads) {
        return kernels::DeformConvProblem{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                                          sizes[6], sizes[7], stride, padding, dilation, groups,
                                          offset_groups, input, offset, mask, threads};
      }));
  m.def("deform_conv_columns", &kernels::deform_conv_columns, unlocked);
  m.def("deform_conv_backward", &kernels::deform_conv_backward, unlocked);
  m.def("winograd_transform", &kernels::winograd_transform, unlocked);
  m.def("scale_shift", &kernels::scale_shift, unlocked);
  m.def("scale_shift_backward", &kernels::scale_shift_backward, unlocked);
  m.def("fused_sgd", &kernels::fused_sgd, unlocked);
  m.def("preprocess_images", &kernels::preprocess_images, unlocked);
  m.def("resize_image", &kernels::resize_image, unlocked);
  m.def("keypoint_targets", &kernels::keypoint_targets, unlocked);
  m.def("keypoints_from_heatmaps", &kernels::keypoints_from_heatmaps, unlocked);
  m.def("paste_masks", &kernels::paste_masks, unlocked);
  m.def("paste_masks_rle", as_bytes(&kernels::paste_masks_rle));
  m.def("rle_from_places", as_bytes(&kernels::rle_from_places));
  m.def("rasterize_polygons", &kernels::rasterize_polygons, unlocked, py::arg("vertices"), py::arg("num_vertices"),
        py::arg("polygon_offsets"), py::arg("num_polygons"), py::arg("instance_offsets"), py::arg("num_instances"),
        py::arg("idxs"), py::arg("boxes"), py::arg("clip"), py::arg("num_regions"), py::arg("size"), py::arg("masks"),
        py::arg("num_threads"));
  m.def("rasterize_bitmaps", &kernels::rasterize_bitmaps, unlocked);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastrcnn_kernels: raw buffers in, raw buffers out. Called by the Python launchers only.";
  bind_boxes(m);
  bind_losses(m);
  bind_maps(m);
}
