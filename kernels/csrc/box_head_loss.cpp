// Cross entropy and class-specific smooth L1 of the box head on the CPU; the rules are in
// fastrcnn_kernels/box_head_loss.py.
//
// A row of logits is widened, and its maximum, its exponentials and their sum are three vectorised loops over the
// first-level cache. The gradient of the regression is written once, zeros included, row by row.

// Nothing here decides an integer: products may be fused into sums. Before the headers, whose functions would otherwise
// not be inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast,no-trapping-math")
#endif
#include <array>
#include <cstring>

#include "exports_losses.h"
#include "losses.h"

namespace {

using namespace losses;

constexpr int64_t kRows = 16;  // rows that have one partial sum

template <typename T>
FASTRCNN_ALWAYS_INLINE T log_sum_exp_of(const T* x, int64_t count, T least) {
  T largest = least;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += vector_math::exp(x[i] - largest);
  return largest + std::log(total);
}

// scale * exp(x - lse)
template <typename T>
FASTRCNN_ALWAYS_INLINE void scaled_softmax_of(const T* x, int64_t count, T lse, T scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = scale * vector_math::exp(x[i] - lse);
}

FASTRCNN_CLONES float log_sum_exp(const float* x, int64_t count) { return log_sum_exp_of(x, count, -HUGE_VALF); }
FASTRCNN_CLONES double log_sum_exp(const double* x, int64_t count) { return log_sum_exp_of(x, count, -HUGE_VAL); }
FASTRCNN_CLONES void scaled_softmax(const float* x, int64_t count, float lse, float scale, float* out) {
  scaled_softmax_of(x, count, lse, scale, out);
}
FASTRCNN_CLONES void scaled_softmax(const double* x, int64_t count, double lse, double scale, double* out) {
  scaled_softmax_of(x, count, lse, scale, out);
}

template <typename S>
struct Problem {
  using T = Compute<S>;
  const S *logits, *regression;
  const int64_t* labels;
  const T *proposals, *gt_boxes;
  int64_t rows, classes, columns;
  std::array<double, 4> weights;
  double beta;
  int box_offset;
  int64_t ignore_index;
  int num_threads;

  int threads() const { return threads_for(rows * classes, num_threads); }
  bool positive(int64_t row) const { return labels[row] > 0 && labels[row] < classes; }

  // The first of the four columns that count.
  int64_t column(int64_t row) const { return columns == 4 * classes ? 4 * labels[row] : columns - 4; }

  // Predicted minus wanted deltas of a positive row.
  std::array<T, 4> differences(int64_t row) const {
    const T *a = proposals + 4 * row, *g = gt_boxes + 4 * row;
    const T offset = static_cast<T>(box_offset);
    const T anchor_width = a[2] - a[0] + offset, anchor_height = a[3] - a[1] + offset;
    const T width = g[2] - g[0] + offset, height = g[3] - g[1] + offset;
    const T dx = g[0] + T(0.5) * width - (a[0] + T(0.5) * anchor_width);
    const T dy = g[1] + T(0.5) * height - (a[1] + T(0.5) * anchor_height);
    const std::array<T, 4> wanted = {
        static_cast<T>(weights[0]) * dx / anchor_width, static_cast<T>(weights[1]) * dy / anchor_height,
        static_cast<T>(weights[2]) * std::log(width / anchor_width),
        static_cast<T>(weights[3]) * std::log(height / anchor_height)};
    std::array<T, 4> result;
    const S* predicted = regression + row * columns + column(row);
    for (size_t k = 0; k < 4; ++k) result[k] = read(predicted, static_cast<int64_t>(k)) - wanted[k];
    return result;
  }
};

template <typename T>
T smooth_l1_of(T difference, T beta) {
  const T distance = std::abs(difference);
  return distance < beta ? T(0.5) * distance * distance / beta : distance - T(0.5) * beta;
}

template <typename T>
T smooth_l1_slope(T difference, T beta) {
  const T slope = difference == T(0) ? T(0) : difference / beta;
  return slope > T(1) ? T(1) : slope < T(-1) ? T(-1) : slope;
}

// Returns the first row whose label is neither a class nor ignored, or -1.
template <typename S, typename T = Compute<S>>
int64_t forward(const Problem<S>& p, const T* normaliser, T* loss_classifier, T* loss_box, T* lse, T* share) {
  struct Partial {
    double classifier = 0.0, box = 0.0;
    int64_t valid = 0, wrong = -1;
  };
  const int64_t groups = (p.rows + kRows - 1) / kRows;
  std::vector<Partial> partials(static_cast<size_t>(groups));
  const int threads = p.threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> buffer(static_cast<size_t>(p.classes));
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      Partial part;
      for (int64_t row = group * kRows; row < std::min(group * kRows + kRows, p.rows); ++row) {
        const T* x = widen(p.logits + row * p.classes, p.classes, buffer.data());
        lse[row] = log_sum_exp(x, p.classes);
        const int64_t label = p.labels[row];
        if (label == p.ignore_index) continue;
        if (label < 0 || label >= p.classes) {
          if (part.wrong < 0) part.wrong = row;
          continue;
        }
        ++part.valid;
        part.classifier += static_cast<double>(lse[row] - x[label]);
        if (label == 0) continue;
        for (const T d : p.differences(row)) part.box += static_cast<double>(smooth_l1_of(d, static_cast<T>(p.beta)));
      }
      partials[static_cast<size_t>(group)] = part;
    }
  }
  Partial total;
  for (const Partial& part : partials) {
    total.classifier += part.classifier;
    total.box += part.box;
    total.valid += part.valid;
    if (total.wrong < 0) total.wrong = part.wrong;
  }
  const double divisor = normaliser != nullptr ? static_cast<double>(*normaliser)
                                               : static_cast<double>(std::max<int64_t>(total.valid, 1));
  *loss_classifier = static_cast<T>(total.classifier / divisor);
  *loss_box = static_cast<T>(total.box / divisor);
  *share = static_cast<T>(1.0 / divisor);
  return total.wrong;
}

template <typename S, typename T = Compute<S>>
void backward(const Problem<S>& p, T classifier_scale, T box_scale, const T* lse, S* logits_grad, S* regression_grad) {
  const int threads = p.threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> buffer(static_cast<size_t>(p.classes)), result(static_cast<size_t>(p.classes));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      S* out = logits_grad + row * p.classes;
      if (p.labels[row] == p.ignore_index) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(p.classes) * sizeof(S));
      } else {
        T* to = destination(out, result.data());
        const T* x = widen(p.logits + row * p.classes, p.classes, buffer.data());
        scaled_softmax(x, p.classes, lse[row], classifier_scale, to);
        const int64_t label = p.labels[row];
        if (label >= 0 && label < p.classes) to[label] -= classifier_scale;
        narrow(to, p.classes, out);
      }
      S* box_out = regression_grad + row * p.columns;
      std::memset(static_cast<void*>(box_out), 0, static_cast<size_t>(p.columns) * sizeof(S));
      if (p.labels[row] == p.ignore_index || !p.positive(row)) continue;
      T slopes[4];
      const auto differences = p.differences(row);
      for (size_t k = 0; k < 4; ++k) slopes[k] = box_scale * smooth_l1_slope(differences[k], static_cast<T>(p.beta));
      S* four = box_out + p.column(row);
      T* to = destination(four, slopes);
      if (to != slopes) std::copy(slopes, slopes + 4, to);
      narrow(to, 4, four);
    }
  }
}

template <typename S>
Problem<S> make_problem(std::uintptr_t logits, std::uintptr_t regression, std::uintptr_t labels,
                        std::uintptr_t proposals, std::uintptr_t gt_boxes, int64_t rows, int64_t classes,
                        int64_t columns, const std::array<double, 4>& weights, double beta, int box_offset,
                        int64_t ignore_index, int num_threads) {
  using T = Compute<S>;
  return {as_pointer<const S>(logits), as_pointer<const S>(regression), as_pointer<const int64_t>(labels),
          as_pointer<const T>(proposals), as_pointer<const T>(gt_boxes), rows, classes, columns, weights, beta,
          box_offset, ignore_index, num_threads};
}

}  // namespace

int64_t kernels::box_head_loss_forward(std::uintptr_t logits, std::uintptr_t regression, std::uintptr_t labels,
                                       std::uintptr_t proposals, std::uintptr_t gt_boxes, std::uintptr_t normaliser,
                                       std::uintptr_t loss_classifier, std::uintptr_t loss_box, std::uintptr_t lse,
                                       std::uintptr_t share, int dtype, int64_t rows, int64_t classes, int64_t columns,
                                       const std::array<double, 4>& weights, double beta, int box_offset,
                                       int64_t ignore_index, int num_threads) {
  int64_t wrong = -1;
#define FASTRCNN_CALL(S)                                                                                            \
  wrong = forward(make_problem<S>(logits, regression, labels, proposals, gt_boxes, rows, classes, columns, weights, \
                                  beta, box_offset, ignore_index, num_threads),                                     \
                  as_pointer<const Compute<S>>(normaliser), as_pointer<Compute<S>>(loss_classifier),                \
                  as_pointer<Compute<S>>(loss_box), as_pointer<Compute<S>>(lse), as_pointer<Compute<S>>(share))
  FASTRCNN_DISPATCH(dtype, FASTRCNN_CALL)
#undef FASTRCNN_CALL
  return wrong;
}

void kernels::box_head_loss_backward(std::uintptr_t grad_classifier, std::uintptr_t grad_box, std::uintptr_t logits,
                                     std::uintptr_t regression, std::uintptr_t labels, std::uintptr_t proposals,
                                     std::uintptr_t gt_boxes, std::uintptr_t lse, std::uintptr_t share,
                                     std::uintptr_t logits_grad, std::uintptr_t regression_grad, int dtype,
                                     int64_t rows, int64_t classes, int64_t columns,
                                     const std::array<double, 4>& weights, double beta, int box_offset,
                                     int64_t ignore_index, int num_threads) {
#define FASTRCNN_CALL(S)                                                                                             \
  {                                                                                                                  \
    const Compute<S> factor = *as_pointer<const Compute<S>>(share);                                                  \
    backward(make_problem<S>(logits, regression, labels, proposals, gt_boxes, rows, classes, columns, weights, beta, \
                             box_offset, ignore_index, num_threads),                                                 \
             *as_pointer<const Compute<S>>(grad_classifier) * factor,                                                \
             *as_pointer<const Compute<S>>(grad_box) * factor, as_pointer<const Compute<S>>(lse),                    \
             as_pointer<S>(logits_grad), as_pointer<S>(regression_grad));                                            \
  }
  FASTRCNN_DISPATCH(dtype, FASTRCNN_CALL)
#undef FASTRCNN_CALL
}
