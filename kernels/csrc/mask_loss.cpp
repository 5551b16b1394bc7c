// The last layer of a mask head with its loss, on the CPU; the rules are in fastrcnn_kernels/mask_loss.py.
//
// Features are read once in each direction, in their own layout. Each region has sums of its own, added up in the
// order of the regions afterwards: no atomics, the same bits whatever the number of threads.
#if defined(__GNUC__) && !defined(__clang__)
// Sums may use fused multiply-add here: no integer is decided. And a selection is not to become a branch because the
// product not selected could have raised a flag: no loop with a ReLU would be vectorised.
#pragma GCC optimize("fp-contract=fast", "no-trapping-math")
#endif
#include <cmath>
#include <type_traits>
#include <vector>

#include "exports_losses.h"
#include "roi_align_isa.h"

namespace roi_align {
namespace {

#define FASTRCNN_ALWAYS inline __attribute__((always_inline))

template <bool Relu, typename T>
FASTRCNN_ALWAYS T rectified(T h) {
  if constexpr (!Relu) return h;
  return h < T(0) ? T(0) : h;  // a NaN stays one
}

template <bool Relu, typename T>
FASTRCNN_ALWAYS T passed(T grad, T h) {
  if constexpr (!Relu) return grad;
  return h <= T(0) ? T(0) : grad;
}

// z[p] += sum over four planes.
template <bool Relu, typename T>
FASTRCNN_ALWAYS void add_planes(const T* h, int64_t stride, const T* w, int count, int64_t size, T* z) {
  if (count == 4) {
    const T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    const T *h0 = h, *h1 = h + stride, *h2 = h + 2 * stride, *h3 = h + 3 * stride;
#pragma omp simd
    for (int64_t p = 0; p < size; ++p)
      z[p] += (w0 * rectified<Relu>(h0[p]) + w1 * rectified<Relu>(h1[p])) +
              (w2 * rectified<Relu>(h2[p]) + w3 * rectified<Relu>(h3[p]));
    return;
  }
  for (int c = 0; c < count; ++c) {
    const T w0 = w[c];
    const T* h0 = h + c * stride;
#pragma omp simd
    for (int64_t p = 0; p < size; ++p) z[p] += w0 * rectified<Relu>(h0[p]);
  }
}

template <bool Relu, typename T>
FASTRCNN_ALWAYS T dot(const T* a, const T* h, int64_t size) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += a[i] * rectified<Relu>(h[i]);
  return sum;
}

// One plane: its share of the weight's gradient, and the gradient of its features.
template <bool Relu, typename T>
FASTRCNN_ALWAYS T plane_gradient(const T* g, const T* h, T w, int64_t size, T* out) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < size; ++p) {
    const T value = h[p], scaled = g[p] * w;
    sum += g[p] * rectified<Relu>(value);
    out[p] = passed<Relu>(scaled, value);
  }
  return sum;
}

// One pixel of channels_last features: the same, over its channels.
template <bool Relu, typename T>
FASTRCNN_ALWAYS void pixel_gradient(T g, const T* h, const T* w, int64_t channels, T* sums, T* out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const T value = h[c], scaled = g * w[c];
    sums[c] += g * rectified<Relu>(value);
    out[c] = passed<Relu>(scaled, value);
  }
}

// exp(x) for x <= 0, within 2 units in the last place, in plain arithmetic that the compiler turns into vectors.
FASTRCNN_ALWAYS float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits of the sum.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r) * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return y * power;
}
FASTRCNN_ALWAYS double exp_negative(double x) { return std::exp(x); }

// log(1 + e) for 0 <= e <= 1: 2 atanh(e / (2 + e)).
FASTRCNN_ALWAYS float log1p_small(float e) {
  const float s = e / (2.0f + e), q = s * s;
  float y = 2.0f / 15;
  y = y * q + 2.0f / 13;
  y = y * q + 2.0f / 11;
  y = y * q + 2.0f / 9;
  y = y * q + 2.0f / 7;
  y = y * q + 2.0f / 5;
  y = y * q + 2.0f / 3;
  y = y * q + 2.0f;
  return y * s;
}
FASTRCNN_ALWAYS double log1p_small(double e) { return std::log1p(e); }

template <typename T>
FASTRCNN_ALWAYS T cross_entropy(const T* z, const uint8_t* target, int64_t size) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < size; ++p) {
    const T x = z[p], e = exp_negative(-std::abs(x));
    sum += (x < T(0) ? T(0) : x) - (target[p] != 0 ? x : T(0)) + log1p_small(e);
  }
  return sum;
}

template <typename T>
FASTRCNN_ALWAYS T logit_gradient(const T* z, const uint8_t* target, T scale, int64_t size, T* g) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < size; ++p) {
    const T x = z[p], e = exp_negative(-std::abs(x));
    const T slope = ((x < T(0) ? e : T(1)) / (T(1) + e) - (target[p] != 0 ? T(1) : T(0))) * scale;
    g[p] = slope;
    sum += slope;
  }
  return sum;
}

struct Shape {
  int64_t channels, pixels;
  bool channels_last, relu;
};

template <bool Relu, typename T>
FASTRCNN_ALWAYS void region_logits(const Shape& s, const T* h, const T* w, T bias, T* z) {
  if (s.channels_last) {
    for (int64_t p = 0; p < s.pixels; ++p) z[p] = bias + dot<Relu>(w, h + p * s.channels, s.channels);
    return;
  }
  for (int64_t p = 0; p < s.pixels; ++p) z[p] = bias;
  for (int64_t c = 0; c < s.channels; c += 4)
    add_planes<Relu>(h + c * s.pixels, s.pixels, w + c, static_cast<int>(std::min<int64_t>(4, s.channels - c)),
                     s.pixels, z);
}

template <bool Relu, typename T>
FASTRCNN_ALWAYS void region_gradient(const Shape& s, const T* g, const T* h, const T* w, T* sums, T* out) {
  if (s.channels_last) {
    std::fill(sums, sums + s.channels, T(0));
    for (int64_t p = 0; p < s.pixels; ++p)
      pixel_gradient<Relu>(g[p], h + p * s.channels, w, s.channels, sums, out + p * s.channels);
    return;
  }
  for (int64_t c = 0; c < s.channels; ++c)
    sums[c] = plane_gradient<Relu>(g, h + c * s.pixels, w[c], s.pixels, out + c * s.pixels);
}

// A template cannot be cloned for several instruction sets: one function for each type.
#define FASTRCNN_MASK_LOSS(T)                                                                                       \
  FASTRCNN_CLONES void logits_of(const Shape& s, const T* h, const T* w, T bias, T* z) {                            \
    s.relu ? region_logits<true>(s, h, w, bias, z) : region_logits<false>(s, h, w, bias, z);                        \
  }                                                                                                                 \
  FASTRCNN_CLONES T loss_of(const T* z, const uint8_t* target, int64_t size) {                                      \
    return cross_entropy(z, target, size);                                                                          \
  }                                                                                                                 \
  FASTRCNN_CLONES T slopes_of(const T* z, const uint8_t* target, T scale, int64_t size, T* g) {                     \
    return logit_gradient(z, target, scale, size, g);                                                               \
  }                                                                                                                 \
  FASTRCNN_CLONES void gradient_of(const Shape& s, const T* g, const T* h, const T* w, T* sums, T* out) {           \
    s.relu ? region_gradient<true>(s, g, h, w, sums, out) : region_gradient<false>(s, g, h, w, sums, out);          \
  }
FASTRCNN_MASK_LOSS(float)
FASTRCNN_MASK_LOSS(double)
#undef FASTRCNN_MASK_LOSS

struct Masks {
  std::uintptr_t hidden;
  int64_t regions, classes;
  std::uintptr_t weight, bias;
  const int64_t* labels;
  Shape shape;
  int threads;

  int64_t size() const { return shape.channels * shape.pixels; }
  int64_t wrong_label() const {
    for (int64_t k = 0; k < regions; ++k)
      if (labels[k] >= classes) return k;
    return -1;
  }
};

// The features of region k in the compute type: in place, or converted into scratch.
template <typename S, typename T>
const T* features_of(const Masks& m, int64_t k, std::vector<T>& scratch) {
  const S* h = as_pointer<const S>(m.hidden) + k * m.size();
  if constexpr (std::is_same<S, T>::value) {
    return h;
  } else {
    scratch.resize(m.size());
    FASTRCNN_BEST(convert_all<S, T>)(h, scratch.data(), m.size());
    return scratch.data();
  }
}

template <typename S>
void forward(const Masks& m, const uint8_t* targets, const double* normaliser, std::uintptr_t logits_address,
             std::uintptr_t loss_address) {
  using T = typename ComputeOf<S>::type;
  const T *weight = as_pointer<const T>(m.weight), *bias = as_pointer<const T>(m.bias);
  T* logits = as_pointer<T>(logits_address);
  std::vector<double> losses(m.regions, 0.0);
#pragma omp parallel num_threads(m.threads)
  {
    std::vector<T> scratch;
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < m.regions; ++k) {
      const int64_t label = m.labels[k];
      T* z = logits + k * m.shape.pixels;
      if (label < 0) {
        std::fill(z, z + m.shape.pixels, T(0));
        continue;
      }
      logits_of(m.shape, features_of<S, T>(m, k, scratch), weight + label * m.shape.channels, bias[label], z);
      if (loss_address) losses[k] = loss_of(z, targets + k * m.shape.pixels, m.shape.pixels);
    }
  }
  if (!loss_address) return;  // not the targets': those of no region have no address
  double total = 0;
  for (const double loss : losses) total += loss;
  *as_pointer<T>(loss_address) = static_cast<T>(total / *normaliser);
}

template <typename S>
void backward(const Masks& m, const uint8_t* targets, const double* scale, std::uintptr_t logits_address,
              std::uintptr_t hidden_address, std::uintptr_t weight_address, std::uintptr_t bias_address) {
  using T = typename ComputeOf<S>::type;
  constexpr bool kConverted = !std::is_same<S, T>::value;
  const int64_t channels = m.shape.channels, pixels = m.shape.pixels;
  const T *weight = as_pointer<const T>(m.weight), *logits = as_pointer<const T>(logits_address);
  S* grad_hidden = as_pointer<S>(hidden_address);
  std::vector<T> by_region(m.regions * (channels + 1));
  advise_large_pages(hidden_address, m.regions * m.size() * static_cast<int64_t>(sizeof(S)));
#pragma omp parallel num_threads(m.threads)
  {
    std::vector<T> scratch, g(pixels), out(kConverted ? m.size() : 0);
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < m.regions; ++k) {
      const int64_t label = m.labels[k];
      S* target = grad_hidden + k * m.size();
      if (label < 0 || label >= m.classes) {
        std::memset(static_cast<void*>(target), 0, sizeof(S) * m.size());
        continue;
      }
      T* sums = by_region.data() + k * (channels + 1);
      sums[channels] = slopes_of(logits + k * pixels, targets + k * pixels, static_cast<T>(*scale), pixels, g.data());
      const T *h = features_of<S, T>(m, k, scratch), *w = weight + label * channels;
      if constexpr (kConverted) {
        gradient_of(m.shape, g.data(), h, w, sums, out.data());
        FASTRCNN_BEST(convert_all<T, S>)(out.data(), target, m.size());
      } else {
        gradient_of(m.shape, g.data(), h, w, sums, target);
      }
    }
  }
  T *grad_weight = as_pointer<T>(weight_address), *grad_bias = as_pointer<T>(bias_address);
  std::fill(grad_weight, grad_weight + m.classes * channels, T(0));
  std::fill(grad_bias, grad_bias + m.classes, T(0));
  for (int64_t k = 0; k < m.regions; ++k) {
    const int64_t label = m.labels[k];
    if (label < 0 || label >= m.classes) continue;
    const T* sums = by_region.data() + k * (channels + 1);
    T* row = grad_weight + label * channels;
    for (int64_t c = 0; c < channels; ++c) row[c] += sums[c];
    grad_bias[label] += sums[channels];
  }
}

template <typename Call>
void by_dtype(int dtype, Call call) {
  switch (dtype) {
    case kFloat64: return call(double{});
    case kFloat16: return call(Half{});
    case kBFloat16: return call(BFloat{});
    default: return call(float{});
  }
}

}  // namespace
}  // namespace roi_align

int64_t kernels::mask_loss_forward(std::uintptr_t hidden, int dtype, bool channels_last, int64_t regions,
                                   int64_t channels, int64_t pixels, std::uintptr_t weight, std::uintptr_t bias,
                                   int64_t classes, std::uintptr_t labels, bool relu, int threads,
                                   std::uintptr_t targets, std::uintptr_t normaliser, std::uintptr_t logits,
                                   std::uintptr_t loss) {
  using namespace roi_align;
  const Masks m{hidden, regions, classes, weight, bias, as_pointer<const int64_t>(labels),
                {channels, pixels, channels_last, relu}, threads};
  const int64_t wrong = m.wrong_label();
  if (wrong < 0) {
    by_dtype(dtype, [&](auto kind) {
      forward<decltype(kind)>(m, as_pointer<const uint8_t>(targets), as_pointer<const double>(normaliser), logits,
                              loss);
    });
  }
  return wrong;
}

void kernels::mask_loss_backward(std::uintptr_t hidden, int dtype, bool channels_last, int64_t regions,
                                 int64_t channels, int64_t pixels, std::uintptr_t weight, std::uintptr_t bias,
                                 int64_t classes, std::uintptr_t labels, bool relu, int threads, std::uintptr_t targets,
                                 std::uintptr_t scale, std::uintptr_t logits, std::uintptr_t grad_hidden,
                                 std::uintptr_t grad_weight, std::uintptr_t grad_bias) {
  using namespace roi_align;
  const Masks m{hidden, regions, classes, weight, bias, as_pointer<const int64_t>(labels),
                {channels, pixels, channels_last, relu}, threads};
  by_dtype(dtype, [&](auto kind) {
    backward<decltype(kind)>(m, as_pointer<const uint8_t>(targets), as_pointer<const double>(scale), logits,
                             grad_hidden, grad_weight, grad_bias);
  });
}
