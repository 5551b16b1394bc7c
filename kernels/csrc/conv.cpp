// The transforms of Winograd's convolution F(4x4, 3x3) on the CPU, NHWC: input, output and gradient tiles. The products
// between them are matrix products (fastrcnn_kernels/winograd.py), 4 times fewer multiplications than the sum itself.
//
//   V = B' d B    d: 6x6 pixels, tiles 4 apart, around a zero border of 1
//   Y = A' m A    m: 6x6 products, Y: 4x4 pixels
//   D = A g A'    g: 4x4 pixels of the gradient (the adjoint of Y)
//
// with the points 0, 1, -1, 2, -2 and infinity (Lavin & Gray, 2016). Planes lie [36, tiles, channels].
#if defined(__GNUC__) && !defined(__clang__)
// Nothing here decides an integer: sums may use fused multiply-add.
#pragma GCC optimize("fp-contract=fast")
#endif
#include <algorithm>
#include <vector>

#include "common.h"
#include "exports_maps.h"

#define FASTRCNN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;  // channels at a time

template <typename T>
struct Maps {
  const T* x;            // [N, height, width, channels]
  const T *bias, *residual;  // output only; null: none
  T* out;                // output only
  T* planes;             // [36, count, channels]
  int64_t height, width, channels, rows, columns;  // rows and columns of tiles
  int64_t first, count;  // tiles of this call
  bool relu;
};

// One axis of each transform: from in[0], in[stride] ... to out[0], out[stride] ...
template <typename T>
FASTRCNN_ALWAYS_INLINE void input_axis(const T (*in)[kLanes], int from, T (*out)[kLanes], int to) {
#pragma omp simd
  for (int c = 0; c < kLanes; ++c) {
    const T d0 = in[0][c], d1 = in[from][c], d2 = in[2 * from][c], d3 = in[3 * from][c], d4 = in[4 * from][c],
            d5 = in[5 * from][c];
    const T even = d4 - 4 * d2, odd = d3 - 4 * d1, near = d4 - d2, far = 2 * (d3 - d1);
    out[0][c] = 4 * d0 - 5 * d2 + d4;
    out[to][c] = even + odd;
    out[2 * to][c] = even - odd;
    out[3 * to][c] = near + far;
    out[4 * to][c] = near - far;
    out[5 * to][c] = 4 * d1 - 5 * d3 + d5;
  }
}

template <typename T>
FASTRCNN_ALWAYS_INLINE void output_axis(const T (*in)[kLanes], int from, T (*out)[kLanes], int to) {
#pragma omp simd
  for (int c = 0; c < kLanes; ++c) {
    const T sum1 = in[from][c] + in[2 * from][c], difference1 = in[from][c] - in[2 * from][c];
    const T sum2 = in[3 * from][c] + in[4 * from][c], difference2 = in[3 * from][c] - in[4 * from][c];
    out[0][c] = in[0][c] + sum1 + sum2;
    out[to][c] = difference1 + 2 * difference2;
    out[2 * to][c] = sum1 + 4 * sum2;
    out[3 * to][c] = difference1 + 8 * difference2 + in[5 * from][c];
  }
}

template <typename T>
FASTRCNN_ALWAYS_INLINE void gradient_axis(const T (*in)[kLanes], int from, T (*out)[kLanes], int to) {
#pragma omp simd
  for (int c = 0; c < kLanes; ++c) {
    const T g0 = in[0][c], g1 = in[from][c], g2 = in[2 * from][c], g3 = in[3 * from][c];
    const T even1 = g0 + g2, odd1 = g1 + g3, even2 = g0 + 4 * g2, odd2 = 2 * g1 + 8 * g3;
    out[0][c] = g0;
    out[to][c] = even1 + odd1;
    out[2 * to][c] = even1 - odd1;
    out[3 * to][c] = even2 + odd2;
    out[4 * to][c] = even2 - odd2;
    out[5 * to][c] = g3;
  }
}

// kSide x kSide pixels from (top, left) on, zero outside the map, as kSide^2 planes of a tile.
template <typename T, int kSide>
FASTRCNN_ALWAYS_INLINE void transform_pixels(const Maps<T>& m, int64_t tile, const T* zeros) {
  const int64_t image = tile / (m.rows * m.columns), place = tile % (m.rows * m.columns);
  constexpr int kBorder = kSide == 6 ? 1 : 0;
  const int64_t top = place / m.columns * 4 - kBorder, left = place % m.columns * 4 - kBorder;
  const T* pixels[kSide * kSide];
  for (int i = 0; i < kSide; ++i)
    for (int j = 0; j < kSide; ++j) {
      const int64_t y = top + i, x = left + j;
      const bool inside = y >= 0 && y < m.height && x >= 0 && x < m.width;
      pixels[i * kSide + j] = inside ? m.x + ((image * m.height + y) * m.width + x) * m.channels : zeros;
    }
  T* planes = m.planes + (tile - m.first) * m.channels;
  const int64_t plane = m.count * m.channels;
  for (int64_t c = 0; c < m.channels; c += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, m.channels - c);
    T in[kSide * kSide][kLanes], half[6 * kSide][kLanes], out[36][kLanes];
    if (lanes == kLanes)
      for (int p = 0; p < kSide * kSide; ++p)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) in[p][l] = pixels[p][c + l];
    else
      for (int p = 0; p < kSide * kSide; ++p)
        for (int l = 0; l < kLanes; ++l) in[p][l] = l < lanes ? pixels[p][c + l] : T(0);
    for (int j = 0; j < kSide; ++j)  // down each column: [kSide, kSide] to [6, kSide]
      kSide == 6 ? input_axis<T>(in + j, kSide, half + j, kSide) : gradient_axis<T>(in + j, kSide, half + j, kSide);
    for (int i = 0; i < 6; ++i)  // along each row: to [6, 6]
      kSide == 6 ? input_axis<T>(half + i * kSide, 1, out + i * 6, 1)
                 : gradient_axis<T>(half + i * kSide, 1, out + i * 6, 1);
    if (lanes == kLanes)
      for (int p = 0; p < 36; ++p)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) planes[p * plane + c + l] = out[p][l];
    else
      for (int p = 0; p < 36; ++p)
        for (int64_t l = 0; l < lanes; ++l) planes[p * plane + c + l] = out[p][l];
  }
}

template <typename T>
FASTRCNN_ALWAYS_INLINE void transform_products(const Maps<T>& m, int64_t tile) {
  const int64_t image = tile / (m.rows * m.columns), place = tile % (m.rows * m.columns);
  const int64_t top = place / m.columns * 4, left = place % m.columns * 4;
  const T* planes = m.planes + (tile - m.first) * m.channels;
  const int64_t plane = m.count * m.channels;
  const int64_t height = std::min<int64_t>(4, m.height - top), width = std::min<int64_t>(4, m.width - left);
  for (int64_t c = 0; c < m.channels; c += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, m.channels - c);
    T in[36][kLanes], half[24][kLanes], out[16][kLanes], bias[kLanes];
    if (lanes == kLanes)
      for (int p = 0; p < 36; ++p)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) in[p][l] = planes[p * plane + c + l];
    else
      for (int p = 0; p < 36; ++p)
        for (int l = 0; l < kLanes; ++l) in[p][l] = l < lanes ? planes[p * plane + c + l] : T(0);
    for (int l = 0; l < kLanes; ++l) bias[l] = m.bias && l < lanes ? m.bias[c + l] : T(0);
    for (int j = 0; j < 6; ++j) output_axis<T>(in + j, 6, half + j, 6);
    for (int i = 0; i < 4; ++i) output_axis<T>(half + i * 6, 1, out + i * 4, 1);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = ((image * m.height + top + i) * m.width + left + j) * m.channels + c;
        T* y = out[i * 4 + j];
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) y[l] += bias[l];
        if (m.residual)
          for (int64_t l = 0; l < lanes; ++l) y[l] += m.residual[at + l];
        if (m.relu)  // NaN is not below zero: it stays
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) y[l] = y[l] < T(0) ? T(0) : y[l];
        for (int64_t l = 0; l < lanes; ++l) m.out[at + l] = y[l];
      }
  }
}

// One function for each type, because a template cannot be cloned for several instruction sets.
#define FASTRCNN_TILES(T)                                                             \
  FASTRCNN_CLONES void input_tile(const Maps<T>& m, int64_t tile, const T* zeros) {    \
    transform_pixels<T, 6>(m, tile, zeros);                                            \
  }                                                                                    \
  FASTRCNN_CLONES void gradient_tile(const Maps<T>& m, int64_t tile, const T* zeros) { \
    transform_pixels<T, 4>(m, tile, zeros);                                            \
  }                                                                                    \
  FASTRCNN_CLONES void output_tile(const Maps<T>& m, int64_t tile) { transform_products<T>(m, tile); }
FASTRCNN_TILES(float)
FASTRCNN_TILES(double)
#undef FASTRCNN_TILES

enum Transform { kInput = 0, kGradient = 1, kOutput = 2 };

template <typename T>
void run(const Maps<T>& m, int transform, int threads) {
  const std::vector<T> zeros(static_cast<size_t>(transform == kOutput ? 0 : m.channels), T(0));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = m.first; tile < m.first + m.count; ++tile) {
    if (transform == kInput)
      input_tile(m, tile, zeros.data());
    else if (transform == kGradient)
      gradient_tile(m, tile, zeros.data());
    else
      output_tile(m, tile);
  }
}

template <typename T>
void winograd(int transform, std::uintptr_t map, std::uintptr_t planes, std::uintptr_t bias, std::uintptr_t residual,
              int64_t height, int64_t width, int64_t channels, int64_t first, int64_t count, bool relu, int threads) {
  const Maps<T> m{as_pointer<const T>(map), as_pointer<const T>(bias), as_pointer<const T>(residual),
                  as_pointer<T>(map),       as_pointer<T>(planes),     height,
                  width,                    channels,                  (height + 3) / 4,
                  (width + 3) / 4,          first,                     count,
                  relu};
  run(m, transform, threads);
}

}  // namespace

void kernels::winograd_transform(int transform, std::uintptr_t map, std::uintptr_t planes, std::uintptr_t bias,
                                 std::uintptr_t residual, int64_t height, int64_t width, int64_t channels,
                                 int64_t first, int64_t count, bool relu, bool float64, int threads) {
  (float64 ? winograd<double> : winograd<float>)(transform, map, planes, bias, residual, height, width, channels, first,
                                                 count, relu, threads);
}
