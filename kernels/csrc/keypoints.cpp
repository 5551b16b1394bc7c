// Keypoints to heat-map cells, and heat maps to keypoints, on the CPU.
//
// The peak of a bicubically resized map is found without the map. A resized pixel is a weighted mean of sixteen cells
// whose weights add up to 1, with at most kNegative on the negative side: it cannot exceed high + kNegative * (high -
// low). Where that bound lies below a value already found, no pixel is evaluated; what is left are a few cells about the
// peak. Arithmetic and order are those of fastrcnn_kernels/keypoints.py, so that equal pixels are equal here too.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exports_maps.h"

namespace {

constexpr double kNegative = 0.4454;  // ((1 + 2 * 0.1875)^2 - 1) / 2, rounded up
constexpr int kMargin = 2;            // cells repeated at each border

template <typename T>
struct Axis {
  int count;
  std::vector<int> first;                  // by output: its first tap in the map with margins
  std::vector<T> weight[4];
  std::vector<int> begin;                  // by cell, 0 .. size + 1: its first output
};

template <typename T>
T near(T x) {
  return (T(1.25) * x - T(2.25)) * x * x + T(1);
}

template <typename T>
T far(T x) {
  return ((T(-0.75) * x + T(3.75)) * x - T(6)) * x + T(3);
}

template <typename T>
void make_axis(Axis<T>& axis, int size, int count) {
  axis.count = count;
  axis.first.resize(count);
  for (auto& weight : axis.weight) weight.resize(count);
  axis.begin.assign(size + 2, count);
  const T scale = T(size) / T(count);
  int cells = 0;
  for (int i = 0; i < count; ++i) {
    const T real = (T(i) + T(0.5)) * scale - T(0.5), below = std::floor(real), t = real - below;
    axis.weight[0][i] = far(t + T(1));
    axis.weight[1][i] = near(t);
    axis.weight[2][i] = near(T(1) - t);
    axis.weight[3][i] = far((T(1) - t) + T(1));
    const int cell = std::clamp(static_cast<int>(below) + 1, 0, size);  // cell 0 lies before the first pixel
    axis.first[i] = cell;
    for (; cells <= cell; ++cells) axis.begin[cells] = i;
  }
}

// Memory of one thread.
template <typename T>
struct Workspace {
  Axis<T> x, y;
  std::vector<T> padded, wide_high, wide_low, bound, across, values;
  std::vector<char> known;
};

template <typename T>
FASTRCNN_CLONES void bounds(const T* padded, int height, int width, T* wide_high, T* wide_low, T* bound) {
  const int pitch = width + 2 * kMargin, cells = width + 1;
  for (int r = 0; r < height + 2 * kMargin; ++r) {
    const T* p = padded + static_cast<int64_t>(r) * pitch;
    for (int c = 0; c < cells; ++c) {
      const T a = p[c] > p[c + 1] ? p[c] : p[c + 1], b = p[c + 2] > p[c + 3] ? p[c + 2] : p[c + 3];
      const T d = p[c] < p[c + 1] ? p[c] : p[c + 1], e = p[c + 2] < p[c + 3] ? p[c + 2] : p[c + 3];
      wide_high[r * cells + c] = a > b ? a : b;
      wide_low[r * cells + c] = d < e ? d : e;
    }
  }
  for (int r = 0; r <= height; ++r) {
    const T* h = wide_high + static_cast<int64_t>(r) * cells;
    const T* l = wide_low + static_cast<int64_t>(r) * cells;
    for (int c = 0; c < cells; ++c) {
      const T a = h[c] > h[c + cells] ? h[c] : h[c + cells];
      const T b = h[c + 2 * cells] > h[c + 3 * cells] ? h[c + 2 * cells] : h[c + 3 * cells];
      const T d = l[c] < l[c + cells] ? l[c] : l[c + cells];
      const T e = l[c + 2 * cells] < l[c + 3 * cells] ? l[c + 2 * cells] : l[c + 3 * cells];
      const T high = a > b ? a : b, low = d < e ? d : e;
      const T size = (high < 0 ? -high : high) + (low < 0 ? -low : low);
      bound[r * cells + c] = high + T(kNegative) * (high - low) + T(1e-5) * size;  // the last term covers rounding
    }
  }
}

template <typename T>
FASTRCNN_CLONES void resize_row(const T* row, const int* first, const T* w0, const T* w1, const T* w2, const T* w3,
                                int count, T* out) {
  for (int x = 0; x < count; ++x) {
    const T* p = row + first[x];
    out[x] = p[0] * w0[x] + p[1] * w1[x] + p[2] * w2[x] + p[3] * w3[x];
  }
}

// Blends four rows and returns the highest value.
template <typename T>
FASTRCNN_CLONES T blend_rows(const T* r0, const T* r1, const T* r2, const T* r3, T w0, T w1, T w2, T w3, int count,
                             T* out) {
  T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
  for (int x = 0; x < count; ++x) {
    const T value = r0[x] * w0 + r1[x] * w1 + r2[x] * w2 + r3[x] * w3;
    out[x] = value;
    highest = value > highest ? value : highest;
  }
  return highest;
}

template <typename T>
struct Peak {
  T value;
  int row, column;
};

template <typename T>
class Map {
 public:
  Map(const T* heat, int height, int width, Workspace<T>& work)
      : height_(height), width_(width), pitch_(width + 2 * kMargin), work_(work) {
    const int rows = height + 2 * kMargin;
    work.padded.resize(static_cast<size_t>(rows) * pitch_);
    for (int r = 0; r < rows; ++r) {
      const T* from = heat + static_cast<int64_t>(std::clamp(r - kMargin, 0, height - 1)) * width;
      T* to = work.padded.data() + static_cast<int64_t>(r) * pitch_;
      std::copy(from, from + width, to + kMargin);
      to[0] = to[1] = from[0];
      to[width + 2] = to[width + 3] = from[width - 1];
    }
    work.across.resize(static_cast<size_t>(rows) * work.x.count);
    work.values.resize(work.x.count);
    work.known.assign(rows, 0);
  }

  // Everything is evaluated, in reading order; NaN is the highest.
  Peak<T> find_anywhere() {
    Peak<T> peak{0, -1, 0};
    for (int y = 0; y < work_.y.count; ++y) {
      blend(y, 0, work_.x.count);
      for (int x = 0; x < work_.x.count; ++x) {
        const T value = work_.values[x];
        if (peak.row < 0 || value > peak.value || value != value) peak = {value, y, x};
        if (value != value) return peak;
      }
    }
    return peak;
  }

  // The same for a map of moderate, finite values.
  Peak<T> find(const T* heat) {
    const int cells = width_ + 1;
    work_.wide_high.resize(static_cast<size_t>(height_ + 2 * kMargin) * cells);
    work_.wide_low.resize(work_.wide_high.size());
    work_.bound.resize(static_cast<size_t>(height_ + 1) * cells);
    bounds(work_.padded.data(), height_, width_, work_.wide_high.data(), work_.wide_low.data(), work_.bound.data());

    // A pixel near the highest cell: what is surely below it needs no look.
    const int64_t top = std::max_element(heat, heat + static_cast<int64_t>(height_) * width_) - heat;
    const int near_y = nearest(static_cast<int>(top / width_), height_, work_.y.count);
    const int near_x = nearest(static_cast<int>(top % width_), width_, work_.x.count);
    T floor = blend(near_y, near_x, near_x + 1);

    Peak<T> peak{-std::numeric_limits<T>::infinity(), 0, 0};
    for (int r = 0; r <= height_; ++r) {
      const int begin = work_.y.begin[r], end = work_.y.begin[r + 1];
      if (begin >= end) continue;
      const T* bound = work_.bound.data() + static_cast<int64_t>(r) * cells;
      int left = 0, right = cells;
      while (left < cells && bound[left] < floor) ++left;
      while (right > left && bound[right - 1] < floor) --right;
      if (left == right) continue;
      const int from = work_.x.begin[left], to = work_.x.begin[right];
      for (int y = begin; y < end && from < to; ++y) {
        const T highest = blend(y, from, to);
        if (!(highest > peak.value)) continue;
        int x = from;
        while (work_.values[x] != highest) ++x;
        peak = {highest, y, x};
        floor = std::max(floor, highest);
      }
    }
    return peak;
  }

 private:
  static int nearest(int cell, int size, int count) {
    return std::clamp(static_cast<int>((cell + 0.5) * count / size), 0, count - 1);
  }

  const T* across(int row) {
    T* out = work_.across.data() + static_cast<int64_t>(row) * work_.x.count;
    if (!work_.known[row]) {
      work_.known[row] = 1;
      const auto& w = work_.x.weight;
      resize_row(work_.padded.data() + static_cast<int64_t>(row) * pitch_, work_.x.first.data(), w[0].data(),
                 w[1].data(), w[2].data(), w[3].data(), work_.x.count, out);
    }
    return out;
  }

  T blend(int y, int from, int to) {
    const int first = work_.y.first[y];
    const T* rows[4];
    for (int tap = 0; tap < 4; ++tap) rows[tap] = across(first + tap) + from;
    const auto& w = work_.y.weight;
    return blend_rows(rows[0], rows[1], rows[2], rows[3], w[0][y], w[1][y], w[2][y], w[3][y], to - from,
                      work_.values.data() + from);
  }

  int height_, width_, pitch_;
  Workspace<T>& work_;
};

template <typename T>
void peaks(const T* maps, const T* boxes, int64_t rows, int64_t points, int height, int width, int largest, T* out,
           int num_threads) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const T limit = std::numeric_limits<T>::max() / 64;
  const int threads = static_cast<int>(std::min<int64_t>(rows * points > 8 ? num_threads : 1, std::max<int64_t>(rows, 1)));
#pragma omp parallel num_threads(threads)
  {
    Workspace<T> work;
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < rows; ++k) {
      const T* box = boxes + 4 * k;
      T* found = out + 3 * points * k;
      const T box_width = box[2] - box[0], box_height = box[3] - box[1];
      if (!std::isfinite(box[0]) || !std::isfinite(box[1]) || !std::isfinite(box_width) || !std::isfinite(box_height)) {
        std::fill(found, found + 3 * points, nan);
        continue;
      }
      const T w = std::max(box_width, T(1)), h = std::max(box_height, T(1));
      const int columns = static_cast<int>(std::min(std::ceil(w), T(largest)));
      const int lines = static_cast<int>(std::min(std::ceil(h), T(largest)));
      make_axis(work.x, width, columns);
      make_axis(work.y, height, lines);
      const T step_x = w / T(columns), step_y = h / T(lines);
      for (int64_t j = 0; j < points; ++j) {
        const int64_t size = static_cast<int64_t>(height) * width;
        const T* heat = maps + (k * points + j) * size;
        bool moderate = true;
        for (int64_t i = 0; i < size; ++i) moderate &= heat[i] < limit && heat[i] > -limit;
        Map<T> map(heat, height, width, work);
        const Peak<T> peak = moderate ? map.find(heat) : map.find_anywhere();
        found[3 * j] = (T(peak.column) + T(0.5)) * step_x + box[0];
        found[3 * j + 1] = (T(peak.row) + T(0.5)) * step_y + box[1];
        found[3 * j + 2] = peak.value;
      }
    }
  }
}

template <typename T>
T place(T point, T low, T high, T size) {
  return point == high ? size - T(1) : std::floor((point - low) * (size / (high - low)));
}

template <typename T>
void targets(const T* keypoints, const T* boxes, const T* within, int64_t rows, int64_t points, int64_t size,
             int64_t* index, uint8_t* valid) {
  const T side = static_cast<T>(size);
  for (int64_t k = 0; k < rows; ++k) {
    const T* box = boxes + 4 * k;
    const T* row = keypoints + 3 * points * k;
    bool counts = within == nullptr;
    for (int64_t j = 0; j < points && !counts; ++j) {
      const T *p = row + 3 * j, *w = within + 4 * k;
      counts = p[0] >= w[0] && p[0] <= w[2] && p[1] >= w[1] && p[1] <= w[3] && p[2] > 0;
    }
    for (int64_t j = 0; j < points; ++j) {
      const T* p = row + 3 * j;
      const T x = place(p[0], box[0], box[2], side), y = place(p[1], box[1], box[3], side);
      const bool is_valid = counts && x >= 0 && x < side && y >= 0 && y < side && p[2] > 0;
      index[k * points + j] = is_valid ? static_cast<int64_t>(y) * size + static_cast<int64_t>(x) : 0;
      valid[k * points + j] = is_valid;
    }
  }
}

}  // namespace

void kernels::keypoint_targets(std::uintptr_t keypoints, std::uintptr_t boxes, std::uintptr_t within, bool is_double,
                               int64_t rows, int64_t points, int64_t size, std::uintptr_t index, std::uintptr_t valid) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    targets(as_pointer<const T>(keypoints), as_pointer<const T>(boxes), as_pointer<const T>(within), rows, points, size,
            as_pointer<int64_t>(index), as_pointer<uint8_t>(valid));
  };
  is_double ? run(double{}) : run(float{});
}

void kernels::keypoints_from_heatmaps(std::uintptr_t maps, std::uintptr_t boxes, bool is_double, int64_t rows,
                                      int64_t points, int height, int width, int largest, std::uintptr_t out,
                                      int num_threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    peaks(as_pointer<const T>(maps), as_pointer<const T>(boxes), rows, points, height, width, largest,
          as_pointer<T>(out), num_threads);
  };
  is_double ? run(double{}) : run(float{});
}
