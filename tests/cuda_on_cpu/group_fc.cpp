// csrc/group_fc.cu for the CPU, behind C functions that test_cuda_on_cpu.py calls on numpy's memory.
#include "../../csrc/group_fc.cu"

extern "C" const char* grouped_product(mlhead::GroupedProduct* p, int64_t parts, void* workspace) {
  return mlhead::launch_grouped_product(*p, parts, workspace, nullptr);
}
extern "C" int64_t parts_of(mlhead::GroupedProduct* p, int multiprocessors) {
  return mlhead::parts_of(*p, multiprocessors);
}
extern "C" const char* column_sum(int dtype, const void* x, int64_t rows, int64_t columns, int64_t stride_row,
                                  int64_t stride_column, void* out) {
  return mlhead::launch_column_sum(mlhead::Dtype(dtype), x, rows, columns, stride_row, stride_column, out, nullptr);
}
