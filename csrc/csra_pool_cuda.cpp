// The CUDA form of csra_pool's private ops: checks on the stable ABI; the kernels are in csra_pool.cu.
#include "csra_pool.h"
#include "csra_pool_checks.h"
#include "cuda_device.h"

namespace mlhead {
namespace {

CsraScores scores_of(const ScoresCall& call, const Tensor& scores, double average) {
  CsraScores p{};
  p.dtype = call.dtype;
  p.B = call.B, p.L = call.L, p.N = call.N;
  p.classes = call.classes, p.first = call.first;
  p.average = average;
  p.temperatures = call.temperatures, p.lam = call.lam;
  p.scores = scores.const_data_ptr();
  p.s_b = call.s_b, p.s_l = call.s_l;
  p.scale = call.scale;
  return p;
}

void csra_pool_scores_cuda(const Tensor& scores, const std::optional<Tensor>& scale, const Tensor& heads,
                           int64_t classes, int64_t first, double average, const Tensor& pooled) {
  const ScoresCall call("csra_pool_scores", scores, scale, heads, classes, first);
  call.check_result("pooled", pooled, scores);
  const Device device(scores);
  CsraScores p = scores_of(call, scores, average);
  p.pooled = pooled.mutable_data_ptr(), p.pooled_b = pooled.strides()[0];
  check_launch(call.where, launch_csra_pool(p, device.stream()));
}

void csra_pool_scores_backward_cuda(const Tensor& scores, const std::optional<Tensor>& scale, const Tensor& heads,
                                    int64_t classes, int64_t first, double average, const Tensor& dlogits,
                                    const Tensor& ds) {
  const ScoresCall call("csra_pool_scores_backward", scores, scale, heads, classes, first);
  call.check_dlogits(dlogits, scores);
  call.check_ds(ds, scores);
  const Device device(scores);
  CsraScores p = scores_of(call, scores, average);
  p.ds = ds.mutable_data_ptr();
  p.dlogits = dlogits.const_data_ptr(), p.d_b = dlogits.strides()[0], p.d_c = dlogits.strides()[1];
  check_launch(call.where, launch_csra_pool_backward(p, device.stream()));
}

void csra_unit_rows_backward_cuda(const Tensor& dw, const Tensor& weight, const Tensor& norm, bool divide) {
  const char* where = "csra_unit_rows_backward";
  const UnitRowsCall call(where, dw, weight, norm);
  const Device device(dw);
  const UnitRows p{call.dtype,
                   call.dw_accumulated,
                   divide,
                   call.N,
                   call.D,
                   dw.mutable_data_ptr(),
                   call.dw_n,
                   weight.const_data_ptr(),
                   call.w_n,
                   call.w_d,
                   norm.const_data_ptr()};
  check_launch(where, launch_unit_rows_backward(p, device.stream()));
}

}  // namespace
}  // namespace mlhead

// The schemas are in csra_pool_cpu.cpp.
STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CUDA, m) {
  m.impl("csra_pool_scores", TORCH_BOX(&mlhead::csra_pool_scores_cuda));
  m.impl("csra_pool_scores_backward", TORCH_BOX(&mlhead::csra_pool_scores_backward_cuda));
  m.impl("csra_unit_rows_backward", TORCH_BOX(&mlhead::csra_unit_rows_backward_cuda));
}
