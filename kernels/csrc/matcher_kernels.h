// The inner loops of the matcher for one instruction set; included by isa.h once for each, hence no include guard.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "matcher.h"

#define FASTRCNN_INLINE FASTRCNN_TARGET inline __attribute__((always_inline))

namespace matcher {
namespace {
namespace FASTRCNN_ISA {

template <typename T>
constexpr int kLanes = FASTRCNN_VECTOR_BYTES / static_cast<int>(sizeof(T));
template <typename T>
using Float = Vector<T, kLanes<T>>;
template <typename T>
using Int = Vector<IntOf<T>, kLanes<T>>;

template <typename V, typename T>
FASTRCNN_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V, typename T>
FASTRCNN_INLINE void store(T* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}
template <typename T>
FASTRCNN_INLINE Float<T> splat(T value) {
  return value - Float<T>{};
}
template <typename V>
FASTRCNN_INLINE V least(const V& a, const V& b) {
  return a < b ? a : b;
}
template <typename V>
FASTRCNN_INLINE V most(const V& a, const V& b) {
  return a > b ? a : b;
}

// Bit i is set where lane i of a comparison is true.
template <typename M>
FASTRCNN_INLINE uint32_t lane_bits(const M& mask) {
  constexpr int kCount = static_cast<int>(sizeof(M) / sizeof(mask[0]));
#if defined(__x86_64__) && FASTRCNN_VECTOR_BYTES == 64
  if constexpr (kCount == 16) return static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)mask));
  return static_cast<uint32_t>(_mm512_movepi64_mask((__m512i)mask));
#elif defined(__x86_64__) && FASTRCNN_VECTOR_BYTES == 32
  if constexpr (kCount == 8) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__x86_64__)
  if constexpr (kCount == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kCount; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

template <typename T>
struct Tile {
  alignas(64) T x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];
  T left, top, right, bottom;  // around the boxes that are finite
  int32_t number;
  int count, groups;  // boxes, vectors
  int64_t start;      // of the boxes of an image
  uint64_t inside;    // bit i: box i takes part in training
};

// Areas, the window test, boxes that are not finite, and what surrounds the others.
template <typename T>
FASTRCNN_INLINE void finish_tile(Tile<T>& tile, T offset, const Window<T>& window) {
  constexpr int kN = kLanes<T>;
  const int count = tile.count;
  tile.groups = (count + kN - 1) / kN;
  for (int i = count; i < tile.groups * kN; ++i) {
    tile.x1[i] = tile.y1[i] = kFar<T>;
    tile.x2[i] = tile.y2[i] = -kFar<T>;
  }
  Float<T> left = splat(kFar<T>), top = left, right = -left, bottom = right;
  const Float<T> far = splat(kFar<T>);
  uint64_t inside = 0;
  for (int group = 0; group < tile.groups; ++group) {
    const int at = group * kN;
    Float<T> x1 = load<Float<T>>(tile.x1 + at), y1 = load<Float<T>>(tile.y1 + at);
    Float<T> x2 = load<Float<T>>(tile.x2 + at), y2 = load<Float<T>>(tile.y2 + at);
    if (window.active) {
      const Int<T> in = (x1 >= window.least) & (y1 >= window.least) & (x2 < window.right) & (y2 < window.bottom);
      inside |= static_cast<uint64_t>(lane_bits(in)) << at;
    }
    const Float<T> area = (x2 - x1 + offset) * (y2 - y1 + offset);
    const Int<T> finite = area - area == T(0);
    store(tile.area + at, finite ? most(area, splat(std::numeric_limits<T>::min())) : splat(T(1)));
    if (__builtin_expect(lane_bits(finite) != (1u << kN) - 1, 0)) {
      x1 = finite ? x1 : far;
      y1 = finite ? y1 : far;
      x2 = finite ? x2 : -far;
      y2 = finite ? y2 : -far;
      store(tile.x1 + at, x1);
      store(tile.y1 + at, y1);
      store(tile.x2 + at, x2);
      store(tile.y2 + at, y2);
    }
    left = least(x1, left);
    top = least(y1, top);
    right = most(x2, right);
    bottom = most(y2, bottom);
  }
  tile.left = left[0];
  tile.top = top[0];
  tile.right = right[0];
  tile.bottom = bottom[0];
  for (int i = 1; i < kN; ++i) {
    tile.left = std::min<T>(tile.left, left[i]);
    tile.top = std::min<T>(tile.top, top[i]);
    tile.right = std::max<T>(tile.right, right[i]);
    tile.bottom = std::max<T>(tile.bottom, bottom[i]);
  }
  tile.inside = window.active ? inside : ~uint64_t(0);
}

template <typename T>
FASTRCNN_INLINE void load_tile(const Problem<T>& problem, int64_t image, int32_t number, const Window<T>& window,
                               Tile<T>& tile) {
  tile.number = number;
  if (problem.boxes != nullptr) {
    tile.start = static_cast<int64_t>(number) * kTile;
    tile.count = static_cast<int>(std::min<int64_t>(kTile, problem.boxes_per_row - tile.start));
    const T* box = problem.boxes + 4 * (tile.start + (problem.boxes_per_image ? image * problem.boxes_per_row : 0));
    for (int i = 0; i < tile.count; ++i) {
      tile.x1[i] = box[4 * i];
      tile.y1[i] = box[4 * i + 1];
      tile.x2[i] = box[4 * i + 2];
      tile.y2[i] = box[4 * i + 3];
    }
  } else {
    size_t which = 0;
    while (which + 1 < problem.levels.size() && problem.levels[which + 1].first_tile <= number) ++which;
    const Level<T>& level = problem.levels[which];
    const int32_t within = number - level.first_tile;
    const int32_t y = within / level.tiles_per_row;
    const int64_t start = static_cast<int64_t>(within % level.tiles_per_row) * kTile;
    tile.start = level.first_anchor + y * level.row + start;
    tile.count = static_cast<int>(std::min<int64_t>(kTile, level.row - start));
    const T shift = static_cast<T>(y) * level.stride;
    std::memcpy(tile.x1, level.x1.data() + start, sizeof(tile.x1));
    std::memcpy(tile.x2, level.x2.data() + start, sizeof(tile.x2));
    for (int at = 0; at < kTile; at += kLanes<T>) {
      store(tile.y1 + at, shift + load<Float<T>>(level.cell_y1.data() + start + at));
      store(tile.y2 + at, shift + load<Float<T>>(level.cell_y2.data() + start + at));
    }
  }
  finish_tile(tile, problem.offset, window);
}

template <typename T>
struct OneGt {
  Float<T> x1, y1, x2, y2, area;
};

template <typename T>
FASTRCNN_INLINE OneGt<T> one_gt(const Gts<T>& gts, int gt) {
  return {splat(gts.x1[gt]), splat(gts.y1[gt]), splat(gts.x2[gt]), splat(gts.y2[gt]), splat(gts.area[gt])};
}

template <typename T>
FASTRCNN_INLINE Float<T> intersection(const OneGt<T>& gt, const Tile<T>& tile, int at, T offset) {
  const Float<T> zero{};
  const Float<T> width =
      least(gt.x2, load<Float<T>>(tile.x2 + at)) - most(gt.x1, load<Float<T>>(tile.x1 + at)) + offset;
  const Float<T> height =
      least(gt.y2, load<Float<T>>(tile.y2 + at)) - most(gt.y1, load<Float<T>>(tile.y1 + at)) + offset;
  return most(width, zero) * most(height, zero);
}

template <typename T>
FASTRCNN_INLINE Float<T> ratio(const OneGt<T>& gt, const Tile<T>& tile, int at, const Float<T>& shared) {
  return shared / ((gt.area + load<Float<T>>(tile.area + at)) - shared);
}

// Which of kLanes ground truths from `gt` on may intersect a box of the tile. Rounding is monotonic, so the overlap with
// the surrounding box is at least as large as with any box in it.
template <typename T>
FASTRCNN_INLINE uint32_t near(const Gts<T>& gts, int gt, const Tile<T>& tile, T offset) {
  const Float<T> width =
      least(load<Float<T>>(gts.x2.data() + gt), splat(tile.right)) -
      most(load<Float<T>>(gts.x1.data() + gt), splat(tile.left)) + offset;
  const Float<T> height =
      least(load<Float<T>>(gts.y2.data() + gt), splat(tile.bottom)) -
      most(load<Float<T>>(gts.y1.data() + gt), splat(tile.top)) + offset;
  return lane_bits((width > T(0)) & (height > T(0)));
}

template <typename T>
struct Scores {
  Float<T> best[kTile / kLanes<T>];
  Int<T> own[kTile / kLanes<T>];
};

// The best ground truth of each box of a tile, the first on a tie; with a record, also the best of each ground truth.
template <typename T>
FASTRCNN_INLINE void score_tile(const Gts<T>& gts, const Tile<T>& tile, T offset, Scores<T>& scores,
                                Record<T>* record) {
  constexpr int kN = kLanes<T>;
  for (int group = 0; group < tile.groups; ++group) {
    scores.best[group] = Float<T>{};
    scores.own[group] = Int<T>{};
  }
  for (int first = 0; first < gts.count; first += kN) {
    for (uint32_t bits = near(gts, first, tile, offset); bits != 0; bits &= bits - 1) {
      const int number = first + __builtin_ctz(bits);
      const OneGt<T> gt = one_gt(gts, number);
      const Int<T> name = static_cast<IntOf<T>>(number) - Int<T>{};
      Float<T> top{};
      for (int group = 0; group < tile.groups; ++group) {
        const Float<T> shared = intersection(gt, tile, group * kN, offset);
        if (lane_bits(shared > T(0)) == 0) continue;
        const Float<T> iou = ratio(gt, tile, group * kN, shared);
        const Int<T> better = iou > scores.best[group];
        scores.best[group] = better ? iou : scores.best[group];
        scores.own[group] = better ? name : scores.own[group];
        top = most(iou, top);
      }
      if (record != nullptr && lane_bits(top >= splat(record->value[number])) != 0) {
        T largest = top[0];
        for (int i = 1; i < kN; ++i) largest = std::max<T>(largest, top[i]);
        record->merge(number, largest, tile.number, tile.number);
      }
    }
  }
}

template <typename T>
FASTRCNN_INLINE Window<T> window_of(const Problem<T>& problem, int64_t image) {
  if (problem.image_sizes == nullptr || problem.straddle < 0) return {false, T(0), T(0), T(0)};
  // The size plus the threshold is a float32, as adding a Python float to an integer tensor gives.
  const float more = static_cast<float>(problem.straddle);
  const float bottom = static_cast<float>(problem.image_sizes[2 * image]) + more;
  const float right = static_cast<float>(problem.image_sizes[2 * image + 1]) + more;
  return {true, static_cast<T>(-problem.straddle), static_cast<T>(right), static_cast<T>(bottom)};
}

template <typename T>
FASTRCNN_INLINE void write_tile(const Problem<T>& problem, const Gts<T>& gts, const Tile<T>& tile,
                                const Scores<T>& scores, bool keep_all, int64_t* out) {
  constexpr int kN = kLanes<T>;
  alignas(64) IntOf<T> result[kTile];
  for (int group = 0; group < tile.groups; ++group) {
    const Float<T> best = scores.best[group];
    const Int<T> background = best < problem.low;  // -1 where true
    const Int<T> unmatched = Int<T>{} - 2 - background;
    const Int<T> matched = keep_all ? (background | -1) : best >= problem.high;
    store(result + group * kN, matched ? scores.own[group] : unmatched);
  }
  if (gts.index[gts.count - 1] != gts.count - 1) {
    for (int i = 0; i < tile.count; ++i) {
      if (result[i] >= 0) result[i] = gts.index[result[i]];
    }
  }
  if (tile.inside != ~uint64_t(0)) {
    for (int i = 0; i < tile.count; ++i) result[i] = tile.inside >> i & 1 ? result[i] : -2;
  }
  out += tile.start;
  for (int i = 0; i < tile.count; ++i) out[i] = result[i];
}

// Matches the boxes of some tiles of an image. `record` null: nothing is kept about the ground truths.
template <typename T>
FASTRCNN_TARGET void match_tiles(const Problem<T>& problem, int64_t image, int32_t first, int32_t last, bool keep_all,
                                 Record<T>* record) {
  const Gts<T>& gts = problem.gts[image];
  const Window<T> window = window_of(problem, image);
  int64_t* out = problem.out + image * problem.boxes_per_row;
  Tile<T> tile;
  Scores<T> scores;
  for (int32_t number = first; number < last; ++number) {
    load_tile(problem, image, number, window, tile);
    if (gts.count == 0) {
      for (int i = 0; i < tile.count; ++i) out[tile.start + i] = tile.inside >> i & 1 ? -1 : -2;
      continue;
    }
    score_tile(gts, tile, problem.offset, scores, record);
    write_tile(problem, gts, tile, scores, keep_all, out);
  }
}

// Gives the boxes of a tile that tie the best IoU of some ground truth their own best one.
template <typename T>
FASTRCNN_TARGET void match_ties(const Problem<T>& problem, int64_t image, int32_t number, const Record<T>& record) {
  constexpr int kN = kLanes<T>;
  const Gts<T>& gts = problem.gts[image];
  Tile<T> tile;
  load_tile(problem, image, number, window_of(problem, image), tile);
  uint64_t ties = 0;
  for (int first = 0; first < gts.count; first += kN) {
    for (uint32_t bits = near(gts, first, tile, problem.offset); bits != 0; bits &= bits - 1) {
      const int candidate = first + __builtin_ctz(bits);
      if (number < record.first[candidate] || number > record.last[candidate]) continue;
      const OneGt<T> gt = one_gt(gts, candidate);
      for (int group = 0; group < tile.groups; ++group) {
        const Float<T> shared = intersection(gt, tile, group * kN, problem.offset);
        const Float<T> iou = ratio(gt, tile, group * kN, shared);
        ties |= static_cast<uint64_t>(lane_bits(iou == record.value[candidate])) << (group * kN);
      }
    }
  }
  ties &= tile.inside;
  if (ties == 0) return;
  Scores<T> scores;
  score_tile<T>(gts, tile, problem.offset, scores, nullptr);
  int64_t* out = problem.out + image * problem.boxes_per_row + tile.start;
  for (; ties != 0; ties &= ties - 1) {
    const int i = __builtin_ctzll(ties);
    out[i] = gts.index[scores.own[i / kN][i % kN]];
  }
}

}  // namespace FASTRCNN_ISA
}  // namespace
}  // namespace matcher
#undef FASTRCNN_INLINE
