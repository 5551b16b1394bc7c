// Where an anchor of a pyramid lies, and what the kernels of the region proposal network share.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <vector>

#include "common.h"

namespace rpn {

struct Place {
  int64_t level, anchor, y, x;
};

struct Level {
  std::uintptr_t objectness, deltas;
  int64_t height, width;
  std::array<int64_t, 4> objectness_strides, deltas_strides;  // of image, channel, y, x

  int64_t objectness_at(int64_t n, int64_t channel, const Place& at) const {
    const auto& s = objectness_strides;
    return n * s[0] + channel * s[1] + at.y * s[2] + at.x * s[3];
  }
  int64_t deltas_at(int64_t n, int64_t channel, const Place& at) const {
    const auto& s = deltas_strides;
    return n * s[0] + channel * s[1] + at.y * s[2] + at.x * s[3];
  }
};

// The place of an anchor numbered over all levels in the order level, y, x, anchor; false for a number that is none.
template <typename Levels>
bool locate(const Levels& levels, int64_t num_anchors, int64_t index, Place& at) {
  if (index < 0) return false;
  for (size_t l = 0; l < levels.size(); ++l) {
    const int64_t count = levels[l].height * levels[l].width * num_anchors;
    if (index < count) {
      const int64_t position = index / num_anchors;
      at = {static_cast<int64_t>(l), index % num_anchors, position / levels[l].width, position % levels[l].width};
      return true;
    }
    index -= count;
  }
  return false;
}

// Zeros by all threads: the first touch of fresh memory is what it costs.
inline void fill_zero(std::uintptr_t address, int64_t bytes, int threads) {
  constexpr int64_t kChunk = int64_t{1} << 21;
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (int64_t i = 0; i < chunks; ++i)
    std::memset(as_pointer<char>(address) + i * kChunk, 0, std::min(kChunk, bytes - i * kChunk));
}

}  // namespace rpn
