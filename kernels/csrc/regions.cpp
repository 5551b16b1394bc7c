// What the second stage trains on, gathered; the rules are in fastrcnn_kernels/regions.py. A few thousand boxes: one
// thread.
#include <algorithm>
#include <limits>

#include "exports_boxes.h"

namespace {

using Pointers = std::vector<std::uintptr_t>;

template <typename T>
void append_boxes(const Pointers& p, int64_t images, int64_t room, int64_t more) {
  const T *boxes = as_pointer<const T>(p[0]), *scores = as_pointer<const T>(p[1]), *added = as_pointer<const T>(p[3]);
  const int64_t *count = as_pointer<const int64_t>(p[2]), *added_count = as_pointer<const int64_t>(p[4]);
  T *out = as_pointer<T>(p[5]), *out_scores = as_pointer<T>(p[6]);
  int64_t* out_count = as_pointer<int64_t>(p[7]);
  for (int64_t n = 0; n < images; ++n) {
    const int64_t first = count[n], last = first + added_count[n];
    T *row = out + n * (room + more) * 4, *score = out_scores + n * (room + more);
    std::copy_n(boxes + n * room * 4, first * 4, row);
    std::copy_n(scores + n * room, first, score);
    std::copy_n(added + n * more * 4, (last - first) * 4, row + first * 4);
    std::fill(score + first, score + last, T(1));
    std::fill(row + last * 4, row + (room + more) * 4, T(0));
    std::fill(score + last, score + room + more, -std::numeric_limits<T>::infinity());
    out_count[n] = last;
  }
}

template <typename T>
void gather_regions(const Pointers& p, int64_t images, int64_t slots, int64_t room, int64_t ground_truths,
                    int64_t most_positives, int64_t ignore_label) {
  const T *boxes = as_pointer<const T>(p[0]), *gt_boxes = as_pointer<const T>(p[1]);
  const auto integers = [&p](int i) { return as_pointer<const int64_t>(p[i]); };
  const int64_t *gt_labels = integers(2), *matched = integers(3), *indices = integers(4);
  const int64_t *num_positive = integers(5), *num_sampled = integers(6);
  T *out = as_pointer<T>(p[7]), *rois = as_pointer<T>(p[8]), *wanted = as_pointer<T>(p[11]);
  T* positive_rois = as_pointer<T>(p[12]);
  int64_t *labels = as_pointer<int64_t>(p[9]), *matched_idxs = as_pointer<int64_t>(p[10]);
  int64_t *positive_labels = as_pointer<int64_t>(p[13]), *instances = as_pointer<int64_t>(p[14]);
  int64_t total = 0;
  const T nothing[4] = {0, 0, 0, 0};
  for (int64_t n = 0; n < images; ++n) {
    total += num_positive[n];
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t row = n * slots + slot, index = std::max<int64_t>(indices[row], 0);
      const bool positive = slot < num_positive[n], valid = slot < num_sampled[n];
      const T* box = room > 0 ? boxes + (n * room + index) * 4 : nothing;
      const int64_t gt = positive && room > 0 ? matched[n * room + index] : 0;
      const T* gt_box = ground_truths > 0 ? gt_boxes + (n * ground_truths + gt) * 4 : nothing;
      const int64_t label = positive && ground_truths > 0 ? gt_labels[n * ground_truths + gt] : 0;
      std::copy_n(box, 4, out + row * 4);
      rois[row * 5] = valid ? static_cast<T>(n) : T(-1);
      std::copy_n(box, 4, rois + row * 5 + 1);
      labels[row] = valid ? label : ignore_label;
      matched_idxs[row] = gt;
      std::copy_n(gt_box, 4, wanted + row * 4);
      if (slot < most_positives) {
        const int64_t place = n * most_positives + slot;
        positive_rois[place * 5] = positive ? static_cast<T>(n) : T(-1);
        std::copy_n(box, 4, positive_rois + place * 5 + 1);
        positive_labels[place] = positive ? labels[row] : -1;
        instances[place] = positive ? n * ground_truths + gt : -1;
      }
    }
  }
  *as_pointer<int64_t>(p[15]) = std::max<int64_t>(total, 1);
}

template <typename T>
void assign_levels(const T* boxes, int64_t stride, int64_t count, const std::vector<double>& areas, int box_offset,
                   int64_t* levels) {
  const T offset = static_cast<T>(box_offset);
  for (int64_t i = 0; i < count; ++i) {
    const T* box = boxes + i * stride;
    const T area = (box[2] - box[0] + offset) * (box[3] - box[1] + offset);
    int64_t level = 0;
    for (const double smallest : areas) level += area >= static_cast<T>(smallest);
    levels[i] = level;
  }
}

}  // namespace

void kernels::append_boxes(const std::vector<std::uintptr_t>& pointers, int dtype, int64_t images, int64_t room,
                           int64_t more) {
  (dtype ? ::append_boxes<double> : ::append_boxes<float>)(pointers, images, room, more);
}

void kernels::gather_regions(const std::vector<std::uintptr_t>& pointers, int dtype, int64_t images, int64_t slots,
                             int64_t room, int64_t ground_truths, int64_t most_positives, int64_t ignore_label) {
  (dtype ? ::gather_regions<double> : ::gather_regions<float>)(pointers, images, slots, room, ground_truths,
                                                               most_positives, ignore_label);
}

void kernels::assign_levels(std::uintptr_t boxes, int64_t stride, int dtype, int64_t count,
                            const std::vector<double>& areas, int box_offset, std::uintptr_t levels) {
  auto* out = as_pointer<int64_t>(levels);
  dtype ? ::assign_levels(as_pointer<const double>(boxes), stride, count, areas, box_offset, out)
        : ::assign_levels(as_pointer<const float>(boxes), stride, count, areas, box_offset, out);
}
