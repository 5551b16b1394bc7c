// Matching of boxes, or of the anchors of a pyramid, to ground truths; the rule is in fastrcnn_kernels/matcher.py.
//
// Boxes are handled in tiles of 64 with the box that surrounds them: a ground truth that does not intersect it has
// IoU 0 with all 64 and is skipped, sixteen at a time. What is left is one division a pair, eight or sixteen pairs at a
// time, and none where nothing intersects. Nothing of the size [G, A] exists.
//
// Low-quality matches take a second pass. The first keeps, for each ground truth, its best IoU and the first and the
// last tile where it occurs; the second looks at the tiles between those only. A best IoU of 0 ties every box that has
// IoU 0 with that ground truth, which is every box: then all boxes get their own best ground truth.
//
// Anchors are computed in the tile: a tile is a piece of one row of one level, whose x are those of every row.
#include "exports_boxes.h"
#include "matcher.h"

#include <cmath>
#ifdef _OPENMP
#include <omp.h>
#endif

#define FASTRCNN_KERNELS "matcher_kernels.h"
#include "isa.h"

namespace matcher {
namespace {

constexpr int32_t kChunk = 32;            // tiles that a thread takes at a time
constexpr int64_t kBoxesPerThread = 8192;  // less is not worth waking a thread

template <typename T>
Gts<T> usable_gts(const T* boxes, int64_t count, T offset) {
  Gts<T> gts;
  for (int64_t i = 0; i < count; ++i) {
    const T* b = boxes + 4 * i;
    const T area = (b[2] - b[0] + offset) * (b[3] - b[1] + offset);
    if (!std::isfinite(area)) continue;
    gts.x1.push_back(b[0]);
    gts.y1.push_back(b[1]);
    gts.x2.push_back(b[2]);
    gts.y2.push_back(b[3]);
    gts.area.push_back(std::max(area, std::numeric_limits<T>::min()));
    gts.index.push_back(static_cast<int32_t>(i));
  }
  gts.count = static_cast<int>(gts.x1.size());
  const size_t padded = gts.x1.size() + kPadding;
  gts.x1.resize(padded, kFar<T>);
  gts.y1.resize(padded, kFar<T>);
  gts.x2.resize(padded, -kFar<T>);
  gts.y2.resize(padded, -kFar<T>);
  return gts;
}

template <typename T>
void read_gts(Problem<T>& problem, const T* gt_boxes, const int64_t* gt_count, int64_t num_gts) {
  for (int64_t n = 0; n < problem.images; ++n) {
    const int64_t count = std::min(std::max<int64_t>(gt_count[n], 0), num_gts);
    problem.gts.push_back(usable_gts(gt_boxes + 4 * n * num_gts, count, problem.offset));
  }
}

// What all threads found about the ground truths of an image, and the tiles that may hold ties.
template <typename T>
struct Summary {
  Record<T> record;
  bool keep_all = false;
  std::vector<int32_t> tiles;
};

template <typename T>
Summary<T> summarise(const Problem<T>& problem, int64_t image, const std::vector<std::vector<Record<T>>>& records) {
  Summary<T> summary;
  const int count = problem.gts[image].count;
  summary.record.reset(count);
  for (const auto& thread : records) {
    for (int gt = 0; gt < count; ++gt) {
      const Record<T>& found = thread[image];
      summary.record.merge(gt, found.value[gt], found.first[gt], found.last[gt]);
    }
  }
  std::vector<int32_t> opened(problem.tiles + 1, 0);
  for (int gt = 0; gt < count; ++gt) {
    summary.keep_all = summary.keep_all || summary.record.value[gt] == T(0);
    if (summary.keep_all) return summary;
    ++opened[summary.record.first[gt]];
    --opened[summary.record.last[gt] + 1];
  }
  int32_t open = 0;
  for (int32_t tile = 0; tile < problem.tiles; ++tile) {
    open += opened[tile];
    if (open > 0) summary.tiles.push_back(tile);
  }
  return summary;
}

template <typename T>
void match(const Problem<T>& problem, int num_threads) {
  const int64_t images = problem.images;
  const int64_t useful = images * problem.boxes_per_row / kBoxesPerThread;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
  const auto match_tiles = FASTRCNN_BEST(match_tiles<T>);
  const auto match_ties = FASTRCNN_BEST(match_ties<T>);
  std::vector<std::vector<Record<T>>> records(threads);
  for (auto& thread : records) {
    thread.resize(images);
    for (int64_t n = 0; n < images && problem.low_quality; ++n) thread[n].reset(problem.gts[n].count);
  }
  std::vector<Summary<T>> summaries(images);
  const int64_t chunks = (problem.tiles + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    auto& mine = records[omp_get_thread_num()];
#else
    auto& mine = records[0];
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < images * chunks; ++item) {
      const int64_t image = item / chunks;
      const int32_t first = static_cast<int32_t>(item % chunks) * kChunk;
      match_tiles(problem, image, first, std::min(first + kChunk, problem.tiles), false,
                  problem.low_quality ? &mine[image] : nullptr);
    }
    if (problem.low_quality) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t image = 0; image < images; ++image) summaries[image] = summarise(problem, image, records);
      for (int64_t image = 0; image < images; ++image) {
        const Summary<T>& summary = summaries[image];
        if (summary.keep_all) {
#pragma omp for schedule(dynamic, 1) nowait
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int32_t first = static_cast<int32_t>(chunk) * kChunk;
            match_tiles(problem, image, first, std::min(first + kChunk, problem.tiles), true, nullptr);
          }
        } else {
          const int64_t count = static_cast<int64_t>(summary.tiles.size());
#pragma omp for schedule(dynamic, 16) nowait
          for (int64_t i = 0; i < count; ++i) match_ties(problem, image, summary.tiles[i], summary.record);
        }
      }
    }
  }
}

template <typename T>
void match_boxes(const T* gt_boxes, const int64_t* gt_count, Problem<T>& problem, int64_t num_gts, int num_threads) {
  problem.tiles = static_cast<int32_t>((problem.boxes_per_row + kTile - 1) / kTile);
  read_gts(problem, gt_boxes, gt_count, num_gts);
  match(problem, num_threads);
}

template <typename T>
Level<T> make_level(const T* cells, int64_t per_cell, int64_t width, int64_t stride) {
  Level<T> level;
  level.stride = static_cast<T>(stride);
  level.row = width * per_cell;
  level.tiles_per_row = static_cast<int32_t>((level.row + kTile - 1) / kTile);
  const size_t padded = static_cast<size_t>(level.tiles_per_row) * kTile;
  for (auto* column : {&level.x1, &level.x2, &level.cell_y1, &level.cell_y2}) column->resize(padded);
  for (int64_t x = 0; x < width; ++x) {
    const T shift = static_cast<T>(x) * level.stride;
    for (int64_t a = 0; a < per_cell; ++a) {
      const int64_t at = x * per_cell + a;
      level.x1[at] = shift + cells[4 * a];
      level.cell_y1[at] = cells[4 * a + 1];
      level.x2[at] = shift + cells[4 * a + 2];
      level.cell_y2[at] = cells[4 * a + 3];
    }
  }
  return level;
}

template <typename T>
void match_anchors(const T* gt_boxes, const int64_t* gt_count, const std::vector<std::uintptr_t>& cells,
                   const std::vector<int64_t>& per_cell, const std::vector<int64_t>& grid_sizes,
                   const std::vector<int64_t>& strides, Problem<T>& problem, int64_t num_gts, int num_threads) {
  problem.tiles = 0;
  problem.boxes_per_row = 0;
  for (size_t l = 0; l < cells.size(); ++l) {
    const int64_t height = grid_sizes[2 * l], width = grid_sizes[2 * l + 1];
    if (height * width * per_cell[l] == 0) continue;
    Level<T> level = make_level(as_pointer<const T>(cells[l]), per_cell[l], width, strides[l]);
    level.first_tile = problem.tiles;
    level.first_anchor = problem.boxes_per_row;
    problem.tiles += static_cast<int32_t>(height) * level.tiles_per_row;
    problem.boxes_per_row += height * level.row;
    problem.levels.push_back(std::move(level));
  }
  if (problem.tiles == 0) return;
  read_gts(problem, gt_boxes, gt_count, num_gts);
  match(problem, num_threads);
}

template <typename T>
Problem<T> make_problem(int64_t images, double high, double low, bool low_quality, int box_offset,
                        std::uintptr_t out) {
  Problem<T> problem;
  problem.images = images;
  problem.high = static_cast<T>(high);
  problem.low = static_cast<T>(low);
  problem.low_quality = low_quality;
  problem.offset = static_cast<T>(box_offset);
  problem.out = as_pointer<int64_t>(out);
  return problem;
}

}  // namespace
}  // namespace matcher

void kernels::match_boxes(std::uintptr_t gt_boxes, std::uintptr_t gt_count, std::uintptr_t boxes, bool is_double,
                          int64_t images, int64_t num_gts, int64_t num_boxes, bool boxes_per_image, double high,
                          double low, bool low_quality, int box_offset, std::uintptr_t out, int num_threads) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    auto problem = matcher::make_problem<T>(images, high, low, low_quality, box_offset, out);
    problem.boxes = as_pointer<const T>(boxes);
    problem.boxes_per_image = boxes_per_image;
    problem.boxes_per_row = num_boxes;
    matcher::match_boxes(as_pointer<const T>(gt_boxes), as_pointer<const int64_t>(gt_count), problem, num_gts,
                         num_threads);
  };
  is_double ? run(double()) : run(float());
}

void kernels::match_anchors(std::uintptr_t gt_boxes, std::uintptr_t gt_count, const std::vector<std::uintptr_t>& cells,
                            const std::vector<int64_t>& per_cell, const std::vector<int64_t>& grid_sizes,
                            const std::vector<int64_t>& strides, std::uintptr_t image_sizes, bool is_double,
                            int64_t images, int64_t num_gts, double high, double low, bool low_quality, double straddle,
                            int box_offset, std::uintptr_t out, int num_threads) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    auto problem = matcher::make_problem<T>(images, high, low, low_quality, box_offset, out);
    problem.image_sizes = as_pointer<const int64_t>(image_sizes);
    problem.straddle = straddle;
    matcher::match_anchors(as_pointer<const T>(gt_boxes), as_pointer<const int64_t>(gt_count), cells, per_cell,
                           grid_sizes, strides, problem, num_gts, num_threads);
  };
  is_double ? run(double()) : run(float());
}
