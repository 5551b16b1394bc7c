// What the forward and the backward of RoIAlign share: the plan of a region.
//
// The operator is separable, Out = Wy * F * Wx^T for each channel. A plan holds the non-zero weights of Wy and Wx, with
// the samples of a bin that fall on one pixel already added, by bin (what a bin reads) and by pixel (what reads it).
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace roi_align {

constexpr int kLanes = 16;        // columns of a feature map handled together
constexpr int kBinRows = 7;       // bin rows handled together
constexpr double kMaxGrid = 65536;

enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// One axis of one region. A slot is one of the pixels read, in ascending order.
template <typename T>
struct Axis {
  std::vector<int> pixel;                      // by slot
  std::vector<int> bin_begin, bin_slot;        // what each bin reads
  std::vector<T> bin_weight;
  std::vector<int> slot_begin, slot_bin;       // which bins read each slot
  std::vector<T> slot_weight;

  int slots() const { return static_cast<int>(pixel.size()); }
  bool contiguous() const { return !pixel.empty() && pixel.back() - pixel.front() + 1 == slots(); }
};

template <typename T>
struct Region {
  int64_t roi;
  Axis<T> y, x;
  bool chunked = false;        // columns are contiguous and the map is wide enough for whole chunks of kLanes
  std::vector<int> chunk;      // first column of each chunk
  std::vector<T> dense;        // forward: [slots of x, bin columns rounded up]; backward: [chunks, bin columns, kLanes]

  bool empty() const { return y.pixel.empty() || x.pixel.empty(); }
};

struct Level {
  std::uintptr_t address;
  int height, width;
  double scale;
};

struct Problem {
  std::vector<Level> levels;
  int64_t images, channels, rois;
  std::uintptr_t roi_address, level_address;  // rois are in the compute type
  int bins_y, bins_x, ratio;
  bool aligned, channels_last;
  int dtype, threads;

  int64_t groups() const { return static_cast<int64_t>(levels.size()) * images; }
};

// Fill one axis: T start, bin size and the number of samples a bin, as in the module docstring of roi_align.py.
template <typename T>
void build_axis(T start, T size, T grid, int extent, int bins, std::vector<T>& weight, Axis<T>& axis) {
  weight.assign(extent, T(0));
  axis.bin_begin.assign(1, 0);
  int lowest = extent, highest = -1;
  for (int bin = 0; bin < bins; ++bin) {
    const T base = start + static_cast<T>(bin) * size;
    int64_t begin = 0, end = static_cast<int64_t>(grid);
    if (!std::isfinite(base) || !std::isfinite(size)) end = 0;
    if (end > 8 && size > 0) {
      // Visit only the samples that can fall on the map; two to spare for rounding.
      const T step = size / grid;
      begin = static_cast<int64_t>(std::fmin(std::fmax((T(-1) - base) / step - 2, T(0)), grid));
      end = static_cast<int64_t>(std::fmin(std::fmax((static_cast<T>(extent) - base) / step + 3, T(0)), grid));
    }
    int low = extent, high = -1;
    for (int64_t i = begin; i < end; ++i) {
      T at = base + static_cast<T>(static_cast<T>(i) + T(0.5)) * size / grid;
      if (!(at >= T(-1) && at <= static_cast<T>(extent))) continue;
      if (at < 0) at = 0;
      int pixel = static_cast<int>(at);
      T fraction = at - static_cast<T>(pixel);
      if (pixel >= extent - 1) {
        pixel = extent - 1;
        fraction = 0;
      }
      weight[pixel] += 1 - fraction;
      low = pixel < low ? pixel : low;
      if (fraction > 0) weight[++pixel] += fraction;
      high = pixel > high ? pixel : high;
    }
    for (int pixel = low; pixel <= high; ++pixel) {
      if (weight[pixel] == 0) continue;
      axis.bin_slot.push_back(pixel);  // pixels for now, slots below
      axis.bin_weight.push_back(weight[pixel] / grid);
      weight[pixel] = 0;
    }
    axis.bin_begin.push_back(static_cast<int>(axis.bin_slot.size()));
    lowest = low < lowest ? low : lowest;
    highest = high > highest ? high : highest;
  }
  if (highest < 0) return;

  std::vector<int> slot_of(highest - lowest + 1, -1);
  for (int pixel : axis.bin_slot) slot_of[pixel - lowest] = 0;
  int used = 0;
  for (int mark : slot_of) used += mark == 0;
  const bool fill = highest - lowest < 2 * used + kLanes;  // a few unused columns are cheaper than a gather
  for (int pixel = lowest; pixel <= highest; ++pixel) {
    if (!fill && slot_of[pixel - lowest] < 0) continue;
    slot_of[pixel - lowest] = axis.slots();
    axis.pixel.push_back(pixel);
  }
  axis.slot_begin.assign(axis.slots() + 1, 0);
  for (int& slot : axis.bin_slot) {
    slot = slot_of[slot - lowest];
    ++axis.slot_begin[slot + 1];
  }
  for (int slot = 0; slot < axis.slots(); ++slot) axis.slot_begin[slot + 1] += axis.slot_begin[slot];
  axis.slot_bin.resize(axis.bin_slot.size());
  axis.slot_weight.resize(axis.bin_slot.size());
  std::vector<int> next(axis.slot_begin.begin(), axis.slot_begin.end() - 1);
  for (int bin = 0; bin < bins; ++bin) {
    for (int tap = axis.bin_begin[bin]; tap < axis.bin_begin[bin + 1]; ++tap) {
      const int to = next[axis.bin_slot[tap]]++;
      axis.slot_bin[to] = bin;
      axis.slot_weight[to] = axis.bin_weight[tap];
    }
  }
}

template <typename T>
void axis_bins(T low, T high, const Problem& p, T scale, int bins, T* start, T* size, T* grid) {
  const T offset = p.aligned ? T(0.5) : T(0);
  *start = low * scale - offset;
  T extent = high * scale - offset - *start;
  if (!p.aligned && extent < 1) extent = 1;
  *size = extent / static_cast<T>(bins);
  *grid = p.ratio > 0 ? static_cast<T>(p.ratio) : std::ceil(*size);
  if (p.ratio <= 0) *grid = *grid > 0 ? std::fmin(*grid, static_cast<T>(kMaxGrid)) : T(0);
}

// The regions that are present, in order, for each (level, image): groups[level * images + image].
// Returns the first region that names an image or a level that does not exist, or -1.
template <typename T>
int64_t build_plans(const Problem& p, std::vector<std::vector<Region<T>>>& groups) {
  const T* rois = as_pointer<const T>(p.roi_address);
  const int64_t* level_of = as_pointer<const int64_t>(p.level_address);
  groups.assign(p.groups(), {});
  for (int64_t k = 0; k < p.rois; ++k) {
    const T* roi = rois + 5 * k;
    bool present = roi[0] >= 0;
    for (int i = 0; i < 5; ++i) present = present && std::isfinite(roi[i]);
    if (!present) continue;
    if (!(roi[0] < static_cast<T>(p.images)) || level_of[k] < 0 || level_of[k] >= static_cast<int64_t>(p.levels.size()))
      return k;
    groups[level_of[k] * p.images + static_cast<int64_t>(roi[0])].emplace_back();
    groups[level_of[k] * p.images + static_cast<int64_t>(roi[0])].back().roi = k;
  }
  std::vector<std::pair<Region<T>*, int>> work;
  for (int64_t g = 0; g < p.groups(); ++g)
    for (Region<T>& region : groups[g]) work.emplace_back(&region, static_cast<int>(g / p.images));
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<T> weight;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < static_cast<int64_t>(work.size()); ++i) {
      Region<T>& region = *work[i].first;
      const Level& level = p.levels[work[i].second];
      const T* roi = rois + 5 * region.roi;
      T start, size, grid;
      axis_bins(roi[2], roi[4], p, static_cast<T>(level.scale), p.bins_y, &start, &size, &grid);
      build_axis(start, size, grid, level.height, p.bins_y, weight, region.y);
      axis_bins(roi[1], roi[3], p, static_cast<T>(level.scale), p.bins_x, &start, &size, &grid);
      build_axis(start, size, grid, level.width, p.bins_x, weight, region.x);
      region.chunked = region.x.contiguous() && level.width >= kLanes;
      if (!region.chunked) continue;
      const int last = level.width - kLanes;  // chunks never run over the right edge of the map
      for (int c = region.x.pixel.front(); c <= region.x.pixel.back(); c += kLanes)
        region.chunk.push_back(c < last ? c : last);
    }
  }
  return -1;
}

// 16-bit floats are carried as bits; sums are kept in float.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

#define FASTRCNN_INLINE inline __attribute__((always_inline))

FASTRCNN_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FASTRCNN_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
FASTRCNN_INLINE float load(const float* p) { return *p; }
FASTRCNN_INLINE double load(const double* p) { return *p; }
FASTRCNN_INLINE float load(const BFloat* p) { return from_bits(static_cast<uint32_t>(p->bits) << 16); }
FASTRCNN_INLINE float load(const Half* p) {
  const uint32_t magnitude = static_cast<uint32_t>(p->bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000) << 16;
  const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
  return from_bits(sign | ((p->bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : finite));
}
FASTRCNN_INLINE void store(float* p, float value) { *p = value; }
FASTRCNN_INLINE void store(double* p, double value) { *p = value; }
FASTRCNN_INLINE void store(BFloat* p, float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
FASTRCNN_INLINE void store(Half* p, float value) {
  // Round to nearest even by adding, in float, a power of two whose last mantissa bit is the last bit of the half.
  const uint32_t bits = to_bits(value), twice = bits + bits;
  const float magnitude = from_bits(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f;
  uint32_t bias = twice & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const uint32_t sum = to_bits(from_bits((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  p->bits = static_cast<uint16_t>(((bits & 0x80000000u) >> 16) | (twice > 0xff000000u ? 0x7e00 : rounded));
}

}  // namespace roi_align
