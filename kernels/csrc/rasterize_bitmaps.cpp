// Mask targets from bitmaps: the rules of fastrcnn_kernels/rasterize_bitmaps.py, one region at a time.
//
// RoIAlign of a bitmap takes a sample for each pixel of the box, and sums them in an order that decides ties. Most bins see
// one colour only, where no sum is needed: rows of pixels are combined by and and by or, and only bins that see both colours,
// those along the outline, are summed.
#include <cstring>

#include "exports_maps.h"
#include "paste.h"

namespace {

using paste::Order;

struct Bitmap {
  const uint8_t* pixels;
  int64_t height, width;
};

constexpr float kCoordinateLimit = 32768.0f;  // as in rasterize_bitmaps.py

template <Order order>
PASTE_INLINE void crop_and_resize(const Bitmap& bitmap, int64_t left, int64_t top, int64_t size,
                                  const paste::Scratch& scratch, uint8_t* mask) {
  const auto &y = scratch.y, &x = scratch.x;
  for (int64_t row = 0; row < size; ++row) {
    const uint8_t* upper = bitmap.pixels + (top + y.first[row]) * bitmap.width + left;
    const uint8_t* lower = bitmap.pixels + (top + y.second[row]) * bitmap.width + left;
    for (int64_t column = 0; column < size; ++column) {
      const int32_t first = x.first[column], second = x.second[column];
      const float value =
          paste::blend<order>(upper[first] ? 1.0f : 0.0f, upper[second] ? 1.0f : 0.0f, lower[first] ? 1.0f : 0.0f,
                              lower[second] ? 1.0f : 0.0f, y.near[row], y.far[row], x.near[column], x.far[column]);
      mask[row * size + column] = value >= 1.0f;
    }
  }
}

FASTRCNN_CLONES
void crop_one(const Bitmap& bitmap, const float* box, int64_t size, paste::Scratch& scratch, uint8_t* mask) {
  // Half to even, as Python rounds.
  const auto rounded = [](float value) { return static_cast<int64_t>(std::nearbyint(value)); };
  const auto clamped = [](int64_t value, int64_t limit) { return std::min(std::max<int64_t>(value, 0), limit); };
  const int64_t left = clamped(rounded(box[0]), bitmap.width - 1), top = clamped(rounded(box[1]), bitmap.height - 1);
  const int64_t right = std::max(clamped(rounded(box[2]), bitmap.width), left + 1);
  const int64_t bottom = std::max(clamped(rounded(box[3]), bitmap.height), top + 1);
  paste::whole_pixel_axis(bottom - top, size, 0, size, scratch.y);
  paste::whole_pixel_axis(right - left, size, 0, size, scratch.x);
  if (2 * size > paste::kSmallSides) {
    crop_and_resize<Order::kSeparable>(bitmap, left, top, size, scratch, mask);
  } else {
    crop_and_resize<Order::kSmall>(bitmap, left, top, size, scratch, mask);
  }
}

// The samples of the bins of one axis, bin after bin.
struct Samples {
  int64_t each = 0;  // of a bin
  paste::Axis axis;
  std::vector<uint8_t> present;
  std::vector<int32_t> begin, end;    // of a bin: the pixels that it sees
  std::vector<uint8_t> all_present;  // of a bin

  void make(float low, float high, int64_t size, int64_t extent) {
    const float start = low - 0.5f, bin = ((high - 0.5f) - start) / static_cast<float>(size);
    each = static_cast<int64_t>(std::ceil(bin));
    axis.resize(size * each);
    present.resize(size * each);
    begin.assign(size, static_cast<int32_t>(extent));
    end.assign(size, 0);
    all_present.assign(size, 1);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < each; ++j) {
        const int64_t at_sample = i * each + j;
        float at = (start + static_cast<float>(i) * bin) +
                   (static_cast<float>(j) + 0.5f) * bin / static_cast<float>(each);
        const bool here = at >= -1.0f && at <= static_cast<float>(extent);
        present[at_sample] = here;
        all_present[i] &= here;
        if (!here) continue;
        at = std::max(at, 0.0f);
        const int32_t cell = static_cast<int32_t>(at);
        const bool last = cell >= extent - 1;
        axis.first[at_sample] = last ? static_cast<int32_t>(extent - 1) : cell;
        axis.second[at_sample] = last ? static_cast<int32_t>(extent - 1) : cell + 1;
        axis.far[at_sample] = last ? 0.0f : at - static_cast<float>(cell);
        axis.near[at_sample] = 1.0f - axis.far[at_sample];
        begin[i] = std::min(begin[i], axis.first[at_sample]);
        end[i] = std::max(end[i], axis.second[at_sample] + 1);
      }
    }
  }
};

// The sum of a bin's samples in RoIAlign's order; samples outside the bitmap add nothing.
PASTE_INLINE float bin_sum(const Bitmap& bitmap, const Samples& y, const Samples& x, int64_t row, int64_t column) {
  float total = 0.0f;
  for (int64_t i = row * y.each; i < (row + 1) * y.each; ++i) {
    if (!y.present[i]) continue;
    const uint8_t* upper = bitmap.pixels + y.axis.first[i] * bitmap.width;
    const uint8_t* lower = bitmap.pixels + y.axis.second[i] * bitmap.width;
    const float hy = y.axis.near[i], ly = y.axis.far[i];
    for (int64_t j = column * x.each; j < (column + 1) * x.each; ++j) {
      if (!x.present[j]) continue;
      const int32_t first = x.axis.first[j], second = x.axis.second[j];
      const float hx = x.axis.near[j], lx = x.axis.far[j];
      float value = (upper[first] ? hy * hx : 0.0f) + (upper[second] ? hy * lx : 0.0f);
      value += lower[first] ? ly * hx : 0.0f;
      value += lower[second] ? ly * lx : 0.0f;
      total += value;
    }
  }
  return total;
}

struct Colours {
  std::vector<uint8_t> any, all;  // of the columns of the bitmap, over the rows that a row of bins sees
};

FASTRCNN_CLONES
void combine_rows(const Bitmap& bitmap, int64_t begin, int64_t end, int64_t left, int64_t right, Colours& colours) {
  uint8_t *any = colours.any.data(), *all = colours.all.data();
  std::memset(any + left, 0, right - left);
  std::memset(all + left, 1, right - left);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* pixels = bitmap.pixels + row * bitmap.width;
    for (int64_t column = left; column < right; ++column) {
      const uint8_t set = pixels[column] != 0;
      any[column] |= set;
      all[column] &= set;
    }
  }
}

void align_one(const Bitmap& bitmap, const float* box, int64_t size, Samples& y, Samples& x, Colours& colours,
               uint8_t* mask) {
  y.make(box[1], box[3], size, bitmap.height);
  x.make(box[0], box[2], size, bitmap.width);
  const float count = static_cast<float>(std::max<int64_t>(y.each * x.each, 1));
  colours.any.resize(bitmap.width);
  colours.all.resize(bitmap.width);
  int32_t left = static_cast<int32_t>(bitmap.width), right = 0;
  for (int64_t i = 0; i < size; ++i) {
    left = std::min(left, x.begin[i]);
    right = std::max(right, x.end[i]);
  }
  for (int64_t row = 0; row < size; ++row) {
    uint8_t* out = mask + row * size;
    if (y.begin[row] >= y.end[row] || left >= right) {
      std::memset(out, 0, size);
      continue;
    }
    combine_rows(bitmap, y.begin[row], y.end[row], left, right, colours);
    for (int64_t column = 0; column < size; ++column) {
      uint8_t any = 0, all = 1;
      for (int32_t i = x.begin[column]; i < x.end[column]; ++i) {
        any |= colours.any[i];
        all &= colours.all[i];
      }
      if (!any) {
        out[column] = 0;
      } else if (all && y.all_present[row] && x.all_present[column]) {
        out[column] = 1;
      } else {
        out[column] = bin_sum(bitmap, y, x, row, column) / count >= 0.5f;
      }
    }
  }
}

}  // namespace

void kernels::rasterize_bitmaps(std::uintptr_t bitmaps_address, int64_t num_bitmaps, int64_t height, int64_t width,
                                std::uintptr_t idxs_address, std::uintptr_t boxes_address, int64_t num_regions,
                                int64_t size, bool align, std::uintptr_t masks_address, int num_threads) {
  const auto* bitmaps = as_pointer<const uint8_t>(bitmaps_address);
  const auto* idxs = as_pointer<const int64_t>(idxs_address);
  const auto* boxes = as_pointer<const float>(boxes_address);
  auto* masks = as_pointer<uint8_t>(masks_address);

#pragma omp parallel num_threads(num_threads) if (num_regions > 8)
  {
    paste::Scratch scratch;
    Samples y, x;
    Colours colours;
#pragma omp for schedule(dynamic, 4)
    for (int64_t k = 0; k < num_regions; ++k) {
      const float* box = boxes + 4 * k;
      uint8_t* mask = masks + k * size * size;
      // Of a NaN neither is true.
      const bool bounded = std::all_of(box, box + 4, [](float v) { return std::abs(v) < kCoordinateLimit; });
      if (idxs[k] < 0 || num_bitmaps * height * width == 0 || !bounded || !(box[2] > box[0]) || !(box[3] > box[1])) {
        std::memset(mask, 0, size * size);
        continue;
      }
      const Bitmap bitmap{bitmaps + std::min(idxs[k], num_bitmaps - 1) * height * width, height, width};
      if (align) {
        align_one(bitmap, box, size, y, x, colours, mask);
      } else {
        crop_one(bitmap, box, size, scratch, mask);
      }
    }
  }
}
