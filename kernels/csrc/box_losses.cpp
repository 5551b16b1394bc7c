// Generalized, distance and complete IoU losses of paired boxes on the CPU; the formulas are in
// fastrcnn_kernels/box_losses.py. One vectorised loop over the pairs, corners interleaved as they lie in memory.

// Nothing here decides an integer: products may be fused into sums. Before the headers, whose functions would otherwise
// not be inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast,no-trapping-math")
#endif
#include "exports_losses.h"
#include "losses.h"

namespace {

using namespace losses;

enum Kind { kGeneralized = 0, kDistance = 1, kComplete = 2 };

// One side of the pair along one axis: what the loss and its gradient need.
template <typename T>
struct Axis {
  T size, other_size, overlap, outer, shift;
  T low_inside, high_inside;  // the share of this box in the larger lower and in the smaller upper coordinate
};

template <bool kGradient, typename T>
FASTRCNN_ALWAYS_INLINE Axis<T> axis_of(T a1, T a2, T b1, T b2) {
  Axis<T> axis;
  axis.size = a2 - a1;
  axis.other_size = b2 - b1;
  axis.overlap = (a2 < b2 ? a2 : b2) - (a1 > b1 ? a1 : b1);
  axis.outer = (a2 > b2 ? a2 : b2) - (a1 < b1 ? a1 : b1);
  axis.shift = T(0.5) * (a1 + a2 - b1 - b2);
  if (kGradient) {
    axis.low_inside = a1 > b1 ? T(1) : a1 == b1 ? T(0.5) : T(0);
    axis.high_inside = a2 < b2 ? T(1) : a2 == b2 ? T(0.5) : T(0);
  }
  return axis;
}

template <typename T>
struct Constants {
  T eps, inner_eps;  // inner_eps: of the IoU and the diagonal
};

// Losses [count], or with `kGradient` their derivatives by the first box [count, 4] times scale.
template <int kKind, bool kGradient, typename T>
FASTRCNN_ALWAYS_INLINE void box_loop(const T* boxes1, const T* boxes2, int64_t count, Constants<T> c, T scale, T* out) {
  constexpr T kFourOverPiSquared = T(0.40528473456935108577551785283891);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T *a = boxes1 + 4 * i, *b = boxes2 + 4 * i;
    const Axis<T> x = axis_of<kGradient>(a[0], a[2], b[0], b[2]), y = axis_of<kGradient>(a[1], a[3], b[1], b[3]);
    const T product = x.overlap * y.overlap;
    const bool meet = (x.overlap > T(0)) & (y.overlap > T(0));
    const T overlap = meet ? product : T(0);
    const T joined = x.size * y.size + x.other_size * y.other_size - overlap, divisor = joined + c.inner_eps;
    const T iou = overlap / divisor;
    // The loss, and its derivatives by the overlap's and the outer box's sides and by both sizes.
    T loss = T(1) - iou;
    // d(1 - iou) = (iou dU - dI) / divisor with dU = dA - dI.
    T by_area = iou / divisor, by_overlap = -(T(1) + iou) / divisor;
    T by_outer_x = T(0), by_outer_y = T(0), by_shift_x = T(0), by_shift_y = T(0), by_size_x = T(0), by_size_y = T(0);
    if (kKind == kGeneralized) {
      const T outer = x.outer * y.outer, outer_divisor = outer + c.eps, empty = (outer - joined) / outer_divisor;
      loss += empty;
      by_area -= T(1) / outer_divisor;
      by_overlap += T(1) / outer_divisor;
      const T by_outer = (T(1) - empty) / outer_divisor;
      by_outer_x = by_outer * y.outer;
      by_outer_y = by_outer * x.outer;
    } else {
      const T diagonal = x.outer * x.outer + y.outer * y.outer + c.inner_eps;
      const T distance = (x.shift * x.shift + y.shift * y.shift) / diagonal;
      loss += distance;
      by_outer_x = T(-2) * distance * x.outer / diagonal;
      by_outer_y = T(-2) * distance * y.outer / diagonal;
      by_shift_x = x.shift / diagonal;  // of each corner, half of the centre's
      by_shift_y = y.shift / diagonal;
    }
    if (kKind == kComplete) {
      const T ratio = x.size / y.size;
      const T angle = vector_math::atan(x.other_size / y.other_size) - vector_math::atan(ratio);
      const T v = kFourOverPiSquared * angle * angle, alpha = v / (T(1) - iou + v + c.eps);
      loss += alpha * v;
      const T by_ratio = alpha * T(-2) * kFourOverPiSquared * angle / (T(1) + ratio * ratio) / y.size;
      by_size_x = by_ratio;
      by_size_y = -by_ratio * ratio;
    }
    if (kGradient) {
      const T inner_x = meet ? by_overlap * y.overlap : T(0), inner_y = meet ? by_overlap * x.overlap : T(0);
      const T size_x = by_area * y.size + by_size_x, size_y = by_area * x.size + by_size_y;
      T* g = out + 4 * i;
      g[0] = scale * (by_shift_x - size_x - inner_x * x.low_inside - by_outer_x * (T(1) - x.low_inside));
      g[1] = scale * (by_shift_y - size_y - inner_y * y.low_inside - by_outer_y * (T(1) - y.low_inside));
      g[2] = scale * (by_shift_x + size_x + inner_x * x.high_inside + by_outer_x * (T(1) - x.high_inside));
      g[3] = scale * (by_shift_y + size_y + inner_y * y.high_inside + by_outer_y * (T(1) - y.high_inside));
    } else {
      out[i] = loss;
    }
  }
}

#define FASTRCNN_BOX_LOOPS(T)                                                                                       \
  FASTRCNN_CLONES void box_losses(int kind, const T* a, const T* b, int64_t count, Constants<T> c, T* out) {        \
    if (kind == kGeneralized) box_loop<kGeneralized, false>(a, b, count, c, T(1), out);                             \
    else if (kind == kDistance) box_loop<kDistance, false>(a, b, count, c, T(1), out);                              \
    else box_loop<kComplete, false>(a, b, count, c, T(1), out);                                                     \
  }                                                                                                                 \
  FASTRCNN_CLONES void box_gradients(int kind, const T* a, const T* b, int64_t count, Constants<T> c, T scale,      \
                                     T* out) {                                                                      \
    if (kind == kGeneralized) box_loop<kGeneralized, true>(a, b, count, c, scale, out);                             \
    else if (kind == kDistance) box_loop<kDistance, true>(a, b, count, c, scale, out);                              \
    else box_loop<kComplete, true>(a, b, count, c, scale, out);                                                     \
  }                                                                                                                 \
  FASTRCNN_CLONES void multiply_rows(T* out, const T* grad, int64_t count) {                                        \
    _Pragma("omp simd") for (int64_t i = 0; i < 4 * count; ++i) out[i] *= grad[i >> 2];                             \
  }

FASTRCNN_BOX_LOOPS(float)
FASTRCNN_BOX_LOOPS(double)

template <typename T>
void forward(std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t out, int64_t count, int kind, double eps,
             double inner_eps, int reduction, int num_threads) {
  const auto *a = as_pointer<const T>(boxes1), *b = as_pointer<const T>(boxes2);
  const Constants<T> c = {static_cast<T>(eps), static_cast<T>(inner_eps)};
  reduce_chunks(count, reduction, as_pointer<T>(out), num_threads, [&](int64_t first, int64_t n, T* to) {
    box_losses(kind, a + 4 * first, b + 4 * first, n, c, to);
  });
}

template <typename T>
void backward(std::uintptr_t grad_address, std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t out_address,
              int64_t count, int kind, double eps, double inner_eps, int reduction, int num_threads) {
  const auto *a = as_pointer<const T>(boxes1), *b = as_pointer<const T>(boxes2);
  const auto* grad = as_pointer<const T>(grad_address);
  auto* out = as_pointer<T>(out_address);
  const Constants<T> c = {static_cast<T>(eps), static_cast<T>(inner_eps)};
  const T scale = shared_gradient(grad, count, reduction);
  for_chunks(count, kChunk, num_threads, [&](int64_t first, int64_t n) {
    box_gradients(kind, a + 4 * first, b + 4 * first, n, c, scale, out + 4 * first);
    if (reduction == kNone) multiply_rows(out + 4 * first, grad + first, n);
  });
}

}  // namespace

void kernels::box_iou_loss_forward(std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t out, int dtype,
                                   int64_t count, int kind, double eps, double inner_eps, int reduction,
                                   int num_threads) {
  auto* run = dtype == kFloat64 ? &forward<double> : &forward<float>;
  run(boxes1, boxes2, out, count, kind, eps, inner_eps, reduction, num_threads);
}

void kernels::box_iou_loss_backward(std::uintptr_t grad, std::uintptr_t boxes1, std::uintptr_t boxes2,
                                    std::uintptr_t out, int dtype, int64_t count, int kind, double eps,
                                    double inner_eps, int reduction, int num_threads) {
  auto* run = dtype == kFloat64 ? &backward<double> : &backward<float>;
  run(grad, boxes1, boxes2, out, count, kind, eps, inner_eps, reduction, num_threads);
}
