// Losses of a region proposal network on its sampled anchors, on the CPU; the rules are in fastrcnn_kernels/rpn_loss.py.
//
// A few hundred anchors an image: the forward is one thread's work of some microseconds. The dense gradient is zeros,
// written by all threads, and a few hundred stores.
#include "exports_losses.h"
#include "rpn_loss.h"

#include <cmath>

#include "roi_align_isa.h"

namespace rpn {
namespace {

using roi_align::BFloat;
using roi_align::ComputeOf;
using roi_align::Half;

float value_of(float x) { return x; }
double value_of(double x) { return x; }
float value_of(Half x) {
  using namespace roi_align;
  float out;
  FASTRCNN_BEST(convert_all<Half, float>)(&x, &out, 1);
  return out;
}
float value_of(BFloat x) {
  using namespace roi_align;
  float out;
  FASTRCNN_BEST(convert_all<BFloat, float>)(&x, &out, 1);
  return out;
}
void assign(float x, float* out) { *out = x; }
void assign(double x, double* out) { *out = x; }
void assign(float x, Half* out) {
  using namespace roi_align;
  FASTRCNN_BEST(convert_all<float, Half>)(&x, out, 1);
}
void assign(float x, BFloat* out) {
  using namespace roi_align;
  FASTRCNN_BEST(convert_all<float, BFloat>)(&x, out, 1);
}

// Anchors [A, 4] without strides, cells [L, A, 4] with them.
template <typename T>
void anchor_box(const T* anchors, const std::vector<int64_t>& strides, int64_t num_anchors, int64_t index,
                const Place& at, T* box) {
  const bool listed = strides.empty();
  const T* from = anchors + 4 * (listed ? index : at.level * num_anchors + at.anchor);
  const T x = listed ? T(0) : static_cast<T>(at.x * strides[at.level]);
  const T y = listed ? T(0) : static_cast<T>(at.y * strides[at.level]);
  for (int i = 0; i < 4; ++i) box[i] = from[i] + (i % 2 ? y : x);
}

template <typename T>
void encode(const T* wanted, const T* anchor, T offset, T* target) {
  const T aw = anchor[2] - anchor[0] + offset, ah = anchor[3] - anchor[1] + offset;
  const T w = wanted[2] - wanted[0] + offset, h = wanted[3] - wanted[1] + offset;
  target[0] = ((wanted[0] + T(0.5) * w) - (anchor[0] + T(0.5) * aw)) / aw;
  target[1] = ((wanted[1] + T(0.5) * h) - (anchor[1] + T(0.5) * ah)) / ah;
  target[2] = std::log(w / aw);
  target[3] = std::log(h / ah);
}

struct Sample {
  std::uintptr_t anchors, gt_boxes, indices, num_positive, num_sampled, matched, normaliser;
  int64_t images, slots, total, num_gt;
  double beta;
  int box_offset;
};

template <typename S>
void forward(const std::vector<Level>& levels, int64_t num_anchors, const std::vector<int64_t>& strides,
             const Sample& s, std::uintptr_t losses_address, std::uintptr_t slopes_address) {
  using T = typename ComputeOf<S>::type;
  const T *anchors = as_pointer<const T>(s.anchors), *gt = as_pointer<const T>(s.gt_boxes);
  const auto* indices = as_pointer<const int64_t>(s.indices);
  const auto* matched = as_pointer<const int64_t>(s.matched);
  const auto* num_positive = as_pointer<const int64_t>(s.num_positive);
  const auto* num_sampled = as_pointer<const int64_t>(s.num_sampled);
  const T normaliser = *as_pointer<const T>(s.normaliser), beta = static_cast<T>(s.beta);
  T* slopes = as_pointer<T>(slopes_address);
  double sums[2] = {0, 0};
  std::fill(slopes, slopes + s.images * s.slots * 5, T(0));
  for (int64_t n = 0; n < s.images; ++n) {
    const int64_t used = std::min(num_sampled[n], s.slots);
    for (int64_t b = 0; b < used; ++b) {
      const int64_t index = indices[n * s.slots + b];
      Place at;
      if (!locate(levels, num_anchors, index, at)) continue;
      const Level& level = levels[at.level];
      T* slope = slopes + (n * s.slots + b) * 5;
      const T z = value_of(*(as_pointer<const S>(level.objectness) + level.objectness_at(n, at.anchor, at)));
      const bool positive = b < num_positive[n];
      const T e = std::exp(-std::abs(z));
      sums[0] += std::max(z, T(0)) - (positive ? z : T(0)) + std::log1p(e) + (std::isnan(z) ? z : T(0));
      slope[0] = ((z < 0 ? e : T(1)) / (T(1) + e) - (positive ? T(1) : T(0))) / normaliser;
      if (!positive || s.num_gt == 0) continue;
      T anchor[4], target[4];
      anchor_box(anchors, strides, num_anchors, index, at, anchor);
      const int64_t g = std::clamp<int64_t>(matched[n * s.total + index], 0, s.num_gt - 1);
      encode(gt + (n * s.num_gt + g) * 4, anchor, static_cast<T>(s.box_offset), target);
      for (int i = 0; i < 4; ++i) {
        const T d =
            value_of(*(as_pointer<const S>(level.deltas) + level.deltas_at(n, 4 * at.anchor + i, at))) - target[i];
        const T away = std::abs(d);
        sums[1] += away < beta ? T(0.5) * d * d / beta : away - T(0.5) * beta;
        slope[1 + i] = (away < beta ? d / beta : d > 0 ? T(1) : d < 0 ? T(-1) : d) / normaliser;
      }
    }
  }
  T* losses = as_pointer<T>(losses_address);
  losses[0] = static_cast<T>(sums[0] / normaliser);
  losses[1] = static_cast<T>(sums[1] / normaliser);
}

template <typename S>
void backward(const std::vector<Level>& levels, int64_t num_anchors, const int64_t* indices,
              std::uintptr_t slopes_address, std::uintptr_t grad_address, int64_t images, int64_t slots, int threads) {
  using T = typename ComputeOf<S>::type;
  const T *slopes = as_pointer<const T>(slopes_address), *grad = as_pointer<const T>(grad_address);
  for (const Level& level : levels) {
    const int64_t bytes = images * num_anchors * level.height * level.width * static_cast<int64_t>(sizeof(S));
    fill_zero(level.objectness, bytes, threads);
    fill_zero(level.deltas, 4 * bytes, threads);
  }
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t b = 0; b < slots; ++b) {
      Place at;
      if (!locate(levels, num_anchors, indices[n * slots + b], at)) continue;
      const Level& level = levels[at.level];
      const T* slope = slopes + (n * slots + b) * 5;
      assign(slope[0] * grad[0], as_pointer<S>(level.objectness) + level.objectness_at(n, at.anchor, at));
      for (int i = 0; i < 4; ++i)
        assign(slope[1 + i] * grad[1], as_pointer<S>(level.deltas) + level.deltas_at(n, 4 * at.anchor + i, at));
    }
  }
}

template <typename Call>
void by_dtype(int dtype, Call call) {
  switch (dtype) {
    case roi_align::kFloat64: return call(double{});
    case roi_align::kFloat16: return call(Half{});
    case roi_align::kBFloat16: return call(BFloat{});
    default: return call(float{});
  }
}

std::vector<Level> levels_of(const std::vector<kernels::RpnLevel>& described) {
  std::vector<Level> levels;
  for (const auto& [objectness, deltas, height, width, objectness_strides, deltas_strides] : described)
    levels.push_back({objectness, deltas, height, width, objectness_strides, deltas_strides});
  return levels;
}

}  // namespace
}  // namespace rpn

void kernels::rpn_loss_forward(const std::vector<RpnLevel>& described, int dtype, int64_t num_anchors,
                               const std::vector<int64_t>& strides, const std::array<std::uintptr_t, 7>& tensors,
                               int64_t images, int64_t slots, int64_t total, int64_t num_gt, double beta,
                               int box_offset, std::uintptr_t losses, std::uintptr_t slopes) {
  using namespace rpn;
  const auto levels = levels_of(described);
  const Sample sample{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6],
                      images, slots, total, num_gt, beta, box_offset};
  by_dtype(dtype, [&](auto kind) {
    forward<decltype(kind)>(levels, num_anchors, strides, sample, losses, slopes);
  });
}

void kernels::rpn_loss_backward(const std::vector<RpnLevel>& described, int dtype, int64_t num_anchors,
                                std::uintptr_t indices, std::uintptr_t slopes, std::uintptr_t grad, int64_t images,
                                int64_t slots, int threads) {
  using namespace rpn;
  const auto levels = levels_of(described);
  by_dtype(dtype, [&](auto kind) {
    backward<decltype(kind)>(levels, num_anchors, as_pointer<const int64_t>(indices), slopes, grad, images, slots,
                             threads);
  });
}
