// exp, log, log1p and atan of floats without branches or calls, so that a loop over them becomes vectors. Mark the loop
// `#pragma omp simd` and its function FASTRCNN_CLONES. Errors are the largest found over a dense sweep of the domain, in
// units in the last place. NaN goes through exp, log1p and atan. The overloads for double are the library's: correct, one at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define FASTRCNN_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define FASTRCNN_ALWAYS_INLINE inline
#endif

namespace vector_math {

FASTRCNN_ALWAYS_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
FASTRCNN_ALWAYS_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// 2 ulp from -87.3 to 88.3; below, where the result is not a normal number, 0, and above infinity.
FASTRCNN_ALWAYS_INLINE float exp(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the last bits of the sum
  const float inside = x < -87.33f ? -87.33f : x > 88.37f ? 88.37f : x;
  const float shifted = inside * 1.44269504f + kShift, n = shifted - kShift;
  const float r = inside - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float scale = from_bits((to_bits(shifted) - to_bits(kShift) + 127u) << 23);
  const float y = (p * (r * r) + r + 1.0f) * scale;
  return x < -87.33f ? 0.0f : x > 88.37f ? HUGE_VALF : y;
}

// 2 ulp for normal, finite, positive numbers; nothing sensible for others, NaN included.
FASTRCNN_ALWAYS_INLINE float log_normal(float x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3u;
  const uint32_t bits = to_bits(x);
  const int32_t n = static_cast<int32_t>(bits - kRootHalf) >> 23;
  const float f = from_bits(bits - (static_cast<uint32_t>(n) << 23)) - 1.0f, e = static_cast<float>(n);
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  return f + (p * square * f + e * -2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
}

// log(1 + x) for x from 0 to 1: 2 ulp.
FASTRCNN_ALWAYS_INLINE float log1p_unit(float x) {
  float p = -3.1760570127516985e-3f;
  p = p * x + 1.9542526453733444e-2f;
  p = p * x + -5.6373611092567444e-2f;
  p = p * x + 1.0543623566627502e-1f;
  p = p * x + -1.5269666910171509e-1f;
  p = p * x + 1.9663274288177490e-1f;
  p = p * x + -2.4951615929603577e-1f;
  p = p * x + 3.3329710364341736e-1f;
  p = p * x + -4.9999892711639404e-1f;
  return (p * x + 1.0f) * x;
}

// 3 ulp everywhere, infinities included.
FASTRCNN_ALWAYS_INLINE float atan(float x) {
  const float magnitude = from_bits(to_bits(x) & 0x7fffffffu);
  const bool far = magnitude > 2.414213562f, middle = magnitude > 0.4142135624f;
  const float top = far ? -1.0f : middle ? magnitude - 1.0f : magnitude;
  const float bottom = far ? magnitude : middle ? magnitude + 1.0f : 1.0f;
  const float base = far ? 1.5707963268f : middle ? 0.7853981634f : 0.0f;
  const float r = top / bottom, square = r * r;
  float p = 8.05374449538e-2f;
  p = p * square + -1.38776856032e-1f;
  p = p * square + 1.99777106478e-1f;
  p = p * square + -3.33329491539e-1f;
  const float y = base + (p * square * r + r);
  return from_bits(to_bits(y) | (to_bits(x) & 0x80000000u));
}

FASTRCNN_ALWAYS_INLINE double exp(double x) { return std::exp(x); }
FASTRCNN_ALWAYS_INLINE double log_normal(double x) { return std::log(x); }
FASTRCNN_ALWAYS_INLINE double log1p_unit(double x) { return std::log1p(x); }
FASTRCNN_ALWAYS_INLINE double atan(double x) { return std::atan(x); }

}  // namespace vector_math
