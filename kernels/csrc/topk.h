// The best k of a long run of scores: a threshold guessed from a sample, one pass that collects what reaches it, a sort
// of what was collected. Exact: too few collected means a lower threshold and another pass.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "common.h"
#include "sort.h"

namespace topk {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__attribute__((always_inline)) inline float widen(float value) { return value; }
__attribute__((always_inline)) inline double widen(double value) { return value; }
__attribute__((always_inline)) inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
// Integer shifts and one product, so that a loop over it becomes vectors on every machine.
__attribute__((always_inline)) inline float widen(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  float scaled;
  std::memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 5.192296858534828e33f;  // 2^112: the difference of the exponents' biases
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits = (value.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bits;
  bits |= static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// A score and its index as one number or pair: increasing is decreasing score, ties by lower index, NaN first.
template <typename T>
struct Ranks;
template <>
struct Ranks<float> {
  using Rank = uint64_t;
  static Rank make(float score, uint32_t index) { return descending_key(score) << 32 | index; }
  static uint32_t index(Rank rank) { return static_cast<uint32_t>(rank); }
  static uint64_t key(Rank rank) { return rank >> 32; }
};
template <>
struct Ranks<double> {
  using Rank = std::pair<uint64_t, uint32_t>;
  static Rank make(double score, uint32_t index) { return {descending_key(score), index}; }
  static uint32_t index(const Rank& rank) { return rank.second; }
  static uint64_t key(const Rank& rank) { return rank.first; }
};

inline void sort_ranks(std::vector<uint64_t>& ranks, std::vector<uint64_t>& scratch) {
  if (ranks.size() < 512) {
    std::sort(ranks.begin(), ranks.end());
    return;
  }
  radix_sort(ranks, scratch);  // by score alone, and stable: equal scores stay in the order in which they were found
  for (size_t start = 0; start < ranks.size();) {
    size_t stop = start + 1;
    bool rising = true;
    for (; stop < ranks.size() && ranks[stop] >> 32 == ranks[start] >> 32; ++stop) {
      rising = rising && ranks[stop - 1] < ranks[stop];
    }
    if (!rising) std::sort(ranks.begin() + start, ranks.begin() + stop);
    start = stop;
  }
}
inline void sort_ranks(std::vector<std::pair<uint64_t, uint32_t>>& ranks,
                       std::vector<std::pair<uint64_t, uint32_t>>&) {
  std::sort(ranks.begin(), ranks.end());
}

constexpr int kBlock = 64;

// Positions in values[0..count) that are not below `limit` (with kStrict: that are above it, which NaN is not), written
// to `found`, which has room for all. Returns how many they are.
template <bool kStrict, typename V, typename T>
__attribute__((always_inline)) inline int64_t collect(const V* values, int64_t count, T limit, uint32_t* found) {
  int64_t held = 0;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    uint8_t flags[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      flags[j] = kStrict ? widen(values[i + j]) > limit : !(widen(values[i + j]) < limit);
    }
    for (int word = 0; word < kBlock / 8; ++word) {
      uint64_t bits;
      std::memcpy(&bits, flags + 8 * word, sizeof bits);
      while (bits != 0) {
        const int byte = __builtin_ctzll(bits) >> 3;
        found[held++] = static_cast<uint32_t>(i + 8 * word + byte);
        bits &= bits - 1;
      }
    }
  }
  for (; i < count; ++i) {
    const T value = widen(values[i]);
    if (kStrict ? value > limit : !(value < limit)) found[held++] = static_cast<uint32_t>(i);
  }
  return held;
}

// One for each type and rule, because a template cannot be cloned for several instruction sets. Defined in topk.cpp.
int64_t at_least(const float* values, int64_t count, float limit, uint32_t* found);
int64_t at_least(const double* values, int64_t count, double limit, uint32_t* found);
int64_t at_least(const BFloat16* values, int64_t count, float limit, uint32_t* found);
int64_t at_least(const Float16* values, int64_t count, float limit, uint32_t* found);
int64_t above(const float* values, int64_t count, float limit, uint32_t* found);
int64_t above(const double* values, int64_t count, double limit, uint32_t* found);
int64_t above(const BFloat16* values, int64_t count, float limit, uint32_t* found);
int64_t above(const Float16* values, int64_t count, float limit, uint32_t* found);

template <typename T>
struct Workspace {
  std::vector<typename Ranks<T>::Rank> ranks, scratch;
  std::vector<uint32_t> found;
  std::vector<T> sample;
};

// Fills work.ranks with the best k of values[0..count), best first. `index_of` turns a position into the index that
// ranks ties and that the ranks carry.
template <typename V, typename T, typename IndexOf>
void best(const V* values, int64_t count, int64_t k, IndexOf index_of, Workspace<T>& work) {
  constexpr int64_t kSample = 2048;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T limit = -kInfinity;
  auto first = [](T a, T b) { return std::isnan(a) ? !std::isnan(b) : a > b; };
  int64_t place = 0, size = 0;
  if (count > 2 * kSample && k < count / 2) {
    const int64_t step = count / kSample | 1;
    work.sample.clear();
    for (int64_t i = step / 2; i < count; i += step) work.sample.push_back(widen(values[i]));
    size = static_cast<int64_t>(work.sample.size());
    const double expected = static_cast<double>(size) * static_cast<double>(k) / static_cast<double>(count);
    place = static_cast<int64_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
  }
  work.found.resize(count);
  int64_t held = 0;
  while (true) {
    if (place >= size) {
      limit = -kInfinity;
    } else {
      std::nth_element(work.sample.begin(), work.sample.begin() + place, work.sample.end(), first);
      limit = work.sample[place];
    }
    held = at_least(values, count, limit, work.found.data());
    if (held >= k || place >= size) break;
    place = 4 * place;
  }
  work.ranks.resize(held);
  for (int64_t i = 0; i < held; ++i) {
    const uint32_t position = work.found[i];
    work.ranks[i] = Ranks<T>::make(widen(values[position]), index_of(position));
  }
  sort_ranks(work.ranks, work.scratch);
  work.ranks.resize(std::min(held, k));
}

}  // namespace topk
