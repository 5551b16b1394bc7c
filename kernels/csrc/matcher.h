// What the drivers of the matcher (matcher.cpp) and its inner loops (matcher_kernels.h) share.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common.h"

namespace matcher {

constexpr int kTile = 64;     // boxes handled together: what no box of a tile can overlap is skipped
constexpr int kPadding = 16;  // lanes of the widest vector

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;
template <typename T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// A box that is not finite, and one that is not there, goes from kFar to -kFar: it intersects nothing, wherever that is.
template <typename T>
constexpr T kFar = T(1e8);

// The ground truths of one image that can be matched, by coordinate; padded.
template <typename T>
struct Gts {
  std::vector<T> x1, y1, x2, y2, area;
  std::vector<int32_t> index;  // in the padded batch
  int count = 0;
};

// The best IoU of each ground truth so far, and the first and last tile in which it occurs.
template <typename T>
struct Record {
  std::vector<T> value;
  std::vector<int32_t> first, last;

  void reset(int count) {
    value.assign(count, T(0));
    first.assign(count, std::numeric_limits<int32_t>::max());
    last.assign(count, -1);
  }
  void merge(int gt, T other, int32_t other_first, int32_t other_last) {
    if (other > value[gt]) {
      value[gt] = other;
      first[gt] = other_first;
      last[gt] = other_last;
    } else if (other == value[gt]) {
      first[gt] = std::min(first[gt], other_first);
      last[gt] = std::max(last[gt], other_last);
    }
  }
};

// Anchors of one level: x is read from a row that all rows share, y is the row's plus the cell's.
template <typename T>
struct Level {
  std::vector<T> x1, x2, cell_y1, cell_y2;  // by position in the row, padded
  T stride;
  int64_t row;  // anchors in a row
  int32_t tiles_per_row;
  int32_t first_tile;
  int64_t first_anchor;
};

template <typename T>
struct Problem {
  const T* boxes = nullptr;  // [A, 4] or [N, A, 4]; null: the anchors of `levels`
  bool boxes_per_image = false;
  std::vector<Level<T>> levels;
  const int64_t* image_sizes = nullptr;
  double straddle = -1;
  int64_t images, boxes_per_row;
  int32_t tiles;
  T high, low, offset;
  bool low_quality;
  std::vector<Gts<T>> gts;
  int64_t* out;
};

// Which anchors take part in training. `active` false: all.
template <typename T>
struct Window {
  bool active;
  T least, right, bottom;
};

}  // namespace matcher
