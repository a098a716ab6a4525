#define MLHEAD_ISA baseline
#define MLHEAD_ISA_NAME "baseline"
#define MLHEAD_VECTOR_BYTES 16
#include "gemm_kernels.h"

namespace mlhead {
extern const Kernels baseline_kernels;
const Kernels baseline_kernels = baseline::kKernels;
}  // namespace mlhead
