// The part of a deformable convolution that is not a matrix product, on the CPU: sampling the columns, and their
// gradient. The launcher multiplies them, a chunk of positions at a time, so that a chunk stays in the cache.
//
// Maps are NHWC: a sample is then four runs of channels, blended as vectors. Columns are [G, positions, K, C / G].
// Backward: a task owns a block of channels of one image, so that no two write the same pixel; the sums over channels
// that give the gradient of the offsets are kept by block and added in order. Blocks depend on the shape alone, so the
// result is the same for any number of threads.
#if defined(__GNUC__) && !defined(__clang__)
// Sums may use fused multiply-add. Coordinates hold no product, so they round as in PyTorch.
#pragma GCC optimize("fp-contract=fast")
#endif
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "exports_maps.h"

namespace {

constexpr int64_t kBlock = 64;        // channels of a task of the backward, at most
constexpr int64_t kPositions = 16;    // positions of a task of the forward

using Problem = kernels::DeformConvProblem;

// Channels that share a weight group and an offset group.
struct Run {
  int64_t first, width, group, offset_group;
};

std::vector<Run> channel_runs(const Problem& p, int64_t most) {
  const int64_t of_group = p.channels / p.groups, of_offset_group = p.channels / p.offset_groups;
  std::vector<Run> runs;
  int64_t first = 0;
  while (first < p.channels) {
    const int64_t group = first / of_group, offset_group = first / of_offset_group;
    const int64_t end = std::min((group + 1) * of_group, (offset_group + 1) * of_offset_group);
    const int64_t width = std::min(most > 0 ? most : end - first, end - first);
    runs.push_back({first, width, group, offset_group});
    first += width;
  }
  return runs;
}

// The four corners of one sample: pixel numbers (-1: none), weights and their derivatives.
template <typename T>
struct Sample {
  int64_t pixel[4];
  T weight[4], weight_dy[4], weight_dx[4];
};

template <typename T>
inline __attribute__((always_inline)) Sample<T> place(const Problem& p, T y, T x) {
  Sample<T> s;
  const T height = static_cast<T>(p.height), width = static_cast<T>(p.width);
  for (int i = 0; i < 4; ++i) {
    s.pixel[i] = -1;
    s.weight[i] = s.weight_dy[i] = s.weight_dx[i] = 0;
  }
  // Written so that NaN is not outside: it must reach the output.
  if (y < T(-1) || y >= height || x < T(-1) || x >= width) return s;
  const T low_y = std::floor(y), low_x = std::floor(x);
  const T far_y = y - low_y, far_x = x - low_x, near_y = 1 - far_y, near_x = 1 - far_x;
  const T wy[2] = {near_y, far_y}, wx[2] = {near_x, far_x};
  const bool real = low_y == low_y && low_x == low_x;
  const int64_t top = real ? static_cast<int64_t>(low_y) : -2, left = real ? static_cast<int64_t>(low_x) : -2;
  for (int i = 0; i < 4; ++i) {
    const int64_t row = top + i / 2, column = left + i % 2;
    if (row >= 0 && row < p.height && column >= 0 && column < p.width) s.pixel[i] = row * p.width + column;
    s.weight[i] = wy[i / 2] * wx[i % 2];
    s.weight_dy[i] = i / 2 ? wx[i % 2] : -wx[i % 2];
    s.weight_dx[i] = i % 2 ? wy[i / 2] : -wy[i / 2];
  }
  return s;
}

// One output position: image, place in the output, and where its offsets and mask begin.
template <typename T>
struct Position {
  int64_t image, at;
  T y, x;

  Position(const Problem& p, int64_t number) : image(number / p.positions()), at(number % p.positions()) {
    y = static_cast<T>(at / p.out_width * p.stride[0] - p.padding[0]);
    x = static_cast<T>(at % p.out_width * p.stride[1] - p.padding[1]);
  }
  Sample<T> sample(const Problem& p, int64_t offset_group, int64_t tap) const {
    const int64_t plane = ((image * p.offset_groups + offset_group) * p.taps() + tap) * 2 * p.positions() + at;
    const T* moved = as_pointer<const T>(p.offset) + plane;
    return place<T>(p, y + static_cast<T>(tap / p.kernel_w * p.dilation[0]) + moved[0],
                    x + static_cast<T>(tap % p.kernel_w * p.dilation[1]) + moved[p.positions()]);
  }
  T modulation(const Problem& p, int64_t offset_group, int64_t tap) const {
    if (p.mask == 0) return T(1);
    return as_pointer<const T>(p.mask)[((image * p.offset_groups + offset_group) * p.taps() + tap) * p.positions() + at];
  }
};

template <typename T>
inline __attribute__((always_inline)) void columns_of(
    const Problem& p, const std::vector<Run>& runs, const T* nothing, int64_t start, int64_t count, int64_t first,
    int64_t last, T* columns) {
  const int64_t of_group = p.channels / p.groups, row = p.taps() * of_group;
  for (int64_t number = first; number < last; ++number) {
    const Position<T> position(p, start + number);
    const T* image = as_pointer<const T>(p.input) + position.image * p.height * p.width * p.channels;
    for (int64_t tap = 0; tap < p.taps(); ++tap) {
      int64_t sampled = -1;
      Sample<T> s{};
      T w0 = 0, w1 = 0, w2 = 0, w3 = 0;
      for (const Run& run : runs) {
        if (run.offset_group != sampled) {
          sampled = run.offset_group;
          s = position.sample(p, sampled, tap);
          const T m = position.modulation(p, sampled, tap);
          w0 = s.weight[0] * m, w1 = s.weight[1] * m, w2 = s.weight[2] * m, w3 = s.weight[3] * m;
        }
        const T* __restrict a = s.pixel[0] < 0 ? nothing : image + s.pixel[0] * p.channels + run.first;
        const T* __restrict b = s.pixel[1] < 0 ? nothing : image + s.pixel[1] * p.channels + run.first;
        const T* __restrict c = s.pixel[2] < 0 ? nothing : image + s.pixel[2] * p.channels + run.first;
        const T* __restrict d = s.pixel[3] < 0 ? nothing : image + s.pixel[3] * p.channels + run.first;
        T* __restrict out =
            columns + (run.group * count + number) * row + tap * of_group + (run.first - run.group * of_group);
#pragma omp simd
        for (int64_t i = 0; i < run.width; ++i) out[i] = w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i];
      }
    }
  }
}

// One function for each type, because a template cannot be cloned for several instruction sets.
FASTRCNN_CLONES void columns_tile(const Problem& p, const std::vector<Run>& runs, const float* nothing, int64_t start,
                                  int64_t count, int64_t first, int64_t last, float* columns) {
  columns_of<float>(p, runs, nothing, start, count, first, last, columns);
}
FASTRCNN_CLONES void columns_tile(const Problem& p, const std::vector<Run>& runs, const double* nothing, int64_t start,
                                  int64_t count, int64_t first, int64_t last, double* columns) {
  columns_of<double>(p, runs, nothing, start, count, first, last, columns);
}

template <typename T>
void columns_any(const Problem& p, int64_t start, int64_t count, T* columns) {
  const std::vector<Run> runs = channel_runs(p, 0);
  const std::vector<T> nothing(p.channels, T(0));
  const int64_t tiles = (count + kPositions - 1) / kPositions;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t tile = 0; tile < tiles; ++tile)
    columns_tile(p, runs, nothing.data(), start, count, tile * kPositions, std::min(count, (tile + 1) * kPositions),
                 columns);
}

// What one block of channels adds to the gradients at `count` positions of one image from `first` on: columns are
// written, the input's gradient is added to, and the sums [count, K, 3] (mask, y, x) are written.
template <typename T>
struct BackwardTask {
  int64_t start, count, first, last;  // positions of the chunk, and those of this task within it
  Run run;
  const T *nothing, *grad_columns;
  T *columns, *grad_input, *dump, *sums;
};

template <typename T>
inline __attribute__((always_inline)) void backward_of(const Problem& p, const BackwardTask<T>& task) {
  const Run& run = task.run;
  const int64_t of_group = p.channels / p.groups, row = p.taps() * of_group;
  for (int64_t number = task.first; number < task.last; ++number) {
    const Position<T> position(p, task.start + number);
    const int64_t image = position.image * p.height * p.width * p.channels + run.first;
    const T* source = as_pointer<const T>(p.input) + image;
    T* target = task.grad_input + image;
    for (int64_t tap = 0; tap < p.taps(); ++tap) {
      const Sample<T> s = position.sample(p, run.offset_group, tap);
      const T m = position.modulation(p, run.offset_group, tap);
      const T w0 = s.weight[0], w1 = s.weight[1], w2 = s.weight[2], w3 = s.weight[3];
      const T* __restrict a = s.pixel[0] < 0 ? task.nothing : source + s.pixel[0] * p.channels;
      const T* __restrict b = s.pixel[1] < 0 ? task.nothing : source + s.pixel[1] * p.channels;
      const T* __restrict c = s.pixel[2] < 0 ? task.nothing : source + s.pixel[2] * p.channels;
      const T* __restrict d = s.pixel[3] < 0 ? task.nothing : source + s.pixel[3] * p.channels;
      const int64_t at = (run.group * task.count + number) * row + tap * of_group + run.first - run.group * of_group;
      const T* __restrict grad = task.grad_columns + at;
      T* __restrict column = task.columns + at;
      T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < run.width; ++i) {
        const T g = grad[i];
        s0 += g * a[i];
        s1 += g * b[i];
        s2 += g * c[i];
        s3 += g * d[i];
        column[i] = m * (w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i]);
      }
      T* sums = task.sums + (number * p.taps() + tap) * 3;
      sums[0] = w0 * s0 + w1 * s1 + w2 * s2 + w3 * s3;
      sums[1] = m * (s.weight_dy[0] * s0 + s.weight_dy[1] * s1 + s.weight_dy[2] * s2 + s.weight_dy[3] * s3);
      sums[2] = m * (s.weight_dx[0] * s0 + s.weight_dx[1] * s1 + s.weight_dx[2] * s2 + s.weight_dx[3] * s3);
      const T m0 = m * w0, m1 = m * w1, m2 = m * w2, m3 = m * w3;
      T* __restrict ga = s.pixel[0] < 0 ? task.dump : target + s.pixel[0] * p.channels;
      T* __restrict gb = s.pixel[1] < 0 ? task.dump + kBlock : target + s.pixel[1] * p.channels;
      T* __restrict gc = s.pixel[2] < 0 ? task.dump + 2 * kBlock : target + s.pixel[2] * p.channels;
      T* __restrict gd = s.pixel[3] < 0 ? task.dump + 3 * kBlock : target + s.pixel[3] * p.channels;
#pragma omp simd
      for (int64_t i = 0; i < run.width; ++i) {
        const T g = grad[i];
        ga[i] += m0 * g;
        gb[i] += m1 * g;
        gc[i] += m2 * g;
        gd[i] += m3 * g;
      }
    }
  }
}

FASTRCNN_CLONES void backward_task(const Problem& p, const BackwardTask<float>& task) { backward_of<float>(p, task); }
FASTRCNN_CLONES void backward_task(const Problem& p, const BackwardTask<double>& task) { backward_of<double>(p, task); }

template <typename T>
void backward_any(const Problem& p, int64_t start, int64_t count, const T* grad_columns, T* columns, T* grad_input,
                  T* grad_offset, T* grad_mask) {
  // At least four blocks where there are channels for them, so that a single image feeds several threads.
  const int64_t quarter = (p.channels / p.offset_groups / 4 + 15) / 16 * 16;
  const std::vector<Run> blocks = channel_runs(p, std::clamp<int64_t>(quarter, 16, kBlock));
  const int64_t num_blocks = static_cast<int64_t>(blocks.size()), taps = p.taps(), positions = p.positions();
  const int64_t first_image = start / positions, images = (start + count - 1) / positions - first_image + 1;
  const std::vector<T> nothing(kBlock, T(0));
  std::vector<T> sums(num_blocks * count * taps * 3);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<T> dump(4 * kBlock, T(0));
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < images * num_blocks; ++i) {
      const int64_t image = first_image + i / num_blocks, block = i % num_blocks;
      BackwardTask<T> task{start, count, std::max<int64_t>(0, image * positions - start),
                           std::min(count, (image + 1) * positions - start), blocks[block], nothing.data(),
                           grad_columns, columns, grad_input, dump.data(), sums.data() + block * count * taps * 3};
      backward_task(p, task);
    }
#pragma omp for schedule(static)
    for (int64_t number = 0; number < count; ++number) {
      const Position<T> position(p, start + number);
      for (int64_t block = 0; block < num_blocks;) {
        const int64_t offset_group = blocks[block].offset_group;
        int64_t next = block;
        while (next < num_blocks && blocks[next].offset_group == offset_group) ++next;
        for (int64_t tap = 0; tap < taps; ++tap) {
          T total[3] = {0, 0, 0};
          for (int64_t b = block; b < next; ++b)
            for (int i = 0; i < 3; ++i) total[i] += sums[((b * count + number) * taps + tap) * 3 + i];
          const int64_t plane = (position.image * p.offset_groups + offset_group) * taps + tap;
          grad_offset[plane * 2 * positions + position.at] = total[1];
          grad_offset[(plane * 2 + 1) * positions + position.at] = total[2];
          if (grad_mask) grad_mask[plane * positions + position.at] = total[0];
        }
        block = next;
      }
    }
  }
}

template <typename T>
void backward_typed(const Problem& p, int64_t start, int64_t count, const std::array<std::uintptr_t, 5>& a) {
  backward_any<T>(p, start, count, as_pointer<const T>(a[0]), as_pointer<T>(a[1]), as_pointer<T>(a[2]),
                  as_pointer<T>(a[3]), as_pointer<T>(a[4]));
}

}  // namespace

void kernels::deform_conv_columns(const Problem& p, int64_t start, int64_t count, std::uintptr_t columns, bool wide) {
  if (wide) {
    columns_any<double>(p, start, count, as_pointer<double>(columns));
  } else {
    columns_any<float>(p, start, count, as_pointer<float>(columns));
  }
}

// Addresses: gradient of the columns; columns, gradient of the input, of the offsets and of the mask (or 0).
void kernels::deform_conv_backward(const Problem& p, int64_t start, int64_t count,
                                   const std::array<std::uintptr_t, 5>& addresses, bool wide) {
  if (wide) {
    backward_typed<double>(p, start, count, addresses);
  } else {
    backward_typed<float>(p, start, count, addresses);
  }
}
