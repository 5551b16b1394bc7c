// Soft-NMS on the CPU: each selection lowers the scores of all that are left and finds the best of them in one pass.
//
// The lists lie as structure of arrays in the order of the indices, dead entries are squeezed out when they are many, so
// that the first of equal scores is the one of lower index. The rules are pinned in fastrcnn_kernels/soft_nms.py.
#include <algorithm>
#include <limits>
#include <vector>

#include "box_coder.h"
#include "exports_boxes.h"

namespace {

constexpr int kLanes = 16;

template <typename T>
struct Lists {
  std::vector<T> x1, y1, x2, y2, area, score;
  std::vector<int32_t> index;
};

template <typename T>
struct Rule {
  T threshold, sigma, min_score, offset;
  bool gaussian;
};

// Lowers the scores of `size` entries (a multiple of kLanes) for a selected box; the best of them to `best` by lane.
template <bool kGaussian, typename T>
__attribute__((always_inline)) inline void lower(Lists<T>& l, int64_t size, const Rule<T>& rule, T x1, T y1, T x2, T y2,
                                                 T area, T* best) {
  const T offset = rule.offset, threshold = rule.threshold, sigma = rule.sigma, min_score = rule.min_score;
  constexpr T kGone = -std::numeric_limits<T>::infinity();
  T top[kLanes];
  for (int i = 0; i < kLanes; ++i) top[i] = kGone;
  for (int64_t start = 0; start < size; start += kLanes) {
    const T *lx1 = l.x1.data() + start, *ly1 = l.y1.data() + start, *lx2 = l.x2.data() + start;
    const T *ly2 = l.y2.data() + start, *larea = l.area.data() + start;
    T* score = l.score.data() + start;
    T iou[kLanes];
    int overlaps = 0;
    for (int i = 0; i < kLanes; ++i) {
      const T left = x1 < lx1[i] ? lx1[i] : x1, above = y1 < ly1[i] ? ly1[i] : y1;
      const T right = lx2[i] < x2 ? lx2[i] : x2, below = ly2[i] < y2 ? ly2[i] : y2;
      T width = right - left + offset, height = below - above + offset;
      width = T(0) < width ? width : T(0);
      height = T(0) < height ? height : T(0);
      const T inter = width * height;
      iou[i] = inter / (area + larea[i] - inter);
      overlaps |= kGaussian ? iou[i] > T(0) : iou[i] > threshold;
    }
    // Most blocks have nothing to lower: their scores are as they were, and were not too low.
    if (overlaps != 0) {
      for (int i = 0; i < kLanes; ++i) {
        T weight;
        if (kGaussian) {
          const T decay = box_coder::exponential(-(iou[i] * iou[i]) / sigma);
          weight = iou[i] > T(0) ? decay : T(1);
        } else {
          weight = iou[i] > threshold ? T(1) - iou[i] : T(1);
        }
        const T lowered = score[i] * weight;
        score[i] = lowered >= min_score ? lowered : kGone;
      }
    }
    for (int i = 0; i < kLanes; ++i) top[i] = score[i] > top[i] ? score[i] : top[i];
  }
  for (int i = 0; i < kLanes; ++i) best[i] = top[i];
}

FASTRCNN_CLONES void lower_linear(Lists<float>& l, int64_t size, const Rule<float>& rule, const float* b, float* best) {
  lower<false>(l, size, rule, b[0], b[1], b[2], b[3], b[4], best);
}
FASTRCNN_CLONES void lower_linear(Lists<double>& l, int64_t size, const Rule<double>& rule, const double* b,
                                  double* best) {
  lower<false>(l, size, rule, b[0], b[1], b[2], b[3], b[4], best);
}
FASTRCNN_CLONES void lower_gaussian(Lists<float>& l, int64_t size, const Rule<float>& rule, const float* b,
                                    float* best) {
  lower<true>(l, size, rule, b[0], b[1], b[2], b[3], b[4], best);
}
FASTRCNN_CLONES void lower_gaussian(Lists<double>& l, int64_t size, const Rule<double>& rule, const double* b,
                                    double* best) {
  lower<true>(l, size, rule, b[0], b[1], b[2], b[3], b[4], best);
}

template <typename T>
int64_t soft_nms(const T* boxes, const T* scores, int64_t count, const Rule<T>& rule, int64_t* keep, T* rescored) {
  constexpr T kGone = -std::numeric_limits<T>::infinity();
  Lists<T> l;
  auto put = [&l](T x1, T y1, T x2, T y2, T area, T score, int32_t index) {
    l.x1.push_back(x1);
    l.y1.push_back(y1);
    l.x2.push_back(x2);
    l.y2.push_back(y2);
    l.area.push_back(area);
    l.score.push_back(score);
    l.index.push_back(index);
  };
  T best = kGone;
  for (int64_t i = 0; i < count; ++i) {
    if (!(scores[i] >= rule.min_score)) continue;
    const T* b = boxes + 4 * i;
    put(b[0], b[1], b[2], b[3], (b[2] - b[0] + rule.offset) * (b[3] - b[1] + rule.offset), scores[i],
        static_cast<int32_t>(i));
    best = scores[i] > best ? scores[i] : best;
  }
  while (l.score.size() % kLanes != 0) put(T(0), T(0), T(0), T(0), T(0), kGone, -1);
  int64_t kept = 0;
  int64_t since = 0;
  while (best > kGone) {
    const auto found = std::find(l.score.begin(), l.score.end(), best) - l.score.begin();
    const T box[5] = {l.x1[found], l.y1[found], l.x2[found], l.y2[found], l.area[found]};
    keep[kept] = l.index[found];
    rescored[kept++] = best;
    l.score[found] = kGone;
    T tops[kLanes];
    const int64_t size = static_cast<int64_t>(l.score.size());
    rule.gaussian ? lower_gaussian(l, size, rule, box, tops) : lower_linear(l, size, rule, box, tops);
    best = *std::max_element(tops, tops + kLanes);
    if (++since * 8 < size) continue;
    since = 0;
    int64_t alive = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (!(l.score[i] > kGone)) continue;
      l.x1[alive] = l.x1[i];
      l.y1[alive] = l.y1[i];
      l.x2[alive] = l.x2[i];
      l.y2[alive] = l.y2[i];
      l.area[alive] = l.area[i];
      l.score[alive] = l.score[i];
      l.index[alive++] = l.index[i];
    }
    const int64_t padded = (alive + kLanes - 1) / kLanes * kLanes;
    for (auto* values : {&l.x1, &l.y1, &l.x2, &l.y2, &l.area, &l.score}) values->resize(padded);
    l.index.resize(padded);
    std::fill(l.score.begin() + alive, l.score.end(), kGone);
  }
  return kept;
}

}  // namespace

int64_t kernels::soft_nms(std::uintptr_t boxes, bool doubles, std::uintptr_t scores, int64_t count, double threshold,
                          double sigma, double min_score, bool gaussian, int box_offset, std::uintptr_t keep,
                          std::uintptr_t rescored) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const Rule<T> rule{static_cast<T>(threshold), static_cast<T>(sigma), static_cast<T>(min_score),
                       static_cast<T>(box_offset), gaussian};
    return ::soft_nms(as_pointer<const T>(boxes), as_pointer<const T>(scores), count, rule,
                    as_pointer<int64_t>(keep), as_pointer<T>(rescored));
  };
  return doubles ? run(double()) : run(float());
}
