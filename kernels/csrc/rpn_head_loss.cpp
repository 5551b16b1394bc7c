// Neighbourhoods of a pyramid's features at the sampled positions, gathered and added back, on the CPU; the rules are in
// fastrcnn_kernels/rpn_head_loss.py.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif
#include <algorithm>

#include "exports_losses.h"
#include "roi_align_isa.h"
#include "rpn_loss.h"

namespace rpn {
namespace {

using roi_align::ComputeOf;
using roi_align::BFloat;
using roi_align::Half;

struct Map {
  std::uintptr_t address;
  int64_t height, width;
  std::array<int64_t, 4> strides;

  // Of channel 0; false beyond the border.
  bool offset(int64_t n, const Place& at, int tap, int64_t& out) const {
    const int64_t y = at.y + tap / 3 - 1, x = at.x + tap % 3 - 1;
    if (y < 0 || y >= height || x < 0 || x >= width) return false;
    out = n * strides[0] + y * strides[2] + x * strides[3];
    return true;
  }
};

std::vector<Map> maps_of(const std::vector<kernels::FeatureMap>& described) {
  std::vector<Map> maps;
  for (const auto& [address, height, width, strides] : described) maps.push_back({address, height, width, strides});
  return maps;
}

// E is an unsigned integer of the element's size: nothing is computed here.
template <typename E>
void gather(const std::vector<Map>& maps, int64_t images, int64_t slots, int64_t channels, const int64_t* indices,
            int64_t num_anchors, bool channels_last, E* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < images * slots; ++row) {
    E* to = out + row * 9 * channels;
    Place at;
    if (!locate(maps, num_anchors, indices[row], at)) {
      std::fill(to, to + 9 * channels, E(0));
      continue;
    }
    const Map& map = maps[at.level];
    const E* from = as_pointer<const E>(map.address);
    const int64_t to_channel = channels_last ? 1 : 9, stride = map.strides[1];
    for (int tap = 0; tap < 9; ++tap) {
      E* spot = to + (channels_last ? tap * channels : tap);
      int64_t offset;
      if (!map.offset(row / slots, at, tap, offset)) {
        for (int64_t c = 0; c < channels; ++c) spot[c * to_channel] = 0;
      } else if (channels_last && stride == 1) {
        std::memcpy(spot, from + offset, sizeof(E) * channels);
      } else {
        for (int64_t c = 0; c < channels; ++c) spot[c * to_channel] = from[offset + c * stride];
      }
    }
  }
}

struct Entry {
  uint64_t pixel;  // numbered over levels and images
  uint32_t row;
  int32_t tap, level;
  int64_t offset;
};

template <typename S>
void scatter(const std::vector<Map>& maps, int64_t images, int64_t slots, int64_t channels, const int64_t* indices,
             int64_t num_anchors, bool channels_last, const S* rows, int threads) {
  using T = typename ComputeOf<S>::type;
  for (const Map& map : maps) {
    const int64_t bytes = images * channels * map.height * map.width * static_cast<int64_t>(sizeof(S));
    advise_large_pages(map.address, bytes);
    fill_zero(map.address, bytes, threads);
  }
  std::vector<Entry> entries;
  entries.reserve(images * slots * 9);
  for (int64_t row = 0; row < images * slots; ++row) {
    Place at;
    if (!locate(maps, num_anchors, indices[row], at)) continue;
    for (int tap = 0; tap < 9; ++tap) {
      int64_t offset;
      if (!maps[at.level].offset(row / slots, at, tap, offset)) continue;
      // Levels apart by more pixels than there are in any.
      const uint64_t pixel = (static_cast<uint64_t>(at.level) << 48) + static_cast<uint64_t>(offset);
      entries.push_back({pixel, static_cast<uint32_t>(row), tap, static_cast<int32_t>(at.level), offset});
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.pixel != b.pixel ? a.pixel < b.pixel : a.row < b.row;
  });
  std::vector<int64_t> begin;
  for (size_t i = 0; i < entries.size(); ++i)
    if (i == 0 || entries[i].pixel != entries[i - 1].pixel) begin.push_back(static_cast<int64_t>(i));
  const int64_t pixels = static_cast<int64_t>(begin.size());
  begin.push_back(static_cast<int64_t>(entries.size()));
  const int64_t from_channel = channels_last ? 1 : 9;
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> sum(channels), row(channels);
    std::vector<S> packed(channels);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pixels; ++i) {
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t e = begin[i]; e < begin[i + 1]; ++e) {
        const S* from = rows + entries[e].row * 9 * channels +
                        (channels_last ? entries[e].tap * channels : static_cast<int64_t>(entries[e].tap));
        if constexpr (std::is_same<S, T>::value) {
          for (int64_t c = 0; c < channels; ++c) sum[c] += from[c * from_channel];
        } else {
          using namespace roi_align;
          for (int64_t c = 0; c < channels; ++c) packed[c] = from[c * from_channel];
          FASTRCNN_BEST(convert_all<S, T>)(packed.data(), row.data(), channels);
          for (int64_t c = 0; c < channels; ++c) sum[c] += row[c];
        }
      }
      const Entry& first = entries[begin[i]];
      const Map& map = maps[first.level];
      S* to = as_pointer<S>(map.address) + first.offset;
      if constexpr (std::is_same<S, T>::value) {
        for (int64_t c = 0; c < channels; ++c) to[c * map.strides[1]] = sum[c];
      } else {
        using namespace roi_align;
        FASTRCNN_BEST(convert_all<T, S>)(sum.data(), packed.data(), channels);
        for (int64_t c = 0; c < channels; ++c) to[c * map.strides[1]] = packed[c];
      }
    }
  }
}

}  // namespace
}  // namespace rpn

void kernels::rpn_patches(const std::vector<FeatureMap>& described, int64_t element_size, int64_t images, int64_t slots,
                          int64_t channels, std::uintptr_t indices, int64_t num_anchors, bool channels_last,
                          std::uintptr_t out, int threads) {
  using namespace rpn;
  const auto maps = maps_of(described);
  const auto* index = as_pointer<const int64_t>(indices);
  const auto run = [&](auto element) {
    using E = decltype(element);
    gather<E>(maps, images, slots, channels, index, num_anchors, channels_last, as_pointer<E>(out), threads);
  };
  element_size == 8 ? run(uint64_t{}) : element_size == 4 ? run(uint32_t{}) : run(uint16_t{});
}

void kernels::rpn_output_gradients(std::uintptr_t slopes, std::uintptr_t grad_losses, std::uintptr_t indices,
                                   bool doubles, int64_t rows, int64_t num_anchors, std::uintptr_t out) {
  const auto* index = as_pointer<const int64_t>(indices);
  const auto run = [&](auto element) {
    using T = decltype(element);
    const T *slope = as_pointer<const T>(slopes), *grad = as_pointer<const T>(grad_losses);
    T* row = as_pointer<T>(out);
    std::fill(row, row + rows * 5 * num_anchors, T(0));
    for (int64_t r = 0; r < rows; ++r, slope += 5, row += 5 * num_anchors) {
      if (index[r] < 0) continue;
      const int64_t anchor = index[r] % num_anchors;
      row[anchor] = slope[0] * grad[0];
      for (int64_t i = 0; i < 4; ++i) row[num_anchors + 4 * anchor + i] = slope[1 + i] * grad[1];
    }
  };
  doubles ? run(double{}) : run(float{});
}

void kernels::rpn_scatter_patches(const std::vector<FeatureMap>& described, int dtype, int64_t images, int64_t slots,
                                  int64_t channels, std::uintptr_t indices, int64_t num_anchors, bool channels_last,
                                  std::uintptr_t rows, int threads) {
  using namespace rpn;
  const auto maps = maps_of(described);
  const auto* index = as_pointer<const int64_t>(indices);
  const auto run = [&](auto element) {
    using S = decltype(element);
    scatter<S>(maps, images, slots, channels, index, num_anchors, channels_last, as_pointer<const S>(rows), threads);
  };
  switch (dtype) {
    case roi_align::kFloat64: return run(double{});
    case roi_align::kFloat16: return run(Half{});
    case roi_align::kBFloat16: return run(BFloat{});
    default: return run(float{});
  }
}
