// What the losses export: module.cpp binds it, the file named above each group defines it.
#pragma once
#include <array>
#include <tuple>
#include <vector>

#include "common.h"

namespace kernels {

// losses.cpp
void smooth_l1_forward(std::uintptr_t input, std::uintptr_t target, std::uintptr_t out, int dtype, int64_t count,
                       double beta, int reduction, int num_threads);
void smooth_l1_backward(std::uintptr_t grad, std::uintptr_t input, std::uintptr_t target, std::uintptr_t out, int dtype,
                        int64_t count, double beta, int reduction, int num_threads);
void focal_loss_forward(std::uintptr_t logits, std::uintptr_t targets, int64_t classes, std::uintptr_t out, int dtype,
                        int64_t count, double alpha, double gamma, int reduction, int num_threads);
void focal_loss_backward(std::uintptr_t grad, std::uintptr_t logits, std::uintptr_t targets, int64_t classes,
                         std::uintptr_t out, int dtype, int64_t count, double alpha, double gamma, int reduction,
                         int num_threads);

// box_losses.cpp
void box_iou_loss_forward(std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t out, int dtype, int64_t count,
                          int kind, double eps, double inner_eps, int reduction, int num_threads);
void box_iou_loss_backward(std::uintptr_t grad, std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t out,
                           int dtype, int64_t count, int kind, double eps, double inner_eps, int reduction,
                           int num_threads);

// box_head_loss.cpp
int64_t box_head_loss_forward(std::uintptr_t logits, std::uintptr_t regression, std::uintptr_t labels,
                              std::uintptr_t proposals, std::uintptr_t gt_boxes, std::uintptr_t normaliser,
                              std::uintptr_t loss_classifier, std::uintptr_t loss_box, std::uintptr_t lse,
                              std::uintptr_t share, int dtype, int64_t rows, int64_t classes, int64_t columns,
                              const std::array<double, 4>& weights, double beta, int box_offset, int64_t ignore_index,
                              int num_threads);
void box_head_loss_backward(std::uintptr_t grad_classifier, std::uintptr_t grad_box, std::uintptr_t logits,
                            std::uintptr_t regression, std::uintptr_t labels, std::uintptr_t proposals,
                            std::uintptr_t gt_boxes, std::uintptr_t lse, std::uintptr_t share,
                            std::uintptr_t logits_grad, std::uintptr_t regression_grad, int dtype, int64_t rows,
                            int64_t classes, int64_t columns, const std::array<double, 4>& weights, double beta,
                            int box_offset, int64_t ignore_index, int num_threads);

// rpn_loss.cpp
// Addresses of the objectness and the deltas of a level, height, width, strides of both (image, channel, y, x).
using RpnLevel = std::tuple<std::uintptr_t, std::uintptr_t, int64_t, int64_t, std::array<int64_t, 4>,
                            std::array<int64_t, 4>>;
// Write both losses and their slopes in each slot's outputs.
void rpn_loss_forward(const std::vector<RpnLevel>& described, int dtype, int64_t num_anchors,
                      const std::vector<int64_t>& strides, const std::array<std::uintptr_t, 7>& tensors, int64_t images,
                      int64_t slots, int64_t total, int64_t num_gt, double beta, int box_offset, std::uintptr_t losses,
                      std::uintptr_t slopes);
// Write the dense gradients: zeros, and the slopes of each slot.
void rpn_loss_backward(const std::vector<RpnLevel>& described, int dtype, int64_t num_anchors, std::uintptr_t indices,
                       std::uintptr_t slopes, std::uintptr_t grad, int64_t images, int64_t slots, int threads);

// rpn_head_loss.cpp
// Address of a map, height, width, strides (image, channel, y, x).
using FeatureMap = std::tuple<std::uintptr_t, int64_t, int64_t, std::array<int64_t, 4>>;
// Write the 3x3 neighbourhoods of the features at the sampled positions.
void rpn_patches(const std::vector<FeatureMap>& described, int64_t element_size, int64_t images, int64_t slots,
                 int64_t channels, std::uintptr_t indices, int64_t num_anchors, bool channels_last, std::uintptr_t out,
                 int threads);
// slopes [rows, 5], the gradients of the two losses, indices [rows] -> out [rows, 5 * num_anchors].
void rpn_output_gradients(std::uintptr_t slopes, std::uintptr_t grad_losses, std::uintptr_t indices, bool doubles,
                          int64_t rows, int64_t num_anchors, std::uintptr_t out);
// Write dense maps: zeros, and the sums of the rows that reach each pixel, in the order of the slots.
void rpn_scatter_patches(const std::vector<FeatureMap>& described, int dtype, int64_t images, int64_t slots,
                         int64_t channels, std::uintptr_t indices, int64_t num_anchors, bool channels_last,
                         std::uintptr_t rows, int threads);

// mask_loss.cpp
// Write the logits of each region's class and, with targets, the loss. The first region whose label is no class, or -1.
int64_t mask_loss_forward(std::uintptr_t hidden, int dtype, bool channels_last, int64_t regions, int64_t channels,
                          int64_t pixels, std::uintptr_t weight, std::uintptr_t bias, int64_t classes,
                          std::uintptr_t labels, bool relu, int threads, std::uintptr_t targets,
                          std::uintptr_t normaliser, std::uintptr_t logits, std::uintptr_t loss);
// Write the gradients of features, weights and bias.
void mask_loss_backward(std::uintptr_t hidden, int dtype, bool channels_last, int64_t regions, int64_t channels,
                        int64_t pixels, std::uintptr_t weight, std::uintptr_t bias, int64_t classes,
                        std::uintptr_t labels, bool relu, int threads, std::uintptr_t targets, std::uintptr_t scale,
                        std::uintptr_t logits, std::uintptr_t grad_hidden, std::uintptr_t grad_weight,
                        std::uintptr_t grad_bias);

}  // namespace kernels
