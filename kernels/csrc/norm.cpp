// Scale, shift, residual and ReLU in one pass, and its gradient, on the CPU. Bound by memory: each tensor is read once,
// each result written once, and fresh results ask for large pages. The rules are in fastrcnn_kernels/norm.py.
#if defined(__GNUC__) && !defined(__clang__)
// Nothing here decides an integer: sums may use fused multiply-add.
#pragma GCC optimize("fp-contract=fast")
#endif
#include <algorithm>

#include "exports_maps.h"
#include "half.h"

namespace {

using roi_align::BFloat;
using roi_align::Half;
using roi_align::narrow;
using roi_align::widen;

constexpr int64_t kAlone = 1 << 15;  // elements below which a second thread costs more than it brings
constexpr int64_t kStrip = 1 << 13;  // elements of a task, about

// NaN is not below zero: it stays.
template <typename T>
FASTRCNN_ALWAYS_INLINE T positive(T v) {
  return v < T(0) ? T(0) : v;
}

template <typename S, typename T>
struct Forward {
  const S *x, *residual;
  const T *scale, *shift;
  S* out;
  bool relu;
};

template <typename S, typename T>
struct Backward {
  const S *grad, *out;
  const T* scale;
  S *grad_x, *grad_residual;
};

// count elements from at on; channel_step 1: the channel changes with each (from channel 0 on), 0: one channel for all.
template <typename S, typename T, bool kRows, bool kResidual, bool kRelu>
FASTRCNN_ALWAYS_INLINE void forward_strip(const Forward<S, T>& f, int64_t at, int64_t count, int64_t channel) {
  const S *__restrict x = f.x + at, *__restrict residual = f.residual + (kResidual ? at : 0);
  const T *__restrict scale = f.scale + channel, *__restrict shift = f.shift + channel;
  S* out = f.out + at;
  const T s = scale[0], t = shift[0];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T v = widen(x[i]) * (kRows ? scale[i] : s) + (kRows ? shift[i] : t);
    if (kResidual) v += widen(residual[i]);
    narrow(kRelu ? positive(v) : v, out[i]);
  }
}

template <typename S, typename T, bool kRows, bool kRelu, bool kResidual>
FASTRCNN_ALWAYS_INLINE void backward_strip(const Backward<S, T>& b, int64_t at, int64_t count, int64_t channel) {
  const S *__restrict grad = b.grad + at, *__restrict out = b.out + (kRelu ? at : 0);
  const T* __restrict scale = b.scale + channel;
  S *__restrict grad_x = b.grad_x + at, *__restrict grad_residual = b.grad_residual + (kResidual ? at : 0);
  const T s = scale[0];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T value = widen(grad[i]);
    const T g = !kRelu || widen(out[i]) > T(0) ? value : T(0);
    if (kResidual) narrow(g, grad_residual[i]);
    narrow(g * (kRows ? scale[i] : s), grad_x[i]);
  }
}

template <bool kRows, typename S, typename T>
FASTRCNN_ALWAYS_INLINE void forward_any(const Forward<S, T>& f, int64_t at, int64_t count, int64_t channel) {
  if (f.residual && f.relu) return forward_strip<S, T, kRows, true, true>(f, at, count, channel);
  if (f.residual) return forward_strip<S, T, kRows, true, false>(f, at, count, channel);
  if (f.relu) return forward_strip<S, T, kRows, false, true>(f, at, count, channel);
  forward_strip<S, T, kRows, false, false>(f, at, count, channel);
}

template <bool kRows, typename S, typename T>
FASTRCNN_ALWAYS_INLINE void backward_any(const Backward<S, T>& b, int64_t at, int64_t count, int64_t channel) {
  if (b.out && b.grad_residual) return backward_strip<S, T, kRows, true, true>(b, at, count, channel);
  if (b.out) return backward_strip<S, T, kRows, true, false>(b, at, count, channel);
  if (b.grad_residual) return backward_strip<S, T, kRows, false, true>(b, at, count, channel);
  backward_strip<S, T, kRows, false, false>(b, at, count, channel);
}

// One function for each type, because a template cannot be cloned for several instruction sets.
#define FASTRCNN_STRIPS(S, T)                                                                            \
  FASTRCNN_CLONES void strip(const Forward<S, T>& f, bool rows, int64_t at, int64_t count, int64_t c) {  \
    if (rows) return forward_any<true>(f, at, count, c);                                                 \
    forward_any<false>(f, at, count, c);                                                                 \
  }                                                                                                      \
  FASTRCNN_CLONES void strip(const Backward<S, T>& b, bool rows, int64_t at, int64_t count, int64_t c) { \
    if (rows) return backward_any<true>(b, at, count, c);                                                \
    backward_any<false>(b, at, count, c);                                                                \
  }
FASTRCNN_STRIPS(float, float)
FASTRCNN_STRIPS(double, double)
FASTRCNN_STRIPS(Half, float)
FASTRCNN_STRIPS(BFloat, float)
#undef FASTRCNN_STRIPS

// [outer, channels, inner]: rows of channels where inner is 1 (NHWC), else planes (NCHW).
template <typename Pass>
void sweep(const Pass& pass, int64_t outer, int64_t channels, int64_t inner, int threads) {
  const bool rows = inner == 1;
  const int64_t lines = rows ? outer : outer * channels, width = rows ? channels : inner;
  const int64_t together = std::max<int64_t>(1, kStrip / std::max<int64_t>(1, width));
#pragma omp parallel for schedule(static) num_threads(outer* channels* inner < kAlone ? 1 : threads)
  for (int64_t first = 0; first < lines; first += together)
    for (int64_t line = first; line < std::min(lines, first + together); ++line)
      strip(pass, rows, line * width, width, rows ? 0 : line % channels);
}

template <typename S, typename T>
void forward(const std::uintptr_t (&a)[5], int64_t outer, int64_t channels, int64_t inner, bool relu, int threads) {
  const Forward<S, T> pass{as_pointer<const S>(a[0]), as_pointer<const S>(a[3]), as_pointer<const T>(a[1]),
                           as_pointer<const T>(a[2]), as_pointer<S>(a[4]), relu};
  if (a[4] != a[0]) advise_large_pages(a[4], outer * channels * inner * static_cast<int64_t>(sizeof(S)));
  sweep(pass, outer, channels, inner, threads);
}

template <typename S, typename T>
void backward(const std::uintptr_t (&a)[5], int64_t outer, int64_t channels, int64_t inner, int threads) {
  const Backward<S, T> pass{as_pointer<const S>(a[0]), as_pointer<const S>(a[1]), as_pointer<const T>(a[2]),
                            as_pointer<S>(a[3]), as_pointer<S>(a[4])};
  const int64_t bytes = outer * channels * inner * static_cast<int64_t>(sizeof(S));
  advise_large_pages(a[3], bytes);
  if (a[4]) advise_large_pages(a[4], bytes);
  sweep(pass, outer, channels, inner, threads);
}

}  // namespace

void kernels::scale_shift(std::uintptr_t x, std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t residual,
                          std::uintptr_t out, int64_t outer, int64_t channels, int64_t inner, bool relu, int dtype,
                          int threads) {
  const std::uintptr_t addresses[5] = {x, scale, shift, residual, out};
  switch (dtype) {
    case roi_align::kFloat64: return forward<double, double>(addresses, outer, channels, inner, relu, threads);
    case roi_align::kFloat16: return forward<Half, float>(addresses, outer, channels, inner, relu, threads);
    case roi_align::kBFloat16: return forward<BFloat, float>(addresses, outer, channels, inner, relu, threads);
    default: return forward<float, float>(addresses, outer, channels, inner, relu, threads);
  }
}

void kernels::scale_shift_backward(std::uintptr_t grad, std::uintptr_t out, std::uintptr_t scale, std::uintptr_t grad_x,
                                   std::uintptr_t grad_residual, int64_t outer, int64_t channels, int64_t inner,
                                   int dtype, int threads) {
  const std::uintptr_t addresses[5] = {grad, out, scale, grad_x, grad_residual};
  switch (dtype) {
    case roi_align::kFloat64: return backward<double, double>(addresses, outer, channels, inner, threads);
    case roi_align::kFloat16: return backward<Half, float>(addresses, outer, channels, inner, threads);
    case roi_align::kBFloat16: return backward<BFloat, float>(addresses, outer, channels, inner, threads);
    default: return backward<float, float>(addresses, outer, channels, inner, threads);
  }
}
