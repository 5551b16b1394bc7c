// R-CNN's box parametrisation for one box, to be inlined into loops that the compiler turns into vectors.
//
// The formulas are pinned in fastrcnn_kernels/box_coder.py and every operation is rounded in the same order, so centres
// and the targets tx and ty have the reference's bits. exp and log are polynomials: within 1 ulp in float32, the same
// bits on every instruction set (no fused multiply-add), without a call, a table or a branch. float64 calls libm.
// A file whose loops are to become vectors sets `#pragma GCC optimize("no-trapping-math")` before it includes this one.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#define FASTRCNN_INLINE __attribute__((always_inline)) inline

namespace box_coder {

template <typename To, typename From>
FASTRCNN_INLINE To bits_as(From value) {
  return __builtin_bit_cast(To, value);  // a memcpy would keep loops from being vectorised
}

// e^x by 2^n * P(x - n ln 2), coefficients of Cephes' expf. Saturates to 0 and infinity, NaN stays NaN.
FASTRCNN_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // the first product is exact
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  // Two factors, because 2^n alone may be no normal number where the product is one.
  const int32_t power = bits_as<int32_t>(shifted) - bits_as<int32_t>(kRound);
  const int32_t half = power >> 1;
  return y * bits_as<float>((half + 127) << 23) * bits_as<float>((power - half + 127) << 23);
}
FASTRCNN_INLINE double exponential(double x) { return std::exp(x); }

// ln x by e ln 2 + Q(m - 1), m in [sqrt(1/2), sqrt(2)), coefficients of Cephes' logf. 0 gives -infinity, negative NaN.
FASTRCNN_INLINE float logarithm(float x) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool subnormal = x < 1.17549435e-38f;
  const int32_t bits = bits_as<int32_t>(subnormal ? x * 8388608.0f : x);
  const int32_t power = (bits - 0x3f3504f3) >> 23;
  const float f = bits_as<float>(bits - power * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(power - (subnormal ? 23 : 0));
  const float z = f * f;
  float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float y = (f + ((p * f * z + e * -2.12194440e-4f) - 0.5f * z)) + e * 0.693359375f;
  const float special = x == 0.0f ? -kInfinity : (x > 0.0f ? x : std::numeric_limits<float>::quiet_NaN());
  return x > 0.0f && x < kInfinity ? y : special;
}
FASTRCNN_INLINE double logarithm(double x) { return std::log(x); }

// What one call of the coder has in common for all its boxes.
template <typename T>
struct Coder {
  T wx, wy, ww, wh;  // weights
  T offset;          // box_offset
  T clip;            // upper bound of dw / ww and dh / wh
  T ix, iy, iw, ih;  // 1 / weights, used where `powers` says that multiplying by them is dividing
  bool powers;

  Coder(const double* weights, int box_offset, double clip_at)
      : wx(static_cast<T>(weights[0])), wy(static_cast<T>(weights[1])), ww(static_cast<T>(weights[2])),
        wh(static_cast<T>(weights[3])), offset(static_cast<T>(box_offset)), clip(static_cast<T>(clip_at)),
        ix(T(1) / wx), iy(T(1) / wy), iw(T(1) / ww), ih(T(1) / wh), powers(true) {
    for (int i = 0; i < 4; ++i) {
      int exponent;
      powers = powers && std::frexp(weights[i], &exponent) == 0.5 && exponent > -60 && exponent < 60;
    }
  }
};

template <typename T>
struct Corners {
  T x1, y1, x2, y2;
};

template <typename T>
FASTRCNN_INLINE Corners<T> load_corners(const T* box) {
  return {box[0], box[1], box[2], box[3]};
}

template <typename T>
FASTRCNN_INLINE T at_most(T value, T limit) {
  return value > limit ? limit : value;  // NaN stays
}

// The box that (dx, dy, dw, dh) makes of an anchor. kPowers: the coder's `powers`.
template <bool kPowers, typename T>
FASTRCNN_INLINE Corners<T> decode_box(const Coder<T>& c, T dx, T dy, T dw, T dh, const Corners<T>& anchor) {
  const T width = anchor.x2 - anchor.x1 + c.offset;
  const T height = anchor.y2 - anchor.y1 + c.offset;
  const T x = (kPowers ? dx * c.ix : dx / c.wx) * width + (anchor.x1 + T(0.5) * width);
  const T y = (kPowers ? dy * c.iy : dy / c.wy) * height + (anchor.y1 + T(0.5) * height);
  const T half_width = T(0.5) * (exponential(at_most(kPowers ? dw * c.iw : dw / c.ww, c.clip)) * width);
  const T half_height = T(0.5) * (exponential(at_most(kPowers ? dh * c.ih : dh / c.wh, c.clip)) * height);
  return {x - half_width, y - half_height, x + half_width - c.offset, y + half_height - c.offset};
}

// A box clamped to [0, right] x [0, bottom]; NaN stays.
template <typename T>
FASTRCNN_INLINE Corners<T> clip_box(const Corners<T>& box, T right, T bottom) {
  const T x1 = box.x1 < T(0) ? T(0) : box.x1, y1 = box.y1 < T(0) ? T(0) : box.y1;
  const T x2 = box.x2 < T(0) ? T(0) : box.x2, y2 = box.y2 < T(0) ? T(0) : box.y2;
  return {at_most(x1, right), at_most(y1, bottom), at_most(x2, right), at_most(y2, bottom)};
}

// Whether both sides reach min_size; false for NaN.
template <typename T>
FASTRCNN_INLINE bool is_large_enough(const Corners<T>& box, T offset, T min_size) {
  return (box.x2 - box.x1 + offset >= min_size) & (box.y2 - box.y1 + offset >= min_size);
}

// The deltas that make `box` of an anchor: the inverse of decode_box.
template <typename T>
FASTRCNN_INLINE Corners<T> encode_box(const Coder<T>& c, const Corners<T>& box, const Corners<T>& anchor) {
  const T anchor_width = anchor.x2 - anchor.x1 + c.offset, anchor_height = anchor.y2 - anchor.y1 + c.offset;
  const T width = box.x2 - box.x1 + c.offset, height = box.y2 - box.y1 + c.offset;
  const T x = (box.x1 + T(0.5) * width) - (anchor.x1 + T(0.5) * anchor_width);
  const T y = (box.y1 + T(0.5) * height) - (anchor.y1 + T(0.5) * anchor_height);
  return {c.wx * x / anchor_width, c.wy * y / anchor_height, c.ww * logarithm(width / anchor_width),
          c.wh * logarithm(height / anchor_height)};
}

}  // namespace box_coder
