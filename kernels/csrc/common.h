// What every CPU kernel shares: the raw-buffer convention and the function multi-versioning macro.
//
// A kernel receives addresses as integers (torch.Tensor.data_ptr()), sizes and a thread count. The Python launcher
// beside it has checked dtype, device, shape and contiguity; nothing here allocates a tensor or knows torch. The
// functions called from Python are declared in exports_*.h and bound in module.cpp: no kernel knows pybind11.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

// Compile a function for several instruction sets and choose at load time, so that one build runs everywhere.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FASTRCNN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTRCNN_CLONES
#endif

template <typename T>
inline T* as_pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Ask for large pages in a large buffer about to be written for the first time: small ones cost a fault each.
inline void advise_large_pages(std::uintptr_t address, int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(as_pointer<void>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure changes nothing
#else
  (void)address;
  (void)bytes;
#endif
}
