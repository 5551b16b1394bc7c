// What the loss kernels share: numbers of any type as the type computed in, chunks, and sums that do not depend on
// the number of threads: each chunk of fixed size has its own partial sum, added up in order.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common.h"
#include "vector_math.h"

namespace losses {

enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
enum Reduction { kNone = 0, kSum = 1, kMean = 2 };

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kChunk = 1024;         // a few buffers of a chunk fit the first-level cache
constexpr int64_t kWorkOfThread = 16384;  // elements; waking a thread for less costs more than it saves

inline int threads_for(int64_t work, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(work / kWorkOfThread, 1, num_threads));
}

// The numbers as the type computed in: themselves, or converted into `buffer`.
const float* widen(const float* values, int64_t count, float* buffer);
const double* widen(const double* values, int64_t count, double* buffer);
const float* widen(const Half* values, int64_t count, float* buffer);
const float* widen(const BFloat* values, int64_t count, float* buffer);

// Where to compute numbers that end in `values`: there, or in `buffer`, from which `narrow` rounds them.
inline float* destination(float* values, float*) { return values; }
inline double* destination(double* values, double*) { return values; }
inline float* destination(Half*, float* buffer) { return buffer; }
inline float* destination(BFloat*, float* buffer) { return buffer; }
inline void narrow(const float*, int64_t, float*) {}
inline void narrow(const double*, int64_t, double*) {}
void narrow(const float* values, int64_t count, Half* out);
void narrow(const float* values, int64_t count, BFloat* out);

float sum(const float* values, int64_t count);
double sum(const double* values, int64_t count);
void multiply(float* values, const float* by, int64_t count);
void multiply(double* values, const double* by, int64_t count);

inline float read(const float* values, int64_t at) { return values[at]; }
inline double read(const double* values, int64_t at) { return values[at]; }
inline float read(const BFloat* values, int64_t at) {
  return vector_math::from_bits(static_cast<uint32_t>(values[at].bits) << 16);
}
inline float read(const Half* values, int64_t at) {
  float buffer;
  widen(values + at, 1, &buffer);
  return buffer;
}

// Calls body(first, count) for each chunk; no chunk is shared by threads.
template <typename Body>
void for_chunks(int64_t count, int64_t chunk, int num_threads, const Body& body) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int threads = threads_for(count, num_threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t c = 0; c < chunks; ++c) body(c * chunk, std::min(chunk, count - c * chunk));
}

// The losses of every chunk, written by body(first, count, T* losses), or their sum or mean in out[0].
template <typename T, typename Body>
void reduce_chunks(int64_t count, int reduction, T* out, int num_threads, const Body& body) {
  if (reduction == kNone) {
    for_chunks(count, kChunk, num_threads, [&](int64_t first, int64_t n) { body(first, n, out + first); });
    return;
  }
  std::vector<double> partial(static_cast<size_t>((count + kChunk - 1) / kChunk));
  for_chunks(count, kChunk, num_threads, [&](int64_t first, int64_t n) {
    alignas(64) T buffer[kChunk];
    body(first, n, buffer);
    partial[static_cast<size_t>(first / kChunk)] = static_cast<double>(sum(buffer, n));
  });
  double total = 0.0;
  for (const double value : partial) total += value;
  *out = static_cast<T>(reduction == kMean && count > 0 ? total / static_cast<double>(count) : total);
}

// What one loss's gradient is multiplied by where all share it: the gradient of the sum, or of the mean.
template <typename T>
T shared_gradient(const T* grad, int64_t count, int reduction) {
  return reduction == kNone ? T(1) : reduction == kSum ? *grad : *grad / static_cast<T>(std::max<int64_t>(count, 1));
}

#define FASTRCNN_DISPATCH(dtype, call)                 \
  switch (dtype) {                                     \
    case losses::kFloat32: call(float); break;         \
    case losses::kFloat64: call(double); break;        \
    case losses::kFloat16: call(losses::Half); break;  \
    default: call(losses::BFloat); break;              \
  }

}  // namespace losses
