// csrc/csra_pool.cu for the CPU, behind C functions that test_cuda_on_cpu_csra.py calls on torch's memory.
#include "../../csrc/csra_pool.cu"

extern "C" const char* csra_pool(mlhead::CsraScores* p) {
  return mlhead::launch_csra_pool(*p, nullptr);
}
extern "C" const char* csra_pool_backward(mlhead::CsraScores* p) {
  return mlhead::launch_csra_pool_backward(*p, nullptr);
}
extern "C" const char* unit_rows_backward(mlhead::UnitRows* p) {
  return mlhead::launch_unit_rows_backward(*p, nullptr);
}
