// Masks pasted into images, a row of pixels at a time: only the pixels of a box are touched.
//
// The mask's cells are first spread to the columns of the pixels, once for each row of cells; what is left is a few
// multiplications a pixel on contiguous memory, compared and stored as bytes.
#include "exports_maps.h"
#include "paste.h"

namespace {

using paste::Order;

struct Pixels {
  float threshold;
  bool reaches;  // set at the threshold already
};

// Values to bytes: compared, or, for a negative threshold, times 255.
PASTE_INLINE void store_row(const float* values, int64_t count, const Pixels& pixels, uint8_t* out) {
  if (pixels.threshold < 0) {
    for (int64_t i = 0; i < count; ++i) {
      const float scaled = values[i] * 255.0f;
      out[i] = scaled > 0.0f ? static_cast<uint8_t>(std::min(scaled, 255.0f)) : uint8_t{0};
    }
  } else if (pixels.reaches) {
    for (int64_t i = 0; i < count; ++i) out[i] = values[i] >= pixels.threshold;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = values[i] > pixels.threshold;
  }
}

template <Order order>
PASTE_INLINE void paste_rows(const paste::Region& region, int64_t cells, const Pixels& pixels, paste::Scratch& scratch,
                             uint8_t* out, int64_t stride) {
  const int64_t columns = region.columns(), rows = region.rows();
  const auto &y = scratch.y, &x = scratch.x;
  const int32_t *first = x.first.data(), *second = x.second.data();
  const float *b0 = x.near.data(), *b1 = x.far.data();
  // For each row of cells: its values at the columns of the pixels, or the cells before and behind them.
  constexpr bool separable = order == Order::kSeparable;
  scratch.values.resize(cells * columns);
  scratch.more.resize(separable ? columns : (cells + 1) * columns);
  const int32_t low = *std::min_element(y.first.begin(), y.first.end());
  const int32_t high = *std::max_element(y.second.begin(), y.second.end());
  for (int64_t row = low; row <= high; ++row) {
    const float* mask = scratch.padded.data() + row * cells;
    float* before = scratch.values.data() + row * columns;
    if constexpr (separable) {
      for (int64_t i = 0; i < columns; ++i) before[i] = std::fma(mask[first[i]], b0[i], mask[second[i]] * b1[i]);
    } else {
      float* behind = scratch.more.data() + row * columns;
      for (int64_t i = 0; i < columns; ++i) {
        before[i] = mask[first[i]];
        behind[i] = mask[second[i]];
      }
    }
  }
  float* line = scratch.more.data() + (separable ? 0 : cells * columns);
  for (int64_t row = 0; row < rows; ++row) {
    const float a0 = y.near[row], a1 = y.far[row];
    const float* upper = scratch.values.data() + y.first[row] * columns;
    const float* lower = scratch.values.data() + y.second[row] * columns;
    if constexpr (separable) {
      for (int64_t i = 0; i < columns; ++i) line[i] = std::fma(upper[i], a0, lower[i] * a1);
    } else {
      const float* upper_behind = scratch.more.data() + y.first[row] * columns;
      const float* lower_behind = scratch.more.data() + y.second[row] * columns;
      for (int64_t i = 0; i < columns; ++i) {
        line[i] = paste::blend<order>(upper[i], upper_behind[i], lower[i], lower_behind[i], a0, a1, b0[i], b1[i]);
      }
    }
    store_row(line, columns, pixels, out + row * stride);
  }
}

FASTRCNN_CLONES
void paste_one(const float* mask, const float* box, int64_t size, int64_t padding, bool continuous,
               const paste::Image& image, const Pixels& pixels, paste::Scratch& scratch, uint8_t* canvas) {
  const int64_t margin = continuous ? 1 : padding;
  const paste::Region region = paste::region_of(box, size, padding, continuous, image);
  if (region.empty()) return;
  const int64_t cells = size + 2 * margin;
  paste::make_axes(region, box, size, margin, scratch);
  paste::pad_mask(mask, size, margin, scratch.padded);
  uint8_t* out = canvas + region.top * image.width + region.left;
  switch (region.order) {
    case Order::kSeparable:
      return paste_rows<Order::kSeparable>(region, cells, pixels, scratch, out, image.width);
    case Order::kSmall:
      return paste_rows<Order::kSmall>(region, cells, pixels, scratch, out, image.width);
    case Order::kContinuous:
      return paste_rows<Order::kContinuous>(region, cells, pixels, scratch, out, image.width);
  }
}

}  // namespace

void kernels::paste_masks(std::uintptr_t masks_address, std::uintptr_t boxes_address, int64_t num_masks, int64_t size,
                          int64_t padding, bool continuous, int64_t height, int64_t width, double threshold,
                          std::uintptr_t canvas_address, int num_threads) {
  const auto* masks = as_pointer<const float>(masks_address);
  const auto* boxes = as_pointer<const float>(boxes_address);
  auto* canvas = as_pointer<uint8_t>(canvas_address);  // zeros
  const paste::Image image{height, width};
  const Pixels pixels{static_cast<float>(threshold), continuous};

#pragma omp parallel num_threads(num_threads) if (num_masks > 1)
  {
    paste::Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < num_masks; ++k) {
      paste_one(masks + k * size * size, boxes + 4 * k, size, padding, continuous, image, pixels, scratch,
                canvas + k * height * width);
    }
  }
}
