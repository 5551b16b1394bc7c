// Compiles FASTRCNN_KERNELS, a header without include guard, once for each instruction set, so that one build runs
// everywhere: each time with FASTRCNN_ISA (a namespace), FASTRCNN_TARGET (an attribute) and FASTRCNN_VECTOR_BYTES
// defined. FASTRCNN_BEST(f) is then `f` of the best set that the machine has.
#define FASTRCNN_ISA baseline
#define FASTRCNN_TARGET
#define FASTRCNN_VECTOR_BYTES 16
#include FASTRCNN_KERNELS
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTRCNN_ISA avx2
#define FASTRCNN_TARGET __attribute__((target("avx2,bmi,bmi2,lzcnt")))
#define FASTRCNN_VECTOR_BYTES 32
#include FASTRCNN_KERNELS
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES
#define FASTRCNN_ISA avx512
#define FASTRCNN_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,bmi,bmi2,lzcnt")))
#define FASTRCNN_VECTOR_BYTES 64
#include FASTRCNN_KERNELS
#undef FASTRCNN_ISA
#undef FASTRCNN_TARGET
#undef FASTRCNN_VECTOR_BYTES

namespace {
inline int best_isa() {
  static const int found = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
               ? 2
               : 1;
  }();
  return found;
}
}  // namespace
#define FASTRCNN_BEST(...) \
  (best_isa() == 2 ? &avx512::__VA_ARGS__ : best_isa() == 1 ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__)
#else
#define FASTRCNN_BEST(...) (&baseline::__VA_ARGS__)
#endif
