// The inner loops of RoIAlign for one instruction set. Included by roi_align_isa.h once for each, with FASTRCNN_ISA (a
// namespace), FASTRCNN_TARGET (an attribute) and FASTRCNN_VECTOR_BYTES defined: hence no include guard. Left to itself
// the compiler unrolls these short loops and vectorises nothing, and it lowers explicit vectors before it makes
// target_clones; a vector wider than the machine's it keeps in memory, hence Wide.
#include "roi_align.h"

#define FASTRCNN_INLINE FASTRCNN_TARGET inline __attribute__((always_inline))

namespace roi_align {
namespace {
namespace FASTRCNN_ISA {

template <int N>
FASTRCNN_INLINE void load(const float* p, Vector<float, N>& v) {
  std::memcpy(&v, p, sizeof(v));
}
template <int N>
FASTRCNN_INLINE void load(const double* p, Vector<double, N>& v) {
  std::memcpy(&v, p, sizeof(v));
}
template <int N>
FASTRCNN_INLINE void store(float* p, const Vector<float, N>& v) {
  std::memcpy(p, &v, sizeof(v));
}
template <int N>
FASTRCNN_INLINE void store(double* p, const Vector<double, N>& v) {
  std::memcpy(p, &v, sizeof(v));
}
template <int N>
FASTRCNN_INLINE void load_bits(const void* p, Bits32<N>& bits) {
  Vector<uint16_t, N> narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  bits = __builtin_convertvector(narrow, Bits32<N>);
}
template <int N>
FASTRCNN_INLINE void store_bits(void* p, const Bits32<N>& bits) {
  const Vector<uint16_t, N> narrow = __builtin_convertvector(bits, Vector<uint16_t, N>);
  std::memcpy(p, &narrow, sizeof(narrow));
}
template <int N>
FASTRCNN_INLINE void load(const BFloat* p, Vector<float, N>& v) {
  Bits32<N> bits;
  load_bits<N>(p, bits);
  v = (Vector<float, N>)(bits << 16);
}
template <int N>
FASTRCNN_INLINE void store(BFloat* p, const Vector<float, N>& v) {
  const Bits32<N> bits = (Bits32<N>)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_bits<N>(p, (bits & 0x7fffffff) > 0x7f800000 ? rounded * 0 + 0x7fc0 : rounded);
}
template <int N>
FASTRCNN_INLINE void load(const Half* p, Vector<float, N>& v) {
  Bits32<N> bits;
  load_bits<N>(p, bits);
  const Bits32<N> magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const Bits32<N> finite = (Bits32<N>)((Vector<float, N>)magnitude * 0x1p112f);
  v = (Vector<float, N>)(sign | ((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite));
}
template <int N>
FASTRCNN_INLINE void store(Half* p, const Vector<float, N>& v) {
  // Round to nearest even by adding, in float, a power of two whose last mantissa bit is the last bit of the half.
  const Bits32<N> bits = (Bits32<N>)v, twice = bits + bits;
  const Vector<float, N> magnitude = (Vector<float, N>)(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f;
  Bits32<N> bias = twice & 0xff000000;
  bias = bias < 0x71000000 ? bias * 0 + 0x71000000 : bias;
  const Bits32<N> sum = (Bits32<N>)((Vector<float, N>)((bias >> 1) + 0x07800000) + magnitude);
  const Bits32<N> rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  store_bits<N>(p, ((bits & 0x80000000) >> 16) | (twice > 0xff000000 ? rounded * 0 + 0x7e00 : rounded));
}

// N numbers in as many machine vectors as they take.
template <typename T, int N>
struct Wide {
  static constexpr int kMachine = FASTRCNN_VECTOR_BYTES / static_cast<int>(sizeof(T));
  static constexpr int kPart = N < kMachine ? N : kMachine;
  static constexpr int kParts = N / kPart;
  Vector<T, kPart> part[kParts];

  FASTRCNN_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) part[i] = Vector<T, kPart>{};
  }
  template <typename S>
  FASTRCNN_INLINE void read(const S* p) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) load<kPart>(p + i * kPart, part[i]);
  }
  template <typename S>
  FASTRCNN_INLINE void write(S* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) store<kPart>(p + i * kPart, part[i]);
  }
  FASTRCNN_INLINE void add(T weight, const Wide& v) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) part[i] += weight * v.part[i];
  }
  template <typename S>
  FASTRCNN_INLINE void add(T weight, const S* p) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      Vector<T, kPart> v;
      load<kPart>(p + i * kPart, v);
      part[i] += weight * v;
    }
  }
};

// Convert count elements; from and to may be float, Half or BFloat.
template <typename From, typename To>
FASTRCNN_TARGET void convert_all(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Wide<float, kLanes> v;
    v.read(from + i);
    v.write(to + i);
  }
  for (; i < count; ++i) {
    Wide<float, 1> v;
    v.read(from + i);
    v.write(to + i);
  }
}

// out[PH, PW] of one region and one channel. rows: [PH rounded up to kBinRows, kLanes + slots + kLanes] of scratch.
template <typename T, int kBins>
FASTRCNN_INLINE void pool_plane(
    const Region<T>& r, const T* plane, int width, int bins_y, int bins_x, T* rows, T* out) {
  const int slots = r.x.slots(), stride = round_up(slots, kLanes) + 2 * kLanes;
  const int first = r.x.pixel.front(), columns = round_up(bins_x, kBins);
  const int *begin = r.y.bin_begin.data(), *slot = r.y.bin_slot.data(), *pixel_y = r.y.pixel.data();
  const T* weight = r.y.bin_weight.data();
  for (int bin = 0; bin < bins_y; ++bin) {
    T* row = rows + bin * stride + kLanes;
    if (r.chunked) {
      for (const int chunk : r.chunk) {
        Wide<T, kLanes> sum;
        sum.clear();
        for (int tap = begin[bin]; tap < begin[bin + 1]; ++tap)
          sum.add(weight[tap], plane + static_cast<int64_t>(pixel_y[slot[tap]]) * width + chunk);
        sum.write(row + (chunk - first));
      }
    } else {
      const int* pixel_x = r.x.pixel.data();
      for (int s = 0; s < slots; ++s) row[s] = 0;
      for (int tap = begin[bin]; tap < begin[bin + 1]; ++tap) {
        const T* source = plane + static_cast<int64_t>(pixel_y[slot[tap]]) * width;
        for (int s = 0; s < slots; ++s) row[s] += weight[tap] * source[pixel_x[s]];
      }
    }
  }
  for (int bin = 0; bin < bins_y; bin += kBinRows) {
    const T* row = rows + bin * stride + kLanes;
    for (int column = 0; column < bins_x; column += kBins) {
      Wide<T, kBins> sum[kBinRows], dense;
      T sums[kBinRows * kBins];
#pragma GCC unroll 8
      for (int b = 0; b < kBinRows; ++b) sum[b].clear();
      for (int s = 0; s < slots; ++s) {
        dense.read(r.dense.data() + s * columns + column);
#pragma GCC unroll 8
        for (int b = 0; b < kBinRows; ++b) sum[b].add(row[b * stride + s], dense);
      }
#pragma GCC unroll 8
      for (int b = 0; b < kBinRows; ++b) sum[b].write(sums + b * kBins);
      const int have_y = std::min(kBinRows, bins_y - bin), have_x = std::min(kBins, bins_x - column);
      for (int b = 0; b < have_y; ++b)
        for (int l = 0; l < have_x; ++l) out[(bin + b) * bins_x + column + l] = sums[b * kBins + l];
    }
  }
}

template <typename T>
FASTRCNN_TARGET void pool_planes(
    const Region<T>& r, const T* planes, int64_t plane_size, int count, int width, int bins_y, int bins_x, T* rows,
    T* out) {
  for (int c = 0; c < count; ++c) {
    if (bins_x <= 8) {
      pool_plane<T, 8>(r, planes + c * plane_size, width, bins_y, bins_x, rows, out + c * bins_y * bins_x);
    } else {
      pool_plane<T, kLanes>(r, planes + c * plane_size, width, bins_y, bins_x, rows, out + c * bins_y * bins_x);
    }
  }
}

// kWidth channels from c on, of every bin of one region; image and out are NHWC.
template <typename S, int kWidth>
FASTRCNN_INLINE void pool_block(
    const Region<typename ComputeOf<S>::type>& r, const S* image, int width, int64_t channels, int64_t c, int bins_y,
    int bins_x, S* out) {
  using T = typename ComputeOf<S>::type;
  for (int by = 0; by < bins_y; ++by) {
    for (int bx = 0; bx < bins_x; ++bx) {
      Wide<T, kWidth> sum;
      sum.clear();
      for (int ty = r.y.bin_begin[by]; ty < r.y.bin_begin[by + 1]; ++ty) {
        const S* row = image + static_cast<int64_t>(r.y.pixel[r.y.bin_slot[ty]]) * width * channels + c;
        for (int tx = r.x.bin_begin[bx]; tx < r.x.bin_begin[bx + 1]; ++tx) {
          const S* source = row + r.x.pixel[r.x.bin_slot[tx]] * channels;
          const T w = r.y.bin_weight[ty] * r.x.bin_weight[tx];
          sum.add(w, source);
        }
      }
      S* target = out + (static_cast<int64_t>(by) * bins_x + bx) * channels + c;
      sum.write(target);
    }
  }
}

template <typename S>
FASTRCNN_TARGET void pool_region(
    const Region<typename ComputeOf<S>::type>& r, const S* image, int width, int64_t channels, int bins_y, int bins_x,
    S* out) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64) pool_block<S, 64>(r, image, width, channels, c, bins_y, bins_x, out);
  for (; c + 16 <= channels; c += 16) pool_block<S, 16>(r, image, width, channels, c, bins_y, bins_x, out);
  for (; c < channels; ++c) pool_block<S, 1>(r, image, width, channels, c, bins_y, bins_x, out);
}

// Add the gradient of one region and one channel, grad[PH, PW], to a plane.
// spread: [PH rounded up to kBinRows, kLanes] of scratch.
template <typename T>
FASTRCNN_INLINE void spread_plane(
    const Region<T>& r, const T* grad, int width, int bins_y, int bins_x, T* spread, T* plane) {
  const int *begin = r.y.slot_begin.data(), *bin = r.y.slot_bin.data(), *pixel_y = r.y.pixel.data();
  const T* weight = r.y.slot_weight.data();
  const int slots_y = r.y.slots();
  if (r.chunked) {
    const int chunks = static_cast<int>(r.chunk.size());
    for (int c = 0; c < chunks; ++c) {
      const T* dense = r.dense.data() + static_cast<int64_t>(c) * bins_x * kLanes;
      for (int by = 0; by < bins_y; by += kBinRows) {
        Wide<T, kLanes> sum[kBinRows], v;
#pragma GCC unroll 8
        for (int b = 0; b < kBinRows; ++b) sum[b].clear();
        if (by + kBinRows <= bins_y) {
          for (int bx = 0; bx < bins_x; ++bx) {
            v.read(dense + bx * kLanes);
#pragma GCC unroll 8
            for (int b = 0; b < kBinRows; ++b) sum[b].add(grad[(by + b) * bins_x + bx], v);
          }
        } else {
          for (int bx = 0; bx < bins_x; ++bx) {
            v.read(dense + bx * kLanes);
#pragma GCC unroll 8
            for (int b = 0; b < kBinRows - 1; ++b)
              if (by + b < bins_y) sum[b].add(grad[(by + b) * bins_x + bx], v);
          }
        }
#pragma GCC unroll 8
        for (int b = 0; b < kBinRows; ++b) sum[b].write(spread + (by + b) * kLanes);
      }
      for (int s = 0; s < slots_y; ++s) {
        T* target = plane + static_cast<int64_t>(pixel_y[s]) * width + r.chunk[c];
        Wide<T, kLanes> sum;
        sum.read(target);
        for (int tap = begin[s]; tap < begin[s + 1]; ++tap) sum.add(weight[tap], spread + bin[tap] * kLanes);
        sum.write(target);
      }
    }
    return;
  }
  for (int s = 0; s < slots_y; ++s) {
    T* target = plane + static_cast<int64_t>(pixel_y[s]) * width;
    for (int tap = begin[s]; tap < begin[s + 1]; ++tap) {
      const T* row = grad + bin[tap] * bins_x;
      for (int q = 0; q < r.x.slots(); ++q)
        for (int t = r.x.slot_begin[q]; t < r.x.slot_begin[q + 1]; ++t)
          target[r.x.pixel[q]] += weight[tap] * r.x.slot_weight[t] * row[r.x.slot_bin[t]];
    }
  }
}

template <typename T>
FASTRCNN_TARGET void spread_planes(
    const Region<T>& r, const T* grad, int64_t plane_size, int count, int width, int bins_y, int bins_x, T* spread,
    T* planes) {
  for (int c = 0; c < count; ++c)
    spread_plane<T>(r, grad + c * bins_y * bins_x, width, bins_y, bins_x, spread, planes + c * plane_size);
}

// Add kWidth channels from c on of one region to rows [top, bottom) of a map; target starts at row top. NHWC.
template <typename S, int kWidth>
FASTRCNN_INLINE void spread_block(
    const Region<typename ComputeOf<S>::type>& r, const S* grad, int width, int64_t channels, int64_t c, int bins_x,
    int top, int bottom, typename ComputeOf<S>::type* target) {
  using T = typename ComputeOf<S>::type;
  for (int sy = 0; sy < r.y.slots(); ++sy) {
    const int y = r.y.pixel[sy];
    if (y < top || y >= bottom) continue;
    for (int sx = 0; sx < r.x.slots(); ++sx) {
      T* pixel = target + (static_cast<int64_t>(y - top) * width + r.x.pixel[sx]) * channels + c;
      Wide<T, kWidth> sum;
      sum.read(pixel);
      for (int ty = r.y.slot_begin[sy]; ty < r.y.slot_begin[sy + 1]; ++ty) {
        for (int tx = r.x.slot_begin[sx]; tx < r.x.slot_begin[sx + 1]; ++tx) {
          const T w = r.y.slot_weight[ty] * r.x.slot_weight[tx];
          const S* source = grad + (static_cast<int64_t>(r.y.slot_bin[ty]) * bins_x + r.x.slot_bin[tx]) * channels + c;
          sum.add(w, source);
        }
      }
      sum.write(pixel);
    }
  }
}

template <typename S>
FASTRCNN_TARGET void spread_region(
    const Region<typename ComputeOf<S>::type>& r, const S* grad, int width, int64_t channels, int bins_x, int top,
    int bottom, typename ComputeOf<S>::type* target) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64) spread_block<S, 64>(r, grad, width, channels, c, bins_x, top, bottom, target);
  for (; c + 16 <= channels; c += 16) spread_block<S, 16>(r, grad, width, channels, c, bins_x, top, bottom, target);
  for (; c < channels; ++c) spread_block<S, 1>(r, grad, width, channels, c, bins_x, top, bottom, target);
}

}  // namespace FASTRCNN_ISA
}  // namespace
}  // namespace roi_align

#undef FASTRCNN_INLINE
