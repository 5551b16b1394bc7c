// RoIAlign backward over all levels of a pyramid, on the CPU. Deterministic for any number of threads: every pixel of
// the gradient is owned by one task, which adds the regions to it in their order. No atomics, no zero-filling pass.
//
// NCHW: a task owns a few channels of one image. NHWC: a task owns a few rows of one image at one level.
#include <pybind11/stl.h>

#include <algorithm>
#include <type_traits>

#include "roi_align.h"

namespace roi_align {
namespace {

constexpr int kChannels = 4;
constexpr int64_t kBandBytes = 1 << 18;  // of gradient rows that an NHWC task keeps in its cache

int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Add the gradient of one region and one channel, grad[PH, PW], to a plane.
// spread: [PH rounded up to kBinRows, kLanes] of scratch.
template <typename T>
FASTRCNN_INLINE void spread_plane(
    const Region<T>& r, const T* grad, int width, int bins_y, int bins_x, T* spread, T* plane) {
  const int *begin = r.y.slot_begin.data(), *bin = r.y.slot_bin.data(), *pixel_y = r.y.pixel.data();
  const T* weight = r.y.slot_weight.data();
  const int slots_y = r.y.slots();
  if (r.chunked) {
    const int chunks = static_cast<int>(r.chunk.size());
    for (int c = 0; c < chunks; ++c) {
      const T* dense = r.dense.data() + static_cast<int64_t>(c) * bins_x * kLanes;
      for (int by = 0; by < bins_y; by += kBinRows) {
        const int have = std::min(kBinRows, bins_y - by);
        T sum[kBinRows][kLanes] = {};
        if (have == kBinRows) {
          for (int bx = 0; bx < bins_x; ++bx)
            for (int b = 0; b < kBinRows; ++b)
              for (int l = 0; l < kLanes; ++l) sum[b][l] += grad[(by + b) * bins_x + bx] * dense[bx * kLanes + l];
        } else {
          for (int b = 0; b < have; ++b)
            for (int bx = 0; bx < bins_x; ++bx)
              for (int l = 0; l < kLanes; ++l) sum[b][l] += grad[(by + b) * bins_x + bx] * dense[bx * kLanes + l];
        }
        for (int b = 0; b < kBinRows; ++b)
          for (int l = 0; l < kLanes; ++l) spread[(by + b) * kLanes + l] = sum[b][l];
      }
      for (int s = 0; s < slots_y; ++s) {
        T* target = plane + static_cast<int64_t>(pixel_y[s]) * width + r.chunk[c];
        T sum[kLanes];
        for (int l = 0; l < kLanes; ++l) sum[l] = target[l];
        for (int tap = begin[s]; tap < begin[s + 1]; ++tap)
          for (int l = 0; l < kLanes; ++l) sum[l] += weight[tap] * spread[bin[tap] * kLanes + l];
        for (int l = 0; l < kLanes; ++l) target[l] = sum[l];
      }
    }
    return;
  }
  for (int s = 0; s < slots_y; ++s) {
    T* target = plane + static_cast<int64_t>(pixel_y[s]) * width;
    for (int tap = begin[s]; tap < begin[s + 1]; ++tap) {
      const T* row = grad + bin[tap] * bins_x;
      for (int q = 0; q < r.x.slots(); ++q)
        for (int t = r.x.slot_begin[q]; t < r.x.slot_begin[q + 1]; ++t)
          target[r.x.pixel[q]] += weight[tap] * r.x.slot_weight[t] * row[r.x.slot_bin[t]];
    }
  }
}

#define FASTRCNN_SPREAD_PLANES(T)                                                                                  \
  FASTRCNN_CLONES void spread_planes_clones(                                                                       \
      const Region<T>& r, const T* grad, int64_t plane_size, int count, int width, int bins_y, int bins_x,         \
      T* spread, T* planes) {                                                                                      \
    for (int c = 0; c < count; ++c)                                                                                \
      spread_plane<T>(r, grad + c * bins_y * bins_x, width, bins_y, bins_x, spread, planes + c * plane_size);      \
  }
FASTRCNN_SPREAD_PLANES(float)
FASTRCNN_SPREAD_PLANES(double)

// Add channels [c, c + kBlock) of one region to rows [top, bottom) of a map; target starts at row top. All NHWC.
template <typename S, int kBlock>
FASTRCNN_INLINE void spread_block(
    const Region<typename ComputeOf<S>::type>& r, const S* grad, int width, int64_t channels, int64_t c, int bins_x,
    int top, int bottom, typename ComputeOf<S>::type* target) {
  using T = typename ComputeOf<S>::type;
  for (int sy = 0; sy < r.y.slots(); ++sy) {
    const int y = r.y.pixel[sy];
    if (y < top || y >= bottom) continue;
    for (int sx = 0; sx < r.x.slots(); ++sx) {
      T* pixel = target + (static_cast<int64_t>(y - top) * width + r.x.pixel[sx]) * channels + c;
      T sum[kBlock];
      for (int l = 0; l < kBlock; ++l) sum[l] = pixel[l];
      for (int ty = r.y.slot_begin[sy]; ty < r.y.slot_begin[sy + 1]; ++ty) {
        for (int tx = r.x.slot_begin[sx]; tx < r.x.slot_begin[sx + 1]; ++tx) {
          const T w = r.y.slot_weight[ty] * r.x.slot_weight[tx];
          const S* source = grad + (static_cast<int64_t>(r.y.slot_bin[ty]) * bins_x + r.x.slot_bin[tx]) * channels + c;
          for (int l = 0; l < kBlock; ++l) sum[l] += w * load(source + l);
        }
      }
      for (int l = 0; l < kBlock; ++l) pixel[l] = sum[l];
    }
  }
}

#define FASTRCNN_SPREAD_REGION(S)                                                                                    \
  FASTRCNN_CLONES void spread_region_clones(                                                                         \
      const Region<typename ComputeOf<S>::type>& r, const S* grad, int width, int64_t channels, int bins_x, int top, \
      int bottom, typename ComputeOf<S>::type* target) {                                                             \
    int64_t c = 0;                                                                                                   \
    for (; c + 64 <= channels; c += 64) spread_block<S, 64>(r, grad, width, channels, c, bins_x, top, bottom, target); \
    for (; c + 16 <= channels; c += 16) spread_block<S, 16>(r, grad, width, channels, c, bins_x, top, bottom, target); \
    for (; c < channels; ++c) spread_block<S, 1>(r, grad, width, channels, c, bins_x, top, bottom, target);          \
  }
FASTRCNN_SPREAD_REGION(float)
FASTRCNN_SPREAD_REGION(double)
FASTRCNN_SPREAD_REGION(Half)
FASTRCNN_SPREAD_REGION(BFloat)

#define FASTRCNN_CONVERT(From, To)                                        \
  FASTRCNN_CLONES void convert(const From* from, To* to, int64_t count) { \
    for (int64_t i = 0; i < count; ++i) store(to + i, load(from + i));    \
  }
FASTRCNN_CONVERT(Half, float)
FASTRCNN_CONVERT(BFloat, float)
FASTRCNN_CONVERT(float, Half)
FASTRCNN_CONVERT(float, BFloat)

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
            convert(source, grads.data(), count * bins);
            spread_planes_clones(
                r, grads.data(), size, count, level.width, p.bins_y, p.bins_x, spread.data(), planes);
          } else {
            spread_planes_clones(r, source, size, count, level.width, p.bins_y, p.bins_x, spread.data(), planes);
          }
        }
        if constexpr (kConverted) convert(planes, target, count * size);
      }
    }
  }
}

template <typename S, typename T>
void backward_nhwc(const Problem& p, const std::vector<std::vector<Region<T>>>& groups, const S* grad) {
  constexpr bool kConverted = !std::is_same<S, T>::value;
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
        spread_region_clones(r, source, level.width, p.channels, p.bins_x, band.top, band.bottom, rows);
      }
      if constexpr (kConverted) convert(rows, target, size);
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
  if (p.channels_last) {
    backward_nhwc<S, T>(p, groups, grad);
  } else {
    backward_nchw<S, T>(p, groups, grad);
  }
  return -1;
}

int64_t run(const Problem& p, std::uintptr_t grad) {
  py::gil_scoped_release unlocked;
  switch (p.dtype) {
    case kFloat64: return backward<double>(p, grad);
    case kFloat16: return backward<Half>(p, grad);
    case kBFloat16: return backward<BFloat>(p, grad);
    default: return backward<float>(p, grad);
  }
}

}  // namespace
}  // namespace roi_align

void bind_roi_align_backward(py::module_& m) {
  m.def("roi_align_backward", &roi_align::run,
        "Write the gradients of all levels (the problem's levels are the outputs) from that of the pooled regions. The "
        "first region that names a missing image or level, or -1.");
}
