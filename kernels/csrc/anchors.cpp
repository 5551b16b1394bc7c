// The anchors of all levels of a pyramid on the CPU, written once, in order (y, x, anchor of the cell).
//
// The x coordinates of every row of a level are the same: a thread computes one row and then adds y to copies of it.
// Bound by the memory that is written.
#include <algorithm>
#include <cstring>
#include <vector>

#include "exports_boxes.h"

namespace {

constexpr int64_t kAnchorsPerThread = 32768;  // half a megabyte: less is not worth waking a thread

struct Level {
  std::uintptr_t cell;  // [anchors, 4]
  int64_t anchors, height, width, stride;

  int64_t row() const { return anchors * width; }
};

template <typename T>
__attribute__((always_inline)) inline void fill(const Level& level, int64_t first, int64_t last, T* __restrict__ row,
                                                T* __restrict__ out) {
  const T* cell = as_pointer<const T>(level.cell);
  for (int64_t x = 0; x < level.width; ++x) {
    const T shift = static_cast<T>(x) * static_cast<T>(level.stride);
    for (int64_t a = 0; a < level.anchors; ++a) {
      T* target = row + 4 * (x * level.anchors + a);
      target[0] = shift + cell[4 * a];
      target[1] = cell[4 * a + 1];
      target[2] = shift + cell[4 * a + 2];
      target[3] = cell[4 * a + 3];
    }
  }
  const int64_t count = level.row();
  for (int64_t y = first; y < last; ++y) {
    const T shift = static_cast<T>(y) * static_cast<T>(level.stride);
    T* target = out + 4 * y * count;
    for (int64_t i = 0; i < count; ++i) {
      target[4 * i] = row[4 * i];
      target[4 * i + 1] = shift + row[4 * i + 1];
      target[4 * i + 2] = row[4 * i + 2];
      target[4 * i + 3] = shift + row[4 * i + 3];
    }
  }
}

// One function for each type, because a template cannot be cloned for several instruction sets.
FASTRCNN_CLONES void fill_rows(const Level& level, int64_t first, int64_t last, float* row, float* out) {
  fill(level, first, last, row, out);
}
FASTRCNN_CLONES void fill_rows(const Level& level, int64_t first, int64_t last, double* row, double* out) {
  fill(level, first, last, row, out);
}

template <typename T>
void grid_anchors(const std::vector<Level>& levels, T* out, int num_threads) {
  int64_t total = 0, widest = 0;
  for (const Level& level : levels) {
    total += level.row() * level.height;
    widest = std::max(widest, level.row());
  }
  advise_large_pages(reinterpret_cast<std::uintptr_t>(out), total * 4 * static_cast<int64_t>(sizeof(T)));
  const int64_t useful = std::min<int64_t>(num_threads, total / kAnchorsPerThread);
  const int threads = static_cast<int>(std::max<int64_t>(1, useful));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    std::vector<T> row(4 * widest);
    T* target = out;
    for (const Level& level : levels) {
      fill_rows(level, level.height * t / threads, level.height * (t + 1) / threads, row.data(), target);
      target += 4 * level.row() * level.height;
    }
  }
}

}  // namespace

void kernels::grid_anchors(const std::vector<std::vector<int64_t>>& table, bool is_double, std::uintptr_t out,
                           int num_threads) {
  std::vector<Level> levels;
  for (const auto& entry : table) {
    levels.push_back({static_cast<std::uintptr_t>(entry[0]), entry[1], entry[2], entry[3], entry[4]});
  }
  if (is_double) {
    ::grid_anchors(levels, as_pointer<double>(out), num_threads);
  } else {
    ::grid_anchors(levels, as_pointer<float>(out), num_threads);
  }
}
