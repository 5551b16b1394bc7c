// RoIAlign forward over all levels of a pyramid, on the CPU.
//
// NCHW: a thread owns a few channels of one image and pools every region from them while they are in its cache. First
// the rows of a bin are added (contiguous loads along x), then columns are folded into bins by a small dense product.
// NHWC: a thread owns a region and adds pixels weighted by both axes, channels being the vector.
#include "roi_align.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <type_traits>

namespace roi_align {
namespace {

constexpr int kChannels = 4;  // planes pooled together by one thread: a region's plan is read once for all

int round_up(int value, int to) { return (value + to - 1) / to * to; }

// out[PH, PW] of one region and one channel. rows: [PH rounded up to kBinRows, kLanes + slots + kLanes] of scratch.
template <typename T, int kBins>
FASTRCNN_INLINE void pool_plane(
    const Region<T>& r, const T* plane, int width, int bins_y, int bins_x, T* rows, T* out) {
  const int slots = r.x.slots(), stride = round_up(slots, kLanes) + 2 * kLanes;
  const int first = r.x.pixel.front(), columns = round_up(bins_x, kBins);
  const int *begin = r.y.bin_begin.data(), *slot = r.y.bin_slot.data(), *pixel_y = r.y.pixel.data();
  const T* weight = r.y.bin_weight.data();
  for (int bin = 0; bin < bins_y; ++bin) {
    T* row = rows + bin * stride + kLanes;
    if (r.chunked) {
      for (const int chunk : r.chunk) {
        T sum[kLanes] = {};
        for (int tap = begin[bin]; tap < begin[bin + 1]; ++tap) {
          const T* source = plane + static_cast<int64_t>(pixel_y[slot[tap]]) * width + chunk;
          const T w = weight[tap];
          for (int l = 0; l < kLanes; ++l) sum[l] += w * source[l];
        }
        for (int l = 0; l < kLanes; ++l) row[chunk - first + l] = sum[l];
      }
    } else {
      const int* pixel_x = r.x.pixel.data();
      for (int s = 0; s < slots; ++s) row[s] = 0;
      for (int tap = begin[bin]; tap < begin[bin + 1]; ++tap) {
        const T* source = plane + static_cast<int64_t>(pixel_y[slot[tap]]) * width;
        for (int s = 0; s < slots; ++s) row[s] += weight[tap] * source[pixel_x[s]];
      }
    }
  }
  for (int bin = 0; bin < bins_y; bin += kBinRows) {
    const T* row = rows + bin * stride + kLanes;
    for (int column = 0; column < bins_x; column += kBins) {
      T sum[kBinRows][kBins] = {};
      for (int s = 0; s < slots; ++s) {
        const T* dense = r.dense.data() + s * columns + column;
        for (int b = 0; b < kBinRows; ++b)
          for (int l = 0; l < kBins; ++l) sum[b][l] += row[b * stride + s] * dense[l];
      }
      const int have_y = std::min(kBinRows, bins_y - bin), have_x = std::min(kBins, bins_x - column);
      for (int b = 0; b < have_y; ++b)
        for (int l = 0; l < have_x; ++l) out[(bin + b) * bins_x + column + l] = sum[b][l];
    }
  }
}

template <typename T>
FASTRCNN_INLINE void pool_planes(
    const Region<T>& r, const T* planes, int64_t plane_size, int count, int width, int bins_y, int bins_x, T* rows,
    T* out) {
  for (int c = 0; c < count; ++c) {
    if (bins_x <= 8) {
      pool_plane<T, 8>(r, planes + c * plane_size, width, bins_y, bins_x, rows, out + c * bins_y * bins_x);
    } else {
      pool_plane<T, kLanes>(r, planes + c * plane_size, width, bins_y, bins_x, rows, out + c * bins_y * bins_x);
    }
  }
}

#define FASTRCNN_POOL_PLANES(T)                                                                                       \
  FASTRCNN_CLONES void pool_planes_clones(                                                                            \
      const Region<T>& r, const T* planes, int64_t plane_size, int count, int width, int bins_y, int bins_x, T* rows, \
      T* out) {                                                                                                       \
    pool_planes<T>(r, planes, plane_size, count, width, bins_y, bins_x, rows, out);                                   \
  }
FASTRCNN_POOL_PLANES(float)
FASTRCNN_POOL_PLANES(double)

// Channels [c, c + kBlock) of every bin of one region; image and out are NHWC.
template <typename S, int kBlock>
FASTRCNN_INLINE void pool_block(
    const Region<typename ComputeOf<S>::type>& r, const S* image, int width, int64_t channels, int64_t c, int bins_y,
    int bins_x, S* out) {
  using T = typename ComputeOf<S>::type;
  for (int by = 0; by < bins_y; ++by) {
    for (int bx = 0; bx < bins_x; ++bx) {
      T sum[kBlock] = {};
      for (int ty = r.y.bin_begin[by]; ty < r.y.bin_begin[by + 1]; ++ty) {
        const S* row = image + static_cast<int64_t>(r.y.pixel[r.y.bin_slot[ty]]) * width * channels + c;
        for (int tx = r.x.bin_begin[bx]; tx < r.x.bin_begin[bx + 1]; ++tx) {
          const S* source = row + r.x.pixel[r.x.bin_slot[tx]] * channels;
          const T w = r.y.bin_weight[ty] * r.x.bin_weight[tx];
          for (int l = 0; l < kBlock; ++l) sum[l] += w * load(source + l);
        }
      }
      S* target = out + (static_cast<int64_t>(by) * bins_x + bx) * channels + c;
      for (int l = 0; l < kBlock; ++l) store(target + l, sum[l]);
    }
  }
}

template <typename S>
FASTRCNN_INLINE void pool_region(
    const Region<typename ComputeOf<S>::type>& r, const S* image, int width, int64_t channels, int bins_y, int bins_x,
    S* out) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64) pool_block<S, 64>(r, image, width, channels, c, bins_y, bins_x, out);
  for (; c + 16 <= channels; c += 16) pool_block<S, 16>(r, image, width, channels, c, bins_y, bins_x, out);
  for (; c < channels; ++c) pool_block<S, 1>(r, image, width, channels, c, bins_y, bins_x, out);
}

#define FASTRCNN_POOL_REGION(S)                                                                                \
  FASTRCNN_CLONES void pool_region_clones(                                                                     \
      const Region<typename ComputeOf<S>::type>& r, const S* image, int width, int64_t channels, int bins_y,   \
      int bins_x, S* out) {                                                                                    \
    pool_region<S>(r, image, width, channels, bins_y, bins_x, out);                                            \
  }
FASTRCNN_POOL_REGION(float)
FASTRCNN_POOL_REGION(double)
FASTRCNN_POOL_REGION(Half)
FASTRCNN_POOL_REGION(BFloat)

#define FASTRCNN_CONVERT(From, To)                                               \
  FASTRCNN_CLONES void convert(const From* from, To* to, int64_t count) {        \
    for (int64_t i = 0; i < count; ++i) store(to + i, load(from + i));           \
  }
FASTRCNN_CONVERT(Half, float)
FASTRCNN_CONVERT(BFloat, float)
FASTRCNN_CONVERT(float, Half)
FASTRCNN_CONVERT(float, BFloat)

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
        if constexpr (kConverted) convert(source, planes.data(), count * size);
        for (const Region<T>& r : group) {
          if (r.empty()) continue;
          S* target = out + (r.roi * p.channels + channel) * bins;
          if constexpr (kConverted) {
            pool_planes_clones(
                r, planes.data(), size, count, level.width, p.bins_y, p.bins_x, rows.data(), pooled.data());
            convert(pooled.data(), target, count * bins);
          } else {
            pool_planes_clones(r, source, size, count, level.width, p.bins_y, p.bins_x, rows.data(), target);
          }
        }
      }
    }
  }
}

template <typename S, typename T>
void forward_nhwc(const Problem& p, const std::vector<std::vector<Region<T>>>& groups, S* out) {
  const int64_t bins = static_cast<int64_t>(p.bins_y) * p.bins_x;
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
    pool_region_clones(r, source, level.width, p.channels, p.bins_y, p.bins_x, out + r.roi * bins * p.channels);
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
  for (int64_t k = 0; k < p.rois; ++k)
    if (!written[k]) std::memset(out + k * size, 0, sizeof(S) * size);
  if (p.channels_last) {
    forward_nhwc<S, T>(p, groups, out);
  } else {
    forward_nchw<S, T>(p, groups, out);
  }
  return -1;
}

int64_t run(const Problem& p, std::uintptr_t out) {
  py::gil_scoped_release unlocked;
  switch (p.dtype) {
    case kFloat64: return forward<double>(p, out);
    case kFloat16: return forward<Half>(p, out);
    case kBFloat16: return forward<BFloat>(p, out);
    default: return forward<float>(p, out);
  }
}

}  // namespace
}  // namespace roi_align

void bind_roi_align_backward(py::module_& m);

void bind_roi_align(py::module_& m) {
  using namespace roi_align;
  py::class_<Level>(m, "RoiAlignLevel").def(py::init<std::uintptr_t, int, int, double>());
  py::class_<Problem>(m, "RoiAlignProblem")
      .def(py::init<std::vector<Level>, int64_t, int64_t, int64_t, std::uintptr_t, std::uintptr_t, int, int, int, bool,
                    bool, int, int>());
  m.def("roi_align_forward", &run,
        "Pool every region into out (dense, in the features' layout). The first region that names a missing image or "
        "level, or -1.");
  bind_roi_align_backward(m);
}
