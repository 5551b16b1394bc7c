// Where a mask lies in an image: what pasting and its run-length encoding share. The rules, and why the order of the
// sums is pinned, are in fastrcnn_kernels/paste.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"

#define PASTE_INLINE inline __attribute__((always_inline))

namespace paste {

constexpr float kPixelLimit = 1073741824.0f;
constexpr int64_t kSmallSides = 128;  // F.interpolate takes another kernel up to this height + width

// The order of the sums: F.interpolate's large and small kernel, F.grid_sample's.
enum class Order { kSeparable, kSmall, kContinuous };

struct Image {
  int64_t height, width;
};

// For each pixel of one axis: the cells of the mask before and behind it, and the weights of the two.
struct Axis {
  std::vector<int32_t> first, second;
  std::vector<float> near, far;

  void resize(int64_t size) {
    first.resize(size);
    second.resize(size);
    near.resize(size);
    far.resize(size);
  }
};

struct Region {
  int64_t top = 0, bottom = 0, left = 0, right = 0;  // pixels of the image
  int64_t y1 = 0, x1 = 0, h = 0, w = 0;              // the whole box; not for Order::kContinuous
  Order order = Order::kContinuous;

  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
  bool empty() const { return top >= bottom || left >= right; }
};

PASTE_INLINE int64_t whole_pixel(float value) {
  return static_cast<int64_t>(std::min(std::max(value, -kPixelLimit), kPixelLimit));
}

PASTE_INLINE Region region_of(const float* box, int64_t size, int64_t padding, bool continuous, const Image& image) {
  Region region;
  for (int i = 0; i < 4; ++i) {
    if (!std::isfinite(box[i])) return region;
  }
  if (continuous) {
    if (!(box[2] > box[0]) || !(box[3] > box[1])) return region;
    // Bounded before the conversion, so that far coordinates stay integers.
    const auto clamped = [](float value, int64_t limit) {
      return static_cast<int64_t>(std::min(std::max(value, 0.0f), static_cast<float>(limit)));
    };
    region.left = clamped(std::floor(box[0]) - 1.0f, image.width);
    region.top = clamped(std::floor(box[1]) - 1.0f, image.height);
    region.right = clamped(std::ceil(box[2]) + 1.0f, image.width);
    region.bottom = clamped(std::ceil(box[3]) + 1.0f, image.height);
    return region;
  }
  const float scale = static_cast<float>(static_cast<double>(size + 2 * padding) / static_cast<double>(size));
  const float half_x = (box[2] - box[0]) * 0.5f * scale, half_y = (box[3] - box[1]) * 0.5f * scale;
  const float centre_x = (box[2] + box[0]) * 0.5f, centre_y = (box[3] + box[1]) * 0.5f;
  // Differences of large finite numbers may overflow: a NaN counts as 0 as far as the image is concerned.
  const auto truncated = [](float value) { return std::isnan(value) ? int64_t{0} : whole_pixel(value); };
  region.x1 = truncated(centre_x - half_x);
  region.y1 = truncated(centre_y - half_y);
  const int64_t x2 = truncated(centre_x + half_x), y2 = truncated(centre_y + half_y);
  region.w = x2 - region.x1 + 1;
  region.h = y2 - region.y1 + 1;
  region.left = std::max<int64_t>(region.x1, 0);
  region.top = std::max<int64_t>(region.y1, 0);
  region.right = std::min(x2 + 1, image.width);
  region.bottom = std::min(y2 + 1, image.height);
  region.order = region.h + region.w > kSmallSides ? Order::kSeparable : Order::kSmall;
  return region;
}

// Pixels `start` up to `start + count` of `cells` resized to `length` pixels.
PASTE_INLINE void whole_pixel_axis(int64_t cells, int64_t length, int64_t start, int64_t count, Axis& axis) {
  axis.resize(count);
  int32_t* first = axis.first.data();
  int32_t* second = axis.second.data();
  float *near = axis.near.data(), *far = axis.far.data();
  if (cells == length) {
    for (int64_t i = 0; i < count; ++i) {
      first[i] = second[i] = static_cast<int32_t>(start + i);
      near[i] = 1.0f;
      far[i] = 0.0f;
    }
    return;
  }
  const float scale = static_cast<float>(cells) / static_cast<float>(length);
  const int32_t last = static_cast<int32_t>(cells - 1);
  for (int64_t i = 0; i < count; ++i) {
    const float source = std::max(std::fma(scale, static_cast<float>(start + i) + 0.5f, -0.5f), 0.0f);
    const int32_t cell = std::min(static_cast<int32_t>(source), last);
    const float weight = std::min(std::max(source - static_cast<float>(cell), 0.0f), 1.0f);
    first[i] = cell;
    second[i] = std::min(cell + 1, last);
    near[i] = 1.0f - weight;
    far[i] = weight;
  }
}

// Pixels `start` up to `start + count` in a mask of `size` cells (a margin of one around it) from `low` to `high`.
PASTE_INLINE void continuous_axis(int64_t size, float low, float high, int64_t start, int64_t count, Axis& axis) {
  axis.resize(count);
  const float extent = high - low, half = static_cast<float>(size) * 0.5f, last = static_cast<float>(size - 1);
  for (int64_t i = 0; i < count; ++i) {
    const float at = (static_cast<float>(start + i) + 0.5f - low) / extent * 2.0f - 1.0f;
    const float source = std::fma(at + 1.0f, half, -0.5f);
    const float cell = std::floor(source);
    const bool inside = cell >= -1.0f && cell <= last;  // else both cells are the margin's corner
    axis.first[i] = inside ? static_cast<int32_t>(cell) + 1 : 0;
    axis.second[i] = axis.first[i] + inside;
    axis.far[i] = inside ? source - cell : 0.0f;
    axis.near[i] = 1.0f - axis.far[i];
  }
}

// The value of a pixel from the four cells around it: weights a in y, b in x.
template <Order order>
PASTE_INLINE float blend(float p00, float p01, float p10, float p11, float a0, float a1, float b0, float b1) {
  if constexpr (order == Order::kSeparable) {
    return std::fma(std::fma(p00, b0, p01 * b1), a0, std::fma(p10, b0, p11 * b1) * a1);
  }
  const float w00 = a0 * b0, w01 = a0 * b1, w10 = a1 * b0, w11 = a1 * b1;
  const float upper = order == Order::kSmall ? std::fma(p00, w00, p01 * w01) : std::fma(p01, w01, p00 * w00);
  return std::fma(p11, w11, std::fma(p10, w10, upper));
}

// A mask [size, size] inside a margin of zeros, [size + 2 margin] squared.
PASTE_INLINE void pad_mask(const float* mask, int64_t size, int64_t margin, std::vector<float>& padded) {
  const int64_t cells = size + 2 * margin;
  padded.assign(cells * cells, 0.0f);
  for (int64_t row = 0; row < size; ++row) {
    std::copy(mask + row * size, mask + (row + 1) * size, padded.data() + (row + margin) * cells + margin);
  }
}

// What a thread keeps from mask to mask.
struct Scratch {
  Axis y, x;
  std::vector<float> padded, values, more;
  std::vector<uint8_t> bytes;
};

// The axes of one mask; `box` is float32 [4].
PASTE_INLINE void make_axes(const Region& region, const float* box, int64_t size, int64_t margin, Scratch& scratch) {
  if (region.order == Order::kContinuous) {
    continuous_axis(size, box[1], box[3], region.top, region.rows(), scratch.y);
    continuous_axis(size, box[0], box[2], region.left, region.columns(), scratch.x);
  } else {
    const int64_t cells = size + 2 * margin;
    whole_pixel_axis(cells, region.h, region.top - region.y1, region.rows(), scratch.y);
    whole_pixel_axis(cells, region.w, region.left - region.x1, region.columns(), scratch.x);
  }
}

}  // namespace paste
