// Suppression within each class, and the best detections of an image over all classes.
//
// Candidates are visited in decreasing score over all classes and the visit ends with the last detection that is asked
// for: most are never looked at, and each is compared with the few kept boxes of its class, sixteen at a time. Their order
// among one another, and so the result, is that of one suppression a class.
#include "box_coder.h"
#include "exports_boxes.h"
#include "nms.h"
#include "topk.h"

namespace {

template <typename T>
struct Problem {
  const T* boxes;
  const T* scores;
  const int64_t* counts;  // or null: all rows
  const int64_t* sizes;   // or null: not clipped
  int64_t images, rows, classes, box_classes, background;
  T score_threshold, iou_threshold, min_size, offset;
  bool sized;  // whether min_size holds
  int64_t limit, capacity;
  bool ties, padded;
  T* out_boxes;
  T* out_scores;
  int64_t* labels;
  int64_t* out_rows;
  int64_t* kept;
};

template <typename T>
struct Workspace {
  topk::Workspace<T> top;
  std::vector<nms::Chunk<T>> chunks;
  std::vector<int32_t> heads;
};

template <typename T>
__attribute__((always_inline)) inline int64_t visit(const Problem<T>& p, int64_t image, Workspace<T>& work) {
  using Ranks = topk::Ranks<T>;
  const T* boxes = p.boxes + image * p.rows * p.box_classes * 4;
  const T* scores = p.scores + image * p.rows * p.classes;
  T* out_boxes = p.out_boxes + image * p.capacity * 4;
  work.heads.assign(p.classes, -1);
  work.chunks.clear();
  int64_t kept = 0;
  uint64_t last = 0;
  for (const auto& rank : work.top.ranks) {
    if (kept == p.capacity || (kept >= p.limit && !(p.ties && Ranks::key(rank) == last))) break;
    const int64_t index = Ranks::index(rank), row = index / p.classes, label = index % p.classes;
    box_coder::Corners<T> c = box_coder::load_corners(boxes + 4 * (row * p.box_classes + (p.box_classes > 1 ? label : 0)));
    if (p.sizes != nullptr) {
      c = box_coder::clip_box(c, static_cast<T>(p.sizes[2 * image + 1]) - p.offset,
                              static_cast<T>(p.sizes[2 * image]) - p.offset);
    }
    if (p.sized && !box_coder::is_large_enough(c, p.offset, p.min_size)) continue;
    const nms::Box<T> box{c.x1, c.y1, c.x2, c.y2, (c.x2 - c.x1 + p.offset) * (c.y2 - c.y1 + p.offset)};
    bool suppressed = false;
    for (int32_t next = work.heads[label]; next >= 0 && !suppressed; next = work.chunks[next].next) {
      suppressed = nms::any_overlap<T, true>(work.chunks[next], box, p.offset, p.iou_threshold);
    }
    if (suppressed) continue;
    int32_t& head = work.heads[label];
    if (head < 0 || work.chunks[head].count == nms::kLanes) {
      nms::Chunk<T> fresh{};
      std::fill(fresh.area, fresh.area + nms::kLanes, std::numeric_limits<T>::quiet_NaN());
      fresh.next = head;
      head = static_cast<int32_t>(work.chunks.size());
      work.chunks.push_back(fresh);
    }
    nms::Chunk<T>& chunk = work.chunks[head];
    chunk.x1[chunk.count] = box.x1;
    chunk.y1[chunk.count] = box.y1;
    chunk.x2[chunk.count] = box.x2;
    chunk.y2[chunk.count] = box.y2;
    chunk.area[chunk.count++] = box.area;
    T* out = out_boxes + 4 * kept;
    out[0] = box.x1;
    out[1] = box.y1;
    out[2] = box.x2;
    out[3] = box.y2;
    p.out_scores[image * p.capacity + kept] = scores[index];
    p.labels[image * p.capacity + kept] = label;
    p.out_rows[image * p.capacity + kept] = row;
    last = Ranks::key(rank);
    ++kept;
  }
  return kept;
}

// One function for each type, because a template cannot be cloned for several instruction sets.
FASTRCNN_CLONES int64_t visit_any(const Problem<float>& p, int64_t image, Workspace<float>& work) {
  return visit(p, image, work);
}
FASTRCNN_CLONES int64_t visit_any(const Problem<double>& p, int64_t image, Workspace<double>& work) {
  return visit(p, image, work);
}

template <typename T>
void run(const Problem<T>& p, int num_threads) {
  const int threads = nms::useful_threads(num_threads, p.images, p.images * p.rows * p.classes / 16);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace<T> work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t image = 0; image < p.images; ++image) {
      const T* scores = p.scores + image * p.rows * p.classes;
      const int64_t rows = p.counts == nullptr ? p.rows : std::clamp<int64_t>(p.counts[image], 0, p.rows);
      work.top.found.resize(rows * p.classes);
      const int64_t held = topk::above(scores, rows * p.classes, p.score_threshold, work.top.found.data());
      work.top.ranks.clear();
      for (int64_t i = 0; i < held; ++i) {
        const uint32_t index = work.top.found[i];
        if (index % p.classes != p.background) work.top.ranks.push_back(topk::Ranks<T>::make(scores[index], index));
      }
      topk::sort_ranks(work.top.ranks, work.top.scratch);
      const int64_t kept = visit_any(p, image, work);
      p.kept[image] = kept;
      if (!p.padded) continue;
      const int64_t first = image * p.capacity + kept, end = (image + 1) * p.capacity;
      std::fill(p.out_boxes + 4 * first, p.out_boxes + 4 * end, T(0));
      std::fill(p.out_scores + first, p.out_scores + end, -std::numeric_limits<T>::infinity());
      std::fill(p.labels + first, p.labels + end, int64_t(-1));
      std::fill(p.out_rows + first, p.out_rows + end, int64_t(-1));
    }
  }
}

}  // namespace

void kernels::multiclass_nms(std::uintptr_t boxes, bool doubles, std::uintptr_t scores, std::uintptr_t counts,
                             std::uintptr_t sizes, int64_t images, int64_t rows, int64_t classes, int64_t box_classes,
                             int64_t background, double score_threshold, double iou_threshold, double min_size,
                             int box_offset, int64_t limit, int64_t capacity, bool ties, bool padded,
                             std::uintptr_t out_boxes, std::uintptr_t out_scores, std::uintptr_t labels,
                             std::uintptr_t out_rows, std::uintptr_t kept, int num_threads) {
  auto go = [&](auto zero) {
    using T = decltype(zero);
    run(Problem<T>{as_pointer<const T>(boxes), as_pointer<const T>(scores), as_pointer<const int64_t>(counts),
                   as_pointer<const int64_t>(sizes), images, rows, classes, box_classes, background,
                   static_cast<T>(score_threshold), static_cast<T>(iou_threshold), static_cast<T>(min_size),
                   static_cast<T>(box_offset), !std::isnan(min_size), limit, capacity, ties, padded,
                   as_pointer<T>(out_boxes), as_pointer<T>(out_scores), as_pointer<int64_t>(labels),
                   as_pointer<int64_t>(out_rows), as_pointer<int64_t>(kept)},
        num_threads);
  };
  doubles ? go(double()) : go(float());
}
