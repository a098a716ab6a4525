// The CUDA form of group_fc: checks, outputs and workspaces on the stable ABI; the kernels are in group_fc.cu.
#include "build_info.h"
#include "cuda_device.h"
#include "group_fc.h"
#include "group_fc_checks.h"

namespace mlhead {
namespace {

void run(const char* where, const GroupedProduct& p, const Device& device, const Tensor& h) {
  const int64_t parts = parts_of(p, device.multiprocessors());
  // The workspace, in bytes as elements of h's size: torch's allocator keeps it until the stream has passed this point.
  const int64_t bytes = workspace_elements(p, parts) * (p.dtype == Dtype::f64 ? 8 : 4);
  const Tensor workspace = empty_like_h(h, {(bytes + element_size(p.dtype) - 1) / element_size(p.dtype)});
  check_launch(where,
               launch_grouped_product(p, parts, bytes ? workspace.mutable_data_ptr() : nullptr, device.stream()));
}

Tensor group_fc_cuda(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, int64_t num_classes) {
  const char* where = "group_fc";
  const GroupFc f(where, h, weight, num_classes);
  if (bias.has_value()) {
    check_like_h(where, "bias", *bias, h);
    check_shape(where, "bias", shape_of(*bias), "(C,)", {f.C});
  }
  const Device device(h);
  const Tensor logits = empty_like_h(h, {f.B, f.C});
  if (f.B == 0 || f.C == 0) return logits;
  GroupedProduct p{};
  p.product = Product::forward;
  p.dtype = f.dtype;
  p.groups = f.groups(), p.M = f.B, p.N = f.J, p.K = f.E, p.J = f.J, p.C = f.C;
  p.a = f.h, p.a_g = f.h_g, p.a_m = f.h_b, p.a_k = f.h_e;
  p.b = f.weight, p.b_g = f.w_g, p.b_k = f.w_e, p.b_n = f.w_j;
  p.c = logits.mutable_data_ptr(), p.c_g = f.J, p.c_m = f.C;
  if (bias.has_value()) p.bias = bias->const_data_ptr(), p.bias_c = bias->strides()[0];
  run(where, p, device, h);
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> group_fc_backward_cuda(const Tensor& dlogits, const Tensor& h, const Tensor& weight,
                                                          int64_t num_classes, bool need_dh, bool need_dweight,
                                                          bool need_dbias) {
  const char* where = "group_fc_backward";
  const GroupFc f(where, h, weight, num_classes);
  check_like_h(where, "dlogits", dlogits, h);
  check_shape(where, "dlogits", shape_of(dlogits), "(B, C)", {f.B, f.C});
  const Device device(h);
  const void* d = dlogits.const_data_ptr();
  const auto ds = dlogits.strides();
  const int64_t d_b = ds[0], d_c = ds[1];
  GroupedProduct p{};
  p.dtype = f.dtype;
  p.groups = f.G, p.J = f.J, p.C = f.C;

  const Tensor dh = empty_like_h(h, need_dh ? Shape{f.B, f.G, f.E} : Shape{0});
  if (need_dh) {
    p.product = Product::dh;
    p.M = f.B, p.N = f.E, p.K = f.J;
    p.a = d, p.a_g = f.J * d_c, p.a_m = d_b, p.a_k = d_c;
    p.b = f.weight, p.b_g = f.w_g, p.b_k = f.w_j, p.b_n = f.w_e;
    p.c = dh.mutable_data_ptr(), p.c_g = f.E, p.c_m = f.G * f.E;
    run(where, p, device, h);
  }
  const Tensor dweight = empty_like_h(h, need_dweight ? Shape{f.G, f.E, f.J} : Shape{0});
  if (need_dweight) {
    p.product = Product::dweight;
    p.M = f.E, p.N = f.J, p.K = f.B;
    p.a = f.h, p.a_g = f.h_g, p.a_m = f.h_e, p.a_k = f.h_b;
    p.b = d, p.b_g = f.J * d_c, p.b_k = d_b, p.b_n = d_c;
    p.c = dweight.mutable_data_ptr(), p.c_g = f.E * f.J, p.c_m = f.J;
    run(where, p, device, h);
  }
  const Tensor dbias = empty_like_h(h, need_dbias ? Shape{f.C} : Shape{0});
  if (need_dbias)
    check_launch(where, launch_column_sum(f.dtype, d, f.B, f.C, d_b, d_c, dbias.mutable_data_ptr(), device.stream()));
  return {dh, dweight, dbias};
}

}  // namespace
}  // namespace mlhead

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CUDA, m) {
  m.impl("group_fc", TORCH_BOX(&mlhead::group_fc_cuda));
  m.impl("group_fc_backward", TORCH_BOX(&mlhead::group_fc_backward_cuda));
}

MLHEAD_EXPORT const char* mlhead_build_info() {
  return MLHEAD_BUILD_INFO;
}
