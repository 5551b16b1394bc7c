// Greedy non-maximum suppression on the CPU.
//
// Candidates are visited in decreasing score; each is compared with the boxes kept so far, sixteen at a time, and the
// visit ends as soon as `max_output` are kept. Two things make it fast:
//
// - Kept boxes lie in a grid of cells, filed under their upper left corner, in chunks of sixteen (structure of arrays).
//   IoU > t bounds the overlap along each axis: |x1_i - x1_j| < (1 - t) / t * width_j, so a candidate needs to look
//   at the few cells of that window only.
// - The division is done only for chunks in which `inter > t' * union`, with t' a hair below t, found a candidate.
//
// Neither changes a result: every suppression is decided by `inter / union > threshold` with each operation rounded
// to the tensor's own type (see fastrcnn_kernels/nms.py, where the formula is pinned). The window and t' have margins
// far above the rounding error, and where the error is not bounded (tiny, huge or degenerate boxes, low thresholds)
// the sweep falls back to one cell and the exact test.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "exports_boxes.h"
#include "nms.h"
#include "sort.h"

namespace {

using namespace nms;

template <typename T>
struct Grid {
  bool exact_only;  // rounding is not bounded: one cell, no quick test
  int columns, rows;
  T left, top, scale_x, scale_y;
  T reach;  // window half-width in box widths
};

template <typename T>
__attribute__((always_inline)) inline bool is_inert(const Box<T>& box, T offset) {
  // Has no finite positive area, so its IoU with anything is zero, negative or NaN.
  return !(box.x2 - box.x1 + offset > T(0) && box.y2 - box.y1 + offset > T(0) &&
           box.area <= std::numeric_limits<T>::max());
}

template <typename T>
__attribute__((always_inline)) inline Grid<T> plan_grid(const T* boxes, const int32_t* candidates, int64_t count,
                                                        T threshold, T offset) {
  Grid<T> grid{true, 1, 1, T(0), T(0), T(0), T(0), T(0)};
  if (!(threshold >= T(0.05)) || count < 2 * kLanes) return grid;
  const T smallest_side = offset == T(0) ? T(1e-12) : T(1);  // x2 - x1 + 1 cancels where x2 - x1 is near -1
  const T infinity = std::numeric_limits<T>::infinity();
  T left = infinity, top = infinity, right = -infinity, bottom = -infinity;
  double widths = 0, heights = 0;
  int64_t live = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Box<T> box = load_box(boxes, candidates[i], offset);
    if (is_inert(box, offset)) continue;
    const T width = box.x2 - box.x1 + offset;
    const T height = box.y2 - box.y1 + offset;
    if (width < smallest_side || height < smallest_side || box.area > T(1e30)) return grid;
    left = std::min(left, box.x1);
    top = std::min(top, box.y1);
    right = std::max(right, box.x1);
    bottom = std::max(bottom, box.y1);
    widths += width;
    heights += height;
    ++live;
  }
  if (live == 0) return grid;
  const T low = threshold * T(0.999);
  grid.reach = std::max(T(0), (T(1) - low) / low) * T(1.001);
  // Cells of about one window half-width: a query then touches two or three a side.
  const int most = static_cast<int>(std::min(256.0, std::ceil(std::sqrt(static_cast<double>(live)))));
  auto cells = [most](double span, double step) {
    if (!(span > 0) || !(step > 0) || !std::isfinite(span)) return 1;
    return std::max(1, static_cast<int>(std::min<double>(most, span / step)));
  };
  const double span_x = static_cast<double>(right) - static_cast<double>(left);
  const double span_y = static_cast<double>(bottom) - static_cast<double>(top);
  grid.exact_only = false;
  grid.columns = cells(span_x, static_cast<double>(grid.reach) * widths / static_cast<double>(live));
  grid.rows = cells(span_y, static_cast<double>(grid.reach) * heights / static_cast<double>(live));
  grid.left = left;
  grid.top = top;
  grid.scale_x = grid.columns > 1 ? static_cast<T>(grid.columns / span_x) : T(0);
  grid.scale_y = grid.rows > 1 ? static_cast<T>(grid.rows / span_y) : T(0);
  return grid;
}

// Non-decreasing in `x` under rounding, so a box inside a window is filed in a cell of that window.
template <typename T>
__attribute__((always_inline)) inline int cell_of(T x, T origin, T scale, int cells) {
  const T position = (x - origin) * scale;
  if (!(position > T(0))) return 0;
  return position < T(cells) ? static_cast<int>(position) : cells - 1;
}

// Sweeps `candidates` (indices of boxes, best first) and fills `work.kept` with the positions in it that are kept.
template <typename T>
__attribute__((always_inline)) inline void sweep(const T* boxes, const int32_t* candidates, int64_t count, T threshold,
                                                 T offset, int64_t max_output, Workspace<T>& work) {
  work.kept.clear();
  work.chunks.clear();
  const Grid<T> grid = plan_grid(boxes, candidates, count, threshold, offset);
  work.heads.assign(static_cast<size_t>(grid.columns) * grid.rows, -1);
  const T quick = threshold * T(0.9999);
  for (int64_t i = 0; i < count && static_cast<int64_t>(work.kept.size()) < max_output; ++i) {
    const Box<T> box = load_box(boxes, candidates[i], offset);
    if (!grid.exact_only && is_inert(box, offset)) {
      work.kept.push_back(static_cast<int32_t>(i));
      continue;
    }
    int first_column = 0, last_column = 0, first_row = 0, last_row = 0;
    if (!grid.exact_only) {
      const T reach_x = grid.reach * (box.x2 - box.x1 + offset);
      const T reach_y = grid.reach * (box.y2 - box.y1 + offset);
      first_column = cell_of(box.x1 - reach_x, grid.left, grid.scale_x, grid.columns);
      last_column = cell_of(box.x1 + reach_x, grid.left, grid.scale_x, grid.columns);
      first_row = cell_of(box.y1 - reach_y, grid.top, grid.scale_y, grid.rows);
      last_row = cell_of(box.y1 + reach_y, grid.top, grid.scale_y, grid.rows);
    }
    bool suppressed = false;
    for (int row = first_row; row <= last_row && !suppressed; ++row) {
      for (int column = first_column; column <= last_column && !suppressed; ++column) {
        int32_t next = work.heads[static_cast<size_t>(row) * grid.columns + column];
        while (next >= 0) {
          const Chunk<T>& chunk = work.chunks[next];
          if (grid.exact_only) {
            suppressed = any_overlap<T, true>(chunk, box, offset, threshold);
          } else if (any_overlap<T, false>(chunk, box, offset, quick)) {
            suppressed = any_overlap<T, true>(chunk, box, offset, threshold);
          }
          if (suppressed) break;
          next = chunk.next;
        }
      }
    }
    if (suppressed) continue;
    work.kept.push_back(static_cast<int32_t>(i));
    const int column = grid.exact_only ? 0 : cell_of(box.x1, grid.left, grid.scale_x, grid.columns);
    const int row = grid.exact_only ? 0 : cell_of(box.y1, grid.top, grid.scale_y, grid.rows);
    int32_t& head = work.heads[static_cast<size_t>(row) * grid.columns + column];
    if (head < 0 || work.chunks[head].count == kLanes) {
      Chunk<T> fresh{};
      std::fill(fresh.area, fresh.area + kLanes, std::numeric_limits<T>::quiet_NaN());
      fresh.next = head;
      head = static_cast<int32_t>(work.chunks.size());
      work.chunks.push_back(fresh);
    }
    Chunk<T>& chunk = work.chunks[head];
    chunk.x1[chunk.count] = box.x1;
    chunk.y1[chunk.count] = box.y1;
    chunk.x2[chunk.count] = box.x2;
    chunk.y2[chunk.count] = box.y2;
    chunk.area[chunk.count] = box.area;
    ++chunk.count;
  }
}

}  // namespace

// One function for each type, because a template cannot be cloned for several instruction sets.
FASTRCNN_CLONES void nms::sweep_any(const float* boxes, const int32_t* candidates, int64_t count, double threshold,
                               int box_offset, int64_t max_output, Workspace<float>& work) {
  sweep(boxes, candidates, count, static_cast<float>(threshold), static_cast<float>(box_offset), max_output, work);
}

FASTRCNN_CLONES void nms::sweep_any(const double* boxes, const int32_t* candidates, int64_t count, double threshold,
                               int box_offset, int64_t max_output, Workspace<double>& work) {
  sweep(boxes, candidates, count, threshold, static_cast<double>(box_offset), max_output, work);
}

namespace {

// Fills `work.candidates` with the indices of scores[0..count), best first, ties by lower index.
template <typename T>
void sort_candidates(const float* scores, int64_t count, bool skip_absent, Workspace<T>& work) {
  work.keys.clear();
  bool sorted = true;
  uint64_t previous = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (skip_absent && scores[i] == -std::numeric_limits<float>::infinity()) continue;
    const uint64_t key = descending_key(scores[i]) << 32 | static_cast<uint32_t>(i);
    sorted = sorted && previous <= key;
    previous = key;
    work.keys.push_back(key);
  }
  if (!sorted) {
    if (work.keys.size() < 512) {
      std::sort(work.keys.begin(), work.keys.end());
    } else {
      radix_sort(work.keys, work.scratch);
    }
  }
  work.candidates.resize(work.keys.size());
  for (size_t i = 0; i < work.keys.size(); ++i) work.candidates[i] = static_cast<int32_t>(work.keys[i]);
}

template <typename T>
void sort_candidates(const double* scores, int64_t count, bool skip_absent, Workspace<T>& work) {
  work.keys.resize(count);
  work.candidates.clear();
  for (int64_t i = 0; i < count; ++i) {
    work.keys[i] = descending_key(scores[i]);
    if (skip_absent && scores[i] == -std::numeric_limits<double>::infinity()) continue;
    work.candidates.push_back(static_cast<int32_t>(i));
  }
  const auto& keys = work.keys;
  std::stable_sort(work.candidates.begin(), work.candidates.end(),
                   [&keys](int32_t a, int32_t b) { return keys[a] < keys[b]; });
}

template <typename T, typename S>
void nms_segments(const T* boxes, const S* scores, int64_t segments, int64_t size, double threshold, int box_offset,
                  int64_t max_output, bool skip_absent, int64_t* keep, int64_t* counts, int num_threads) {
  const int threads = useful_threads(num_threads, segments, segments * size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace<T> work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < segments; ++s) {
      sort_candidates(scores + s * size, size, skip_absent, work);
      sweep_any(boxes + 4 * s * size, work.candidates.data(), static_cast<int64_t>(work.candidates.size()), threshold,
                box_offset, max_output, work);
      int64_t* row = keep + s * max_output;
      const int64_t kept = static_cast<int64_t>(work.kept.size());
      for (int64_t i = 0; i < kept; ++i) row[i] = work.candidates[work.kept[i]];
      std::fill(row + kept, row + max_output, int64_t(-1));
      counts[s] = kept;
    }
  }
}

// Numbers the distinct values of `idxs` 0, 1, ...; returns how many there are.
int64_t number_groups(const int64_t* idxs, int64_t count, std::vector<int32_t>& groups) {
  groups.resize(count);
  const auto range = std::minmax_element(idxs, idxs + count);
  const uint64_t lowest = static_cast<uint64_t>(*range.first);
  const uint64_t span = static_cast<uint64_t>(*range.second) - lowest;
  int64_t total = 0;
  if (span < static_cast<uint64_t>(4 * count + 4096)) {
    std::vector<int32_t> numbers(span + 1, -1);
    for (int64_t i = 0; i < count; ++i) {
      int32_t& number = numbers[static_cast<uint64_t>(idxs[i]) - lowest];
      if (number < 0) number = static_cast<int32_t>(total++);
      groups[i] = number;
    }
    return total;
  }
  std::vector<int64_t> distinct(idxs, idxs + count);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (int64_t i = 0; i < count; ++i) {
    groups[i] = static_cast<int32_t>(std::lower_bound(distinct.begin(), distinct.end(), idxs[i]) - distinct.begin());
  }
  return static_cast<int64_t>(distinct.size());
}

template <typename T, typename S>
int64_t nms_groups(const T* boxes, const S* scores, const int64_t* idxs, int64_t count, double threshold,
                   int box_offset, int64_t* keep, int num_threads) {
  if (count == 0) return 0;
  Workspace<T> sorting;
  sort_candidates(scores, count, false, sorting);
  std::vector<int32_t> groups;
  const int64_t total = number_groups(idxs, count, groups);
  std::vector<int64_t> starts(total + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++starts[groups[i] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  // Stable: within a group the candidates stay in decreasing score.
  std::vector<int32_t> members(count);
  std::vector<int64_t> cursor(starts.begin(), starts.end() - 1);
  for (const int32_t index : sorting.candidates) members[cursor[groups[index]]++] = index;
  // Largest first, so that no thread is left alone with the largest at the end.
  std::vector<int32_t> visit(total);
  std::iota(visit.begin(), visit.end(), 0);
  std::sort(visit.begin(), visit.end(), [&starts](int32_t a, int32_t b) {
    const int64_t size_a = starts[a + 1] - starts[a], size_b = starts[b + 1] - starts[b];
    return size_a != size_b ? size_a > size_b : a < b;
  });
  std::vector<uint8_t> is_kept(count, 0);
  const int threads = useful_threads(num_threads, total, count);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace<T> work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t v = 0; v < total; ++v) {
      const int64_t start = starts[visit[v]], size = starts[visit[v] + 1] - start;
      sweep_any(boxes, members.data() + start, size, threshold, box_offset, size, work);
      for (const int32_t position : work.kept) is_kept[members[start + position]] = 1;
    }
  }
  int64_t kept = 0;
  for (const int32_t index : sorting.candidates) {
    if (is_kept[index]) keep[kept++] = index;
  }
  return kept;
}

// Calls `run(boxes, scores)` with pointers of the right types.
template <typename Run>
auto with_types(std::uintptr_t boxes, bool double_boxes, std::uintptr_t scores, bool double_scores, Run run) {
  if (double_boxes) {
    return double_scores ? run(as_pointer<const double>(boxes), as_pointer<const double>(scores))
                         : run(as_pointer<const double>(boxes), as_pointer<const float>(scores));
  }
  return double_scores ? run(as_pointer<const float>(boxes), as_pointer<const double>(scores))
                       : run(as_pointer<const float>(boxes), as_pointer<const float>(scores));
}

}  // namespace

void kernels::nms_segments(std::uintptr_t boxes, bool double_boxes, std::uintptr_t scores, bool double_scores,
                           int64_t segments, int64_t size, double threshold, int box_offset, int64_t max_output,
                           bool skip_absent, std::uintptr_t keep, std::uintptr_t counts, int num_threads) {
  with_types(boxes, double_boxes, scores, double_scores, [&](auto* b, auto* s) {
    ::nms_segments(b, s, segments, size, threshold, box_offset, max_output, skip_absent, as_pointer<int64_t>(keep),
                 as_pointer<int64_t>(counts), num_threads);
  });
}

int64_t kernels::nms_groups(std::uintptr_t boxes, bool double_boxes, std::uintptr_t scores, bool double_scores,
                            std::uintptr_t idxs, int64_t count, double threshold, int box_offset, std::uintptr_t keep,
                            int num_threads) {
  return with_types(boxes, double_boxes, scores, double_scores, [&](auto* b, auto* s) {
    return ::nms_groups(b, s, as_pointer<const int64_t>(idxs), count, threshold, box_offset,
                      as_pointer<int64_t>(keep), num_threads);
  });
}
