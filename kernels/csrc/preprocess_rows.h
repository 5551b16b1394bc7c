// The row kernels of preprocess.cpp: one line of pixels at a time, in AVX2 and portably.
//
// A line of the intermediate image is bytes: the horizontal pass rounds to a grey level, as Pillow does. Weights are
// integers in units of 2^-22; a weighted sum of bytes fits 31 bits, so everything up to the grey level is exact.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTRCNN_AVX2_ROWS 1
#include <immintrin.h>
#define FASTRCNN_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FASTRCNN_AVX2_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline
#endif

namespace preprocess {

constexpr int kPrecision = 22;
constexpr int kHalf = 1 << (kPrecision - 1);
constexpr int kSlack = 64;  // bytes that may be read behind a line

enum OutType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kByte = 3 };
enum Arithmetic { kSubtract = 0, kCorrected = 1, kDivide = 2 };

// One axis of a resize, Pillow's coefficients: output i is the sum over t < taps of weight[i * taps + t] times input
// first[i] + t. Inputs beyond the axis have weight 0.
struct Axis {
  int taps = 1;
  bool identity = true;
  std::vector<int32_t> first, weight;
};

// The horizontal pass in blocks of eight outputs, two half-blocks of four that each read sixteen bytes.
struct Blocks {
  bool usable = false;  // else some half-block reaches over more than sixteen bytes
  int pairs = 1;
  std::vector<int32_t> base;                // [blocks, 2]
  std::vector<uint8_t> shuffle;             // [blocks, 32]: bytes of the half-blocks to 16-bit pairs of taps
  std::vector<int16_t> high, low;           // [blocks, pairs, 16]: weight = high * 2^11 + low
};

// What makes a network input of a grey level, by channel of the output; `levels` is the exact result for all of them.
struct Normalize {
  Arithmetic arithmetic = kSubtract;
  bool unit = false;
  float mean[4] = {0, 0, 0, 0}, std[4] = {1, 1, 1, 1};
  std::vector<float> mean_line, std_line, inverse_line;  // the same by position of an interleaved line
  std::vector<float> levels;                              // [channels, 256]
};

inline uint16_t to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to nearest even, with subnormals, as the F16C instruction does.
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;  // one unit of a half's subnormal is one unit in the last place of 0.5
    uint32_t result;
    std::memcpy(&result, &shifted, 4);
    return static_cast<uint16_t>(sign | (result - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

// Interleaved pixels to three planes, in the order of the output channels.
inline void split(const uint8_t* pixels, int64_t width, bool reverse, uint8_t* const planes[3]) {
  uint8_t* a = planes[reverse ? 2 : 0];
  uint8_t* b = planes[1];
  uint8_t* c = planes[reverse ? 0 : 2];
  for (int64_t x = 0; x < width; ++x) {
    a[x] = pixels[3 * x];
    b[x] = pixels[3 * x + 1];
    c[x] = pixels[3 * x + 2];
  }
}

// Three planes to interleaved pixels of 3 or 4 channels; the fourth is 0.
inline void join(const uint8_t* const planes[3], int64_t width, int channels, uint8_t* line) {
  for (int64_t x = 0; x < width; ++x) {
    for (int c = 0; c < 3; ++c) line[channels * x + c] = planes[c][x];
    if (channels == 4) line[4 * x + 3] = 0;
  }
}

FASTRCNN_CLONES inline void filter_row(const Axis& axis, int64_t width, const uint8_t* plane, uint8_t* line) {
  const int taps = axis.taps;
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t* from = plane + axis.first[x];
    const int32_t* weight = axis.weight.data() + x * taps;
    int32_t sum = kHalf;
    for (int t = 0; t < taps; ++t) sum += from[t] * weight[t];
    line[x] = static_cast<uint8_t>(sum >> kPrecision);
  }
}

// The vertical pass: lines weighted and summed to grey levels.
FASTRCNN_CLONES inline void blend(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count,
                                  int32_t* sums, uint8_t* levels) {
  for (int64_t i = 0; i < count; ++i) sums[i] = kHalf;
  for (int t = 0; t < taps; ++t) {
    const uint8_t* line = lines[t];
    const int32_t w = weight[t];
    for (int64_t i = 0; i < count; ++i) sums[i] += line[i] * w;
  }
  for (int64_t i = 0; i < count; ++i) levels[i] = static_cast<uint8_t>(sums[i] >> kPrecision);
}

// Grey levels to the output type through the table; `period` channels follow one another.
inline void look_up(const uint8_t* levels, int64_t count, const float* table, int period, int type, void* out) {
  int channel = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = table[256 * channel + levels[i]];
    if (type == kFloat32) static_cast<float*>(out)[i] = value;
    if (type == kFloat16) static_cast<uint16_t*>(out)[i] = to_half(value);
    if (type == kBFloat16) static_cast<uint16_t*>(out)[i] = to_bfloat(value);
    if (++channel == period) channel = 0;
  }
}

#ifdef FASTRCNN_AVX2_ROWS

inline bool has_avx2() {
  static const bool found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return found;
}

FASTRCNN_AVX2 inline void split_avx2(const uint8_t* pixels, int64_t width, bool reverse, uint8_t* const planes[3]) {
  const char z = -1;
  const __m128i a0 = _mm_setr_epi8(0, 3, 6, 9, 12, 15, z, z, z, z, z, z, z, z, z, z);
  const __m128i a1 = _mm_setr_epi8(z, z, z, z, z, z, 2, 5, 8, 11, 14, z, z, z, z, z);
  const __m128i a2 = _mm_setr_epi8(z, z, z, z, z, z, z, z, z, z, z, 1, 4, 7, 10, 13);
  const __m128i b0 = _mm_setr_epi8(1, 4, 7, 10, 13, z, z, z, z, z, z, z, z, z, z, z);
  const __m128i b1 = _mm_setr_epi8(z, z, z, z, z, 0, 3, 6, 9, 12, 15, z, z, z, z, z);
  const __m128i b2 = _mm_setr_epi8(z, z, z, z, z, z, z, z, z, z, z, 2, 5, 8, 11, 14);
  const __m128i c0 = _mm_setr_epi8(2, 5, 8, 11, 14, z, z, z, z, z, z, z, z, z, z, z);
  const __m128i c1 = _mm_setr_epi8(z, z, z, z, z, 1, 4, 7, 10, 13, z, z, z, z, z, z);
  const __m128i c2 = _mm_setr_epi8(z, z, z, z, z, z, z, z, z, z, 0, 3, 6, 9, 12, 15);
  uint8_t* first = planes[reverse ? 2 : 0];
  uint8_t* last = planes[reverse ? 0 : 2];
  int64_t x = 0;
  for (; x + 16 <= width; x += 16) {
    const __m128i* from = reinterpret_cast<const __m128i*>(pixels + 3 * x);
    const __m128i p = _mm_loadu_si128(from), q = _mm_loadu_si128(from + 1), r = _mm_loadu_si128(from + 2);
    const auto merged = [&](__m128i i, __m128i j, __m128i k) FASTRCNN_AVX2 {
      return _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(p, i), _mm_shuffle_epi8(q, j)), _mm_shuffle_epi8(r, k));
    };
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first + x), merged(a0, a1, a2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[1] + x), merged(b0, b1, b2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(last + x), merged(c0, c1, c2));
  }
  uint8_t* const rest[3] = {planes[0] + x, planes[1] + x, planes[2] + x};
  split(pixels + 3 * x, width - x, reverse, rest);
}

// May write up to kSlack bytes behind the line.
FASTRCNN_AVX2 inline void join_avx2(const uint8_t* const planes[3], int64_t width, int channels, uint8_t* line) {
  const __m128i three = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  int64_t x = 0;
  for (; x + 16 <= width; x += 16) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[0] + x));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[1] + x));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[2] + x));
    const __m128i zero = _mm_setzero_si128();
    const __m128i ab[2] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
    const __m128i cz[2] = {_mm_unpacklo_epi8(c, zero), _mm_unpackhi_epi8(c, zero)};
    for (int half = 0; half < 2; ++half) {
      const __m128i four[2] = {_mm_unpacklo_epi16(ab[half], cz[half]), _mm_unpackhi_epi16(ab[half], cz[half])};
      for (int part = 0; part < 2; ++part) {
        uint8_t* to = line + channels * (x + 8 * half + 4 * part);
        const __m128i value = channels == 4 ? four[part] : _mm_shuffle_epi8(four[part], three);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
      }
    }
  }
  const uint8_t* const rest[3] = {planes[0] + x, planes[1] + x, planes[2] + x};
  join(rest, width - x, channels, line + channels * x);
}

// All three planes of a row at once: the tables are read once. May write seven bytes behind each line.
FASTRCNN_AVX2 inline void filter_row_avx2(const Blocks& table, int64_t width, const uint8_t* const planes[3],
                                          uint8_t* const lines[3]) {
  const __m256i half = _mm256_set1_epi32(kHalf);
  const int64_t blocks = (width + 7) / 8;
  for (int64_t block = 0; block < blocks; ++block) {
    const __m256i shuffle =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.shuffle.data() + 32 * block));
    const int32_t lower = table.base[2 * block], upper = table.base[2 * block + 1];
    __m256i sum[3] = {half, half, half};
    for (int pair = 0; pair < table.pairs; ++pair) {
      const int64_t at = 16 * (block * table.pairs + pair);
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.high.data() + at));
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.low.data() + at));
      for (int c = 0; c < 3; ++c) {
        const uint8_t* from = planes[c] + 2 * pair;
        const __m128i left = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lower));
        const __m128i right = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + upper));
        const __m256i taps =
            _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1), shuffle);
        const __m256i coarse = _mm256_slli_epi32(_mm256_madd_epi16(taps, high), 11);
        sum[c] = _mm256_add_epi32(sum[c], _mm256_add_epi32(coarse, _mm256_madd_epi16(taps, low)));
      }
    }
    for (int c = 0; c < 3; ++c) {
      const __m256i level = _mm256_srli_epi32(sum[c], kPrecision);
      const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256(level, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(lines[c] + 8 * block), _mm_packus_epi16(words, words));
    }
  }
}

template <int kTaps>
FASTRCNN_AVX2_INLINE __m256i blend8(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t at) {
  const auto bytes = [&](int t) FASTRCNN_AVX2 {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lines[t] + at)));
  };
  if (kTaps == 1) return bytes(0);
  __m256i sum = _mm256_set1_epi32(kHalf);
  for (int t = 0; t < (kTaps ? kTaps : taps); ++t)
    sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(bytes(t), _mm256_set1_epi32(weight[t])));
  return _mm256_srli_epi32(sum, kPrecision);
}

struct Constants8 {
  __m256 mean, std, inverse;
};

template <int kArithmetic>
FASTRCNN_AVX2_INLINE __m256 normalize8(__m256i level, const Constants8& by, __m256 unit, __m256 inverse_unit) {
  __m256 value = _mm256_cvtepi32_ps(level);
  if (kArithmetic == kCorrected) {
    // A product with the reciprocal, put right by its remainder: the rounded quotient, as the table was checked for.
    const __m256 quotient = _mm256_mul_ps(value, inverse_unit);
    value = _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, unit, value), inverse_unit, quotient);
  } else if (kArithmetic == kDivide) {
    value = _mm256_div_ps(value, unit);
  }
  value = _mm256_sub_ps(value, by.mean);
  if (kArithmetic == kCorrected) {
    const __m256 quotient = _mm256_mul_ps(value, by.inverse);
    value = _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, by.std, value), by.inverse, quotient);
  } else if (kArithmetic == kDivide) {
    value = _mm256_div_ps(value, by.std);
  }
  return value;
}

template <int kType>
FASTRCNN_AVX2_INLINE void store8(__m256 value, uint8_t* to) {
  if (kType == kFloat32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), value);
  } else if (kType == kFloat16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, 0));
  } else {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
}

// The vertical pass fused with the normalisation: `count` elements of one plane (kLine false: constants of `channel`)
// or of an interleaved line.
template <int kType, int kArithmetic, bool kLine, int kTaps>
FASTRCNN_AVX2 void finish_avx2(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count,
                               const Normalize& by, int channel, uint8_t* out) {
  constexpr int kBytes = kType == kFloat32 ? 4 : 2;
  const float divisor = by.unit ? 255.0f : 1.0f;
  const __m256 unit = _mm256_set1_ps(divisor), inverse_unit = _mm256_set1_ps(1.0f / divisor);
  Constants8 constants{_mm256_set1_ps(by.mean[channel]), _mm256_set1_ps(by.std[channel]),
                       _mm256_set1_ps(1.0f / by.std[channel])};
  alignas(32) uint8_t rest[32];
  for (int64_t i = 0; i < count; i += 8) {
    if (kLine) {
      constants.mean = _mm256_loadu_ps(by.mean_line.data() + i);
      if (kArithmetic != kSubtract) constants.std = _mm256_loadu_ps(by.std_line.data() + i);
      if (kArithmetic == kCorrected) constants.inverse = _mm256_loadu_ps(by.inverse_line.data() + i);
    }
    const __m256 value =
        normalize8<kArithmetic>(blend8<kTaps>(lines, weight, taps, i), constants, unit, inverse_unit);
    if (i + 8 <= count) {
      store8<kType>(value, out + kBytes * i);
    } else {
      store8<kType>(value, rest);
      std::memcpy(out + kBytes * i, rest, kBytes * (count - i));
    }
  }
}

template <int kTaps>
FASTRCNN_AVX2 void finish_bytes_avx2(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count,
                                     uint8_t* out) {
  alignas(16) uint8_t rest[16];
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i level = blend8<kTaps>(lines, weight, taps, i);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256(level, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    if (i + 8 <= count) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), bytes);
    } else {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(rest), bytes);
      std::memcpy(out + i, rest, count - i);
    }
  }
}
#endif

}  // namespace preprocess
