// What the kernels on boxes export: module.cpp binds it, the file named above each group defines it.
#pragma once
#include <vector>

#include "common.h"

namespace kernels {

// anchors.cpp
// Levels (address of a cell [anchors, 4], anchors, height, width, stride) -> out [all anchors, 4].
void grid_anchors(const std::vector<std::vector<int64_t>>& table, bool is_double, std::uintptr_t out, int num_threads);

// boxes.cpp
// boxes1 [batches, n, 4], boxes2 [batches, m, 4] -> out [batches, n, m]: IoU, GIoU, DIoU or CIoU by kind.
void pairwise_iou(int kind, std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t angles1,
                  std::uintptr_t angles2, int64_t batches, int64_t n, int64_t m, int64_t stride1, int64_t stride2,
                  int box_offset, double eps, bool is_double, std::uintptr_t out, int num_threads);

// box_coder.cpp
struct BoxCoderCall {
  std::vector<double> weights;
  int box_offset;
  double clip;
  bool is_double;
  int num_threads;
};
// deltas [.., k, 4], anchors [.., 4], repeated to rows -> out [rows, k, 4].
void decode_boxes(const BoxCoderCall& call, std::uintptr_t deltas, int64_t delta_rows, std::uintptr_t anchors,
                  int64_t anchor_rows, int64_t rows, int64_t k, std::uintptr_t out);
// boxes [.., 4], anchors [.., 4], repeated to rows -> out [rows, 4].
void encode_boxes(const BoxCoderCall& call, std::uintptr_t boxes, int64_t box_rows, std::uintptr_t anchors, int64_t anchor_rows,
                  int64_t rows, std::uintptr_t out);
// deltas [images, per_image, 4], anchors repeated, sizes [images, 2] -> clipped boxes and flags of size.
void decode_proposals(const BoxCoderCall& call, std::uintptr_t deltas, std::uintptr_t anchors, int64_t anchor_rows,
                      std::uintptr_t sizes, int64_t images, int64_t per_image, double min_size, std::uintptr_t out,
                      std::uintptr_t valid);
// grad [rows, k, 4] -> grad_deltas [rows, k, 4] and grad_anchors [rows, 4], either may be absent (0).
void decode_boxes_backward(const BoxCoderCall& call, std::uintptr_t grad, std::uintptr_t deltas, int64_t delta_rows,
                           std::uintptr_t anchors, int64_t anchor_rows, int64_t rows, int64_t k,
                           std::uintptr_t grad_deltas, std::uintptr_t grad_anchors);
// grad [rows, 4] -> grad_boxes and grad_anchors [rows, 4], either may be absent (0).
void encode_boxes_backward(const BoxCoderCall& call, std::uintptr_t grad, std::uintptr_t boxes, int64_t box_rows,
                           std::uintptr_t anchors, int64_t anchor_rows, int64_t rows, std::uintptr_t grad_boxes,
                           std::uintptr_t grad_anchors);

// matcher.cpp
// gt_boxes [images, num_gts, 4], gt_count, boxes [num_boxes, 4] or one such a image -> out [images, num_boxes].
void match_boxes(std::uintptr_t gt_boxes, std::uintptr_t gt_count, std::uintptr_t boxes, bool is_double, int64_t images,
                 int64_t num_gts, int64_t num_boxes, bool boxes_per_image, double high, double low, bool low_quality,
                 int box_offset, std::uintptr_t out, int num_threads);
// gt_boxes [images, num_gts, 4], gt_count, cells [per_cell, 4] of each level, image_sizes [images, 2] -> out [images,
// anchors of all levels].
void match_anchors(std::uintptr_t gt_boxes, std::uintptr_t gt_count, const std::vector<std::uintptr_t>& cells,
                   const std::vector<int64_t>& per_cell, const std::vector<int64_t>& grid_sizes,
                   const std::vector<int64_t>& strides, std::uintptr_t image_sizes, bool is_double, int64_t images,
                   int64_t num_gts, double high, double low, bool low_quality, double straddle, int box_offset,
                   std::uintptr_t out, int num_threads);

// sampler.cpp
// labels [images, entries] of 1, 4 or 8 bytes, seeds [images], counts [images] or 0 for all entries -> indices [images,
// size], num_pos, num_sampled.
void sample_balanced(std::uintptr_t labels, int label_bytes, std::uintptr_t seeds, std::uintptr_t counts,
                     int64_t images, int64_t entries, int64_t size, int64_t most_positives, int64_t first_positive,
                     std::uintptr_t indices, std::uintptr_t num_pos, std::uintptr_t num_sampled, int num_threads);
// image_ids [count] -> a seed of 64 bits for each.
void image_seeds(std::uintptr_t image_ids, int64_t count, uint64_t seed, uint32_t step, uint32_t stream,
                 std::uintptr_t out);

// regions.cpp
// Addresses of boxes [images, room, 4], scores, count, added [images, more, 4], added_count -> boxes, scores, count.
void append_boxes(const std::vector<std::uintptr_t>& pointers, int dtype, int64_t images, int64_t room, int64_t more);
// Addresses of boxes, gt_boxes, gt_labels, matched, indices, num_positive, num_sampled -> the nine outputs.
void gather_regions(const std::vector<std::uintptr_t>& pointers, int dtype, int64_t images, int64_t slots, int64_t room,
                    int64_t ground_truths, int64_t most_positives, int64_t ignore_label);
// boxes [count, 4], `stride` elements apart, and the smallest area of each level but the first -> levels [count].
void assign_levels(std::uintptr_t boxes, int64_t stride, int dtype, int64_t count, const std::vector<double>& areas,
                   int box_offset, std::uintptr_t levels);

// nms.cpp
// boxes [segments, size, 4], scores [segments, size] -> keep [segments, max_output] padded with -1, counts.
void nms_segments(std::uintptr_t boxes, bool double_boxes, std::uintptr_t scores, bool double_scores, int64_t segments,
                  int64_t size, double threshold, int box_offset, int64_t max_output, bool skip_absent,
                  std::uintptr_t keep, std::uintptr_t counts, int num_threads);
// boxes [count, 4], scores [count], idxs [count] -> how many of keep [count] were filled, in decreasing score.
int64_t nms_groups(std::uintptr_t boxes, bool double_boxes, std::uintptr_t scores, bool double_scores,
                   std::uintptr_t idxs, int64_t count, double threshold, int box_offset, std::uintptr_t keep,
                   int num_threads);

// soft_nms.cpp
// boxes [count, 4], scores [count] -> how many of keep and rescored were filled, in order of selection.
int64_t soft_nms(std::uintptr_t boxes, bool doubles, std::uintptr_t scores, int64_t count, double threshold,
                 double sigma, double min_score, bool gaussian, int box_offset, std::uintptr_t keep,
                 std::uintptr_t rescored);

// multiclass_nms.cpp
// boxes [images, rows, box_classes, 4], scores [images, rows, classes]; min_size NaN: any size.
void multiclass_nms(std::uintptr_t boxes, bool doubles, std::uintptr_t scores, std::uintptr_t counts,
                    std::uintptr_t sizes, int64_t images, int64_t rows, int64_t classes, int64_t box_classes,
                    int64_t background, double score_threshold, double iou_threshold, double min_size, int box_offset,
                    int64_t limit, int64_t capacity, bool ties, bool padded, std::uintptr_t out_boxes,
                    std::uintptr_t out_scores, std::uintptr_t labels, std::uintptr_t out_rows, std::uintptr_t kept,
                    int num_threads);

// proposals.cpp
// rows: eight integers a level (Level in proposals.cpp); dtype 0 to 3: float, double, half, bfloat16.
void generate_proposals(const std::vector<int64_t>& rows, int dtype, std::uintptr_t image_sizes, int64_t images,
                        int64_t capacity, int64_t pre_nms_top_n, int64_t max_output, int64_t top_n, bool per_batch,
                        double iou_threshold, double min_size, const std::vector<double>& weights, int box_offset,
                        double clip, std::uintptr_t boxes, std::uintptr_t scores, std::uintptr_t counts,
                        int num_threads);

}  // namespace kernels
