// What the kernels on feature maps, images, masks and parameters export: module.cpp binds it, the file named above each
// group defines it.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "common.h"

namespace roi_align {
struct Problem;
}

namespace kernels {

// roi_align.cpp
// Pool every region into out (dense, in the features' layout). The first region that names a missing image or level, or
// -1.
int64_t roi_align_forward(const roi_align::Problem& p, std::uintptr_t out);

// roi_align_backward.cpp
// Write the gradients of all levels (the problem's levels are the outputs) from that of the pooled regions. The first
// region that names a missing image or level, or -1.
int64_t roi_align_backward(const roi_align::Problem& p, std::uintptr_t grad);

// roi_pool.cpp
// Pool every region: values and pixels. The first region that names a missing image, or -1. Sizes: N, C, H, W, K, PH,
// PW.
int64_t roi_pool_forward(std::uintptr_t input, std::uintptr_t rois, std::uintptr_t out, std::uintptr_t argmax,
                         const std::array<int64_t, 7>& sizes, double scale, bool channels_last, int dtype, int threads);
// Write the gradient of the map.
void roi_pool_backward(std::uintptr_t out, std::uintptr_t rois, std::uintptr_t grad, std::uintptr_t argmax,
                       const std::array<int64_t, 7>& sizes, bool channels_last, int dtype, int threads);

// deform_conv.cpp
struct DeformConvProblem {
  int64_t images, channels, height, width, out_height, out_width, kernel_h, kernel_w;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups, offset_groups;
  std::uintptr_t input, offset, mask;  // mask 0: none
  int threads;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t positions() const { return out_height * out_width; }
};
// Sample the columns [G, count, K, C / G] of count positions from start on.
void deform_conv_columns(const DeformConvProblem& p, int64_t start, int64_t count, std::uintptr_t columns, bool wide);
// From the gradient of the columns of count positions: the columns, and the gradients of input (added to), offset and
// mask (written).
void deform_conv_backward(const DeformConvProblem& p, int64_t start, int64_t count,
                          const std::array<std::uintptr_t, 5>& addresses, bool wide);

// 0: 6x6 pixels of the NHWC map to planes; 1: 4x4 pixels of a gradient; 2: planes to 4x4 pixels of the map.
void winograd_transform(int transform, std::uintptr_t map, std::uintptr_t planes, std::uintptr_t bias,
                        std::uintptr_t residual, int64_t height, int64_t width, int64_t channels, int64_t first,
                        int64_t count, bool relu, bool float64, int threads);

// norm.cpp
// out = relu(x * scale + shift + residual) over [outer, channels, inner]; x may be out. residual 0: none.
void scale_shift(std::uintptr_t x, std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t residual,
                 std::uintptr_t out, int64_t outer, int64_t channels, int64_t inner, bool relu, int dtype, int threads);
// Gradients of x and of the residual (0: not wanted); out 0: there was no ReLU.
void scale_shift_backward(std::uintptr_t grad, std::uintptr_t out, std::uintptr_t scale, std::uintptr_t grad_x,
                          std::uintptr_t grad_residual, int64_t outer, int64_t channels, int64_t inner, int dtype,
                          int threads);

// optim.cpp
void fused_sgd(std::uintptr_t params_address, std::uintptr_t grads_address, int grads_type,
               std::uintptr_t buffer_address, std::uintptr_t groups_address, std::uintptr_t settings_address,
               int64_t count, bool nesterov, std::uintptr_t scale_address, std::uintptr_t found_inf_address,
               std::uintptr_t copy_address, int copy_type, std::uintptr_t step_address, int num_threads);

// preprocess.cpp
using ImageDescription = std::array<int64_t, 7>;  // address, height, width, row stride, output height, width, mirrored
void preprocess_images(const std::vector<ImageDescription>& images, const std::vector<double>& mean,
                       const std::vector<double>& std, bool to_bgr255, int64_t height, int64_t width, int channels,
                       int type, bool channels_last, std::uintptr_t out, bool portable, int num_threads);
void resize_image(const ImageDescription& image, std::uintptr_t out, bool portable, int num_threads);

// keypoints.cpp
void keypoint_targets(std::uintptr_t keypoints, std::uintptr_t boxes, std::uintptr_t within, bool is_double,
                      int64_t rows, int64_t points, int64_t size, std::uintptr_t index, std::uintptr_t valid);
void keypoints_from_heatmaps(std::uintptr_t maps, std::uintptr_t boxes, bool is_double, int64_t rows, int64_t points,
                             int height, int width, int largest, std::uintptr_t out, int num_threads);

// paste.cpp
void paste_masks(std::uintptr_t masks_address, std::uintptr_t boxes_address, int64_t num_masks, int64_t size,
                 int64_t padding, bool continuous, int64_t height, int64_t width, double threshold,
                 std::uintptr_t canvas_address, int num_threads);

// paste_rle.cpp
std::string paste_masks_rle(std::uintptr_t masks_address, std::uintptr_t boxes_address, int64_t num_masks, int64_t size,
                            int64_t padding, bool continuous, int64_t height, int64_t width, double threshold_value,
                            std::uintptr_t offsets_address, int num_threads);
std::string rle_from_places(std::uintptr_t places_address, std::uintptr_t ends_address, int64_t num_masks,
                            int64_t total, std::uintptr_t offsets_address);

// rasterize.cpp
void rasterize_polygons(std::uintptr_t vertices_address, int64_t num_vertices, std::uintptr_t polygon_offsets_address,
                        int64_t num_polygons, std::uintptr_t instance_offsets_address, int64_t num_instances,
                        std::uintptr_t idxs_address, std::uintptr_t boxes_address, std::uintptr_t clip_address,
                        int64_t num_regions, int64_t size, std::uintptr_t masks_address, int num_threads);

// rasterize_bitmaps.cpp
void rasterize_bitmaps(std::uintptr_t bitmaps_address, int64_t num_bitmaps, int64_t height, int64_t width,
                       std::uintptr_t idxs_address, std::uintptr_t boxes_address, int64_t num_regions, int64_t size,
                       bool align, std::uintptr_t masks_address, int num_threads);

}  // namespace kernels
