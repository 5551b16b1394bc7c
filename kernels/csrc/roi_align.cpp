// RoIAlign forward over all levels of a pyramid, on the CPU.
//
// NCHW: a thread owns a few channels of one image and pools every region from them while they are in its cache. First
// the rows of a bin are added (contiguous loads along x), then columns are folded into bins by a small dense product.
// NHWC: a thread owns a region and adds pixels weighted by both axes, channels being the vector.
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

template <typename T>
void add_dense_columns(std::vector<std::vector<Region<T>>>& groups, int bins_x) {
  const int columns = round_up(bins_x, bins_x <= 8 ? 8 : kLanes);
  for (auto& group : groups) {
    for (Region<T>& r : group) {
      r.dense.assign(static_cast<size_t>(r.x.slots()) * columns, T(0));
      for (int bin = 0; bin < bins_x; ++bin)
        for (int tap = r.x.bin_begin[bin]; tap < r.x.bin_begin[bin + 1]; ++tap)
          r.dense[r.x.bin_slot[tap] * columns + bin] = r.x.bin_weight[tap];
    }
  }
}

template <typename S, typename T>
void forward_nchw(const Problem& p, std::vector<std::vector<Region<T>>>& groups, S* out) {
  constexpr bool kConverted = !std::is_same<S, T>::value;
  const auto pool = FASTRCNN_BEST(pool_planes<T>);
  add_dense_columns(groups, p.bins_x);
  const int64_t blocks = (p.channels + kChannels - 1) / kChannels, bins = static_cast<int64_t>(p.bins_y) * p.bins_x;
  int widest = 0;
  int64_t largest = 0;
  for (const Level& level : p.levels) {
    widest = std::max(widest, level.width);
    largest = std::max(largest, static_cast<int64_t>(level.height) * level.width);
  }
#pragma omp parallel num_threads(p.threads)
  {
    // Zero, because bin rows beyond the last are multiplied too (and thrown away).
    std::vector<T> rows(static_cast<size_t>(round_up(p.bins_y, kBinRows)) * (round_up(widest, kLanes) + 2 * kLanes));
    std::vector<T> planes(kConverted ? kChannels * largest : 0), pooled(kConverted ? kChannels * bins : 0);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.images * blocks; ++task) {
      const int64_t image = task / blocks, channel = task % blocks * kChannels;
      const int count = static_cast<int>(std::min<int64_t>(kChannels, p.channels - channel));
      for (size_t l = 0; l < p.levels.size(); ++l) {
        const Level& level = p.levels[l];
        const auto& group = groups[l * p.images + image];
        if (group.empty()) continue;
        const int64_t size = static_cast<int64_t>(level.height) * level.width;
        const S* source = as_pointer<const S>(level.address) + (image * p.channels + channel) * size;
        if constexpr (kConverted) FASTRCNN_BEST(convert_all<S, T>)(source, planes.data(), count * size);
        for (const Region<T>& r : group) {
          if (r.empty()) continue;
          S* target = out + (r.roi * p.channels + channel) * bins;
          if constexpr (kConverted) {
            pool(r, planes.data(), size, count, level.width, p.bins_y, p.bins_x, rows.data(), pooled.data());
            FASTRCNN_BEST(convert_all<T, S>)(pooled.data(), target, count * bins);
          } else {
            pool(r, source, size, count, level.width, p.bins_y, p.bins_x, rows.data(), target);
          }
        }
      }
    }
  }
}

template <typename S, typename T>
void forward_nhwc(const Problem& p, const std::vector<std::vector<Region<T>>>& groups, S* out) {
  const int64_t bins = static_cast<int64_t>(p.bins_y) * p.bins_x;
  const auto pool = FASTRCNN_BEST(pool_region<S>);
  std::vector<std::pair<const Region<T>*, int64_t>> work;
  for (int64_t g = 0; g < p.groups(); ++g)
    for (const Region<T>& r : groups[g]) work.emplace_back(&r, g);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < static_cast<int64_t>(work.size()); ++i) {
    const Region<T>& r = *work[i].first;
    if (r.empty()) continue;
    const Level& level = p.levels[work[i].second / p.images];
    const int64_t image = work[i].second % p.images;
    const S* source = as_pointer<const S>(level.address) + image * level.height * level.width * p.channels;
    pool(r, source, level.width, p.channels, p.bins_y, p.bins_x, out + r.roi * bins * p.channels);
  }
}

template <typename S>
int64_t forward(const Problem& p, std::uintptr_t out_address) {
  using T = typename ComputeOf<S>::type;
  S* out = as_pointer<S>(out_address);
  std::vector<std::vector<Region<T>>> groups;
  const int64_t wrong = build_plans(p, groups);
  if (wrong >= 0) return wrong;
  std::vector<char> written(p.rois, 0);
  for (const auto& group : groups)
    for (const Region<T>& r : group) written[r.roi] = !r.empty();
  const int64_t size = p.channels * p.bins_y * p.bins_x;
  advise_large_pages(out_address, p.rois * size * static_cast<int64_t>(sizeof(S)));
  for (int64_t k = 0; k < p.rois; ++k)
    if (!written[k]) std::memset(out + k * size, 0, sizeof(S) * size);
  if (p.channels_last) {
    forward_nhwc<S, T>(p, groups, out);
  } else {
    forward_nchw<S, T>(p, groups, out);
  }
  return -1;
}

}  // namespace
}  // namespace roi_align

int64_t kernels::roi_align_forward(const roi_align::Problem& p, std::uintptr_t out) {
  using namespace roi_align;
  switch (p.dtype) {
    case kFloat64: return forward<double>(p, out);
    case kFloat16: return forward<Half>(p, out);
    case kBFloat16: return forward<BFloat>(p, out);
    default: return forward<float>(p, out);
  }
}
