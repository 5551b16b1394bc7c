// The plans of all regions: samples placed, clamped and merged as the docstring of roi_align.py says. Compiled without
// contraction, so that coordinates round as in PyTorch.
#include <cmath>

#include "roi_align.h"

namespace roi_align {
namespace {

constexpr double kMaxGrid = 65536;

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

}  // namespace

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

template int64_t build_plans<float>(const Problem&, std::vector<std::vector<Region<float>>>&);
template int64_t build_plans<double>(const Problem&, std::vector<std::vector<Region<double>>>&);

}  // namespace roi_align
