// The inner loops of the sampler for one instruction set; included by isa.h once for each, hence no include guard.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "sampler.h"

#define FASTRCNN_INLINE FASTRCNN_TARGET inline __attribute__((always_inline))

namespace sampler {
namespace {
namespace FASTRCNN_ISA {

// 32-bit words in 64-bit lanes: a product needs no shuffle, and what is left in the upper half never reaches a result.
constexpr int kCounters = FASTRCNN_VECTOR_BYTES / 8;
struct VectorOf {
  typedef uint64_t type __attribute__((vector_size(FASTRCNN_VECTOR_BYTES)));
};
using Words = VectorOf::type;

FASTRCNN_INLINE Words multiply(const Words& a, uint64_t b) {
#if defined(__x86_64__) && FASTRCNN_VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)(Words{} + b));
#elif defined(__x86_64__) && FASTRCNN_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)(Words{} + b));
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)(Words{} + b));
#else
  return (a & 0xffffffff) * b;
#endif
}

// Whether any lane is not zero.
FASTRCNN_INLINE bool any(const Words& words) {
  uint64_t bits = 0;
  for (int i = 0; i < kCounters; ++i) bits |= words[i];
  return bits != 0;
}

// The keys of the entries 4 * first, 4 * first + 1, ... of kVectors vectors of counters, in order of the counter:
// even[v][i] holds the first two keys of a counter, the first in the lower half, and odd[v][i] the other two.
FASTRCNN_INLINE void make_keys(uint64_t first, uint32_t seed_low, uint32_t seed_high, Words (&even)[kVectors],
                               Words (&odd)[kVectors]) {
  Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kCounters; ++i) c0[v][i] = first + static_cast<uint64_t>(v * kCounters + i);
    c1[v] = c2[v] = c3[v] = Words{};
  }
  uint32_t key0 = seed_low, key1 = seed_high;
  for (int round = 0; round < kRounds; ++round) {
    for (int v = 0; v < kVectors; ++v) {
      const Words product0 = multiply(c0[v], kMultiplier0), product1 = multiply(c2[v], kMultiplier1);
      c0[v] = (product1 >> 32) ^ c1[v] ^ static_cast<uint64_t>(key0);
      c2[v] = (product0 >> 32) ^ c3[v] ^ static_cast<uint64_t>(key1);
      c1[v] = product1;
      c3[v] = product0;
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  for (int v = 0; v < kVectors; ++v) {
    even[v] = (c0[v] & 0xffffffff) | (c1[v] << 32);
    odd[v] = (c2[v] & 0xffffffff) | (c3[v] << 32);
  }
}

// Which of the two keys in each lane are at most `limit`; zero where none is.
FASTRCNN_INLINE Words at_most(const Words& keys, uint64_t limit) {
  const Words low = keys & 0xffffffff, high = keys >> 32;
  return (Words)(low <= limit) | (Words)(high <= limit);
}

// One byte an entry: 1 positive, 2 negative, 0 ignored.
template <typename L>
FASTRCNN_INLINE void classify(const L* labels, int64_t count, L first_positive, uint8_t* kinds) {
  for (int64_t i = 0; i < count; ++i) {
    const L label = labels[i];
    kinds[i] = static_cast<uint8_t>((label >= first_positive) | ((label == first_positive - 1) << 1));
  }
}

// Adds the entries [first, last) of an image to what was found before; `first` is a multiple of kTile.
template <typename L>
FASTRCNN_TARGET void sample_entries(const L* labels, int64_t first, int64_t last, L first_positive, uint64_t seed,
                                    Found& found) {
  constexpr int kBlock = 4 * kCounters * kVectors;  // entries handled together
  constexpr uint64_t kOnes = 0x0101010101010101;
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  alignas(64) uint8_t kinds[kTile];
  Words even[kVectors], odd[kVectors];
  for (int64_t start = first; start < last; start += kTile) {
    const int64_t count = std::min<int64_t>(kTile, last - start);
    classify(labels + start, count, first_positive, kinds);
    if (count < kTile) std::memset(kinds + count, 0, kTile - count);
    for (int64_t at = 0; at < count; at += kBlock) {
      int positives = 0, negatives = 0;
      for (int i = 0; i < kBlock; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, kinds + at + i, 8);
        positives += __builtin_popcountll(eight & kOnes);
        negatives += __builtin_popcountll(eight & (kOnes << 1));
      }
      found.positives.total += positives;
      found.negatives.total += negatives;
      // The largest key that can still be drawn; none where there is no entry of a kind.
      const int64_t limit = std::max(positives ? found.positives.limit : -1, negatives ? found.negatives.limit : -1);
      if (limit < 0) continue;
      make_keys(static_cast<uint64_t>(start + at) / 4, low, high, even, odd);
      Words small = at_most(even[0], static_cast<uint64_t>(limit)) | at_most(odd[0], static_cast<uint64_t>(limit));
      for (int v = 1; v < kVectors; ++v) {
        small |= at_most(even[v], static_cast<uint64_t>(limit)) | at_most(odd[v], static_cast<uint64_t>(limit));
      }
      if (!any(small)) continue;
      for (int i = 0; i < kBlock; ++i) {
        const int v = i / 4 / kCounters, lane = i / 4 % kCounters;
        const uint64_t pair = i & 2 ? odd[v][lane] : even[v][lane];
        const uint32_t key = static_cast<uint32_t>(i & 1 ? pair >> 32 : pair);
        const uint64_t item = static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(start + at + i);
        if (kinds[at + i] == 1) found.positives.offer(item);
        if (kinds[at + i] == 2) found.negatives.offer(item);
      }
    }
  }
}

}  // namespace FASTRCNN_ISA
}  // namespace
}  // namespace sampler
#undef FASTRCNN_INLINE
