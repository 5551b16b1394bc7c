// The inner loop of RoIPool for one instruction set. Included by roi_pool.cpp once for each, with FASTRCNN_ISA,
// FASTRCNN_TARGET and FASTRCNN_VECTOR_BYTES defined, for the reasons given in roi_align_kernels.h: no include guard.
namespace roi_pool {
namespace {
namespace FASTRCNN_ISA {

// The highest value of each bin and its pixel (-1: none), [PH * PW, kSide]. tile [H * W, kSide] from row `above` on.
template <typename T>
FASTRCNN_TARGET void pool_region(const T* tile, int64_t above, int64_t width, const Bins& y, const Bins& x, T lowest,
                                 T* best, Index<T>* where) {
  constexpr int kMachine = FASTRCNN_VECTOR_BYTES / static_cast<int>(sizeof(T));
  constexpr int kPart = kMachine < kSide ? kMachine : kSide, kParts = kSide / kPart;
  using Values = roi_align::Vector<T, kPart>;
  using Pixels = roi_align::Vector<Index<T>, kPart>;
  for (size_t by = 0; by < y.first.size(); ++by) {
    for (size_t bx = 0; bx < x.first.size(); ++bx, best += kSide, where += kSide) {
      const bool empty = y.last[by] <= y.first[by] || x.last[bx] <= x.first[bx];
      Values high[kParts];
      Pixels at[kParts];
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) {
        high[i] = Values{} + (empty ? T(0) : lowest);
        at[i] = Pixels{} - 1;
      }
      for (int64_t row = y.first[by]; row < y.last[by]; ++row) {
        const T* source = tile + ((row - above) * width + x.first[bx]) * kSide;
        for (int64_t column = x.first[bx]; column < x.last[bx]; ++column, source += kSide) {
          const Pixels pixel = Pixels{} + static_cast<Index<T>>(row * width + column);
#pragma GCC unroll 8
          for (int i = 0; i < kParts; ++i) {
            Values v;
            std::memcpy(&v, source + i * kPart, sizeof v);
            const Pixels higher = v > high[i];
            high[i] = higher ? v : high[i];
            at[i] = higher ? pixel : at[i];
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) {
        std::memcpy(best + i * kPart, &high[i], sizeof high[i]);
        std::memcpy(where + i * kPart, &at[i], sizeof at[i]);
      }
    }
  }
}

}  // namespace FASTRCNN_ISA
}  // namespace
}  // namespace roi_pool
