// Huge pages for large outputs on the CPU. Where an allocator takes fresh memory for them (glibc does above 32 MiB, and
// below when it has given the top of its heap back), 4 KiB page faults cost more than the arithmetic (45 ms for 79 MB,
// measured; 5 of 13 ms for 31 MB): ask for huge pages, where the system offers them on request.
#pragma once

#include <cstdint>

#include "group_fc_checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlhead {

inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  if (bytes <= (int64_t(8) << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is fine
#endif
}

// A contiguous output of that shape, of the dtype and the device of `like`: the CPU.
inline Tensor output_like(const Tensor& like, const Shape& shape) {
  const Tensor out = empty_like_h(like, shape);
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * int64_t(out.element_size()));
  return out;
}

}  // namespace mlhead
