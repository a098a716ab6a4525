#define MLHEAD_ISA avx2
#define MLHEAD_ISA_NAME "avx2"
#define MLHEAD_VECTOR_BYTES 32
#include "gemm_kernels.h"

namespace mlhead {
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = avx2::kKernels;
}  // namespace mlhead
