// Huge pages for large outputs on the CPU. Above 32 MiB glibc maps fresh memory for each one, and 4 KiB page faults
// then cost more than the arithmetic (45 ms for 79 MB, measured): ask for huge pages, where the system offers them on
// request.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlhead {

inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  if (bytes <= (int64_t(32) << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is fine
#endif
}

}  // namespace mlhead
