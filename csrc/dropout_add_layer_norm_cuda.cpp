// The CUDA form of dropout_add_layer_norm: checks, outputs and workspaces on the stable ABI; the kernels are in
// dropout_add_layer_norm.cu.
#include "dropout_add_layer_norm.h"

#include "cuda_device.h"
#include "rows_checks.h"

namespace mlhead {
namespace {

LayerNormOperand operand_of(const Strided& x) {
  return {x.data, x.b, x.n, x.e};
}

LayerNormCall call_of(const AddNorm& a) {
  LayerNormCall p{};
  p.dtype = a.dtype, p.parameters_accumulated = a.wide_weight;
  p.B = a.B, p.N = a.N, p.E = a.E;
  p.x = operand_of(a.x), p.residual = operand_of(a.residual);
  p.weight = a.weight, p.bias = a.bias;
  p.weight_e = a.weight_e, p.bias_e = a.bias_e;
  p.seed = a.seed, p.dropout_p = a.dropout_p, p.eps = a.eps;
  return p;
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                       const Tensor& bias, const std::optional<Tensor>& seed,
                                                       double dropout_p, double eps) {
  const AddNorm a("dropout_add_layer_norm", x, residual, weight, bias, seed, dropout_p, eps);
  const Device device(x);
  const Tensor out = empty_like_h(x, {a.B, a.N, a.E}), statistics = empty_accumulated(x, {2, a.B, a.N});
  LayerNormCall p = call_of(a);
  p.out = out.mutable_data_ptr(), p.statistics = statistics.mutable_data_ptr();
  check_launch(a.where, launch_dropout_add_layer_norm(p, device.stream()));
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward_cuda(
    const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& seed, double dropout_p, double eps, const Tensor& statistics, bool need_dx,
    bool need_dresidual, bool need_dweight, bool need_dbias) {
  const AddNorm a("dropout_add_layer_norm_backward", x, residual, weight, bias, seed, dropout_p, eps);
  LayerNormCall p = call_of(a);
  p.dout = operand_of(a.checked_dout(dout, x));
  p.statistics = const_cast<void*>(a.checked_statistics(statistics, x));  // backward only reads it
  const Device device(x);
  const Shape rows{a.B, a.N, a.E};
  const Tensor dx = empty_like_h(x, need_dx ? rows : Shape{0});
  const Tensor dresidual = empty_like_h(x, need_dresidual ? rows : Shape{0});
  const Tensor dweight = empty_like_h(weight, {need_dweight ? a.E : 0});
  const Tensor dbias = empty_like_h(bias, {need_dbias ? a.E : 0});
  if (need_dx) p.dx = dx.mutable_data_ptr();
  if (need_dresidual) p.dresidual = dresidual.mutable_data_ptr();
  if (need_dweight) p.dweight = dweight.mutable_data_ptr();
  if (need_dbias) p.dbias = dbias.mutable_data_ptr();

  // The workspace goes back to torch's allocator, which keeps it until the stream has passed this point.
  const int64_t elements = layer_norm_workspace_elements(p);
  const Tensor workspace = empty_accumulated(x, {elements});
  check_launch(a.where, launch_dropout_add_layer_norm_backward(p, elements ? workspace.mutable_data_ptr() : nullptr,
                                                               device.stream()));
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace mlhead

// The schemas are in rows_cpu.cpp.
STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CUDA, m) {
  m.impl("dropout_add_layer_norm", TORCH_BOX(&mlhead::dropout_add_layer_norm_cuda));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&mlhead::dropout_add_layer_norm_backward_cuda));
}
