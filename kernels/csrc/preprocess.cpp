// Images to network input on the CPU: resized as Pillow resizes, mirrored, normalised, padded, in one walk.
//
// A task is a run of rows of one image of the batch. It filters input rows along x into a ring of a few lines of
// bytes, and each output row is blended from these, normalised and stored in one pass over registers; nothing of image
// size is written but the batch. Pillow's arithmetic is kept to the bit: weights in double, rounded to 22 bits, and a
// rounding to grey levels between the two passes.
#include "exports_maps.h"
#include "preprocess_rows.h"

#include <algorithm>
#include <array>

namespace preprocess {
namespace {

constexpr int64_t kRows = 64;              // rows of a task
constexpr int64_t kPixelsPerThread = 1 << 15;  // less is not worth waking a thread

// Pillow's precompute_coeffs and normalize_coeffs_8bpc for its BILINEAR filter.
Axis make_axis(int64_t in, int64_t out) {
  Axis axis;
  axis.identity = in == out;
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double widening = std::max(scale, 1.0), support = widening, inverse = 1.0 / widening;
  const int most = static_cast<int>(std::ceil(support)) * 2 + 1;
  std::vector<double> weight(most);
  std::vector<int32_t> all(static_cast<size_t>(out) * most, 0);
  axis.first.resize(out);
  for (int64_t x = 0; x < out; ++x) {
    const double centre = (static_cast<double>(x) + 0.5) * scale;
    const int64_t begin = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    const int64_t end = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), in);
    double total = 0;
    for (int64_t t = 0; t < end - begin; ++t) {
      const double distance = std::abs((static_cast<double>(t + begin) - centre + 0.5) * inverse);
      weight[t] = distance < 1.0 ? 1.0 - distance : 0.0;
      total += weight[t];
    }
    axis.first[x] = static_cast<int32_t>(begin);
    for (int64_t t = 0; t < end - begin; ++t) {
      const double share = total != 0.0 ? weight[t] / total : weight[t];
      const int32_t fixed = static_cast<int32_t>(0.5 + share * (1 << kPrecision));
      all[x * most + t] = fixed;
      if (fixed) axis.taps = std::max(axis.taps, static_cast<int>(t) + 1);
    }
  }
  axis.weight.resize(static_cast<size_t>(out) * axis.taps);
  for (int64_t x = 0; x < out; ++x)
    std::copy_n(all.begin() + x * most, axis.taps, axis.weight.begin() + x * axis.taps);
  return axis;
}

void mirror(Axis& axis) {
  const int64_t out = static_cast<int64_t>(axis.first.size());
  std::reverse(axis.first.begin(), axis.first.end());
  for (int64_t x = 0; x < out / 2; ++x)
    std::swap_ranges(axis.weight.begin() + x * axis.taps, axis.weight.begin() + (x + 1) * axis.taps,
                     axis.weight.begin() + (out - 1 - x) * axis.taps);
  axis.identity = axis.identity && out == 1;
}

Blocks make_blocks(const Axis& axis) {
  Blocks table;
  const int64_t out = static_cast<int64_t>(axis.first.size()), blocks = (out + 7) / 8;
  table.pairs = (axis.taps + 1) / 2;
  table.base.assign(2 * blocks, 0);
  table.shuffle.assign(32 * blocks, 0x80);
  table.high.assign(16 * blocks * table.pairs, 0);
  table.low.assign(16 * blocks * table.pairs, 0);
  for (int64_t half = 0; half < 2 * blocks; ++half) {
    const int64_t begin = 4 * half, end = std::min(begin + 4, out);
    if (begin >= end) continue;
    const int32_t base = *std::min_element(axis.first.begin() + begin, axis.first.begin() + end);
    table.base[half] = base;
    for (int64_t x = begin; x < end; ++x) {
      const int32_t reach = axis.first[x] - base;
      if (reach + 1 > 15) return table;
      uint8_t* shuffle = table.shuffle.data() + 16 * half + 4 * (x - begin);
      shuffle[0] = static_cast<uint8_t>(reach);
      shuffle[2] = static_cast<uint8_t>(reach + 1);
      for (int t = 0; t < axis.taps; ++t) {
        const int32_t weight = axis.weight[x * axis.taps + t];
        const int64_t at = 16 * (half / 2 * table.pairs + t / 2) + 2 * (x - half / 2 * 8) + t % 2;
        table.high[at] = static_cast<int16_t>(weight >> 11);
        table.low[at] = static_cast<int16_t>(weight & 2047);
      }
    }
  }
  table.usable = true;
  return table;
}

struct Image {
  const uint8_t* pixels;
  int64_t height, width, row_stride, out_height, out_width;
  Axis x, y;
  Blocks blocks;
  bool upside_down = false;
};

struct Batch {
  std::vector<Image> images;
  Normalize by;
  int64_t height, width;
  int channels, type;
  bool reverse, channels_last;
  uint8_t* out;

  int64_t element() const { return type == kByte ? 1 : type == kFloat32 ? 4 : 2; }
  int64_t lines() const { return channels_last ? 1 : channels; }
};

void make_normalize(Batch& batch, const std::vector<double>& mean, const std::vector<double>& std) {
  Normalize& by = batch.by;
  by.unit = !batch.reverse;
  by.levels.assign(4 * 256, 0.0f);
  bool plain = !by.unit, corrected = true;
  const float unit = by.unit ? 255.0f : 1.0f, inverse_unit = 1.0f / unit;
  for (int c = 0; c < 3; ++c) {
    by.mean[c] = static_cast<float>(mean[c]);
    by.std[c] = static_cast<float>(std[c]);
    plain = plain && by.std[c] == 1.0f;
    const float inverse = 1.0f / by.std[c];
    for (int level = 0; level < 256; ++level) {
      const float grey = static_cast<float>(level);
      const float exact = (grey / unit - by.mean[c]) / by.std[c];
      by.levels[256 * c + level] = exact;
      float value = grey * inverse_unit;
      value = std::fma(std::fma(-value, unit, grey), inverse_unit, value) - by.mean[c];
      const float quotient = value * inverse;
      value = std::fma(std::fma(-quotient, by.std[c], value), inverse, quotient);
      corrected = corrected && std::memcmp(&value, &exact, sizeof(float)) == 0;
    }
  }
  by.arithmetic = plain ? kSubtract : corrected ? kCorrected : kDivide;
  if (!batch.channels_last || batch.type == kByte) return;
  int64_t widest = 0;
  for (const Image& image : batch.images) widest = std::max(widest, image.out_width);
  const int64_t size = widest * batch.channels + 8;
  by.mean_line.resize(size);
  by.std_line.resize(size);
  by.inverse_line.resize(size);
  for (int64_t i = 0; i < size; ++i) {
    by.mean_line[i] = by.mean[i % batch.channels];
    by.std_line[i] = by.std[i % batch.channels];
    by.inverse_line[i] = 1.0f / by.std_line[i];
  }
}

#ifdef FASTRCNN_AVX2_ROWS
template <int kType, int kArithmetic, bool kLine>
void finish_taps(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count, const Normalize& by,
                 int channel, uint8_t* out) {
  if (taps == 1) return finish_avx2<kType, kArithmetic, kLine, 1>(lines, weight, taps, count, by, channel, out);
  if (taps == 2) return finish_avx2<kType, kArithmetic, kLine, 2>(lines, weight, taps, count, by, channel, out);
  finish_avx2<kType, kArithmetic, kLine, 0>(lines, weight, taps, count, by, channel, out);
}

template <int kType, bool kLine>
void finish_arithmetic(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count,
                       const Normalize& by, int channel, uint8_t* out) {
  const auto run = by.arithmetic == kSubtract    ? &finish_taps<kType, kSubtract, kLine>
                   : by.arithmetic == kCorrected ? &finish_taps<kType, kCorrected, kLine>
                                                 : &finish_taps<kType, kDivide, kLine>;
  run(lines, weight, taps, count, by, channel, out);
}

template <bool kLine>
void finish_fast(int type, const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count,
                 const Normalize& by, int channel, uint8_t* out) {
  const auto run = type == kFloat32   ? &finish_arithmetic<kFloat32, kLine>
                   : type == kFloat16 ? &finish_arithmetic<kFloat16, kLine>
                                      : &finish_arithmetic<kBFloat16, kLine>;
  run(lines, weight, taps, count, by, channel, out);
}

void finish_bytes(const uint8_t* const* lines, const int32_t* weight, int taps, int64_t count, uint8_t* out) {
  if (taps == 1) return finish_bytes_avx2<1>(lines, weight, taps, count, out);
  if (taps == 2) return finish_bytes_avx2<2>(lines, weight, taps, count, out);
  finish_bytes_avx2<0>(lines, weight, taps, count, out);
}
#endif

// Memory of one thread.
struct Workspace {
  std::vector<uint8_t> planes, filtered, ring, levels;
  std::vector<int32_t> sums;
  std::vector<const uint8_t*> taps;
};

uint8_t* reserve(std::vector<uint8_t>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

class Stripe {
 public:
  Stripe(const Batch& batch, const Image& image, Workspace& work, bool fast)
      : batch_(batch), image_(image), work_(work), fast_(fast) {
    in_pitch_ = image.width + kSlack + 2 * image.blocks.pairs;
    plane_pitch_ = image.out_width + kSlack;
    line_ = batch.channels_last ? image.out_width * batch.channels : image.out_width;
    line_pitch_ = line_ + kSlack;
    slot_ = line_pitch_ * (batch.channels_last ? 1 : 3);
    reserve(work.planes, 3 * in_pitch_);
    reserve(work.filtered, 3 * plane_pitch_);
    reserve(work.ring, slot_ * image.y.taps);
    reserve(work.levels, line_);
    if (!fast) work.sums.resize(std::max<int64_t>(static_cast<int64_t>(work.sums.size()), line_));
    work.taps.resize(image.y.taps);
  }

  // One input row, filtered along x and in the order of the output's channels, into `to`.
  void filter(int64_t row, uint8_t* to) {
    const uint8_t* pixels = image_.pixels + row * image_.row_stride;
    uint8_t* planes[3];
    uint8_t* lines[3];
    for (int c = 0; c < 3; ++c) {
      lines[c] = batch_.channels_last ? work_.filtered.data() + c * plane_pitch_ : to + c * line_pitch_;
      planes[c] = image_.x.identity ? lines[c] : work_.planes.data() + c * in_pitch_;
    }
#ifdef FASTRCNN_AVX2_ROWS
    if (fast_) {
      split_avx2(pixels, image_.width, batch_.reverse, planes);
      if (!image_.x.identity) {
        if (image_.blocks.usable) {
          filter_row_avx2(image_.blocks, image_.out_width, planes, lines);
        } else {
          for (int c = 0; c < 3; ++c) filter_row(image_.x, image_.out_width, planes[c], lines[c]);
        }
      }
      if (batch_.channels_last) join_avx2(lines, image_.out_width, batch_.channels, to);
      return;
    }
#endif
    split(pixels, image_.width, batch_.reverse, planes);
    if (!image_.x.identity)
      for (int c = 0; c < 3; ++c) filter_row(image_.x, image_.out_width, planes[c], lines[c]);
    if (batch_.channels_last) join(lines, image_.out_width, batch_.channels, to);
  }

  // Output rows `begin` to `end` of the image, `row(y, channel)` being where each goes.
  template <typename Row>
  void run(int64_t begin, int64_t end, const Row& row) {
    const int taps = image_.y.taps;
    int64_t known = begin < end ? image_.y.first[begin] : 0;
    for (int64_t y = begin; y < end; ++y) {
      const int64_t first = image_.y.first[y], last = std::min<int64_t>(first + taps, image_.height);
      for (known = std::max(known, first); known < last; ++known)
        filter(known, work_.ring.data() + known % taps * slot_);
      const int32_t* weight = image_.y.weight.data() + y * taps;
      for (int64_t line = 0; line < batch_.lines(); ++line) {
        uint8_t* to = row(y, line);
        const int64_t stored = line_ * batch_.element();
        if (line == 3) {  // a padding channel of its own plane
          std::memset(to, 0, stored);
        } else {
          // Taps beyond the image have weight 0; they read a line that is there.
          for (int t = 0; t < taps; ++t)
            work_.taps[t] = work_.ring.data() + std::min(first + t, image_.height - 1) % taps * slot_ + line * line_pitch_;
          finish(weight, taps, static_cast<int>(line), to);
        }
        if (batch_.type != kByte) {
          const int64_t full = batch_.width * (batch_.channels_last ? batch_.channels : 1) * batch_.element();
          std::memset(to + stored, 0, full - stored);
        }
      }
    }
  }

 private:
  void finish(const int32_t* weight, int taps, int channel, uint8_t* to) {
#ifdef FASTRCNN_AVX2_ROWS
    if (fast_) {
      if (batch_.type == kByte) return finish_bytes(work_.taps.data(), weight, taps, line_, to);
      const auto run = batch_.channels_last ? &finish_fast<true> : &finish_fast<false>;
      return run(batch_.type, work_.taps.data(), weight, taps, line_, batch_.by, channel, to);
    }
#endif
    uint8_t* levels = batch_.type == kByte ? to : work_.levels.data();
    blend(work_.taps.data(), weight, taps, line_, work_.sums.data(), levels);
    if (batch_.type == kByte) return;
    const float* table = batch_.by.levels.data() + (batch_.channels_last ? 0 : 256 * channel);
    look_up(levels, line_, table, batch_.channels_last ? batch_.channels : 1, batch_.type, to);
  }

  const Batch& batch_;
  const Image& image_;
  Workspace& work_;
  bool fast_;
  int64_t in_pitch_, plane_pitch_, line_, line_pitch_, slot_;
};

void run_batch(Batch& batch, bool portable, int num_threads) {
#ifdef FASTRCNN_AVX2_ROWS
  const bool fast = !portable && has_avx2();
#else
  const bool fast = false;
  (void)portable;
#endif
  const int64_t count = static_cast<int64_t>(batch.images.size());
  const int64_t row_bytes = batch.width * (batch.channels_last ? batch.channels : 1) * batch.element();
  const int64_t image_bytes = row_bytes * batch.height * batch.lines();
  if (batch.type != kByte)
    advise_large_pages(reinterpret_cast<std::uintptr_t>(batch.out), image_bytes * count);
  const int64_t stripes = (batch.height + kRows - 1) / kRows;
  const int64_t useful = std::max<int64_t>(1, count * batch.height * batch.width / kPixelsPerThread);
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, useful));
#pragma omp parallel num_threads(threads)
  {
    Workspace work;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < count * stripes; ++task) {
      const Image& image = batch.images[task / stripes];
      uint8_t* out = batch.out + task / stripes * image_bytes;
      const int64_t begin = task % stripes * kRows, end = std::min(begin + kRows, batch.height);
      const auto row = [&](int64_t y, int64_t line) {
        if (image.upside_down && y < image.out_height) y = image.out_height - 1 - y;
        return out + (line * batch.height + y) * row_bytes;
      };
      const int64_t drawn = std::clamp(image.out_height, begin, end);
      Stripe(batch, image, work, fast).run(begin, drawn, row);
      for (int64_t line = 0; line < batch.lines(); ++line)
        if (drawn < end) std::memset(row(drawn, line), 0, row_bytes * (end - drawn));
    }
  }
}

using Description = kernels::ImageDescription;

std::vector<Image> describe(const std::vector<Description>& rows) {
  std::vector<Image> images;
  for (const Description& d : rows) {
    Image image{as_pointer<const uint8_t>(static_cast<std::uintptr_t>(d[0])), d[1], d[2], d[3], d[4], d[5],
                make_axis(d[2], d[5]), make_axis(d[1], d[4]), {}};
    if (d[6] & 1) mirror(image.x);
    image.upside_down = (d[6] & 2) != 0;
    image.blocks = make_blocks(image.x);
    images.push_back(std::move(image));
  }
  return images;
}

}  // namespace
}  // namespace preprocess

void kernels::preprocess_images(const std::vector<ImageDescription>& images, const std::vector<double>& mean,
                                const std::vector<double>& std, bool to_bgr255, int64_t height, int64_t width,
                                int channels, int type, bool channels_last, std::uintptr_t out, bool portable,
                                int num_threads) {
  using namespace preprocess;
  Batch batch{describe(images), {}, height, width, channels, type, to_bgr255, channels_last, as_pointer<uint8_t>(out)};
  make_normalize(batch, mean, std);
  run_batch(batch, portable, num_threads);
}

void kernels::resize_image(const ImageDescription& image, std::uintptr_t out, bool portable, int num_threads) {
  using namespace preprocess;
  Batch batch{describe({image}), {}, image[4], image[5], 3, kByte, false, true, as_pointer<uint8_t>(out)};
  run_batch(batch, portable, num_threads);
}
