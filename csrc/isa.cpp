// Which instruction set runs, and each thread's scratch memory.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "gemm.h"

namespace mlhead {

extern const Kernels baseline_kernels;
#if defined(MLHEAD_X86)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

const Kernels* kernels_by_name(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &baseline_kernels;
#if defined(MLHEAD_X86)
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return &avx2_kernels;
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &avx512_kernels;
#endif
  return nullptr;
}

static const Kernels& choose() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool any = limit == nullptr;
  if (any || std::strcmp(limit, "avx512") == 0)
    if (const Kernels* k = kernels_by_name("avx512")) return *k;
  if (any || std::strncmp(limit, "avx", 3) == 0)
    if (const Kernels* k = kernels_by_name("avx2")) return *k;
  return baseline_kernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

namespace {
struct Block {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Block() { std::free(data); }
};
}  // namespace

void* thread_scratch(int64_t bytes, int which) {
  thread_local Block blocks[2];
  Block& block = blocks[which];
  if (block.bytes < bytes) {
    std::free(block.data);
    block.bytes = 0;
    block.data = std::aligned_alloc(4096, size_t((bytes + 4095) / 4096 * 4096));
    if (block.data == nullptr) throw std::bad_alloc();
    block.bytes = bytes;
  }
  return block.data;
}

}  // namespace mlhead
