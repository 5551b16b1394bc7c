// 16-bit floats, one number at a time, without branches, so that a loop over them becomes vectors.
#pragma once
#include <cstring>

#include "roi_align.h"

#define FASTRCNN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace roi_align {

FASTRCNN_ALWAYS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
FASTRCNN_ALWAYS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTRCNN_ALWAYS_INLINE float widen(float v) { return v; }
FASTRCNN_ALWAYS_INLINE double widen(double v) { return v; }
FASTRCNN_ALWAYS_INLINE float widen(BFloat v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
FASTRCNN_ALWAYS_INLINE float widen(Half v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13, sign = (v.bits & 0x8000u) << 16;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  return bits_to_float(sign | ((v.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
}

FASTRCNN_ALWAYS_INLINE void narrow(float v, float& out) { out = v; }
FASTRCNN_ALWAYS_INLINE void narrow(double v, double& out) { out = v; }
FASTRCNN_ALWAYS_INLINE void narrow(float v, BFloat& out) {
  const uint32_t bits = float_to_bits(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FASTRCNN_ALWAYS_INLINE void narrow(float v, Half& out) {
  // Round to nearest even by adding, in float, a power of two whose last mantissa bit is the last bit of the half.
  const uint32_t bits = float_to_bits(v), twice = bits + bits;
  const float magnitude = bits_to_float(bits & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
  const uint32_t exponent = twice & 0xff000000u, bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = float_to_bits(bits_to_float((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t rounded = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  out.bits = static_cast<uint16_t>(((bits & 0x80000000u) >> 16) | (twice > 0xff000000u ? 0x7e00u : rounded));
}

}  // namespace roi_align
