#define MLHEAD_ISA avx512
#define MLHEAD_ISA_NAME "avx512"
#define MLHEAD_VECTOR_BYTES 64
#include "gemm_kernels.h"

namespace mlhead {
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = avx512::kKernels;
}  // namespace mlhead
