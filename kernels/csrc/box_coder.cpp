// Boxes to regression targets and back on the CPU, and their gradients.
//
// Every loop is over boxes as they lie in memory, (x1, y1, x2, y2) side by side; the compiler turns sixteen of them into
// vectors. A row is one anchor with its k boxes; either input may have fewer rows than the call, and is then repeated
// (broadcast over leading dimensions). Bound by the memory that is read and written.
#if defined(__GNUC__) && !defined(__clang__)
// Comparisons may be evaluated where the code would branch around them: without this, few loops become vectors.
#pragma GCC optimize("no-trapping-math")
#endif
#include "box_coder.h"

#include <algorithm>
#include <vector>

#include "exports_boxes.h"

namespace {

using box_coder::Coder;
using box_coder::Corners;
using box_coder::decode_box;
using box_coder::encode_box;
using box_coder::load_corners;
using Call = kernels::BoxCoderCall;

constexpr int64_t kBoxesPerThread = 16384;  // some twenty microseconds: less is not worth waking a thread
constexpr int64_t kScratch = 256;           // boxes whose anchors are repeated at a time

// Calls `run(begin, end)` on contiguous parts of [0, rows), one a thread; `boxes` is the work of all rows.
template <typename Run>
void in_parts(int64_t rows, int64_t boxes, int num_threads, Run run) {
  const int64_t useful = std::min<int64_t>({num_threads, boxes / kBoxesPerThread, rows});
  const int threads = static_cast<int>(std::max<int64_t>(1, useful));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int t = 0; t < threads; ++t) run(rows * t / threads, rows * (t + 1) / threads);
}

// Calls `run(first, count, a, b)` on the longest runs of rows in which neither input starts again; a and b are rows of
// the inputs, which have `period_a` and `period_b` of them.
template <typename Run>
void in_runs(int64_t begin, int64_t end, int64_t period_a, int64_t period_b, Run run) {
  while (begin < end) {
    const int64_t a = begin % period_a, b = begin % period_b;
    const int64_t count = std::min({end - begin, period_a - a, period_b - b});
    run(begin, count, a, b);
    begin += count;
  }
}

template <typename T>
FASTRCNN_INLINE void store(T* out, const Corners<T>& box) {
  out[0] = box.x1;
  out[1] = box.y1;
  out[2] = box.x2;
  out[3] = box.y2;
}

// One anchor a box.
template <bool kPowers, typename T>
FASTRCNN_INLINE void decode_each(const Coder<T> c, const T* __restrict__ deltas, const T* __restrict__ anchors,
                                 int64_t count, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const T* d = deltas + 4 * i;
    store(out + 4 * i, decode_box<kPowers>(c, d[0], d[1], d[2], d[3], load_corners(anchors + 4 * i)));
  }
}

// One anchor for all boxes.
template <bool kPowers, typename T>
FASTRCNN_INLINE void decode_row(const Coder<T> c, const T* __restrict__ deltas, const Corners<T>& anchor,
                                int64_t count, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const T* d = deltas + 4 * i;
    store(out + 4 * i, decode_box<kPowers>(c, d[0], d[1], d[2], d[3], anchor));
  }
}

template <bool kPowers, typename T>
FASTRCNN_INLINE void decode(const Coder<T>& c, const T* deltas, const T* anchors, int64_t rows, int64_t k, T* out) {
  if (k == 1) return decode_each<kPowers>(c, deltas, anchors, rows, out);
  if (k >= 16) {
    for (int64_t row = 0; row < rows; ++row) {
      decode_row<kPowers>(c, deltas + 4 * k * row, load_corners(anchors + 4 * row), k, out + 4 * k * row);
    }
    return;
  }
  T repeated[4 * kScratch];
  for (int64_t row = 0; row < rows; row += kScratch / k) {
    const int64_t count = std::min(kScratch / k, rows - row);
    for (int64_t i = 0; i < count; ++i) {
      const Corners<T> anchor = load_corners(anchors + 4 * (row + i));
      for (int64_t j = 0; j < k; ++j) store(repeated + 4 * (i * k + j), anchor);
    }
    decode_each<kPowers>(c, deltas + 4 * k * row, repeated, count * k, out + 4 * k * row);
  }
}

// One function for each type, because a template cannot be cloned for several instruction sets.
FASTRCNN_CLONES void decode_rows(const Coder<float>& c, const float* deltas, const float* anchors, int64_t rows,
                                 int64_t k, float* out) {
  c.powers ? decode<true>(c, deltas, anchors, rows, k, out) : decode<false>(c, deltas, anchors, rows, k, out);
}
void decode_rows(const Coder<double>& c, const double* deltas, const double* anchors, int64_t rows, int64_t k,
                 double* out) {
  decode<false>(c, deltas, anchors, rows, k, out);
}

template <typename T>
FASTRCNN_INLINE void encode(const Coder<T> c, const T* __restrict__ boxes, const T* __restrict__ anchors, int64_t rows,
                            T* __restrict__ out) {
  for (int64_t i = 0; i < rows; ++i) {
    store(out + 4 * i, encode_box(c, load_corners(boxes + 4 * i), load_corners(anchors + 4 * i)));
  }
}
FASTRCNN_CLONES void encode_rows(const Coder<float>& c, const float* boxes, const float* anchors, int64_t rows,
                                 float* out) {
  encode(c, boxes, anchors, rows, out);
}
void encode_rows(const Coder<double>& c, const double* boxes, const double* anchors, int64_t rows, double* out) {
  encode(c, boxes, anchors, rows, out);
}

template <typename T>
FASTRCNN_INLINE void propose(const Coder<T> c, const T* __restrict__ deltas, const T* __restrict__ anchors,
                             int64_t rows, T right, T bottom, T min_size, T* __restrict__ out,
                             uint8_t* __restrict__ valid) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* d = deltas + 4 * i;
    const Corners<T> box = box_coder::clip_box(
        decode_box<false>(c, d[0], d[1], d[2], d[3], load_corners(anchors + 4 * i)), right, bottom);
    store(out + 4 * i, box);
    valid[i] = box_coder::is_large_enough(box, c.offset, min_size);
  }
}
FASTRCNN_CLONES void propose_rows(const Coder<float>& c, const float* deltas, const float* anchors, int64_t rows,
                                  float right, float bottom, float min_size, float* out, uint8_t* valid) {
  propose(c, deltas, anchors, rows, right, bottom, min_size, out, valid);
}
void propose_rows(const Coder<double>& c, const double* deltas, const double* anchors, int64_t rows, double right,
                  double bottom, double min_size, double* out, uint8_t* valid) {
  propose(c, deltas, anchors, rows, right, bottom, min_size, out, valid);
}

// Gradients of decode_box: with respect to the deltas, and to the width, height and centre of the anchor.
template <typename T>
struct DecodeGradient {
  Corners<T> deltas;
  T width, height, x, y;
};

template <typename T>
FASTRCNN_INLINE DecodeGradient<T> decode_gradient(const Coder<T>& c, const Corners<T>& d, const Corners<T>& anchor,
                                                  const Corners<T>& grad) {
  const T width = anchor.x2 - anchor.x1 + c.offset, height = anchor.y2 - anchor.y1 + c.offset;
  const T dw = d.x2 / c.ww, dh = d.y2 / c.wh;
  const T grad_x = grad.x1 + grad.x2, grad_y = grad.y1 + grad.y2;
  const T grown_x = T(0.5) * (grad.x2 - grad.x1) * box_coder::exponential(box_coder::at_most(dw, c.clip));
  const T grown_y = T(0.5) * (grad.y2 - grad.y1) * box_coder::exponential(box_coder::at_most(dh, c.clip));
  return {{grad_x * width / c.wx, grad_y * height / c.wy, dw <= c.clip ? grown_x * width / c.ww : T(0),
           dh <= c.clip ? grown_y * height / c.wh : T(0)},
          grad_x * (d.x1 / c.wx) + grown_x,
          grad_y * (d.y1 / c.wy) + grown_y,
          grad_x,
          grad_y};
}

// The corners of a box from gradients of its width, height and centre.
template <typename T>
FASTRCNN_INLINE Corners<T> corner_gradient(T width, T height, T x, T y) {
  const T right = width + T(0.5) * x, bottom = height + T(0.5) * y;
  return {x - right, y - bottom, right, bottom};
}

template <typename T>
FASTRCNN_INLINE void decode_backward(const Coder<T> c, const T* __restrict__ grad, const T* __restrict__ deltas,
                                     const T* __restrict__ anchors, int64_t rows, int64_t k,
                                     T* __restrict__ grad_deltas, T* __restrict__ grad_anchors) {
  for (int64_t row = 0; row < rows && grad_anchors != nullptr; ++row) {
    const Corners<T> anchor = load_corners(anchors + 4 * row);
    T width = 0, height = 0, x = 0, y = 0;
    for (int64_t i = row * k; i < (row + 1) * k; ++i) {
      const DecodeGradient<T> g = decode_gradient(c, load_corners(deltas + 4 * i), anchor, load_corners(grad + 4 * i));
      width += g.width;
      height += g.height;
      x += g.x;
      y += g.y;
    }
    store(grad_anchors + 4 * row, corner_gradient(width, height, x, y));
  }
  if (grad_deltas == nullptr) return;
  if (k == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      store(grad_deltas + 4 * i, decode_gradient(c, load_corners(deltas + 4 * i), load_corners(anchors + 4 * i),
                                                 load_corners(grad + 4 * i)).deltas);
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Corners<T> anchor = load_corners(anchors + 4 * row);
    for (int64_t i = row * k; i < (row + 1) * k; ++i) {
      store(grad_deltas + 4 * i,
            decode_gradient(c, load_corners(deltas + 4 * i), anchor, load_corners(grad + 4 * i)).deltas);
    }
  }
}
FASTRCNN_CLONES void decode_backward_rows(const Coder<float>& c, const float* grad, const float* deltas,
                                          const float* anchors, int64_t rows, int64_t k, float* grad_deltas,
                                          float* grad_anchors) {
  decode_backward(c, grad, deltas, anchors, rows, k, grad_deltas, grad_anchors);
}
void decode_backward_rows(const Coder<double>& c, const double* grad, const double* deltas, const double* anchors,
                          int64_t rows, int64_t k, double* grad_deltas, double* grad_anchors) {
  decode_backward(c, grad, deltas, anchors, rows, k, grad_deltas, grad_anchors);
}

template <bool kBoxes, bool kAnchors, typename T>
FASTRCNN_INLINE void encode_backward(const Coder<T> c, const T* __restrict__ grad, const T* __restrict__ boxes,
                                     const T* __restrict__ anchors, int64_t rows, T* __restrict__ grad_boxes,
                                     T* __restrict__ grad_anchors) {
  for (int64_t i = 0; i < rows; ++i) {
    const Corners<T> box = load_corners(boxes + 4 * i), anchor = load_corners(anchors + 4 * i);
    const Corners<T> g = load_corners(grad + 4 * i);
    const T anchor_width = anchor.x2 - anchor.x1 + c.offset, anchor_height = anchor.y2 - anchor.y1 + c.offset;
    const T width = box.x2 - box.x1 + c.offset, height = box.y2 - box.y1 + c.offset;
    const T x = (box.x1 + T(0.5) * width) - (anchor.x1 + T(0.5) * anchor_width);
    const T y = (box.y1 + T(0.5) * height) - (anchor.y1 + T(0.5) * anchor_height);
    const T grad_x = g.x1 * c.wx / anchor_width, grad_y = g.y1 * c.wy / anchor_height;
    const T log_x = g.x2 * c.ww, log_y = g.y2 * c.wh;
    if (kBoxes) store(grad_boxes + 4 * i, corner_gradient(log_x / width, log_y / height, grad_x, grad_y));
    if (kAnchors) {
      store(grad_anchors + 4 * i, corner_gradient(-(grad_x * x + log_x) / anchor_width,
                                                  -(grad_y * y + log_y) / anchor_height, -grad_x, -grad_y));
    }
  }
}
template <typename T>
FASTRCNN_INLINE void encode_backward(const Coder<T>& c, const T* grad, const T* boxes, const T* anchors, int64_t rows,
                                     T* grad_boxes, T* grad_anchors) {
  if (grad_anchors == nullptr) {
    encode_backward<true, false>(c, grad, boxes, anchors, rows, grad_boxes, grad_anchors);
  } else if (grad_boxes == nullptr) {
    encode_backward<false, true>(c, grad, boxes, anchors, rows, grad_boxes, grad_anchors);
  } else {
    encode_backward<true, true>(c, grad, boxes, anchors, rows, grad_boxes, grad_anchors);
  }
}
FASTRCNN_CLONES void encode_backward_rows(const Coder<float>& c, const float* grad, const float* boxes,
                                          const float* anchors, int64_t rows, float* grad_boxes, float* grad_anchors) {
  encode_backward(c, grad, boxes, anchors, rows, grad_boxes, grad_anchors);
}
void encode_backward_rows(const Coder<double>& c, const double* grad, const double* boxes, const double* anchors,
                          int64_t rows, double* grad_boxes, double* grad_anchors) {
  encode_backward(c, grad, boxes, anchors, rows, grad_boxes, grad_anchors);
}

// A buffer of rows that an output or a repeated input may lack.
template <typename T>
T* row_of(std::uintptr_t address, int64_t row, int64_t width) {
  return address == 0 ? nullptr : as_pointer<T>(address) + row * width;
}

// Calls `run(coder)` with the coder of the call's type.
template <typename Run>
void with_type(const Call& call, Run run) {
  if (call.is_double) {
    run(Coder<double>(call.weights.data(), call.box_offset, call.clip));
  } else {
    run(Coder<float>(call.weights.data(), call.box_offset, call.clip));
  }
}

template <typename T>
T scalar_of(const Coder<T>&);  // names the type of a coder

}  // namespace

void kernels::decode_boxes(const Call& call, std::uintptr_t deltas, int64_t delta_rows, std::uintptr_t anchors,
                           int64_t anchor_rows, int64_t rows, int64_t k, std::uintptr_t out) {
  with_type(call, [&](const auto& coder) {
    using T = decltype(scalar_of(coder));
    advise_large_pages(out, rows * k * 4 * static_cast<int64_t>(sizeof(T)));
    in_parts(rows, rows * k, call.num_threads, [&](int64_t begin, int64_t end) {
      in_runs(begin, end, delta_rows, anchor_rows, [&](int64_t row, int64_t count, int64_t d, int64_t a) {
        decode_rows(coder, row_of<T>(deltas, d, 4 * k), row_of<T>(anchors, a, 4), count, k, row_of<T>(out, row, 4 * k));
      });
    });
  });
}

void kernels::encode_boxes(const Call& call, std::uintptr_t boxes, int64_t box_rows, std::uintptr_t anchors,
                           int64_t anchor_rows, int64_t rows, std::uintptr_t out) {
  with_type(call, [&](const auto& coder) {
    using T = decltype(scalar_of(coder));
    advise_large_pages(out, rows * 4 * static_cast<int64_t>(sizeof(T)));
    in_parts(rows, rows, call.num_threads, [&](int64_t begin, int64_t end) {
      in_runs(begin, end, box_rows, anchor_rows, [&](int64_t row, int64_t count, int64_t b, int64_t a) {
        encode_rows(coder, row_of<T>(boxes, b, 4), row_of<T>(anchors, a, 4), count, row_of<T>(out, row, 4));
      });
    });
  });
}

void kernels::decode_proposals(const Call& call, std::uintptr_t deltas, std::uintptr_t anchors, int64_t anchor_rows,
                               std::uintptr_t sizes, int64_t images, int64_t per_image, double min_size,
                               std::uintptr_t out, std::uintptr_t valid) {
  const int64_t* size = as_pointer<const int64_t>(sizes);
  with_type(call, [&](const auto& coder) {
    using T = decltype(scalar_of(coder));
    in_parts(images * per_image, images * per_image, call.num_threads, [&](int64_t begin, int64_t end) {
      in_runs(begin, end, per_image, anchor_rows, [&](int64_t row, int64_t count, int64_t, int64_t a) {
        const int64_t* image = size + 2 * (row / per_image);
        const T bottom = static_cast<T>(image[0] - call.box_offset), right = static_cast<T>(image[1] - call.box_offset);
        propose_rows(coder, row_of<T>(deltas, row, 4), row_of<T>(anchors, a, 4), count, right, bottom,
                     static_cast<T>(min_size), row_of<T>(out, row, 4), as_pointer<uint8_t>(valid) + row);
      });
    });
  });
}

void kernels::decode_boxes_backward(const Call& call, std::uintptr_t grad, std::uintptr_t deltas, int64_t delta_rows,
                                    std::uintptr_t anchors, int64_t anchor_rows, int64_t rows, int64_t k,
                                    std::uintptr_t grad_deltas, std::uintptr_t grad_anchors) {
  with_type(call, [&](const auto& coder) {
    using T = decltype(scalar_of(coder));
    in_parts(rows, rows * k, call.num_threads, [&](int64_t begin, int64_t end) {
      in_runs(begin, end, delta_rows, anchor_rows, [&](int64_t row, int64_t count, int64_t d, int64_t a) {
        decode_backward_rows(coder, row_of<T>(grad, row, 4 * k), row_of<T>(deltas, d, 4 * k), row_of<T>(anchors, a, 4),
                             count, k, row_of<T>(grad_deltas, row, 4 * k), row_of<T>(grad_anchors, row, 4));
      });
    });
  });
}

void kernels::encode_boxes_backward(const Call& call, std::uintptr_t grad, std::uintptr_t boxes, int64_t box_rows,
                                    std::uintptr_t anchors, int64_t anchor_rows, int64_t rows,
                                    std::uintptr_t grad_boxes, std::uintptr_t grad_anchors) {
  with_type(call, [&](const auto& coder) {
    using T = decltype(scalar_of(coder));
    in_parts(rows, rows, call.num_threads, [&](int64_t begin, int64_t end) {
      in_runs(begin, end, box_rows, anchor_rows, [&](int64_t row, int64_t count, int64_t b, int64_t a) {
        encode_backward_rows(coder, row_of<T>(grad, row, 4), row_of<T>(boxes, b, 4), row_of<T>(anchors, a, 4), count,
                             row_of<T>(grad_boxes, row, 4), row_of<T>(grad_anchors, row, 4));
      });
    });
  });
}
