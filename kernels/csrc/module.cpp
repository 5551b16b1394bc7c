// The Python module of the CPU kernels. One bind function per operator family, in the file of its name.
#include "common.h"

void bind_anchors(py::module_& m);
void bind_box_coder(py::module_& m);
void bind_box_head_loss(py::module_& m);
void bind_box_losses(py::module_& m);
void bind_boxes(py::module_& m);
void bind_deform_conv(py::module_& m);
void bind_keypoints(py::module_& m);
void bind_losses(py::module_& m);
void bind_mask_loss(py::module_& m);
void bind_matcher(py::module_& m);
void bind_multiclass_nms(py::module_& m);
void bind_nms(py::module_& m);
void bind_norm(py::module_& m);
void bind_optim(py::module_& m);
void bind_paste(py::module_& m);
void bind_paste_rle(py::module_& m);
void bind_preprocess(py::module_& m);
void bind_proposals(py::module_& m);
void bind_rasterize(py::module_& m);
void bind_rasterize_bitmaps(py::module_& m);
void bind_roi_align(py::module_& m);
void bind_roi_pool(py::module_& m);
void bind_rpn_head_loss(py::module_& m);
void bind_rpn_loss(py::module_& m);
void bind_sampler(py::module_& m);
void bind_soft_nms(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastrcnn_kernels: raw buffers in, raw buffers out. Called by the Python launchers only.";
  bind_anchors(m);
  bind_box_coder(m);
  bind_box_head_loss(m);
  bind_box_losses(m);
  bind_boxes(m);
  bind_deform_conv(m);
  bind_keypoints(m);
  bind_losses(m);
  bind_mask_loss(m);
  bind_matcher(m);
  bind_multiclass_nms(m);
  bind_nms(m);
  bind_norm(m);
  bind_optim(m);
  bind_paste(m);
  bind_paste_rle(m);
  bind_preprocess(m);
  bind_proposals(m);
  bind_rasterize(m);
  bind_rasterize_bitmaps(m);
  bind_roi_align(m);
  bind_roi_pool(m);
  bind_rpn_head_loss(m);
  bind_rpn_loss(m);
  bind_sampler(m);
  bind_soft_nms(m);
}
