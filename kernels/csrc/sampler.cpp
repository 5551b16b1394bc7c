// Balanced sampling; the draw is specified in fastrcnn_kernels/sampler.py.
//
// One pass over the entries: Philox keys of several counters at a time, and of those only the entries whose key is at
// most the largest that can still be drawn are looked at one by one. That limit falls quickly: of n entries in random
// order about k ln(n / k) are ever among the k smallest. Counts, positives and negatives come out of the same pass.
// Threads share an image by stretches; what they found is merged by key, so the draw does not depend on them.
#include "exports_boxes.h"
#include "sampler.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define FASTRCNN_KERNELS "sampler_kernels.h"
#include "isa.h"

namespace sampler {
namespace {

constexpr int64_t kStretch = 16 * kTile;     // entries that a thread takes at a time
constexpr int64_t kEntriesPerThread = 65536;  // less is not worth waking a thread

// Sorts what was found and writes it: `count` indices from `out` on.
void write_drawn(std::vector<uint64_t>& items, int64_t count, int64_t* out) {
  if (count == 0) return;
  if (static_cast<int64_t>(items.size()) > count) {
    std::nth_element(items.begin(), items.begin() + (count - 1), items.end());
  }
  std::sort(items.begin(), items.begin() + count);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(items[i] & 0xffffffff);
}

template <typename L>
void sample(const L* labels, const int64_t* seeds, const int64_t* counts, int64_t images, int64_t entries, int64_t size,
            int64_t most_positives, L first_positive, int64_t* indices, int64_t* num_pos, int64_t* num_sampled,
            int num_threads) {
  const int64_t useful = images * entries / kEntriesPerThread;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
  const auto sample_entries = FASTRCNN_BEST(sample_entries<L>);
  const int64_t stretches = (entries + kStretch - 1) / kStretch;
  std::vector<std::vector<Found>> found(threads);
  for (auto& thread : found) thread.resize(images);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    auto& mine = found[omp_get_thread_num()];
#else
    auto& mine = found[0];
#endif
    for (Found& image : mine) {
      image.positives.start(most_positives);
      image.negatives.start(size);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < images * stretches; ++item) {
      const int64_t image = item / stretches, first = item % stretches * kStretch;
      const int64_t last = std::min({first + kStretch, entries, counts ? counts[image] : entries});
      if (first >= last) continue;
      sample_entries(labels + image * entries, first, last, first_positive, static_cast<uint64_t>(seeds[image]),
                     mine[image]);
    }
  }
  for (int64_t n = 0; n < images; ++n) {
    Found& all = found[0][n];
    for (int t = 1; t < threads; ++t) {
      for (auto kind : {&Found::positives, &Found::negatives}) {
        const Smallest& other = found[t][n].*kind;
        (all.*kind).total += other.total;
        (all.*kind).items.insert((all.*kind).items.end(), other.items.begin(), other.items.end());
      }
    }
    const int64_t positives = std::min(all.positives.total, most_positives);
    const int64_t negatives = std::min(all.negatives.total, size - positives);
    int64_t* row = indices + n * size;
    write_drawn(all.positives.items, positives, row);
    write_drawn(all.negatives.items, negatives, row + positives);
    std::fill(row + positives + negatives, row + size, int64_t(-1));
    num_pos[n] = positives;
    num_sampled[n] = positives + negatives;
  }
}

void philox(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = counter[0] * kMultiplier0, product1 = counter[2] * kMultiplier1;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[0] = next0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = next2;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

}  // namespace
}  // namespace sampler

void kernels::sample_balanced(std::uintptr_t labels, int label_bytes, std::uintptr_t seeds, std::uintptr_t counts,
                              int64_t images, int64_t entries, int64_t size, int64_t most_positives,
                              int64_t first_positive, std::uintptr_t indices, std::uintptr_t num_pos,
                              std::uintptr_t num_sampled, int num_threads) {
  const auto run = [&](auto type) {
    using L = decltype(type);
    sampler::sample(as_pointer<const L>(labels), as_pointer<const int64_t>(seeds), as_pointer<const int64_t>(counts),
                    images, entries, size, most_positives, static_cast<L>(first_positive),
                    as_pointer<int64_t>(indices), as_pointer<int64_t>(num_pos), as_pointer<int64_t>(num_sampled),
                    num_threads);
  };
  label_bytes == 1 ? run(int8_t()) : label_bytes == 4 ? run(int32_t()) : run(int64_t());
}

void kernels::image_seeds(std::uintptr_t image_ids, int64_t count, uint64_t seed, uint32_t step, uint32_t stream,
                          std::uintptr_t out) {
  const auto* ids = as_pointer<const uint64_t>(image_ids);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t words[4] = {static_cast<uint32_t>(ids[i]), static_cast<uint32_t>(ids[i] >> 32), step, stream};
    sampler::philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    as_pointer<uint64_t>(out)[i] = words[0] | static_cast<uint64_t>(words[1]) << 32;
  }
}
