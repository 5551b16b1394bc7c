// What the driver of the sampler (sampler.cpp) and its inner loops (sampler_kernels.h) share.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"

namespace sampler {

constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;
constexpr int kVectors = 2;  // vectors of counters in flight: a product takes several cycles
constexpr int kTile = 1024;  // entries whose labels are looked at together

// The `wanted` smallest of the items offered so far, in no order, and some more. An item is a key, then the index.
struct Smallest {
  int64_t wanted = 0;
  int64_t total = 0;   // entries of this kind, offered or not
  int64_t limit = -1;  // keys above it need not be offered
  size_t capacity = 0;
  std::vector<uint64_t> items;

  void start(int64_t count) {
    wanted = count;
    limit = count > 0 ? 0xffffffff : -1;
    capacity = static_cast<size_t>(2 * count + 64);
    items.reserve(std::min<size_t>(capacity, 4096));
  }
  void offer(uint64_t item) {
    if (static_cast<int64_t>(item >> 32) > limit) return;
    items.push_back(item);
    if (items.size() >= capacity) keep_smallest();
  }
  void keep_smallest() {
    if (static_cast<int64_t>(items.size()) <= wanted) return;
    std::nth_element(items.begin(), items.begin() + (wanted - 1), items.end());
    items.resize(wanted);
    limit = static_cast<int64_t>(items[wanted - 1] >> 32);
  }
};

struct Found {
  Smallest positives, negatives;
};

}  // namespace sampler
