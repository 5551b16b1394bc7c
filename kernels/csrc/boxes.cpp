// IoU, GIoU, DIoU and CIoU of every pair of two lists of boxes on the CPU.
//
// The second list is turned into columns of coordinates, a tile at a time, so that one box of the first is compared with
// sixteen of the second. Lists shorter than a tile are computed in whole vectors: what a row writes beyond its end is
// the beginning of the next row, which is written after it. Each operation is rounded as in
// fastrcnn_kernels/boxes_reference.py, so every implementation gives the same bits. Bound by the output that is written.
#if defined(__GNUC__) && !defined(__clang__)
// Comparisons may be evaluated where the code would branch around them: without this, few loops become vectors.
#pragma GCC optimize("no-trapping-math")
#endif
#include <algorithm>
#include <limits>

#include "exports_boxes.h"

namespace {

#define FASTRCNN_INLINE __attribute__((always_inline)) inline

enum Kind { kIoU = 0, kGeneralized = 1, kDistance = 2, kComplete = 3 };

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 1024;             // boxes of the second list held as columns
constexpr int64_t kPairs = 1 << 16;         // pairs of a task: some ten microseconds
constexpr int64_t kPairsPerThread = 1 << 17;  // less is not worth waking a thread

template <typename T>
struct Box {
  T x1, y1, x2, y2, area, x, y, angle;
};

template <typename T>
struct Columns {
  T x1[kTile + kLanes], y1[kTile + kLanes], x2[kTile + kLanes], y2[kTile + kLanes], area[kTile + kLanes];
  T x[kTile + kLanes], y[kTile + kLanes], angle[kTile + kLanes];
};

template <typename T>
FASTRCNN_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
FASTRCNN_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
FASTRCNN_INLINE T positive_area(const T* b, T offset) {
  const T area = (b[2] - b[0] + offset) * (b[3] - b[1] + offset);
  return area < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : area;  // NaN stays
}

template <int kKind, typename T>
FASTRCNN_INLINE void fill_columns(const T* __restrict__ boxes, const T* __restrict__ angles, int64_t count, T offset,
                                  Columns<T>& c) {
  for (int64_t i = 0; i < count; ++i) {
    const T* b = boxes + 4 * i;
    c.x1[i] = b[0];
    c.y1[i] = b[1];
    c.x2[i] = b[2];
    c.y2[i] = b[3];
    c.area[i] = positive_area(b, offset);
    if (kKind >= kDistance) {
      c.x[i] = (b[0] + b[2]) / T(2);
      c.y[i] = (b[1] + b[3]) / T(2);
    }
    if (kKind == kComplete) c.angle[i] = angles[i];
  }
}

// NaN needs no care in the minima and maxima: the area of its box is NaN, and with it the union.
template <int kKind, typename T>
FASTRCNN_INLINE void row_of_pairs(const Box<T>& a, const Columns<T>& c, int64_t count, T offset, T eps,
                                  T* __restrict__ out) {
  constexpr T kSmallest = std::numeric_limits<T>::min();
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const T width = larger(smaller(a.x2, c.x2[i]) - larger(a.x1, c.x1[i]) + offset, T(0));
    const T height = larger(smaller(a.y2, c.y2[i]) - larger(a.y1, c.y1[i]) + offset, T(0));
    const T inter = width * height;
    const T joined = a.area + c.area[i] - inter;
    T result = inter / joined;
    if (kKind != kIoU) {
      const T span_x = larger(larger(a.x2, c.x2[i]) - smaller(a.x1, c.x1[i]) + offset, T(0));
      const T span_y = larger(larger(a.y2, c.y2[i]) - smaller(a.y1, c.y1[i]) + offset, T(0));
      if (kKind == kGeneralized) {
        const T hull = larger(span_x * span_y, T(2) * kSmallest);
        result = result - (hull - joined) / hull;
      } else {
        const T iou = result, dx = a.x - c.x[i], dy = a.y - c.y[i];
        result = iou - (dx * dx + dy * dy) / (span_x * span_x + span_y * span_y + eps);
        if (kKind == kComplete) {
          const T turn = a.angle - c.angle[i];
          const T v = T(0.40528473456935108578) * (turn * turn);  // 4 / pi^2
          result = result - v / (T(1) - iou + v + eps) * v;
        }
      }
    }
    out[i] = result;
  }
}

template <typename T>
struct Problem {
  const T *boxes1, *boxes2;      // [batches or 1, n, 4], [batches or 1, m, 4]
  const T *angles1, *angles2;    // [.., n], [.., m]; of CIoU only
  int64_t batches, n, m, stride1, stride2;  // strides in boxes: 0 where a list serves all batches
  T offset, eps;
  T* out;                        // [batches, n, m]
};

// Rows [row, row + rows) of one batch against the tile of columns [column, column + columns).
template <int kKind, typename T>
FASTRCNN_INLINE void tile_of_pairs(const Problem<T>& p, int64_t batch, int64_t row, int64_t rows, int64_t column,
                                   int64_t columns) {
  Columns<T> c;
  const int64_t padded = (columns + kLanes - 1) / kLanes * kLanes;
  const int64_t second = batch * p.stride2 + column;
  fill_columns<kKind>(p.boxes2 + 4 * second, p.angles2 + (kKind == kComplete ? second : 0), columns, p.offset, c);
  T* const lists[] = {c.x1, c.y1, c.x2, c.y2, c.area, c.x, c.y, c.angle};
  for (T* list : lists) std::fill(list + columns, list + padded, T(0));
  const bool whole_rows = columns == p.m;
  for (int64_t i = row; i < row + rows; ++i) {
    const int64_t first = batch * p.stride1 + i;
    const T* b = p.boxes1 + 4 * first;
    Box<T> a{b[0], b[1], b[2], b[3], positive_area(b, p.offset), T(0), T(0), T(0)};
    if (kKind >= kDistance) {
      a.x = (b[0] + b[2]) / T(2);
      a.y = (b[1] + b[3]) / T(2);
    }
    if (kKind == kComplete) a.angle = p.angles1[first];
    // The last row of a task may not write where another task begins.
    const int64_t count = whole_rows && (row + rows - i - 1) * columns >= kLanes ? padded : columns;
    row_of_pairs<kKind>(a, c, count, p.offset, p.eps, p.out + (batch * p.n + i) * p.m + column);
  }
}

// One function for each type and kind, because a template cannot be cloned for several instruction sets.
#define FASTRCNN_TILE(name, kind, type)                                                                             \
  FASTRCNN_CLONES void name(const Problem<type>& p, int64_t batch, int64_t row, int64_t rows, int64_t column,       \
                            int64_t columns) {                                                                      \
    tile_of_pairs<kind>(p, batch, row, rows, column, columns);                                                      \
  }
FASTRCNN_TILE(iou_tile, kIoU, float)
FASTRCNN_TILE(generalized_tile, kGeneralized, float)
FASTRCNN_TILE(distance_tile, kDistance, float)
FASTRCNN_TILE(complete_tile, kComplete, float)
FASTRCNN_TILE(iou_tile, kIoU, double)
FASTRCNN_TILE(generalized_tile, kGeneralized, double)
FASTRCNN_TILE(distance_tile, kDistance, double)
FASTRCNN_TILE(complete_tile, kComplete, double)
#undef FASTRCNN_TILE

template <typename T>
void all_pairs(const Problem<T>& p, int kind, int num_threads) {
  using Tile = void (*)(const Problem<T>&, int64_t, int64_t, int64_t, int64_t, int64_t);
  const Tile tiles[] = {iou_tile, generalized_tile, distance_tile, complete_tile};
  const Tile tile = tiles[kind];
  const int64_t width = std::min(p.m, kTile);
  const int64_t height = std::min(p.n, std::max<int64_t>(1, kPairs / width));
  const int64_t across = (p.m + width - 1) / width, down = (p.n + height - 1) / height;
  const int64_t pairs = p.batches * p.n * p.m;
  advise_large_pages(reinterpret_cast<std::uintptr_t>(p.out), pairs * static_cast<int64_t>(sizeof(T)));
  const int64_t useful = std::min<int64_t>(num_threads, pairs / kPairsPerThread);
  const int threads = static_cast<int>(std::max<int64_t>(1, useful));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t task = 0; task < p.batches * down * across; ++task) {
    const int64_t column = task % across * width, row = task / across % down * height;
    tile(p, task / (across * down), row, std::min(height, p.n - row), column, std::min(width, p.m - column));
  }
}

}  // namespace

void kernels::pairwise_iou(int kind, std::uintptr_t boxes1, std::uintptr_t boxes2, std::uintptr_t angles1,
                           std::uintptr_t angles2, int64_t batches, int64_t n, int64_t m, int64_t stride1,
                           int64_t stride2, int box_offset, double eps, bool is_double, std::uintptr_t out,
                           int num_threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p{as_pointer<const T>(boxes1), as_pointer<const T>(boxes2), as_pointer<const T>(angles1),
                       as_pointer<const T>(angles2), batches, n, m, stride1, stride2,
                       static_cast<T>(box_offset), static_cast<T>(eps), as_pointer<T>(out)};
    all_pairs(p, kind, num_threads);
  };
  is_double ? run(0.0) : run(0.0f);
}
