// RoIAlign backward over all levels of a pyramid, on the CPU. Deterministic for any number of threads: every pixel of
// the gradient is owned by one task, which adds the regions to it in their order. No atomics, no zero-filling pass.
//
// NCHW: a task owns a few channels of one image. NHWC: a task owns a few rows of one image at one level.
#if defined(__GNUC__) && !defined(__clang__)
// Sums may use fused multiply-add here; coordinates, which may not, are computed in roi_align_plan.cpp.
#pragma GCC optimize("fp-contract=fast")
#endif
#include <algorithm>
#include <type_traits>

#include "exports_maps.h"
#include "roi_align_isa.h"

namespace roi_align {
namespace {

constexpr int64_t kBandBytes = 1 << 18;  // of gradient rows that an NHWC task keeps in its cache

// For each chunk the transposed weights [bin columns, kLanes], zero in lanes that an earlier chunk covers.
template <typename T>
void add_dense_chunks(std::vector<std::vector<Region<T>>>& groups, int bins_x) {
  for (auto& group : groups) {
    for (Region<T>& r : group) {
      if (!r.chunked) continue;
      r.dense.assign(r.chunk.size() * bins_x * kLanes, T(0));
      for (int bin = 0; bin < bins_x; ++bin) {
        for (int tap = r.x.bin_begin[bin]; tap < r.x.bin_begin[bin + 1]; ++tap) {
          const int slot = r.x.bin_slot[tap], chunk = slot / kLanes;
          const int lane = r.x.pixel[slot] - r.chunk[chunk];
          r.dense[(static_cast<size_t>(chunk) * bins_x + bin) * kLanes + lane] = r.x.bin_weight[tap];
        }
      }
    }
  }
}

template <typename S, typename T>
void backward_nchw(const Problem& p, std::vector<std::vector<Region<T>>>& groups, const S* grad) {
  constexpr bool kConverted = !std::is_same<S, T>::value;
  const auto add = FASTRCNN_BEST(spread_planes<T>);
  add_dense_chunks(groups, p.bins_x);
  const int64_t blocks = (p.channels + kChannels - 1) / kChannels, bins = static_cast<int64_t>(p.bins_y) * p.bins_x;
  int64_t largest = 0;
  for (const Level& level : p.levels)
    largest = std::max(largest, static_cast<int64_t>(level.height) * level.width);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<T> spread(static_cast<size_t>(round_up(p.bins_y, kBinRows)) * kLanes);
    std::vector<T> scratch(kConverted ? kChannels * largest : 0), grads(kConverted ? kChannels * bins : 0);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.images * blocks; ++task) {
      const int64_t image = task / blocks, channel = task % blocks * kChannels;
      const int count = static_cast<int>(std::min<int64_t>(kChannels, p.channels - channel));
      for (size_t l = 0; l < p.levels.size(); ++l) {
        const Level& level = p.levels[l];
        const int64_t size = static_cast<int64_t>(level.height) * level.width;
        S* target = as_pointer<S>(level.address) + (image * p.channels + channel) * size;
        T* planes;
        if constexpr (kConverted) {
          planes = scratch.data();
        } else {
          planes = target;
        }
        std::memset(planes, 0, sizeof(T) * count * size);
        for (const Region<T>& r : groups[l * p.images + image]) {
          if (r.empty()) continue;
          const S* source = grad + (r.roi * p.channels + channel) * bins;
          if constexpr (kConverted) {
            FASTRCNN_BEST(convert_all<S, T>)(source, grads.data(), count * bins);
            add(r, grads.data(), size, count, level.width, p.bins_y, p.bins_x, spread.data(), planes);
          } else {
            add(r, source, size, count, level.width, p.bins_y, p.bins_x, spread.data(), planes);
          }
        }
        if constexpr (kConverted) FASTRCNN_BEST(convert_all<T, S>)(planes, target, count * size);
      }
    }
  }
}

template <typename S, typename T>
void backward_nhwc(const Problem& p, const std::vector<std::vector<Region<T>>>& groups, const S* grad) {
  constexpr bool kConverted = !std::is_same<S, T>::value;
  const auto add = FASTRCNN_BEST(spread_region<S>);
  struct Band {
    int64_t group;
    int top, bottom;
  };
  std::vector<Band> bands;
  int64_t largest = 0;
  for (int64_t g = 0; g < p.groups(); ++g) {
    const Level& level = p.levels[g / p.images];
    const int64_t row = static_cast<int64_t>(level.width) * p.channels;
    const int step = static_cast<int>(std::max<int64_t>(1, kBandBytes / static_cast<int64_t>(sizeof(T) * row + 1)));
    for (int top = 0; top < level.height; top += step) {
      bands.push_back({g, top, std::min(level.height, top + step)});
      largest = std::max(largest, row * (bands.back().bottom - top));
    }
  }
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<T> scratch(kConverted ? largest : 0);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < static_cast<int64_t>(bands.size()); ++i) {
      const Band& band = bands[i];
      const Level& level = p.levels[band.group / p.images];
      const int64_t image = band.group % p.images, row = static_cast<int64_t>(level.width) * p.channels;
      S* target = as_pointer<S>(level.address) + (image * level.height + band.top) * row;
      T* rows;
      if constexpr (kConverted) {
        rows = scratch.data();
      } else {
        rows = target;
      }
      const int64_t size = row * (band.bottom - band.top);
      std::memset(rows, 0, sizeof(T) * size);
      for (const Region<T>& r : groups[band.group]) {
        if (r.empty() || r.y.pixel.front() >= band.bottom || r.y.pixel.back() < band.top) continue;
        const S* source = grad + r.roi * p.bins_y * p.bins_x * p.channels;
        add(r, source, level.width, p.channels, p.bins_x, band.top, band.bottom, rows);
      }
      if constexpr (kConverted) FASTRCNN_BEST(convert_all<T, S>)(rows, target, size);
    }
  }
}

template <typename S>
int64_t backward(const Problem& p, std::uintptr_t grad_address) {
  using T = typename ComputeOf<S>::type;
  std::vector<std::vector<Region<T>>> groups;
  const int64_t wrong = build_plans(p, groups);
  if (wrong >= 0) return wrong;
  const S* grad = as_pointer<const S>(grad_address);
  for (const Level& level : p.levels)
    advise_large_pages(level.address, p.images * p.channels * level.height * level.width * static_cast<int64_t>(sizeof(S)));
  if (p.channels_last) {
    backward_nhwc<S, T>(p, groups, grad);
  } else {
    backward_nchw<S, T>(p, groups, grad);
  }
  return -1;
}

}  // namespace
}  // namespace roi_align

int64_t kernels::roi_align_backward(const roi_align::Problem& p, std::uintptr_t grad) {
  using namespace roi_align;
  switch (p.dtype) {
    case kFloat64: return backward<double>(p, grad);
    case kFloat16: return backward<Half>(p, grad);
    case kBFloat16: return backward<BFloat>(p, grad);
    default: return backward<float>(p, grad);
  }
}
