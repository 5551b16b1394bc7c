// The inner loops of RoIAlign compiled for several instruction sets, chosen when they are called, so that one build
// runs everywhere.
#pragma once
#include <algorithm>

#include "roi_align.h"

#define FASTRCNN_ISA baseline
#define FASTRCNN_TARGET
#define FASTRCNN_VECTOR_BYTES 16
#include "roi_align_kernels.h"
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTRCNN_ISA avx2
#define FASTRCNN_TARGET __attribute__((target("avx2,fma,bmi2")))
#define FASTRCNN_VECTOR_BYTES 32
#include "roi_align_kernels.h"
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES
#define FASTRCNN_ISA avx512
#define FASTRCNN_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,bmi2")))
#define FASTRCNN_VECTOR_BYTES 64
#include "roi_align_kernels.h"
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES

namespace roi_align {
inline int isa() {
  static const int found = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
               ? 2
               : 1;
  }();
  return found;
}
}  // namespace roi_align
#define FASTRCNN_BEST(...) (isa() == 2 ? &avx512::__VA_ARGS__ : isa() == 1 ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__)
#else
#define FASTRCNN_BEST(...) (&baseline::__VA_ARGS__)
#endif
