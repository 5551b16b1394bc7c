// Mask targets on the CPU: the closed form of fastrcnn_kernels/rasterize.py, one region at a time.
//
// Unlike the vectorised reference it visits only the columns that an edge crosses, so a region costs about its
// outline's length in mask pixels, whatever the other instances of the batch are like. Every product that decides a
// tie is made in the same type and order as in pycocotools (the build forbids fused multiply-add).
#include <algorithm>
#include <cmath>
#include <vector>

#include "exports_maps.h"

namespace {

// As in rasterize.py: pycocotools overflows its ints at twice that.
constexpr double kGridLimit = 1073741824.0;

struct Frame {
  float corner_x, corner_y, ratio_x, ratio_y;
};

struct Point {
  double x, y;
};

double to_grid(float coordinate) {
  const double grid = std::trunc(static_cast<double>(coordinate) * 5.0 + 0.5);
  return std::isnan(grid) ? 0.0 : std::clamp(grid, -kGridLimit, kGridLimit);
}

Point vertex_on_grid(const float* vertex, const Frame& frame) {
  return {to_grid((vertex[0] - frame.corner_x) * frame.ratio_x), to_grid((vertex[1] - frame.corner_y) * frame.ratio_y)};
}

// Flip the entry of `toggles` [size, size + 1] (column, row) at which each crossed column changes.
void toggle_edge(Point a, Point b, int64_t size, uint8_t* toggles) {
  const double low = std::min(a.x, b.x), high = std::max(a.x, b.x);
  if (high <= 2.0 || low == high) return;
  // Column c is crossed where low <= 5c + 2 < high.
  int64_t column = static_cast<int64_t>(std::max(std::ceil((low - 2.0) / 5.0), 0.0));
  if (column >= size) return;
  const double dx = std::abs(b.x - a.x), dy = std::abs(b.y - a.y);
  const bool flat = dx >= dy;
  if (flat ? a.x > b.x : a.y > b.y) std::swap(a, b);
  const double slope = flat ? (b.y - a.y) / dx : (b.x - a.x) / dy;
  for (; column < size; ++column) {
    const double at = 5.0 * static_cast<double>(column) + 2.0;
    if (at >= high) break;
    double v;
    if (flat) {
      const double step = at - a.x + (slope < 0 ? 1.0 : 0.0);
      v = std::floor(a.y + slope * step + 0.5);
    } else {
      const double step = std::nearbyint((at + 0.5 - a.x) / slope);
      const bool near = (a.x + slope * step + 0.5 < at + 1.0) == (slope > 0);
      v = a.y - 1.0 + step + (near ? 1.0 : 0.0);
    }
    const double row = std::clamp(std::floor((v + 2.5) / 5.0), 0.0, static_cast<double>(size));
    toggles[column * (size + 1) + static_cast<int64_t>(row)] ^= 1;
  }
}

// The parity along each column, united with what `mask` [size, size] (row, column) holds.
void fill_polygon(const uint8_t* toggles, int64_t size, uint8_t* mask) {
  for (int64_t column = 0; column < size; ++column) {
    const uint8_t* of_column = toggles + column * (size + 1);
    uint8_t inside = 0;
    for (int64_t row = 0; row < size; ++row) {
      inside ^= of_column[row];
      mask[row * size + column] |= inside;
    }
  }
}

}  // namespace

void kernels::rasterize_polygons(std::uintptr_t vertices_address, int64_t num_vertices,
                                 std::uintptr_t polygon_offsets_address, int64_t num_polygons,
                                 std::uintptr_t instance_offsets_address, int64_t num_instances,
                                 std::uintptr_t idxs_address, std::uintptr_t boxes_address, std::uintptr_t clip_address,
                                 int64_t num_regions, int64_t size, std::uintptr_t masks_address, int num_threads) {
  const auto* vertices = as_pointer<const float>(vertices_address);
  const auto* polygon_offsets = as_pointer<const int64_t>(polygon_offsets_address);
  const auto* instance_offsets = as_pointer<const int64_t>(instance_offsets_address);
  const auto* idxs = as_pointer<const int64_t>(idxs_address);
  const auto* boxes = as_pointer<const float>(boxes_address);
  const auto* clip = as_pointer<const float>(clip_address);  // null: corners are clamped at 0 only
  auto* masks = as_pointer<uint8_t>(masks_address);          // zeros

#pragma omp parallel num_threads(num_threads)
  {
    std::vector<uint8_t> toggles(size * (size + 1));
#pragma omp for schedule(dynamic, 4)
    for (int64_t k = 0; k < num_regions; ++k) {
      const float* box = boxes + 4 * k;
      const float width = box[2] - box[0], height = box[3] - box[1];
      const bool finite = std::all_of(box, box + 4, [](float value) { return std::isfinite(value); });
      if (idxs[k] < 0 || num_instances == 0 || !finite || !(width > 0) || !(height > 0)) continue;
      Frame frame{std::max(box[0], 0.0f), std::max(box[1], 0.0f), static_cast<float>(size) / width,
                  static_cast<float>(size) / height};
      if (clip) {
        frame.corner_x = std::min(frame.corner_x, clip[2 * k] - 1.0f);
        frame.corner_y = std::min(frame.corner_y, clip[2 * k + 1] - 1.0f);
      }
      const int64_t instance = std::min(idxs[k], num_instances - 1);
      const int64_t last_polygon = std::min(instance_offsets[instance + 1], num_polygons);
      for (int64_t q = std::max<int64_t>(instance_offsets[instance], 0); q < last_polygon; ++q) {
        const int64_t begin = std::max<int64_t>(polygon_offsets[q], 0);
        const int64_t end = std::min(polygon_offsets[q + 1], num_vertices);
        if (end - begin < 3) continue;
        std::fill(toggles.begin(), toggles.end(), 0);
        const Point first = vertex_on_grid(vertices + 2 * begin, frame);
        Point from = first;
        for (int64_t v = begin + 1; v < end; ++v) {
          const Point to = vertex_on_grid(vertices + 2 * v, frame);
          toggle_edge(from, to, size, toggles.data());
          from = to;
        }
        toggle_edge(from, first, size, toggles.data());
        fill_polygon(toggles.data(), size, masks + k * size * size);
      }
    }
  }
}
