// Sorting of scores: keys whose order is torch.sort(descending=True), and a stable radix sort of keys with indices.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Scores as unsigned integers whose increasing order is torch.sort(descending=True): NaN first, the zeros equal.
inline uint64_t descending_key(float score) {
  if (std::isnan(score)) return 0;
  uint32_t bits = 0;
  if (score != 0.0f) std::memcpy(&bits, &score, sizeof bits);
  return static_cast<uint32_t>(~((bits >> 31) ? ~bits : bits | 0x80000000u));
}

inline uint64_t descending_key(double score) {
  if (std::isnan(score)) return 0;
  uint64_t bits = 0;
  if (score != 0.0) std::memcpy(&bits, &score, sizeof bits);
  return ~((bits >> 63) ? ~bits : bits | 0x8000000000000000ull);
}

// Stable radix sort of (key << 32 | index), three passes of 11 bits over the key.
inline void radix_sort(std::vector<uint64_t>& keys, std::vector<uint64_t>& scratch) {
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  uint32_t histogram[3][kBuckets] = {};
  for (const uint64_t key : keys) {
    for (int pass = 0; pass < 3; ++pass) ++histogram[pass][(key >> (32 + pass * kBits)) & (kBuckets - 1)];
  }
  scratch.resize(keys.size());
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = 32 + pass * kBits;
    uint32_t* starts = histogram[pass];
    if (starts[(keys[0] >> shift) & (kBuckets - 1)] == keys.size()) continue;  // all alike in these bits
    uint32_t total = 0;
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      const uint32_t size = starts[bucket];
      starts[bucket] = total;
      total += size;
    }
    for (const uint64_t key : keys) scratch[starts[(key >> shift) & (kBuckets - 1)]++] = key;
    keys.swap(scratch);
  }
}
