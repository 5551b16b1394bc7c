// Pasted masks as COCO run lengths, without the image: down the columns of a box, from the mask's cells to the string.
//
// Between four cells that all lie clearly on one side of the threshold every pixel lies there too, whatever the sums round
// to. Only pixels between cells on both sides are computed, by the sums that paste.cpp makes; the rest is stepped over.
#include <string>

#include "exports_maps.h"
#include "paste.h"

namespace {

using paste::Order;

// Sums of weights that are not exactly one, and their roundings, stay far below this share of the largest cell.
constexpr float kRounding = 4e-6f;
constexpr float kFinite = 1e30f;

enum Side : uint8_t { kOff = 0, kOn = 1, kBoth = 2 };

struct Threshold {
  float value;
  bool reaches;

  bool is_on(float pixel) const { return reaches ? pixel >= value : pixel > value; }
  Side side(float low, float high) const {
    const float slack = kRounding * std::max(std::abs(low), std::abs(high));
    if (!(low > -kFinite) || !(high < kFinite)) return kBoth;
    return low - slack > value ? kOn : high + slack < value ? kOff : kBoth;
  }
};

// Rows of pixels from `begin` up to `end` that lie between two rows of cells, or on one side whatever their cells.
struct Span {
  int32_t begin, end, upper, lower;
  Side side;
};

// The places, counted down the columns, where the mask changes; two changes at one place are none.
struct Toggles {
  std::vector<int64_t> places;

  void add(int64_t place) {
    if (!places.empty() && places.back() == place) {
      places.pop_back();
    } else {
      places.push_back(place);
    }
  }
};

// pycocotools' string: differences to the run before the last, five bits a character.
void append_run(int64_t value, std::string& out) {
  bool more = true;
  while (more) {
    const int64_t bits = value & 0x1f;
    value >>= 5;
    more = (bits & 0x10) ? value != -1 : value != 0;
    out.push_back(static_cast<char>((more ? bits | 0x20 : bits) + 48));
  }
}

std::string rle_string(const std::vector<int64_t>& places, int64_t total) {
  std::string out;
  int64_t before = 0, runs[3] = {0, 0, 0};  // the last three
  int64_t count = 0;
  const auto append = [&](int64_t run) {
    append_run(count > 2 ? run - runs[(count - 2) % 3] : run, out);
    runs[count++ % 3] = run;
  };
  for (const int64_t place : places) {
    append(place - before);
    before = place;
  }
  if (places.empty() || before < total) append(total - before);
  return out;
}

// The spans of one column of cells: rows of pixels on one side are joined.
PASTE_INLINE void find_spans(const std::vector<Span>& rows, const float* cells, int64_t size, int32_t first,
                             int32_t second, const Threshold& threshold, std::vector<Span>& spans) {
  spans.clear();
  for (Span span : rows) {
    const float *upper = cells + span.upper * size, *lower = cells + span.lower * size;
    const float p00 = upper[first], p01 = upper[second], p10 = lower[first], p11 = lower[second];
    // A NaN is kept by the sum, not by min and max.
    const float sum = p00 + p01 + p10 + p11;
    span.side = std::isnan(sum) ? kBoth
                                : threshold.side(std::min(std::min(p00, p01), std::min(p10, p11)),
                                                 std::max(std::max(p00, p01), std::max(p10, p11)));
    if (span.side != kBoth && !spans.empty() && spans.back().side == span.side) {
      spans.back().end = span.end;
    } else {
      spans.push_back(span);
    }
  }
}

template <Order order>
PASTE_INLINE void walk(const paste::Region& region, int64_t size, const Threshold& threshold, int64_t height,
                       const paste::Scratch& scratch, Toggles& toggles) {
  const auto &y = scratch.y, &x = scratch.x;
  const float* cells = scratch.padded.data();
  std::vector<Span> rows, spans;
  for (int32_t row = 0; row < region.rows(); ++row) {
    const int32_t upper = y.first[row], lower = y.second[row];
    if (rows.empty() || rows.back().upper != upper || rows.back().lower != lower) {
      rows.push_back({row, row, upper, lower, kBoth});
    }
    rows.back().end = row + 1;
  }
  for (int64_t column = 0; column < region.columns(); ++column) {
    const int32_t first = x.first[column], second = x.second[column];
    if (column == 0 || first != x.first[column - 1] || second != x.second[column - 1]) {
      find_spans(rows, cells, size, first, second, threshold, spans);
    }
    const float b0 = x.near[column], b1 = x.far[column];
    const int64_t start = (region.left + column) * height + region.top;
    bool on = false;
    for (const Span& span : spans) {
      Side side = span.side;
      const float *upper = cells + span.upper * size, *lower = cells + span.lower * size;
      const float p00 = upper[first], p01 = upper[second], p10 = lower[first], p11 = lower[second];
      if (order == Order::kSeparable && side == kBoth) {
        const float r0 = std::fma(p00, b0, p01 * b1), r1 = std::fma(p10, b0, p11 * b1);
        if (!std::isnan(r0 + r1)) side = threshold.side(std::min(r0, r1), std::max(r0, r1));
      }
      if (side != kBoth) {
        if (on != (side == kOn)) {
          on = !on;
          toggles.add(start + span.begin);
        }
        continue;
      }
      for (int32_t row = span.begin; row < span.end; ++row) {
        const float value = paste::blend<order>(p00, p01, p10, p11, y.near[row], y.far[row], b0, b1);
        if (threshold.is_on(value) != on) {
          on = !on;
          toggles.add(start + row);
        }
      }
    }
    if (on) toggles.add(start + region.rows());
  }
}

FASTRCNN_CLONES
void encode_one(const float* mask, const float* box, int64_t size, int64_t padding, bool continuous,
                const paste::Image& image, const Threshold& threshold, paste::Scratch& scratch, Toggles& toggles) {
  const int64_t margin = continuous ? 1 : padding;
  toggles.places.clear();
  const paste::Region region = paste::region_of(box, size, padding, continuous, image);
  if (region.empty()) return;
  const int64_t cells = size + 2 * margin;
  paste::make_axes(region, box, size, margin, scratch);
  paste::pad_mask(mask, size, margin, scratch.padded);
  switch (region.order) {
    case Order::kSeparable:
      return walk<Order::kSeparable>(region, cells, threshold, image.height, scratch, toggles);
    case Order::kSmall:
      return walk<Order::kSmall>(region, cells, threshold, image.height, scratch, toggles);
    case Order::kContinuous:
      return walk<Order::kContinuous>(region, cells, threshold, image.height, scratch, toggles);
  }
}

// Joins the strings; writes where each begins, and the end of the last, to `offsets` [strings + 1].
std::string joined(const std::vector<std::string>& strings, int64_t* offsets) {
  std::string all;
  offsets[0] = 0;
  for (size_t i = 0; i < strings.size(); ++i) {
    all += strings[i];
    offsets[i + 1] = static_cast<int64_t>(all.size());
  }
  return all;
}

}  // namespace

std::string kernels::paste_masks_rle(std::uintptr_t masks_address, std::uintptr_t boxes_address, int64_t num_masks,
                                     int64_t size, int64_t padding, bool continuous, int64_t height, int64_t width,
                                     double threshold_value, std::uintptr_t offsets_address, int num_threads) {
  const auto* masks = as_pointer<const float>(masks_address);
  const auto* boxes = as_pointer<const float>(boxes_address);
  const paste::Image image{height, width};
  const Threshold threshold{static_cast<float>(threshold_value), continuous};
  std::vector<std::string> strings(num_masks);
#pragma omp parallel num_threads(num_threads) if (num_masks > 1)
  {
    paste::Scratch scratch;
    Toggles toggles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < num_masks; ++k) {
      encode_one(masks + k * size * size, boxes + 4 * k, size, padding, continuous, image, threshold, scratch, toggles);
      strings[k] = rle_string(toggles.places, height * width);
    }
  }
  return joined(strings, as_pointer<int64_t>(offsets_address));
}

// From the places where each mask changes, down its columns, a place twice being none: what the GPU finds.
std::string kernels::rle_from_places(std::uintptr_t places_address, std::uintptr_t ends_address, int64_t num_masks,
                                     int64_t total, std::uintptr_t offsets_address) {
  const auto* places = as_pointer<const int64_t>(places_address);
  const auto* ends = as_pointer<const int64_t>(ends_address);
  std::vector<std::string> strings(num_masks);
  Toggles toggles;
  for (int64_t k = 0; k < num_masks; ++k) {
    toggles.places.clear();
    for (int64_t i = k ? ends[k - 1] : 0; i < ends[k]; ++i) toggles.add(places[i]);
    strings[k] = rle_string(toggles.places, total);
  }
  return joined(strings, as_pointer<int64_t>(offsets_address));
}
