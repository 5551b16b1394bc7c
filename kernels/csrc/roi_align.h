// What the forward and the backward of RoIAlign share: the plan of a region.
//
// The operator is separable, Out = Wy * F * Wx^T for each channel. A plan holds the non-zero weights of Wy and Wx, with
// the samples of a bin that fall on one pixel already added, by bin (what a bin reads) and by pixel (what reads it).
#pragma once
#include <cstring>
#include <vector>

#include "common.h"

namespace roi_align {

constexpr int kLanes = 16;        // columns of a feature map handled together
constexpr int kChannels = 4;      // planes handled together by one thread: a region's plan is read once for all
constexpr int kBinRows = 7;       // bin rows handled together

enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// One axis of one region. A slot is one of the pixels read, in ascending order.
template <typename T>
struct Axis {
  std::vector<int> pixel;                      // by slot
  std::vector<int> bin_begin, bin_slot;        // what each bin reads
  std::vector<T> bin_weight;
  std::vector<int> slot_begin, slot_bin;       // which bins read each slot
  std::vector<T> slot_weight;

  int slots() const { return static_cast<int>(pixel.size()); }
  bool contiguous() const { return !pixel.empty() && pixel.back() - pixel.front() + 1 == slots(); }
};

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }

template <typename T>
struct Region {
  int64_t roi;
  Axis<T> y, x;
  bool chunked = false;        // columns are contiguous and the map is wide enough for whole chunks of kLanes
  std::vector<int> chunk;      // first column of each chunk
  std::vector<T> dense;        // forward: [slots of x, bin columns rounded up]; backward: [chunks, bin columns, kLanes]

  bool empty() const { return y.pixel.empty() || x.pixel.empty(); }
};

struct Level {
  std::uintptr_t address;
  int height, width;
  double scale;
};

struct Problem {
  std::vector<Level> levels;
  int64_t images, channels, rois;
  std::uintptr_t roi_address, level_address;  // rois are in the compute type
  int bins_y, bins_x, ratio;
  bool aligned, channels_last;
  int dtype, threads;

  int64_t groups() const { return static_cast<int64_t>(levels.size()) * images; }
};

// The regions that are present, in order, for each (level, image): groups[level * images + image].
// Returns the first region that names an image or a level that does not exist, or -1. T is float or double.
template <typename T>
int64_t build_plans(const Problem& p, std::vector<std::vector<Region<T>>>& groups);

// 16-bit floats are carried as bits; sums are kept in float.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// Vectors of the compiler (GCC, clang).
template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;
template <int N>
using Bits32 = Vector<uint32_t, N>;

}  // namespace roi_align
