// The CUDA form of relu_dropout: checks and outputs on the stable ABI; the kernels are in relu_dropout.cu.
#include "relu_dropout.h"

#include "cuda_device.h"
#include "rows_checks.h"

namespace mlhead {
namespace {

ReluOperand operand_of(const Strided& x) {
  return {x.data, x.b, x.n, x.e};
}

ReluCall call_of(const ReluDropout& a, const Tensor& result, double dropout_p) {
  ReluCall p{};
  p.dtype = a.dtype;
  p.B = a.B, p.N = a.N, p.F = a.F;
  p.dropout_p = dropout_p;
  p.result = result.mutable_data_ptr();
  return p;
}

Tensor relu_dropout_cuda(const Tensor& x, const std::optional<Tensor>& seed, double dropout_p) {
  const ReluDropout a("relu_dropout", x);
  const int64_t* const seed_at = checked_seed(a.where, seed, dropout_p, "x", x);
  const Device device(x);
  const Tensor out = empty_like_h(x, {a.B, a.N, a.F});
  ReluCall p = call_of(a, out, dropout_p);
  p.x = operand_of(a.x);
  p.seed = seed_at;
  check_launch(a.where, launch_relu_dropout(p, device.stream()));
  return out;
}

Tensor relu_dropout_backward_cuda(const Tensor& dout, const Tensor& out, double dropout_p) {
  const ReluDropout a("relu_dropout_backward", out);
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) fail(a.where, "dropout_p", "in [0, 1)", std::to_string(dropout_p));
  const Strided upstream = a.checked_dout(dout, out);
  const Device device(out);
  const Tensor dx = empty_like_h(out, {a.B, a.N, a.F});
  ReluCall p = call_of(a, dx, dropout_p);
  p.dout = operand_of(upstream), p.out = operand_of(a.x);
  check_launch(a.where, launch_relu_dropout_backward(p, device.stream()));
  return dx;
}

}  // namespace
}  // namespace mlhead

// The schemas are in rows_cpu.cpp.
STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CUDA, m) {
  m.impl("relu_dropout", TORCH_BOX(&mlhead::relu_dropout_cuda));
  m.impl("relu_dropout_backward", TORCH_BOX(&mlhead::relu_dropout_backward_cuda));
}
