// Region proposals on the CPU: the best anchors of each image and level, decoded, clipped and suppressed; then over levels.
//
// The head's outputs are read where they lie, NCHW or channels_last: one pass over the logits (topk.h), and the deltas of
// the anchors chosen only. Anchors are computed. An image and level is a task; all ranks are by logit, ties by lower
// index, so that what is chosen does not depend on how a sigmoid rounds.
#include <cstring>
#include <memory>
#include <numeric>

#include "box_coder.h"
#include "exports_boxes.h"
#include "nms.h"
#include "topk.h"

namespace {

constexpr int kBlock = 128;

// What Python passes of a level: eight integers.
struct Level {
  std::uintptr_t objectness, deltas, cells;
  int64_t anchors, height, width, stride;
  bool logits_last, deltas_last;  // channels_last, not NCHW

  explicit Level(const int64_t* row)
      : objectness(static_cast<std::uintptr_t>(row[0])), deltas(static_cast<std::uintptr_t>(row[1])),
        cells(static_cast<std::uintptr_t>(row[2])), anchors(row[3]), height(row[4]), width(row[5]), stride(row[6]),
        logits_last((row[7] & 1) != 0), deltas_last((row[7] & 2) != 0) {}
  int64_t size() const { return anchors * height * width; }
};

template <typename T>
struct Settings {
  int64_t pre_nms_top_n, max_output, top_n;  // top_n 0: no limit
  bool per_batch;
  double iou_threshold;
  int box_offset;
  T min_size;
  box_coder::Coder<T> coder;
};

template <typename T>
struct Block {
  T dx[kBlock], dy[kBlock], dw[kBlock], dh[kBlock];
  T x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock];
  uint8_t large[kBlock];
};

template <typename T>
__attribute__((always_inline)) inline void decode(Block<T>& b, const Settings<T>& settings, T right, T bottom) {
  const box_coder::Coder<T> coder = settings.coder;
  const T min_size = settings.min_size;
  for (int i = 0; i < kBlock; ++i) {
    const box_coder::Corners<T> anchor{b.x1[i], b.y1[i], b.x2[i], b.y2[i]};
    const auto box = box_coder::clip_box(
        box_coder::decode_box<false>(coder, b.dx[i], b.dy[i], b.dw[i], b.dh[i], anchor), right, bottom);
    b.x1[i] = box.x1;
    b.y1[i] = box.y1;
    b.x2[i] = box.x2;
    b.y2[i] = box.y2;
    b.large[i] = box_coder::is_large_enough(box, coder.offset, min_size);
  }
}

FASTRCNN_CLONES void decode_block(Block<float>& b, const Settings<float>& settings, float right, float bottom) {
  decode(b, settings, right, bottom);
}
FASTRCNN_CLONES void decode_block(Block<double>& b, const Settings<double>& settings, double right, double bottom) {
  decode(b, settings, right, bottom);
}

// The survivors of one image and level, best first.
template <typename T>
struct Survivors {
  std::unique_ptr<T[]> boxes;
  std::vector<uint64_t> keys;  // descending_key of the logits
  std::vector<T> logits;
};

template <typename T>
struct Workspace {
  topk::Workspace<T> top;
  nms::Workspace<T> nms;
  Block<T> block;
  std::vector<T> boxes, logits;
};

template <typename V, typename T>
void propose_level(const Level& level, int64_t image, T right, T bottom, const Settings<T>& settings,
                   Workspace<T>& work, Survivors<T>& out) {
  using Ranks = topk::Ranks<T>;
  const int64_t size = level.size(), plane = level.height * level.width, anchors = level.anchors;
  const int64_t k = std::min(settings.pre_nms_top_n, size);
  const V* logits = as_pointer<const V>(level.objectness) + image * size;
  const V* deltas = as_pointer<const V>(level.deltas) + image * 4 * size;
  const T* cells = as_pointer<const T>(level.cells);
  if (k == 0) return;
  const bool last = level.logits_last || anchors == 1;
  if (last) {
    topk::best(logits, size, k, [](uint32_t position) { return position; }, work.top);
  } else {
    const uint32_t step = static_cast<uint32_t>(plane), count = static_cast<uint32_t>(anchors);
    topk::best(logits, size, k,
               [=](uint32_t position) { return position % step * count + position / step; }, work.top);
  }
  work.boxes.resize(4 * k);
  work.logits.resize(k);
  work.nms.candidates.clear();
  Block<T>& b = work.block;
  for (int64_t start = 0; start < k; start += kBlock) {
    const int held = static_cast<int>(std::min<int64_t>(kBlock, k - start));
    for (int i = 0; i < held; ++i) {
      const uint32_t index = Ranks::index(work.top.ranks[start + i]);
      const int64_t a = index % anchors, cell = index / anchors;
      const V* d = level.deltas_last ? deltas + cell * 4 * anchors + 4 * a : deltas + 4 * a * plane + cell;
      const int64_t apart = level.deltas_last ? 1 : plane;
      b.dx[i] = topk::widen(d[0]);
      b.dy[i] = topk::widen(d[apart]);
      b.dw[i] = topk::widen(d[2 * apart]);
      b.dh[i] = topk::widen(d[3 * apart]);
      const T x = static_cast<T>(cell % level.width * level.stride), y = static_cast<T>(cell / level.width * level.stride);
      b.x1[i] = x + cells[4 * a];
      b.y1[i] = y + cells[4 * a + 1];
      b.x2[i] = x + cells[4 * a + 2];
      b.y2[i] = y + cells[4 * a + 3];
      work.logits[start + i] = topk::widen(logits[last ? index : a * plane + cell]);
    }
    decode_block(b, settings, right, bottom);
    for (int i = 0; i < held; ++i) {
      T* box = work.boxes.data() + 4 * (start + i);
      box[0] = b.x1[i];
      box[1] = b.y1[i];
      box[2] = b.x2[i];
      box[3] = b.y2[i];
      if (b.large[i]) work.nms.candidates.push_back(static_cast<int32_t>(start + i));
    }
  }
  const auto& candidates = work.nms.candidates;
  nms::sweep_any(work.boxes.data(), candidates.data(), static_cast<int64_t>(candidates.size()), settings.iou_threshold,
                 settings.box_offset, settings.max_output, work.nms);
  const size_t kept = work.nms.kept.size();
  out.boxes.reset(new T[4 * kept]);
  out.keys.resize(kept);
  out.logits.resize(kept);
  for (size_t i = 0; i < kept; ++i) {
    const int32_t position = candidates[work.nms.kept[i]];
    std::memcpy(out.boxes.get() + 4 * i, work.boxes.data() + 4 * position, 4 * sizeof(T));
    out.keys[i] = Ranks::key(work.top.ranks[position]);
    out.logits[i] = work.logits[position];
  }
}

// How many of each of `count` lists are among the `top_n` best of all, ties by lower list, then by place in the list.
template <typename T>
std::vector<int64_t> cut_lists(const Survivors<T>* lists, int64_t count, int64_t top_n) {
  std::vector<int64_t> cuts(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += cuts[i] = static_cast<int64_t>(lists[i].keys.size());
  if (top_n == 0 || total <= top_n) return cuts;
  // The smallest key that top_n entries or more do not exceed, by bisection; the lists are sorted.
  uint64_t low = 0, high = ~uint64_t(0);
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    int64_t reached = 0;
    for (int64_t i = 0; i < count; ++i) {
      const auto& keys = lists[i].keys;
      reached += std::upper_bound(keys.begin(), keys.end(), middle) - keys.begin();
    }
    if (reached >= top_n) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  int64_t left = top_n;
  for (int64_t i = 0; i < count; ++i) {
    const auto& keys = lists[i].keys;
    cuts[i] = std::lower_bound(keys.begin(), keys.end(), low) - keys.begin();
    left -= cuts[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto& keys = lists[i].keys;
    const int64_t ties = std::upper_bound(keys.begin(), keys.end(), low) - keys.begin() - cuts[i];
    const int64_t taken = std::min(ties, left);
    cuts[i] += taken;
    left -= taken;
  }
  return cuts;
}

// One image's survivors, as many of each level as `cuts` says, to its row of the outputs.
template <typename T>
int64_t write_image(const Survivors<T>* levels, int64_t count, const int64_t* cuts, bool sorted, int64_t capacity,
                    T* boxes, T* scores) {
  std::vector<int64_t> cursor(count, 0);
  int64_t written = 0;
  auto put = [&](int64_t level) {
    const Survivors<T>& from = levels[level];
    const int64_t place = cursor[level]++;
    std::memcpy(boxes + 4 * written, from.boxes.get() + 4 * place, 4 * sizeof(T));
    scores[written++] = T(1) / (T(1) + box_coder::exponential(-from.logits[place]));
  };
  if (sorted) {
    while (true) {
      int64_t next = -1;
      for (int64_t i = 0; i < count; ++i) {
        if (cursor[i] == cuts[i]) continue;
        if (next < 0 || levels[i].keys[cursor[i]] < levels[next].keys[cursor[next]]) next = i;
      }
      if (next < 0) break;
      put(next);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      while (cursor[i] < cuts[i]) put(i);
    }
  }
  std::fill(boxes + 4 * written, boxes + 4 * capacity, T(0));
  std::fill(scores + written, scores + capacity, -std::numeric_limits<T>::infinity());
  return written;
}

template <typename V, typename T>
void generate(const std::vector<Level>& levels, const int64_t* image_sizes, int64_t images, int64_t capacity,
              const Settings<T>& settings, T* boxes, T* scores, int64_t* counts, int num_threads) {
  const int64_t num_levels = static_cast<int64_t>(levels.size()), tasks = images * num_levels;
  std::vector<Survivors<T>> survivors(tasks);
  std::vector<int64_t> largest(num_levels);
  std::iota(largest.begin(), largest.end(), 0);
  std::stable_sort(largest.begin(), largest.end(),
                   [&](int64_t a, int64_t b) { return levels[a].size() > levels[b].size(); });
  int64_t candidates = 0;
  for (const Level& level : levels) candidates += images * (std::min(settings.pre_nms_top_n, level.size()) + level.size() / 64);
  const int threads = nms::useful_threads(num_threads, tasks, candidates);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace<T> work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      // Largest levels first, so that no thread is left alone with one at the end.
      const int64_t level = largest[task / images], image = task % images;
      const T bottom = static_cast<T>(image_sizes[2 * image] - settings.box_offset);
      const T right = static_cast<T>(image_sizes[2 * image + 1] - settings.box_offset);
      propose_level<V>(levels[level], image, right, bottom, settings, work, survivors[image * num_levels + level]);
    }
  }
  std::vector<int64_t> cuts;
  if (settings.per_batch) cuts = cut_lists(survivors.data(), tasks, settings.top_n);
  for (int64_t image = 0; image < images; ++image) {
    const Survivors<T>* own = survivors.data() + image * num_levels;
    std::vector<int64_t> own_cuts;
    if (!settings.per_batch) own_cuts = cut_lists(own, num_levels, settings.top_n);
    const int64_t* chosen = settings.per_batch ? cuts.data() + image * num_levels : own_cuts.data();
    const bool sorted = settings.top_n > 0 && !settings.per_batch;
    counts[image] = write_image(own, num_levels, chosen, sorted, capacity, boxes + 4 * image * capacity,
                                scores + image * capacity);
  }
}

}  // namespace

void kernels::generate_proposals(const std::vector<int64_t>& rows, int dtype, std::uintptr_t image_sizes,
                                 int64_t images, int64_t capacity, int64_t pre_nms_top_n, int64_t max_output,
                                 int64_t top_n, bool per_batch, double iou_threshold, double min_size,
                                 const std::vector<double>& weights, int box_offset, double clip, std::uintptr_t boxes,
                                 std::uintptr_t scores, std::uintptr_t counts, int num_threads) {
  std::vector<Level> levels;
  for (size_t i = 0; i < rows.size(); i += 8) levels.emplace_back(rows.data() + i);
  auto run = [&](auto value, auto zero) {
    using T = decltype(zero);
    const Settings<T> settings{pre_nms_top_n, max_output, top_n, per_batch, iou_threshold, box_offset,
                               static_cast<T>(min_size), {weights.data(), box_offset, clip}};
    generate<decltype(value)>(levels, as_pointer<const int64_t>(image_sizes), images, capacity, settings,
                              as_pointer<T>(boxes), as_pointer<T>(scores), as_pointer<int64_t>(counts),
                              num_threads);
  };
  if (dtype == 0) run(float(), float());
  if (dtype == 1) run(double(), double());
  if (dtype == 2) run(topk::Float16(), float());
  if (dtype == 3) run(topk::BFloat16(), float());
}
