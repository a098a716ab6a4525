// For mlhead._C only: the tile shapes of AVX-512 (16 lanes, up to 16 rows) compiled for AVX2, two registers for one, so
// that their logic is tested on processors without AVX-512.
#define MLHEAD_ISA wide
#define MLHEAD_ISA_NAME "wide"
#define MLHEAD_VECTOR_BYTES 64
#include "gemm_kernels.h"

namespace mlhead {
extern const Kernels wide_kernels;
const Kernels wide_kernels = wide::kKernels;
}  // namespace mlhead
