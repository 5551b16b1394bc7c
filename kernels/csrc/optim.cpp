// SGD with momentum over a flat buffer of parameters, on the CPU: each byte is read once and written once.
//
// Bound by memory: 20 bytes a parameter (parameter, momentum and gradient read, parameter and momentum written). A block
// of 1024 parameters belongs to one group, whose settings are looked up once; 16-bit gradients are widened into a
// buffer that stays in the cache. Rounding is torch.optim.SGD's: weight decay and the step are fused multiply-adds, the
// momentum is a product and a sum.
#include <algorithm>
#include <cmath>

#include "exports_maps.h"
#include "preprocess_rows.h"  // conversions of 16-bit floats, FASTRCNN_AVX2

namespace {

using preprocess::to_bfloat;
using preprocess::to_half;

constexpr int64_t kBlock = 1024;         // fastrcnn_kernels.optim.BLOCK
constexpr int64_t kBlocksPerThread = 64;  // less is not worth waking a thread

enum Type { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Settings {
  float lr, weight_decay, momentum;
};

float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  if (bits >= 0x0f800000) {
    bits += 0x70000000;  // infinity and NaN
    std::memcpy(&value, &bits, 4);
  } else {
    std::memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;  // 2^112: subnormals come out right
  }
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

void widen(const uint16_t* from, int type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    if (type == kBFloat16) std::memcpy(to + i, &bits, 4);
    if (type == kFloat16) to[i] = from_half(from[i]);
  }
}

void narrow(const float* from, int type, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = type == kBFloat16 ? to_bfloat(from[i]) : to_half(from[i]);
}

void update(float* params, const float* grads, float* buffer, int64_t count, const Settings& by, float scale,
            bool nesterov) {
  for (int64_t i = 0; i < count; ++i) {
    float grad = scale != 1.0f ? grads[i] / scale : grads[i];
    if (by.weight_decay != 0.0f) grad = std::fma(params[i], by.weight_decay, grad);
    if (buffer) {
      buffer[i] = buffer[i] * by.momentum + grad;
      grad = nesterov ? std::fma(buffer[i], by.momentum, grad) : buffer[i];
    }
    params[i] = std::fma(grad, -by.lr, params[i]);
  }
}

#ifdef FASTRCNN_AVX2_ROWS
FASTRCNN_AVX2 void widen_avx2(const uint16_t* from, int type, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m256 wide = type == kFloat16
                            ? _mm256_cvtph_ps(bits)
                            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    _mm256_storeu_ps(to + i, wide);
  }
  widen(from + i, type, count - i, to + i);
}

FASTRCNN_AVX2 void narrow_avx2(const float* from, int type, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(from + i);
    if (type == kFloat16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(value, 0));
      continue;
    }
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i rounded =
        _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  narrow(from + i, type, count - i, to + i);
}

template <bool kMomentum, bool kNesterov, bool kScaled>
FASTRCNN_AVX2 void update_avx2(float* params, const float* grads, float* buffer, int64_t count, const Settings& by,
                               float scale) {
  const __m256 decay = _mm256_set1_ps(by.weight_decay), momentum = _mm256_set1_ps(by.momentum);
  const __m256 lr = _mm256_set1_ps(by.lr), divisor = _mm256_set1_ps(scale);
  const bool decays = by.weight_decay != 0.0f;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 param = _mm256_loadu_ps(params + i);
    __m256 grad = _mm256_loadu_ps(grads + i);
    if (kScaled) grad = _mm256_div_ps(grad, divisor);
    if (decays) grad = _mm256_fmadd_ps(param, decay, grad);
    if (kMomentum) {
      const __m256 sum = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(buffer + i), momentum), grad);
      _mm256_storeu_ps(buffer + i, sum);
      grad = kNesterov ? _mm256_fmadd_ps(sum, momentum, grad) : sum;
    }
    _mm256_storeu_ps(params + i, _mm256_fnmadd_ps(grad, lr, param));
  }
  update(params + i, grads + i, kMomentum ? buffer + i : nullptr, count - i, by, scale, kNesterov);
}

void update_fast(float* params, const float* grads, float* buffer, int64_t count, const Settings& by, float scale,
                 bool nesterov) {
  const bool scaled = scale != 1.0f;
  const auto run = !buffer    ? (scaled ? &update_avx2<false, false, true> : &update_avx2<false, false, false>)
                   : nesterov ? (scaled ? &update_avx2<true, true, true> : &update_avx2<true, true, false>)
                              : (scaled ? &update_avx2<true, false, true> : &update_avx2<true, false, false>);
  run(params, grads, buffer, count, by, scale);
}
#endif

}  // namespace

void kernels::fused_sgd(std::uintptr_t params_address, std::uintptr_t grads_address, int grads_type,
                        std::uintptr_t buffer_address, std::uintptr_t groups_address, std::uintptr_t settings_address,
                        int64_t count, bool nesterov, std::uintptr_t scale_address, std::uintptr_t found_inf_address,
                        std::uintptr_t copy_address, int copy_type, std::uintptr_t step_address, int num_threads) {
  if (found_inf_address && *as_pointer<const float>(found_inf_address) != 0.0f) return;
  if (step_address) *as_pointer<float>(step_address) += 1.0f;
  auto* params = as_pointer<float>(params_address);
  auto* buffer = as_pointer<float>(buffer_address);  // null: no momentum
  const auto* wide_grads = as_pointer<const float>(grads_address);
  const auto* short_grads = as_pointer<const uint16_t>(grads_address);
  const auto* groups = as_pointer<const int32_t>(groups_address);
  const auto* settings = as_pointer<const Settings>(settings_address);
  auto* copy = as_pointer<uint16_t>(copy_address);  // null: none
  const float scale = scale_address ? *as_pointer<const float>(scale_address) : 1.0f;
  auto* const widened_by = &widen;
  auto* const narrowed_by = &narrow;
  auto* const updated_by = &update;
#ifdef FASTRCNN_AVX2_ROWS
  const bool fast = preprocess::has_avx2();
  auto* const widen_best = fast ? &widen_avx2 : widened_by;
  auto* const narrow_best = fast ? &narrow_avx2 : narrowed_by;
  auto* const update_best = fast ? &update_fast : updated_by;
#else
  auto* const widen_best = widened_by;
  auto* const narrow_best = narrowed_by;
  auto* const update_best = updated_by;
#endif
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const int threads = static_cast<int>(std::clamp<int64_t>(blocks / kBlocksPerThread, 1, num_threads));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    if (groups[block] < 0) continue;
    const int64_t begin = block * kBlock, size = std::min(kBlock, count - begin);
    float wide[kBlock];
    const float* grads = wide_grads + begin;
    if (grads_type != kFloat32) {
      widen_best(short_grads + begin, grads_type, size, wide);
      grads = wide;
    }
    update_best(params + begin, grads, buffer ? buffer + begin : nullptr, size, settings[groups[block]], scale,
                nesterov);
    if (copy) narrow_best(params + begin, copy_type, size, copy + begin);
  }
}
