// Greedy suppression of one list, shared by the operators that end in it. Defined in nms.cpp, which says how it works.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace nms {

constexpr int kLanes = 16;
constexpr int64_t kBoxesPerThread = 2048;  // about a tenth of a millisecond: less is not worth waking a thread

inline int useful_threads(int num_threads, int64_t parts, int64_t boxes) {
  const int64_t useful = std::min<int64_t>(parts, boxes / kBoxesPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
}

// Kept boxes, sixteen at a time. The area of a lane that is not in use is NaN.
template <typename T>
struct Chunk {
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
  int32_t count;
  int32_t next;
};

template <typename T>
struct Box {
  T x1, y1, x2, y2, area;
};

// Memory of one thread, reused from segment to segment.
template <typename T>
struct Workspace {
  std::vector<Chunk<T>> chunks;
  std::vector<int32_t> heads;
  std::vector<int32_t> candidates;
  std::vector<int32_t> kept;
  std::vector<uint64_t> keys, scratch;
};

template <typename T>
__attribute__((always_inline)) inline Box<T> load_box(const T* boxes, int64_t index, T offset) {
  const T* b = boxes + 4 * index;
  return {b[0], b[1], b[2], b[3], (b[2] - b[0] + offset) * (b[3] - b[1] + offset)};
}

template <typename T, bool kExact>
__attribute__((always_inline)) inline bool any_overlap(const Chunk<T>& chunk, const Box<T>& box, T offset, T limit) {
  int hits = 0;
  for (int i = 0; i < kLanes; ++i) {
    const T left = box.x1 < chunk.x1[i] ? chunk.x1[i] : box.x1;
    const T top = box.y1 < chunk.y1[i] ? chunk.y1[i] : box.y1;
    const T right = chunk.x2[i] < box.x2 ? chunk.x2[i] : box.x2;
    const T bottom = chunk.y2[i] < box.y2 ? chunk.y2[i] : box.y2;
    T width = right - left + offset;
    T height = bottom - top + offset;
    width = T(0) < width ? width : T(0);
    height = T(0) < height ? height : T(0);
    const T inter = width * height;
    const T joined = box.area + chunk.area[i] - inter;
    // Unused lanes have a NaN area: every comparison with it is false.
    hits |= kExact ? (inter / joined > limit) : (inter > limit * joined);
  }
  return hits != 0;
}

// Sweeps `candidates` (indices of boxes, best first) and fills `work.kept` with the positions in it that are kept.
void sweep_any(const float* boxes, const int32_t* candidates, int64_t count, double threshold, int box_offset,
               int64_t max_output, Workspace<float>& work);
void sweep_any(const double* boxes, const int32_t* candidates, int64_t count, double threshold, int box_offset,
               int64_t max_output, Workspace<double>& work);

}  // namespace nms
