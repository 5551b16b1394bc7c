// Smooth L1 and the sigmoid focal loss on the CPU; the formulas are in fastrcnn_kernels/losses.py.
//
// A chunk of numbers is widened to the type computed in (float32 is read where it lies), goes through one vectorised
// loop, and is written, or added up while it is in the first-level cache. The backward computes from the inputs again:
// an exponential costs less than a pass over memory that keeps it.

// Nothing here decides an integer: products may be fused into sums. Before the headers, whose functions would otherwise
// not be inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast,no-trapping-math")
#endif
#include "exports_losses.h"
#include "losses.h"

namespace losses {

const float* widen(const float* values, int64_t, float*) { return values; }
const double* widen(const double* values, int64_t, double*) { return values; }

FASTRCNN_CLONES const float* widen(const BFloat* values, int64_t count, float* buffer) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffer[i] = vector_math::from_bits(static_cast<uint32_t>(values[i].bits) << 16);
  return buffer;
}

FASTRCNN_CLONES const float* widen(const Half* values, int64_t count, float* buffer) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = values[i].bits, magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const uint32_t finite = vector_math::to_bits(vector_math::from_bits(magnitude) * 0x1p112f);
    buffer[i] = vector_math::from_bits(sign | ((bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
  }
  return buffer;
}

FASTRCNN_CLONES void narrow(const float* values, int64_t count, BFloat* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = vector_math::to_bits(values[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

FASTRCNN_CLONES void narrow(const float* values, int64_t count, Half* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    // Round to nearest even by adding, in float, a power of two whose last mantissa bit is the last bit of the half.
    const uint32_t bits = vector_math::to_bits(values[i]), twice = bits + bits;
    const float magnitude = vector_math::from_bits(bits & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
    uint32_t bias = twice & 0xff000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    const uint32_t total = vector_math::to_bits(vector_math::from_bits((bias >> 1) + 0x07800000u) + magnitude);
    const uint32_t rounded = ((total >> 13) & 0x7c00u) + (total & 0x0fffu);
    out[i].bits = static_cast<uint16_t>(((bits & 0x80000000u) >> 16) | (twice > 0xff000000u ? 0x7e00u : rounded));
  }
}

FASTRCNN_CLONES float sum(const float* values, int64_t count) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}
FASTRCNN_CLONES double sum(const double* values, int64_t count) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}
FASTRCNN_CLONES void multiply(float* values, const float* by, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] *= by[i];
}
FASTRCNN_CLONES void multiply(double* values, const double* by, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] *= by[i];
}

namespace {

template <typename T>
FASTRCNN_ALWAYS_INLINE void smooth_l1_loop(const T* input, const T* target, int64_t count, T beta, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T distance = std::abs(input[i] - target[i]);
    // Without a branch: a division by zero where beta is 0 is not selected.
    out[i] = distance < beta ? T(0.5) * distance * distance / beta : distance - T(0.5) * beta;
  }
}

template <typename T>
FASTRCNN_ALWAYS_INLINE void smooth_l1_gradient_loop(const T* input, const T* target, int64_t count, T beta, T scale,
                                                    T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T difference = input[i] - target[i];
    // Over beta 0 a difference is an infinity of its sign, and 0 is 0.
    const T slope = difference == T(0) ? T(0) : difference / beta;
    out[i] = scale * (slope > T(1) ? T(1) : slope < T(-1) ? T(-1) : slope);
  }
}

// q^gamma for q from 0 to 1. What multiplies it is 0 where q is, and 0^0 is 1: the smallest normal number stands for 0.
template <typename T>
FASTRCNN_ALWAYS_INLINE T power(T q, T gamma) {
  constexpr T kLeast = std::numeric_limits<T>::min();
  return vector_math::exp(gamma * vector_math::log_normal(q < kLeast ? kLeast : q));
}

template <typename T>
struct Focal {
  T base, slope, gamma;  // the weight of target t is base + slope * t
};

// With `kGradient` the derivative by the logit times `scale`, else the loss.
template <bool kGradient, bool kSquare, typename T>
FASTRCNN_ALWAYS_INLINE void focal_loop(const T* logits, const T* targets, int64_t count, Focal<T> f, T scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T x = logits[i], t = targets[i];
    const T e = vector_math::exp(-std::abs(x)), inverse = T(1) / (T(1) + e), small = e * inverse;
    const bool positive = x >= T(0);
    const T p = positive ? inverse : small, not_p = positive ? small : inverse;
    const T above = p * (T(1) - t), below = not_p * t, q = above + below;
    const T cross_entropy = (positive ? x : T(0)) - x * t + vector_math::log1p_unit(e);
    const T weight = f.base + f.slope * t, factor = kSquare ? q * q : power(q, f.gamma);
    if (kGradient) {
      // p (1 - p) / q tends to 1 where q underflows.
      const T ratio = q > T(0) ? p * not_p / q : T(1);
      const T inner = above - below + cross_entropy * (f.gamma * (T(1) - t - t) * ratio);
      out[i] = scale * weight * factor * inner;
    } else {
      out[i] = weight * factor * cross_entropy;
    }
  }
}

#define FASTRCNN_LOSS_LOOPS(T)                                                                                     \
  FASTRCNN_CLONES void smooth_l1(const T* input, const T* target, int64_t count, T beta, T* out) {                 \
    smooth_l1_loop(input, target, count, beta, out);                                                               \
  }                                                                                                                \
  FASTRCNN_CLONES void smooth_l1_gradient(const T* input, const T* target, int64_t count, T beta, T scale,         \
                                          T* out) {                                                                \
    smooth_l1_gradient_loop(input, target, count, beta, scale, out);                                               \
  }                                                                                                                \
  FASTRCNN_CLONES void focal(const T* logits, const T* targets, int64_t count, Focal<T> f, T* out) {               \
    if (f.gamma == T(2)) focal_loop<false, true>(logits, targets, count, f, T(1), out);                            \
    else focal_loop<false, false>(logits, targets, count, f, T(1), out);                                           \
  }                                                                                                                \
  FASTRCNN_CLONES void focal_gradient(const T* logits, const T* targets, int64_t count, Focal<T> f, T scale,       \
                                      T* out) {                                                                    \
    if (f.gamma == T(2)) focal_loop<true, true>(logits, targets, count, f, scale, out);                            \
    else focal_loop<true, false>(logits, targets, count, f, scale, out);                                           \
  }

FASTRCNN_LOSS_LOOPS(float)
FASTRCNN_LOSS_LOOPS(double)

// The targets of the elements [first, first + count) of a matrix of logits [K, classes] from labels [K]: 1 in column
// label - 1, else 0.
template <typename T>
const T* spread_labels(const int64_t* labels, int64_t classes, int64_t first, int64_t count, T* buffer) {
  std::fill(buffer, buffer + count, T(0));
  for (int64_t row = first / classes; row * classes < first + count; ++row) {
    const int64_t at = row * classes + labels[row] - 1 - first;
    if (labels[row] > 0 && labels[row] <= classes && at >= 0 && at < count) buffer[at] = T(1);
  }
  return buffer;
}

// Zero for the rows whose label is negative.
template <typename T>
void clear_ignored(const int64_t* labels, int64_t classes, int64_t first, int64_t count, T* values) {
  for (int64_t row = first / classes; row * classes < first + count; ++row) {
    if (labels[row] >= 0) continue;
    const int64_t begin = std::max<int64_t>(row * classes - first, 0);
    std::fill(values + begin, values + std::min(row * classes + classes - first, count), T(0));
  }
}

template <typename S>
void smooth_l1_forward(std::uintptr_t input_address, std::uintptr_t target_address, std::uintptr_t out_address,
                       int64_t count, double beta, int reduction, int num_threads) {
  using T = Compute<S>;
  const auto *input = as_pointer<const S>(input_address), *target = as_pointer<const S>(target_address);
  reduce_chunks(count, reduction, as_pointer<T>(out_address), num_threads, [&](int64_t first, int64_t n, T* out) {
    alignas(64) T a[kChunk], b[kChunk];
    smooth_l1(widen(input + first, n, a), widen(target + first, n, b), n, static_cast<T>(beta), out);
  });
}

template <typename S>
void smooth_l1_backward(std::uintptr_t grad_address, std::uintptr_t input_address, std::uintptr_t target_address,
                        std::uintptr_t out_address, int64_t count, double beta, int reduction, int num_threads) {
  using T = Compute<S>;
  const auto *input = as_pointer<const S>(input_address), *target = as_pointer<const S>(target_address);
  const auto* grad = as_pointer<const T>(grad_address);
  auto* out = as_pointer<S>(out_address);
  const T scale = shared_gradient(grad, count, reduction);
  for_chunks(count, kChunk, num_threads, [&](int64_t first, int64_t n) {
    alignas(64) T a[kChunk], b[kChunk], result[kChunk];
    T* to = destination(out + first, result);
    smooth_l1_gradient(widen(input + first, n, a), widen(target + first, n, b), n, static_cast<T>(beta), scale, to);
    if (reduction == kNone) multiply(to, grad + first, n);
    narrow(to, n, out + first);
  });
}

template <typename T>
Focal<T> focal_parameters(double alpha, double gamma) {
  const bool weighted = alpha >= 0;
  return {static_cast<T>(weighted ? 1 - alpha : 1), static_cast<T>(weighted ? 2 * alpha - 1 : 0),
          static_cast<T>(gamma)};
}

// `classes` 0: targets of the logits' type and shape; else labels int64 [count / classes].
template <typename S>
void focal_forward(std::uintptr_t logits_address, std::uintptr_t targets_address, int64_t classes,
                   std::uintptr_t out_address, int64_t count, double alpha, double gamma, int reduction,
                   int num_threads) {
  using T = Compute<S>;
  const auto *logits = as_pointer<const S>(logits_address), *targets = as_pointer<const S>(targets_address);
  const auto* labels = as_pointer<const int64_t>(targets_address);
  const auto f = focal_parameters<T>(alpha, gamma);
  reduce_chunks(count, reduction, as_pointer<T>(out_address), num_threads, [&](int64_t first, int64_t n, T* out) {
    alignas(64) T x[kChunk], t[kChunk];
    const T* of = classes > 0 ? spread_labels(labels, classes, first, n, t) : widen(targets + first, n, t);
    focal(widen(logits + first, n, x), of, n, f, out);
    if (classes > 0) clear_ignored(labels, classes, first, n, out);
  });
}

template <typename S>
void focal_backward(std::uintptr_t grad_address, std::uintptr_t logits_address, std::uintptr_t targets_address,
                    int64_t classes, std::uintptr_t out_address, int64_t count, double alpha, double gamma,
                    int reduction, int num_threads) {
  using T = Compute<S>;
  const auto *logits = as_pointer<const S>(logits_address), *targets = as_pointer<const S>(targets_address);
  const auto* labels = as_pointer<const int64_t>(targets_address);
  const auto* grad = as_pointer<const T>(grad_address);
  auto* out = as_pointer<S>(out_address);
  const auto f = focal_parameters<T>(alpha, gamma);
  const T scale = shared_gradient(grad, count, reduction);
  for_chunks(count, kChunk, num_threads, [&](int64_t first, int64_t n) {
    alignas(64) T x[kChunk], t[kChunk], result[kChunk];
    T* to = destination(out + first, result);
    const T* of = classes > 0 ? spread_labels(labels, classes, first, n, t) : widen(targets + first, n, t);
    focal_gradient(widen(logits + first, n, x), of, n, f, scale, to);
    if (reduction == kNone) multiply(to, grad + first, n);
    if (classes > 0) clear_ignored(labels, classes, first, n, to);
    narrow(to, n, out + first);
  });
}

}  // namespace
}  // namespace losses

void kernels::smooth_l1_forward(std::uintptr_t input, std::uintptr_t target, std::uintptr_t out, int dtype,
                                int64_t count, double beta, int reduction, int num_threads) {
#define FASTRCNN_CALL(S) losses::smooth_l1_forward<S>(input, target, out, count, beta, reduction, num_threads)
  FASTRCNN_DISPATCH(dtype, FASTRCNN_CALL)
#undef FASTRCNN_CALL
}

void kernels::smooth_l1_backward(std::uintptr_t grad, std::uintptr_t input, std::uintptr_t target, std::uintptr_t out,
                                 int dtype, int64_t count, double beta, int reduction, int num_threads) {
#define FASTRCNN_CALL(S) losses::smooth_l1_backward<S>(grad, input, target, out, count, beta, reduction, num_threads)
  FASTRCNN_DISPATCH(dtype, FASTRCNN_CALL)
#undef FASTRCNN_CALL
}

void kernels::focal_loss_forward(std::uintptr_t logits, std::uintptr_t targets, int64_t classes, std::uintptr_t out,
                                 int dtype, int64_t count, double alpha, double gamma, int reduction, int num_threads) {
#define FASTRCNN_CALL(S) \
  losses::focal_forward<S>(logits, targets, classes, out, count, alpha, gamma, reduction, num_threads)
  FASTRCNN_DISPATCH(dtype, FASTRCNN_CALL)
#undef FASTRCNN_CALL
}

void kernels::focal_loss_backward(std::uintptr_t grad, std::uintptr_t logits, std::uintptr_t targets, int64_t classes,
                                  std::uintptr_t out, int dtype, int64_t count, double alpha, double gamma,
                                  int reduction, int num_threads) {
#define FASTRCNN_CALL(S) \
  losses::focal_backward<S>(grad, logits, targets, classes, out, count, alpha, gamma, reduction, num_threads)
  FASTRCNN_DISPATCH(dtype, FASTRCNN_CALL)
#undef FASTRCNN_CALL
}
