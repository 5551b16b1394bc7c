// RoIPool on the CPU. A task owns 16 channels of one image: it puts them side by side, [H, W, 16], whatever the layout
// and type of the map, so that a pixel of all of them is one comparison of vectors, and pools every region of the image
// while they are in its cache. In the backward a task owns the planes that it adds to, region after region, so that the
// result is the same for any number of threads. Rounding is that of fastrcnn_kernels/roi_pool.py, without contraction.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "exports_maps.h"
#include "half.h"
#include "roi_align_isa.h"

namespace roi_pool {
namespace {

constexpr int kSide = 16;            // channels side by side
constexpr int64_t kAlone = 1 << 14;  // results below which a second thread costs more than it brings

template <typename T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// First and past-the-last pixel of each bin along one axis.
struct Bins {
  std::vector<int64_t> first, last;
};

}  // namespace
}  // namespace roi_pool

#define FASTRCNN_ISA baseline
#define FASTRCNN_TARGET
#define FASTRCNN_VECTOR_BYTES 16
#include "roi_pool_kernels.h"
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTRCNN_ISA avx2
#define FASTRCNN_TARGET __attribute__((target("avx2,fma,bmi2")))
#define FASTRCNN_VECTOR_BYTES 32
#include "roi_pool_kernels.h"
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES
#define FASTRCNN_ISA avx512
#define FASTRCNN_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,bmi2")))
#define FASTRCNN_VECTOR_BYTES 64
#include "roi_pool_kernels.h"
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES
#endif

namespace roi_pool {
namespace {

using roi_align::BFloat;
using roi_align::ComputeOf;
using roi_align::Half;
using roi_align::isa;

template <typename S>
typename ComputeOf<S>::type lowest() {
  if constexpr (std::is_same_v<S, Half>) return -65504.0f;
  else if constexpr (std::is_same_v<S, BFloat>) return -0x1.fep127f;
  else return std::numeric_limits<S>::lowest();
}

struct Sizes {
  int64_t images, channels, height, width, rois, bins_y, bins_x;

  int64_t pixels() const { return height * width; }
  int64_t bins() const { return bins_y * bins_x; }
  int64_t blocks() const { return (channels + kSide - 1) / kSide; }
  int threads(int given) const { return rois * channels * bins() < kAlone ? 1 : given; }
};

// Regions present in each image, in order. `wrong`: the first that names an image that does not exist, or -1.
template <typename T>
std::vector<std::vector<int64_t>> by_image(const Sizes& s, const T* rois, int64_t& wrong) {
  std::vector<std::vector<int64_t>> groups(s.images);
  wrong = -1;
  for (int64_t k = 0; k < s.rois; ++k) {
    const T* roi = rois + 5 * k;
    if (!std::all_of(roi, roi + 5, [](T v) { return std::isfinite(v); }) || roi[0] < 0) continue;
    if (roi[0] < static_cast<T>(s.images)) {
      groups[static_cast<int64_t>(roi[0])].push_back(k);
    } else if (wrong < 0) {
      wrong = k;
    }
  }
  return groups;
}

template <typename T>
int64_t to_pixel(T coordinate, T scale) {
  constexpr T kFar = static_cast<T>(1 << 30);
  return static_cast<int64_t>(std::clamp(std::round(coordinate * scale), -kFar, kFar));
}

template <typename T>
void fill_bins(T low, T high, T scale, int64_t bins, int64_t extent, Bins& axis) {
  const int64_t first = to_pixel(low, scale), last = to_pixel(high, scale);
  const T size = static_cast<T>(std::max<int64_t>(last - first + 1, 1)) / static_cast<T>(bins);
  axis.first.resize(bins);
  axis.last.resize(bins);
  for (int64_t i = 0; i < bins; ++i) {
    const int64_t from = static_cast<int64_t>(std::floor(static_cast<T>(i) * size)) + first;
    const int64_t to = static_cast<int64_t>(std::ceil(static_cast<T>(i + 1) * size)) + first;
    axis.first[i] = std::clamp<int64_t>(from, 0, extent);
    axis.last[i] = std::clamp<int64_t>(to, 0, extent);
  }
}

// Rows [above, below) of `count` channels from `channel` on, side by side.
template <typename S, typename T>
void fill_tile(const Sizes& s, const S* image, bool channels_last, int64_t channel, int64_t count, int64_t above,
               int64_t below, T* tile) {
  const int64_t begin = above * s.width, end = below * s.width;
  if (channels_last) {
    for (int64_t p = begin; p < end; ++p, tile += kSide)
      for (int64_t c = 0; c < count; ++c) tile[c] = roi_align::widen(image[p * s.channels + channel + c]);
  } else {
    // Few pixels at a time, so that the tile's lines are still there for the next channel.
    for (int64_t some = begin; some < end; some += 64) {
      const int64_t stop = std::min(end, some + 64);
      for (int64_t c = 0; c < count; ++c) {
        const S* plane = image + (channel + c) * s.pixels();
        for (int64_t p = some; p < stop; ++p) tile[(p - begin) * kSide + c] = roi_align::widen(plane[p]);
      }
    }
  }
}

template <typename S>
int64_t forward(const Sizes& s, const S* input, const typename ComputeOf<S>::type* rois, S* out, int32_t* argmax,
                double spatial_scale, bool channels_last, int threads) {
  using T = typename ComputeOf<S>::type;
  int64_t wrong;
  const auto groups = by_image(s, rois, wrong);
  if (wrong >= 0) return wrong;
  const int64_t bins = s.bins(), size = s.channels * bins;
  advise_large_pages(reinterpret_cast<std::uintptr_t>(out), s.rois * size * static_cast<int64_t>(sizeof(S)));
  advise_large_pages(reinterpret_cast<std::uintptr_t>(argmax), s.rois * size * 4);
  std::vector<Bins> ys(s.rois), xs(s.rois);
  std::vector<char> present(s.rois, 0);
  std::vector<int64_t> above(s.images, s.height), below(s.images, 0);
  for (int64_t n = 0; n < s.images; ++n) {
    for (const int64_t k : groups[n]) {
      const T scale = static_cast<T>(spatial_scale), *roi = rois + 5 * k;
      present[k] = 1;
      fill_bins<T>(roi[1], roi[3], scale, s.bins_x, s.width, xs[k]);
      fill_bins<T>(roi[2], roi[4], scale, s.bins_y, s.height, ys[k]);
      above[n] = std::min(above[n], ys[k].first.front());
      below[n] = std::max(below[n], ys[k].last.back());
    }
  }
  for (int64_t k = 0; k < s.rois; ++k) {
    if (present[k]) continue;
    std::memset(out + k * size, 0, sizeof(S) * size);
    std::fill(argmax + k * size, argmax + (k + 1) * size, -1);
  }
  const auto pool = FASTRCNN_BEST(pool_region<T>);
#pragma omp parallel num_threads(s.threads(threads))
  {
    std::vector<T> tile, best(bins * kSide);
    std::vector<Index<T>> where(bins * kSide);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.images * s.blocks(); ++task) {
      const int64_t n = task / s.blocks(), channel = task % s.blocks() * kSide;
      const int64_t count = std::min<int64_t>(kSide, s.channels - channel);
      if (groups[n].empty()) continue;
      tile.resize(std::max<int64_t>(0, below[n] - above[n]) * s.width * kSide);
      fill_tile(s, input + n * s.channels * s.pixels(), channels_last, channel, count, above[n], below[n], tile.data());
      for (const int64_t k : groups[n]) {
        pool(tile.data(), above[n], s.width, ys[k], xs[k], lowest<S>(), best.data(), where.data());
        if (channels_last) {
          for (int64_t b = 0; b < bins; ++b) {
            const int64_t at = (k * bins + b) * s.channels + channel;
            for (int64_t c = 0; c < count; ++c) {
              roi_align::narrow(best[b * kSide + c], out[at + c]);
              argmax[at + c] = static_cast<int32_t>(where[b * kSide + c]);
            }
          }
        } else {
          for (int64_t c = 0; c < count; ++c) {
            const int64_t at = (k * s.channels + channel + c) * bins;
            for (int64_t b = 0; b < bins; ++b) {
              roi_align::narrow(best[b * kSide + c], out[at + b]);
              argmax[at + b] = static_cast<int32_t>(where[b * kSide + c]);
            }
          }
        }
      }
    }
  }
  return -1;
}

template <typename S>
void backward(const Sizes& s, S* out, const typename ComputeOf<S>::type* rois, const S* grad, const int32_t* argmax,
              bool channels_last, int threads) {
  using T = typename ComputeOf<S>::type;
  int64_t wrong;
  const auto groups = by_image(s, rois, wrong);
  const int64_t bins = s.bins(), pixels = s.pixels();
  advise_large_pages(reinterpret_cast<std::uintptr_t>(out),
                                s.images * s.channels * pixels * static_cast<int64_t>(sizeof(S)));
#pragma omp parallel num_threads(s.threads(threads))
  {
    std::vector<T> sums;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.images * s.blocks(); ++task) {
      const int64_t n = task / s.blocks(), channel = task % s.blocks() * kSide;
      const int64_t count = std::min<int64_t>(kSide, s.channels - channel);
      S* image = out + n * s.channels * pixels;
      sums.assign(count * pixels, T(0));
      for (const int64_t k : groups[n]) {
        if (channels_last) {
          for (int64_t b = 0; b < bins; ++b) {
            const int64_t at = (k * bins + b) * s.channels + channel;
            for (int64_t c = 0; c < count; ++c)
              if (argmax[at + c] >= 0) sums[argmax[at + c] * count + c] += roi_align::widen(grad[at + c]);
          }
        } else {
          for (int64_t c = 0; c < count; ++c) {
            const int64_t at = (k * s.channels + channel + c) * bins;
            T* plane = sums.data() + c * pixels;
            for (int64_t b = 0; b < bins; ++b)
              if (argmax[at + b] >= 0) plane[argmax[at + b]] += roi_align::widen(grad[at + b]);
          }
        }
      }
      if (channels_last) {
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t c = 0; c < count; ++c)
            roi_align::narrow(sums[p * count + c], image[p * s.channels + channel + c]);
      } else {
        for (int64_t i = 0; i < count * pixels; ++i) roi_align::narrow(sums[i], image[channel * pixels + i]);
      }
    }
  }
}

template <typename S>
int64_t forward_at(const Sizes& s, const std::array<std::uintptr_t, 4>& a, double scale, bool last, int threads) {
  using T = typename ComputeOf<S>::type;
  return forward<S>(s, as_pointer<const S>(a[0]), as_pointer<const T>(a[1]), as_pointer<S>(a[2]),
                    as_pointer<int32_t>(a[3]), scale, last, threads);
}

template <typename S>
void backward_at(const Sizes& s, const std::array<std::uintptr_t, 4>& a, bool last, int threads) {
  using T = typename ComputeOf<S>::type;
  backward<S>(s, as_pointer<S>(a[0]), as_pointer<const T>(a[1]), as_pointer<const S>(a[2]),
              as_pointer<const int32_t>(a[3]), last, threads);
}

Sizes sizes_of(const std::array<int64_t, 7>& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}; }

}  // namespace
}  // namespace roi_pool

int64_t kernels::roi_pool_forward(std::uintptr_t input, std::uintptr_t rois, std::uintptr_t out, std::uintptr_t argmax,
                                  const std::array<int64_t, 7>& sizes, double scale, bool channels_last, int dtype,
                                  int threads) {
  using namespace roi_pool;
  const Sizes s = sizes_of(sizes);
  const std::array<std::uintptr_t, 4> a{input, rois, out, argmax};
  switch (dtype) {
    case roi_align::kFloat64: return forward_at<double>(s, a, scale, channels_last, threads);
    case roi_align::kFloat16: return forward_at<Half>(s, a, scale, channels_last, threads);
    case roi_align::kBFloat16: return forward_at<BFloat>(s, a, scale, channels_last, threads);
    default: return forward_at<float>(s, a, scale, channels_last, threads);
  }
}

void kernels::roi_pool_backward(std::uintptr_t out, std::uintptr_t rois, std::uintptr_t grad, std::uintptr_t argmax,
                                const std::array<int64_t, 7>& sizes, bool channels_last, int dtype, int threads) {
  using namespace roi_pool;
  const Sizes s = sizes_of(sizes);
  const std::array<std::uintptr_t, 4> a{out, rois, grad, argmax};
  switch (dtype) {
    case roi_align::kFloat64: return backward_at<double>(s, a, channels_last, threads);
    case roi_align::kFloat16: return backward_at<Half>(s, a, channels_last, threads);
    case roi_align::kBFloat16: return backward_at<BFloat>(s, a, channels_last, threads);
    default: return backward_at<float>(s, a, channels_last, threads);
  }
}
